"""Searching for numbers: the least count that passes a test, the root of a monotone function, the maximum of a black box."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SAMPLERS = ("auto", "gp", "tpe", "random")
Point = dict[str, float]


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; with `log` they are tried evenly by their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"a range goes from a finite number to one that is not below it, got {self.low} to {self.high}.")


def least(passes: Callable[[int], bool], low: int, high: int) -> int:
    """The least whole number from `low` to `high` that passes, by bisection: at most ceil(log2(high - low + 1)) tests. `high` is
    known to pass; where a number passes all larger ones are taken to."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low


def root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where the increasing function `f` crosses zero between `low` and `high`, to the last bit; the nearer end if it does not."""
    if f(low) >= 0:
        return low
    if f(high) <= 0:
        return high
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if f(middle) >= 0 else (middle, high)
    return high


def maximise(
    objective: Callable[[Point], float],
    space: Mapping[str, Range],
    calls: int,
    *,
    start: Iterable[Point] = (),
    warmup: int | None = None,
    sampler: str = "auto",
    seed: int = 0,
) -> tuple[Point, float]:
    """The best of `calls` points of `space`, and its value. `start` points are tried first, then points drawn at random until
    `warmup` have been tried (a tenth of the calls if not given), then points a model of the objective suggests.

    sampler: "gp" a Gaussian process with expected improvement (needs scipy), "tpe" a tree-structured Parzen estimator, "random"
    none of both, "auto" the first of these that is installed. Uses Optuna, and leaves its logging and the random state alone.
    """
    check_sampler(sampler)
    if calls < 1:
        raise ValueError(f"calls={calls} tries nothing; give at least 1.")
    if not space:
        raise ValueError("a search needs at least one range.")
    optuna = _optuna()
    warmup = max(1, calls // 10) if warmup is None else warmup
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize", sampler=_sampler(optuna, chosen(sampler), warmup, seed))
        axes = {name: optuna.distributions.FloatDistribution(x.low, x.high, log=x.log) for name, x in space.items()}
        for point in start:
            study.enqueue_trial({name: min(max(point[name], x.low), x.high) for name, x in space.items()})
        for _ in range(calls):
            trial = study.ask(axes)
            study.tell(trial, objective({name: float(trial.params[name]) for name in space}))
        return {name: float(study.best_params[name]) for name in space}, float(study.best_value)
    finally:
        optuna.logging.set_verbosity(verbosity)


def check_sampler(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}; choose {', '.join(SAMPLERS)}.")
    if sampler == "gp" and importlib.util.find_spec("scipy") is None:
        raise ValueError('sampler="gp" needs scipy: pip install scipy, or choose "tpe".')


def chosen(sampler: str) -> str:
    """What "auto" means on this machine; any other name as it is."""
    if sampler != "auto":
        return sampler
    return "gp" if importlib.util.find_spec("scipy") is not None else "tpe"


def _sampler(optuna: Any, name: str, warmup: int, seed: int) -> Any:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=warmup, multivariate=True)
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=warmup)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("searching a space of numbers needs Optuna: pip install 'jeton[tune]'.") from error
    return optuna
