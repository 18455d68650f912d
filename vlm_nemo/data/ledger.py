"""Account for every sample: used, or dropped with source and reason. Budgets by source."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_nemo.data.sample import Drop
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)


STEPS = 20
"""Parts in which the last samples are counted."""


def recent_samples(min_samples: int) -> int:
    """How many of a source's last samples are judged by themselves."""
    return max(1000, 10 * min_samples)


def check_budget(key: str, max_bad_fraction: float, min_samples: int = 0) -> None:
    """Raises UserError for a budget that makes no sense. key: what the two are of, "data"; empty where they have no
    prefix."""
    prefix = f"{key}." if key else ""
    if not 0 <= max_bad_fraction <= 1:  # so written that NaN is refused
        raise UserError(f"{prefix}max_bad_fraction={max_bad_fraction:g} must be a share from 0 to 1")
    if min_samples < 0:
        raise UserError(f"{prefix}min_samples_before_stop={min_samples} must be at least 0")


@dataclass(kw_only=True)
class Account:
    """One source's samples."""

    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """{reason: n}"""
    examples: dict[str, str] = field(default_factory=dict)
    """{reason: the first sample that was dropped for it}"""
    recent: list[list[int]] = field(default_factory=list)
    """[seen, bad] of the last samples, in parts, the oldest first."""

    def remember(self, seen: int, bad: int, window: int) -> None:
        """Count into the last parts; those go that are not needed to have `window` samples."""
        if not self.recent or self.recent[-1][0] * STEPS >= window:
            self.recent.append([0, 0])
        self.recent[-1][0] += seen
        self.recent[-1][1] += bad
        while sum(part[0] for part in self.recent[1:]) >= window:
            del self.recent[0]

    @property
    def bad(self) -> int:
        return sum(self.dropped.values())

    @property
    def seen(self) -> int:
        return self.used + self.bad

    def worst(self) -> str:
        """ "17 broken image (00012.tar/000120034), 2 too long (…)", the commonest first."""
        listed = sorted(self.dropped.items(), key=lambda entry: (-entry[1], entry[0]))
        named = ((n, reason, self.examples.get(reason)) for reason, n in listed)
        return ", ".join(f"{n} {reason}" + (f" ({key})" if key else "") for n, reason, key in named) or "none"


class Ledger:
    """Counts over all ranks since step 0. `used + dropped == seen`, always, and by source."""

    def __init__(self) -> None:
        self.seen = 0
        self.sources: dict[str, Account] = {}
        self.quiet = False
        """Count, but do not log names: for all ranks but one."""
        self.window = recent_samples(0)
        """Samples of a source that are judged by themselves, the last ones."""
        self._named: set[Drop] = set()

    @classmethod
    def of(cls, sources: Mapping[str, tuple[int, Mapping[str, int]]]) -> Ledger:
        """From {source: (used, {reason: n})}."""
        ledger = cls()
        ledger.sources = {name: Account(used=used, dropped=dict(dropped)) for name, (used, dropped) in sources.items()}
        ledger.seen = sum(account.seen for account in ledger.sources.values())
        return ledger

    def add(self, *, seen: int, used: Mapping[str, int], drops: Iterable[Drop]) -> None:
        """Book one step, over all ranks; used: by source. A sample that is dropped for the first time is logged.

        Raises RuntimeError if the numbers do not add up: a sample was lost or doubled, which is a bug of the loader.
        """
        drops = list(drops)
        if seen != sum(used.values()) + len(drops) or any(n < 0 for n in used.values()):
            raise RuntimeError(f"{seen} samples seen, but {sum(used.values())} used and {len(drops)} dropped")
        self.seen += seen
        bad = Counter(drop.source for drop in drops)
        for name in {**used, **bad}:
            if together := used.get(name, 0) + bad[name]:
                self._account(name).remember(together, bad[name], self.window)
        for name, n in used.items():
            self._account(name).used += n
        for drop in drops:
            account = self._account(drop.source)
            account.dropped[drop.reason] = account.dropped.get(drop.reason, 0) + 1
            account.examples.setdefault(drop.reason, drop.key)
            if not self.quiet and drop not in self._named:
                self._named.add(drop)
                log.warning("dropped %s %s: %s", drop.source, drop.key, drop.reason)

    def _account(self, source: str) -> Account:
        return self.sources.setdefault(source, Account())

    @property
    def used(self) -> int:
        return sum(account.used for account in self.sources.values())

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """{source: {reason: n}}"""
        return {name: account.dropped for name, account in self.sources.items() if account.dropped}

    @property
    def total_dropped(self) -> int:
        return sum(account.bad for account in self.sources.values())

    def assert_whole(self, drawn: int | None = None) -> None:
        """Raises RuntimeError unless used + dropped == seen, and seen == drawn: what the order has given out, less what
        still waits for its row."""
        if self.seen != self.used + self.total_dropped or drawn not in (None, self.seen):
            raise RuntimeError(
                f"the ledger has {self.seen} samples seen, {self.used} used and {self.total_dropped} dropped"
                + ("" if drawn is None else f"; the loader gave out {drawn}")
            )

    def check(
        self,
        max_bad_fraction: float,
        min_samples: int,
        key: str = "data.max_bad_fraction",
        own: Mapping[str, float] | None = None,
    ) -> None:
        """Raises UserError if more than `max_bad_fraction` of at least `min_samples` seen had to be dropped: of one
        source, or of all that have no budget of their own together; or if of a source's last `window` samples clearly
        more had to be: more than chance makes of that share, by five standard deviations and five samples. So a store
        that goes bad after a million good samples stops the run within a window, and a source that is always just
        within its budget never does.

        key: the limit's name in the configuration, for the message; own: {source: its own limit}.
        """
        own = own or {}
        shared = Account()
        for name, account in self.sources.items():
            limit = own.get(name, max_bad_fraction)
            limit_key = f"data.sources.{name}.max_bad_fraction" if name in own else key
            if account.seen >= min_samples and account.bad > limit * account.seen:
                raise UserError(
                    f"{account.bad} of {account.seen} samples of source {name} had to be dropped: {account.worst()}; "
                    f"more than {limit_key}={limit:g}, so mend the data or raise the limit"
                )
            self._check_recent(name, account, limit, limit_key)
            if name not in own:
                shared.used += account.used
                shared.dropped |= {f"{name}: {reason}": n for reason, n in account.dropped.items()}
                shared.examples |= {f"{name}: {reason}": example for reason, example in account.examples.items()}
        if shared.seen >= min_samples and shared.bad > max_bad_fraction * shared.seen:
            raise UserError(
                f"{shared.bad} of {shared.seen} samples had to be dropped: {shared.worst()}; "
                f"more than {key}={max_bad_fraction:g}, so mend the data or raise the limit"
            )

    def _check_recent(self, name: str, account: Account, limit: float, key: str) -> None:
        seen, bad = (sum(part[i] for part in account.recent) for i in (0, 1))
        expected = limit * seen
        if seen >= self.window and bad > expected + 5 * (1 + math.sqrt(expected)):
            raise UserError(
                f"{bad} of the last {seen} samples of source {name} had to be dropped; of all {account.seen}: "
                f"{account.worst()}; that is more than {key}={limit:g}, so mend the data or raise the limit"
            )

    def table(self) -> str:
        """Aligned lines for the log: a source a line, then its reasons with an example."""
        lines = [("source", "seen", "used", "dropped", "")]
        for name, account in sorted(self.sources.items()):
            lines.append((name, f"{account.seen:,}", f"{account.used:,}", f"{account.bad:,}", ""))
            for reason, n in sorted(account.dropped.items(), key=lambda entry: (-entry[1], entry[0])):
                lines.append(("", "", "", f"{n:,}", _with_example(account, reason)))
        if len(self.sources) > 1:
            lines.append(("all", f"{self.seen:,}", f"{self.used:,}", f"{self.total_dropped:,}", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join(
            "  ".join((name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:]), said)).rstrip()
            for name, *numbers, said in lines
        )

    def to_json(self) -> dict[str, Any]:
        """What ledger.json holds."""
        self.assert_whole()
        return {
            "seen": self.seen,
            "used": self.used,
            "dropped": {name: dict(sorted(reasons.items())) for name, reasons in sorted(self.dropped.items())},
            "sources": {
                name: {
                    "seen": account.seen,
                    "used": account.used,
                    "examples": dict(sorted(account.examples.items())),
                }
                | ({"recent": account.recent} if account.recent else {})
                for name, account in sorted(self.sources.items())
            },
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Ledger:
        """Go on from what `to_json` wrote. Raises UserError if it has another form or its numbers do not add up."""
        if not isinstance(content.get("sources"), dict):
            raise UserError(
                "the checkpoint's ledger does not count by source: an older version wrote it; go on with that version, "
                "or start a new run from the checkpoint's weights (checkpoint=DIR and another run_dir)"
            )
        sources, dropped = content["sources"], content["dropped"]
        ledger = cls.of({name: (entry["used"], dropped.get(name, {})) for name, entry in sources.items()})
        for name, account in ledger.sources.items():
            account.examples = dict(sources[name]["examples"])
            account.recent = [list(part) for part in sources[name].get("recent", [])]
        told = (int(content["seen"]), int(content["used"]))
        if told != (ledger.seen, ledger.used) or any(sources[n]["seen"] != a.seen for n, a in ledger.sources.items()):
            raise UserError(
                f"ledger: {told[0]} seen and {told[1]} used are not {ledger.used} used + "
                f"{ledger.total_dropped} dropped by source"
            )
        return ledger


def _with_example(account: Account, reason: str) -> str:
    return f"{reason}, as {account.examples[reason]}" if reason in account.examples else reason
