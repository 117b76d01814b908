"""Rate and distortion: bytes against PSNR, of a tokenizer and of image files.

Bytes of tokens are ``k log2(K) / 8``: no header, no entropy coding, the decoder's weights not counted. Files are Pillow's.
`payload` leaves out of a file what only says how to read it: of JPEG all but the entropy-coded scan, of WebP its 30 bytes of
containers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

QUALITIES = {"JPEG": (1, 3, 5, 10, 15, 20, 30, 50, 75), "WEBP": (0, 1, 3, 5, 10, 20, 30, 50, 75)}


def psnr(images: Tensor, decoded: Tensor) -> Tensor:
    """(B,) decibels: 10 log10(1 / mean squared error), values in [0, 1]; decoded values are clamped to it."""
    error = (images - decoded.clamp(0, 1)).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def as_file(image: Tensor, form: str, quality: int) -> tuple[bytes, Tensor]:
    """One picture (3, H, W) in [0, 1] as a file, and what is read back from it."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if form == "JPEG" else {"method": 6}
    Image.fromarray(array).save(stream, form, quality=quality, **options)
    back = np.asarray(Image.open(stream).convert("RGB"), dtype=np.float32) / 255
    return stream.getvalue(), torch.from_numpy(back).permute(2, 0, 1)


def payload(data: bytes, form: str) -> int:
    """Bytes of a file without its headers and tables."""
    if form == "WEBP":
        return len(data) - 30  # RIFF and WEBP 12, chunk 8, frame header 10
    at = data.index(b"\xff\xda")  # start of scan; Pillow writes one scan, closed by two bytes
    return len(data) - (at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")) - 2


def file_curve(images: Tensor, form: str, qualities: Sequence[int] | None = None) -> list[dict[str, float]]:
    """Mean bytes, payload and PSNR of pictures (B, 3, H, W) at each quality of a format."""
    rows = []
    for quality in qualities or QUALITIES[form]:
        files = [as_file(image, form, quality) for image in images]
        rows.append(
            {
                "quality": quality,
                "bytes": float(np.mean([len(data) for data, _ in files])),
                "payload": float(np.mean([payload(data, form) for data, _ in files])),
                "psnr": psnr(images, torch.stack([back for _, back in files])).mean().item(),
            }
        )
    return rows


def tiles(images: Tensor, side: int) -> Tensor:
    """(B T, C, side, side): pictures (B, C, H, W) cut into T tiles, row by row."""
    b, c, h, w = images.shape
    cut = images.reshape(b, c, h // side, side, w // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side, side)


def untile(parts: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `tiles`."""
    c, side = parts.shape[1], parts.shape[-1]
    cut = parts.reshape(-1, height // side, width // side, c, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, height, width)


@torch.no_grad()
def token_curve(model: Any, images: Tensor, lengths: Sequence[int]) -> list[dict[str, float]]:
    """Mean bytes and PSNR of pictures (B, C, H, W) at each number of tokens a tile, tiles being of the size the model takes."""
    parts = tiles(images, model.image_size)
    each, rows = len(parts) / len(images), []
    ids = torch.cat([model.encode(chunk).ids for chunk in parts.split(256)])
    for k in lengths:
        decoded = torch.cat([model.decode(chunk[:, :k]) for chunk in ids.split(256)])
        back = untile(decoded, *images.shape[2:])
        rows.append({"tokens": k, "bytes": each * model.bytes(k), "psnr": psnr(images, back).mean().item()})
    return rows


def plot(curves: Mapping[str, Sequence[Mapping[str, float]]], title: str, path: Path) -> None:
    """A picture of curves by name; files have a dotted second line for their payload alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        (line,) = axes.plot([row["bytes"] for row in rows], [row["psnr"] for row in rows], marker="o", label=name)
        if "payload" in rows[0]:
            axes.plot([row["payload"] for row in rows], [row["psnr"] for row in rows], ":", color=line.get_color())
    axes.set(xscale="log", xlabel="bytes a picture (dotted: without the file's headers)", ylabel="PSNR, dB", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
