"""What recipes share that train on the digits (`jeton.demo.digits`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..demo.digits import entropy, splits
from ..measure.machine import describe
from ..train import WEIGHTS, Loss, Recipe, load, train


def write(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Put what was measured, and on what machine, beside the weights."""
    results = {**results, "machine": describe()}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def fit(model: nn.Module, out: Path, recipe: Recipe, loss: Loss = entropy, *, resume: bool, progress: bool, name: str) -> float:
    """Train on the digits into a folder of its own, so that a recipe may train several models; one that was finished before is
    read instead where the recipe is resumed. Returns the seconds it took."""
    if resume and (out / WEIGHTS).exists() and not (out / "state").exists():
        load(model, out).eval()
        return float(json.loads((out / "history.json").read_text())["seconds"])
    return train(model, splits()[0], loss, recipe, out=out, resume=resume, progress=progress, name=name).seconds


def over_seeds(seeds: Sequence[int], rows: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    """Accuracies of several seeds, a row each: their mean and themselves."""
    mean = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in rows[0]}
    each = {str(seed): {key: round(value, 4) for key, value in row.items()} for seed, row in zip(seeds, rows, strict=True)}
    return {"accuracy": mean, "of each seed": each}
