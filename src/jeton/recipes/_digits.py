"""What recipes share that train on the digits (`jeton.demo.digits`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..demo.digits import Digits, accuracy, entropy, splits
from ..engine import Run, apply, watch
from ..measure.machine import describe
from ..method import Method
from ..train import WEIGHTS, Loss, Recipe, load, train

More = Callable[[Run, Tensor, Tensor], Mapping[str, Tensor]]


def learn(
    digits: Digits, method: Method, recipe: Recipe, out: Path, *, resume: bool, progress: bool, more: More | None = None
) -> dict[str, Any]:
    """Train a method that learns together with those parameters of the digits model that require gradients, in place: cross
    entropy, the method's own losses, and what `more` (run, pixels, logits) adds. The model and what the method has learned are
    written to `out`; returns seconds and losses."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # of what is built anew
        applied = apply(digits.model, method, train=True)
    with applied as run:

        def loss(student: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            pixels, labels = batch
            logits = student(pixel_values=pixels).logits
            parts = {"task": F.cross_entropy(logits, labels), **run.losses()}
            return parts if more is None else {**parts, **more(run, pixels, logits)}

        student = run.student()
        told = train(student, digits.train, loss, recipe, out=out, resume=resume, progress=progress, name=method.card.id)
        digits.model.save_pretrained(out)
        run.save(out)
    digits.model.eval()
    curves = {name: [round(value, 4) for value in values[:: max(1, len(values) // 10)]] for name, values in told.losses.items()}
    return {"seconds": round(told.seconds), "losses": curves}


def measured(digits: Digits, method: str | Method | None, **fields: Any) -> dict[str, Any]:
    """Accuracy on the held-out digits, the tokens that enter each block, and the share of FLOPs that ran."""
    with watch(digits.model) if method is None else apply(digits.model, method, **fields) as run:
        right = accuracy(digits.model, digits.test)
        report = run.report()
    return {"accuracy": round(right, 4), "tokens": list(report.encoder_tokens), "flops": round(report.flops_share, 4)}


def write(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Put what was measured, and on what machine, beside the weights."""
    results = {**results, "machine": describe()}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def fit(
    model: nn.Module,
    out: Path,
    recipe: Recipe,
    loss: Loss = entropy,
    data: Any = None,
    *,
    resume: bool,
    progress: bool,
    name: str,
) -> float:
    """Train on the digits, or other `data`, into a folder of its own, so that a recipe may train several models; one that was
    finished before is read instead where the recipe is resumed. Returns the seconds it took."""
    if resume and (out / WEIGHTS).exists() and not (out / "state").exists():
        load(model, out).eval()
        return float(json.loads((out / "history.json").read_text())["seconds"])
    data = splits()[0] if data is None else data
    return train(model, data, loss, recipe, out=out, resume=resume, progress=progress, name=name).seconds


def over_seeds(seeds: Sequence[int], rows: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    """Accuracies of several seeds, a row each: their mean and themselves."""
    mean = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in rows[0]}
    each = {str(seed): {key: round(value, 4) for key, value in row.items()} for seed, row in zip(seeds, rows, strict=True)}
    return {"accuracy": mean, "of each seed": each}
