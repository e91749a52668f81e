"""Result rows -> terminal, Markdown page and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_attn.bench import LENGTH, Timing
from triton_attn.mechanism import Mechanism
from triton_attn.offline import Compiled
from triton_attn.report.calls import Call
from triton_attn.report.candidates import Candidates
from triton_attn.report.caught import Kept
from triton_attn.report.earlier import Earlier
from triton_attn.tuning.ranking import Correlation, of_trials
from triton_attn.tuning.tune import Trial
from triton_attn.verify import Verdict


@dataclass
class Results:
    """All that a report tells."""

    catalog: Mapping[str, Mechanism]
    machine: Mapping[str, Any]
    targets: Sequence[str]
    explained: list[Call] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    compiled: list[Compiled] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out
    faults: list[str] = field(default_factory=list)  # what did not run to its end
    seconds: float = 0.0
    trials: list[Trial] = field(default_factory=list)  # of this device and its user's tuner
    kept: Mapping[str, Kept] = field(default_factory=dict)  # by "mechanism/kernel"
    stale: frozenset[str] = frozenset()  # those of them whose kernel has changed
    candidates: list[Candidates] = field(default_factory=list)  # compiled earlier
    earlier: Earlier = field(default_factory=Earlier)  # timings at full sizes

    @property
    def calls(self) -> list[Call]:
        """Each mechanism's first workload at each place."""
        first: dict[tuple[str, str], Call] = {}
        for call in self.explained:
            first.setdefault((call.mechanism, call.where), call)
        return list(first.values())

    @property
    def lengths(self) -> bool:
        """Whether something was timed at several lengths."""
        return any(row.case.startswith(LENGTH) for row in self.timings)

    @property
    def correlations(self) -> list[Correlation]:
        """How far predicted times of what was tuned here order tiles as measured ones do."""
        return of_trials([trial for trial in self.trials if trial.predicted is not None])

    @property
    def predicted(self) -> list[Candidates]:
        """Those of which some tile may run."""
        return [each for each in self.candidates if not each.ranked[0].fault]

    @property
    def wrong(self) -> list[str]:
        """Everything that is wrong, one line each."""
        wrong = [
            f"{row.mechanism} {row.implementation}, {row.case}, {row.dtype} on {row.where}: {row.fault}"
            for row in self.verdicts
            if row.fault
        ]
        wrong += [
            f"{row.mechanism}/{row.kernel}/{row.launch}, {row.target} {row.key}, tile {row.tile}: {row.fault}"
            for row in self.compiled
            if row.fault
        ]
        return wrong + self.faults

    @property
    def headline(self) -> str:
        """One sentence."""
        if self.wrong:
            return f"{len(self.wrong)} thing{'s are' if len(self.wrong) > 1 else ' is'} wrong."
        if not self.verdicts:
            return "Nothing was checked."
        return f"All right: {len(self.verdicts)} checks within their bounds, {len(self.compiled)} compiled kernels that fit."
