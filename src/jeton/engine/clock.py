"""Times of the stages of a run: no synchronisation while the model runs; CUDA events are read when a report is asked for."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, quartiles (low, high) and the number of calls."""

    median: float
    low: float
    high: float
    count: int


class Clock:
    """Collects (start, end) marks per stage. A stage entered several times within one forward adds up."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: dict[str, list[list[tuple[Mark, Mark]]]] = defaultdict(list)
        self.running: set[str] = set()

    def now(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, stage: str) -> None:
        """A new call of this stage starts: what follows is added up under it."""
        self.marks[stage].append([])

    def add(self, stage: str, start: Mark) -> None:
        if not self.marks[stage]:
            self.begin(stage)
        self.marks[stage][-1].append((start, self.now()))

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time a part of a stage; a part inside another part of the same stage is in that one's time already."""
        if stage in self.running:
            yield
            return
        start = self.now()
        self.running.add(stage)
        try:
            yield
        finally:
            self.running.discard(stage)
        self.add(stage, start)

    def clear(self) -> None:
        self.marks.clear()

    def timings(self) -> dict[str, Timing]:
        """Seconds per call of every stage. Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        out = {}
        for stage, calls in self.marks.items():
            seconds = sorted(sum(_between(*pair) for pair in call) for call in calls if call)
            if seconds:
                low, high = seconds[len(seconds) // 4], seconds[(3 * len(seconds)) // 4]
                out[stage] = Timing(statistics.median(seconds), low, high, len(seconds))
        return out


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1e3
