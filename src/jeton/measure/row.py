"""What was counted of one method at one budget, and the row of the table that follows from it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from .plan import Case
from .score import wilson

_ENOUGH = 4  # batches, the first of which is not timed
_STEADY = 0.25  # how much the quartiles of the full model's times may differ


@dataclass
class Tally:
    """Filled batch by batch. `sizes` and `seconds` are the questions of every batch and the time to its first token."""

    case: Case
    reason: str | None = None
    said: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    second: list[bool] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    flops: float = 0.0
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)

    def steady(self, seconds: list[float]) -> list[float]:
        """Times without the first batch, which warms up, and a last one that is not full, where enough others remain."""
        full = [each for each, size in zip(seconds, self.sizes, strict=True) if size == self.sizes[0]]
        return full[1:] or full


@dataclass(frozen=True)
class Row:
    """One line of a comparison. Times are seconds per batch to the first token; `flops` is a share of the full model's.

    keep: the budget asked for. kept: visual tokens left per image, and `fraction` of all. low, high: 95% interval of accuracy.
    retained: share of the full model's accuracy. speedup: median over batches of full time / this time. Ends called low and high
    are quartiles over batches. ideal: what the saved FLOPs allow; realised: speedup / ideal. reason: why the method could not be
    applied; then nothing else is known.
    """

    method: str
    spec: str
    keep: int | float | None
    control: bool
    reason: str | None = None
    kept: float | None = None
    fraction: float | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    retained: float | None = None
    flops: float | None = None
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    ideal: float | None = None
    realised: float | None = None
    second_turn: float | None = None

    @classmethod
    def of(cls, tally: Tally, full: Tally) -> Row:
        """The row of a tally, measured against the full model's."""
        case = tally.case
        if tally.reason is not None:
            return cls(case.label, case.spec, case.keep, case.control, tally.reason)
        accuracy, whole = statistics.fmean(tally.right), statistics.fmean(full.right)
        low, high = wilson(sum(tally.right), len(tally.right))
        times = sorted(tally.steady(tally.seconds))
        pairs = zip(full.steady(full.seconds), tally.steady(tally.seconds), strict=True)
        ratios = sorted(a / b for a, b in pairs)
        speedup, ideal = statistics.median(ratios), full.flops / tally.flops
        return cls(
            case.label,
            case.spec,
            case.keep,
            case.control,
            kept=statistics.fmean(tally.after),
            fraction=sum(tally.after) / sum(full.before),
            accuracy=accuracy,
            low=low,
            high=high,
            retained=accuracy / whole if whole else None,
            flops=tally.flops / full.flops,
            seconds=statistics.median(times),
            seconds_low=_quarter(times, 1),
            seconds_high=_quarter(times, 3),
            stages={name: statistics.median(tally.steady(values)) for name, values in tally.stages.items()},
            speedup=speedup,
            speedup_low=_quarter(ratios, 1),
            speedup_high=_quarter(ratios, 3),
            ideal=ideal,
            realised=speedup / ideal,
            second_turn=statistics.fmean(tally.second) if tally.second else None,
        )


def _quarter(ascending: list[float], number: int) -> float:
    """First or third quartile of sorted values."""
    return ascending[min(number * len(ascending) // 4, len(ascending) - 1)]


def caution(full: Row, batches: int) -> str:
    """Why the times of a comparison are rough, in a sentence; nothing if they are not."""
    if batches < _ENOUGH:
        return f"Times are rough: too few batches were timed ({max(1, batches - 1)}); ask more questions, or use smaller batches."
    varied = (full.seconds_high or 0) / (full.seconds_low or 1) - 1
    if varied > _STEADY:
        return f"Times are rough: the full model's own varied by {varied:.0%} between batches; is another program running?"
    return ""
