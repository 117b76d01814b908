"""How fast do encoders become? Every method that acts in or behind an encoder, over several budgets.

    python benchmarks/encoder.py                                  # both shapes, batch 1 and 8, on the CPU
    python benchmarks/encoder.py --shape vit-b-16-224 --batch 8 --method tome --keep 0.5
    python benchmarks/encoder.py --device cuda --dtype bfloat16 --batch 1 8 64

Random weights from the models' configurations; nothing is downloaded. The unmodified model runs its fast attention (SDPA).
Full and reduced model run in turns; a row's speed-up is the median of the ratios of neighbouring runs. `ideal` is what the saved
FLOPs allow, `selection` the time of scoring, matching and merging as a share of the full forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from common import Spread, budget, built, interleave, megabytes, milliseconds, options, peak_memory, seconds, table, write
from torch import Tensor, nn

import jeton
from jeton.engine import apply, watch
from jeton.method import Method, methods

SITES = ("pixels", "block", "encoder", "entry")
SHAPES = {
    "vit-b-16-224": lambda: transformers.ViTModel(
        transformers.ViTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16)
    ),
    "vit-l-14-336": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
        )
    ),
}


@dataclass(frozen=True)
class Row:
    """One method at one budget. Times in seconds per forward, memory in bytes beyond the model's own."""

    shape: str
    batch: int
    method: str
    keep: int | float
    tokens: tuple[float, ...]
    before: float
    after: float
    flops_share: float
    ideal: float
    full: Spread
    reduced: Spread
    speedup: Spread
    realised: float
    selection: float
    memory_full: int
    memory: int


def chosen(names: list[str] | None, keeps: list[int | float]) -> Iterator[tuple[Method, int | float]]:
    """Every method of the encoder at every budget, the smallest reduction first."""
    for card in methods():
        if card.object.site in SITES and (card.training_free if names is None else card.id in names):
            for keep in keeps:
                yield jeton.get(card.id, keep=keep), keep


def measure(shape: str, net: nn.Module, pixels: Tensor, method: Method, keep: int | float, rounds: int) -> Row:
    device = pixels.device

    def forward() -> object:
        with torch.inference_mode():
            return net(pixel_values=pixels)

    selection: list[float] = []

    def full() -> float:
        return seconds(forward, device)

    def reduced() -> float:
        with apply(net, method) as run:
            spent = seconds(forward, device)
            timing = run.report().seconds.get("selection")
            selection.append(0.0 if timing is None else timing.median)
        return spent

    whole, less = interleave(full, reduced, rounds)
    with watch(net):
        memory_full = peak_memory(forward, device)
    with apply(net, method) as run:
        memory = peak_memory(forward, device)
        report = run.report()
    speedup = Spread.of(a / b for a, b in zip(whole, less, strict=True))
    ideal = 1 / report.flops_share
    return Row(
        shape=shape,
        batch=pixels.shape[0],
        method=method.spec,
        keep=keep,
        tokens=report.encoder_tokens,
        before=sum(image.before for image in report.images) / len(report.images),
        after=sum(image.after for image in report.images) / len(report.images),
        flops_share=report.flops_share,
        ideal=ideal,
        full=Spread.of(whole),
        reduced=Spread.of(less),
        speedup=speedup,
        realised=speedup.median / ideal,
        selection=Spread.of(selection[1:]).median / Spread.of(whole).median,
        memory_full=memory_full,
        memory=memory,
    )


def line(row: Row) -> list[str]:
    return [
        row.method,
        f"{row.before:.0f} > {row.after:.0f}",
        f"{row.flops_share:.3f}",
        milliseconds(row.full),
        milliseconds(row.reduced),
        f"{row.speedup.median:.2f} [{row.speedup.low:.2f}, {row.speedup.high:.2f}]",
        f"{row.ideal:.2f}",
        f"{row.realised:.2f}",
        f"{row.selection:.1%}",
        f"{megabytes(row.memory_full)} > {megabytes(row.memory)}",
    ]


COLUMNS = ("method", "tokens", "FLOPs", "full ms", "reduced ms", "speed-up", "ideal", "realised", "selection", "peak MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--keep", nargs="+", type=budget, default=[0.75, 0.5, 0.25])
    parser.add_argument("--method", nargs="+", help="ids; all that act in or behind an encoder if not given")
    options(parser, rounds=9)
    asked = parser.parse_args()
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    rows: list[Row] = []
    for shape in asked.shape:
        net = built(SHAPES[shape], device, dtype)
        size = net.config.image_size
        for batch in asked.batch:
            pixels = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
            here = [measure(shape, net, pixels, method, keep, asked.rounds) for method, keep in chosen(asked.method, asked.keep)]
            table(f"{shape}, batch {batch}, {asked.dtype} on {device}", COLUMNS, map(line, here))
            rows += here
    settings = {"dtype": asked.dtype, "rounds": asked.rounds, "attention": "sdpa"}
    print(write("encoder", device, settings, rows, asked.out))


if __name__ == "__main__":
    main()
