"""What the benchmarks share: interleaved timing, peak memory, and results as a table and as JSON."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler says when it starts and stops; read when torch is loaded

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from jeton.measure.machine import describe

RESULTS = Path(__file__).parent / "results"


def options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """What every benchmark is told in the same way."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="where the JSON goes; benchmarks/results if not given")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if len(ordered) < 2:
            return cls(ordered[0], ordered[0], ordered[0], len(ordered))
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high, len(ordered))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(full: Callable[[], float], reduced: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Measurements of both, taken in turns after one warm-up each, so that a drifting clock hurts them alike. Every other round
    begins with the second, so that neither always runs on what the other left in the caches."""
    full(), reduced()
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = reduced()
            pairs.append((full(), second))
        else:
            pairs.append((full(), reduced()))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# -- memory --------------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors a call needs at most beyond what is there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    # resident memory is no measure: it swings by half of itself between equal calls
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


# -- models --------------------------------------------------------------------------------------------------------------


def built(make: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model from its configuration with random weights, made where and as it will run."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make().eval()
    finally:
        torch.set_default_dtype(usual)


# -- results -------------------------------------------------------------------------------------------------------------


def write(name: str, device: torch.device, settings: dict[str, Any], rows: Sequence[Any], out: Path | None = None) -> Path:
    """results/<name>-<machine>.json: the machine, the command, the settings and the rows."""
    machine = describe(device)
    path = out or RESULTS / f"{name}-{slug(machine)}.json"
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    found = {
        "benchmark": name,
        "command": command,
        "machine": machine,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def slug(machine: dict[str, Any]) -> str:
    words = str(machine.get("accelerator") or f"cpu {machine['cores']} cores").lower().split()
    return "-".join("".join(letter for letter in word if letter.isalnum()) for word in words)


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    shown = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(shown.columns):
        column.no_wrap, column.justify = True, "right" if number else "left"
    for line in lines:
        shown.add_row(*line)
    Console(width=max(180, Console().width)).print(shown)


def milliseconds(spread: Spread) -> str:
    return f"{spread.median * 1e3:.2f} [{spread.low * 1e3:.2f}, {spread.high * 1e3:.2f}]"


def megabytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


def budget(text: str) -> int | float:
    """A budget as users write it: 64 is a count, 0.25 a fraction."""
    return float(text) if "." in text else int(text)
