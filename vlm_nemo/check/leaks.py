"""Leaks: what one sample of a row can learn of another, of its own future, or of its labels. Found by perturbing.

The witnesses are a tiny twin of the recipe's model (for what the model mixes) and the recipe's own samples where there
is data (for what is supervised).
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_nemo.check.labels import Spoken, label_faults
from vlm_nemo.check.made import Subject
from vlm_nemo.check.probe import Probe, probe
from vlm_nemo.check.report import Finding, Table
from vlm_nemo.data.chat import Template
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.runtime.processes import CPU, RankFailed, run_ranks

TIMEOUT = 300.0


def leaks(subject: Subject, spoken: Sequence[Spoken], tokenizer: Tokenizer, template: Template, whose: str) -> Finding:
    """spoken: samples whose labels are looked at, in words and in tokens of `tokenizer`; whose: where they are from."""
    try:
        found: list[Probe] = run_ranks(probe, 1, subject, timeout=TIMEOUT, environment=CPU)[0]
    except RankFailed as error:
        return Finding(part="leaks", ok=False, verdict=str(error).strip().splitlines()[-1], notes=[str(error)])
    faults = label_faults(spoken, tokenizer, template)
    found.append(
        Probe(
            what=f"labels of {len(spoken)} {whose}",
            wanted="the answers, shifted by one; no prompt, no placeholder",
            seen=faults[0] if faults else "so",
            ok=not faults,
        )
    )
    table = Table(
        title="what moves what",
        columns=("change", "must be", "is"),
        rows=[(one.what, one.wanted, one.seen) for one in found],
        bad=frozenset(i for i, one in enumerate(found) if not one.ok),
    )
    broken = [one for one in found if not one.ok]
    if broken:
        verdict = f"{broken[0].what}: must be {broken[0].wanted}, is {broken[0].seen}"
        if len(broken) > 1:
            verdict += f"; and {len(broken) - 1} more"
    else:
        verdict = f"{len(found)} probes: samples and images keep to themselves, labels are the answers"
    return Finding(
        part="leaks",
        ok=not broken,
        verdict=verdict,
        tables=[table],
        notes=faults[1:],
        data={"probes": [{"what": p.what, "wanted": p.wanted, "seen": p.seen, "ok": p.ok} for p in found]},
    )
