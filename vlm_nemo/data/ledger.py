"""Account for every sample: used, or dropped with source and reason."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from vlm_nemo.data.sample import Drop
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)


class Ledger:
    """Counts over all ranks since step 0. `used + dropped == seen`, always."""

    def __init__(self) -> None:
        self.seen = 0
        self.used = 0
        self.dropped: dict[str, dict[str, int]] = {}
        """{source: {reason: n}}"""
        self.quiet = False
        """Count, but do not log names: for all ranks but one."""
        self._named: set[Drop] = set()

    def add(self, *, seen: int, used: int, drops: Iterable[Drop]) -> None:
        """Book one step, over all ranks; a sample that is dropped for the first time is logged by name.

        Raises RuntimeError if the numbers do not add up: a sample was lost or doubled, which is a bug of the loader.
        """
        drops = list(drops)
        if seen != used + len(drops):
            raise RuntimeError(f"{seen} samples seen, but {used} used and {len(drops)} dropped")
        self.seen += seen
        self.used += used
        for drop in drops:
            reasons = self.dropped.setdefault(drop.source, {})
            reasons[drop.reason] = reasons.get(drop.reason, 0) + 1
            if not self.quiet and drop not in self._named:
                self._named.add(drop)
                log.warning("dropped %s %s: %s", drop.source, drop.key, drop.reason)

    @property
    def total_dropped(self) -> int:
        return sum(n for reasons in self.dropped.values() for n in reasons.values())

    def check(self, max_bad_fraction: float, min_samples: int, key: str = "data.max_bad_fraction") -> None:
        """Raises UserError if more than `max_bad_fraction` of at least `min_samples` seen had to be dropped.

        key: the limit's name in the configuration, for the message.
        """
        bad = self.total_dropped
        if self.seen < min_samples or bad <= max_bad_fraction * self.seen:
            return
        counts = [(n, source, reason) for source, reasons in self.dropped.items() for reason, n in reasons.items()]
        listed = ", ".join(f"{source}: {n} {reason}" for n, source, reason in sorted(counts, reverse=True))
        raise UserError(
            f"{bad} of {self.seen} samples had to be dropped ({listed}), more than "
            f"{key}={max_bad_fraction:g}; mend the data or raise the limit"
        )

    def to_json(self) -> dict[str, Any]:
        """What ledger.json holds."""
        return {
            "seen": self.seen,
            "used": self.used,
            "dropped": {source: dict(sorted(reasons.items())) for source, reasons in sorted(self.dropped.items())},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Ledger:
        """Go on from what `to_json` wrote. Raises UserError if its numbers do not add up."""
        ledger = cls()
        ledger.seen, ledger.used = int(content["seen"]), int(content["used"])
        ledger.dropped = {source: dict(reasons) for source, reasons in content["dropped"].items()}
        if ledger.seen != ledger.used + ledger.total_dropped:
            raise UserError(f"ledger: {ledger.seen} seen is not {ledger.used} used + {ledger.total_dropped} dropped")
        return ledger
