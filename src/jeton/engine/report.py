"""The truth about what a run cost: tokens per site, per image and per layer, FLOPs of the shapes that ran, and times."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .clock import Timing


@dataclass(frozen=True)
class ImageCount:
    """Visual tokens of one image of the last prefill, before any reduction and after all of them."""

    sample: int
    image: int
    before: int
    after: int


@dataclass(frozen=True)
class SiteCount:
    """What one method did at its site in the last prefill: mean tokens of an image (or picture) before and after."""

    site: str
    method: str
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """encoder_tokens: tokens entering each encoder block. layer_tokens: mean tokens entering each language-model layer, padding
    not counted. flops, flops_full: encoder and prefill of the last batch, counted from the shapes that ran and that would have
    run. seconds: per stage and call; "first_token" is everything from pixels to the end of the prefill."""

    method: str
    model: str
    device: str
    dtype: str
    applied: bool
    note: str
    images: tuple[ImageCount, ...]
    sites: tuple[SiteCount, ...]
    encoder_tokens: tuple[float, ...]
    layer_tokens: tuple[float, ...]
    flops: float
    flops_full: float
    seconds: dict[str, Timing]

    @property
    def flops_share(self) -> float:
        """FLOPs that ran as a share of those of the unreduced model; 1.0 before anything has run."""
        return self.flops / self.flops_full if self.flops_full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "flops_share": self.flops_share}

    def __str__(self) -> str:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(f"[bold]{self.method}[/] on {self.model} ({self.device}, {self.dtype})", highlight=False)
        if self.note:
            console.print(self.note, highlight=False)
        table = Table("where", "tokens before", "tokens after", box=None, pad_edge=False)
        for site in self.sites:
            table.add_row(f"{site.site}: {site.method}", f"{site.before:.1f}", f"{site.after:.1f}")
        for image in self.images:
            table.add_row(f"image {image.image} of prompt {image.sample}", str(image.before), str(image.after))
        console.print(table)
        for name, tokens in (("encoder blocks", self.encoder_tokens), ("language-model layers", self.layer_tokens)):
            if tokens:
                console.print(f"tokens entering {name}: {runs(tokens)}", highlight=False)
        if self.flops_full:
            console.print(f"FLOPs {self.flops:.4g} of {self.flops_full:.4g} ({self.flops_share:.1%})", highlight=False)
        for stage, t in self.seconds.items():
            spread = f"[{t.low * 1e3:.2f}, {t.high * 1e3:.2f}]"
            console.print(f"{stage}: {t.median * 1e3:.2f} ms {spread} over {t.count}", highlight=False, markup=False)
        return console.export_text().rstrip()


def runs(tokens: tuple[float, ...]) -> str:
    """12 equal numbers as '197 x 12'."""
    parts: list[tuple[float, int]] = []
    for count in tokens:
        if parts and parts[-1][0] == count:
            parts[-1] = (count, parts[-1][1] + 1)
        else:
            parts.append((count, 1))
    return ", ".join(f"{count:g} x {times}" if times > 1 else f"{count:g}" for count, times in parts)
