"""What do encoder methods cost in accuracy? Every training-free method that acts inside blocks, on the trained digits model.

    python benchmarks/digits.py                        # every method, three budgets
    python benchmarks/digits.py --method tome pitome --keep 0.5

`keep` is the share of the 64 patches that is left behind the last block; 397 held-out digits, so one is 0.0025 and the standard
error of an accuracy of 0.95 is 0.011. A method that cannot reach a budget on 6 blocks is left out at it, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from common import budget, options, table, write

import jeton
from jeton.demo.digits import Digits, accuracy, load_digits
from jeton.engine import watch
from jeton.method import methods


@dataclass(frozen=True)
class Row:
    """One method at one budget; tokens entering each block, the head's and the class token included in neither."""

    method: str
    keep: int | float
    tokens: tuple[float, ...]
    flops_share: float
    accuracy: float | None
    note: str = ""


def rows(digits: Digits, names: list[str], keeps: list[int | float]) -> Iterator[Row]:
    with watch(digits.model) as run:
        found = accuracy(digits.model, digits.test)
        yield Row("full", 1.0, run.report().encoder_tokens, 1.0, found)
    for name in names:
        for keep in keeps:
            try:
                with jeton.apply(digits.model, name, keep=keep) as run:
                    found = accuracy(digits.model, digits.test)
                    report = run.report()
                yield Row(name, keep, report.encoder_tokens, report.flops_share, found)
            except ValueError as error:  # jeton.Unsupported is one
                yield Row(name, keep, (), 1.0, None, str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inside = [card.id for card in methods() if card.training_free and card.object.site == "block"]
    parser.add_argument("--method", nargs="+", default=inside)
    parser.add_argument("--keep", nargs="+", type=budget, default=[0.75, 0.5, 0.25])
    options(parser, rounds=1)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    measured = list(rows(load_digits(device), asked.method, asked.keep))
    lines = [
        (row.method, str(row.keep), f"{row.flops_share:.2f}", "-" if row.accuracy is None else f"{row.accuracy:.3f}", row.note)
        for row in measured
    ]
    table("accuracy on 397 held-out digits", ("method", "keep", "FLOPs", "accuracy", ""), lines)
    print(write("digits", device, {"held out": 397}, measured, asked.out))


if __name__ == "__main__":
    main()
