"""What patches and tokens have to do with each other, asked of the model itself and of what jeton makes of hand-made scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from witness import Listening

import tiny
from jeton.engine import apply
from jeton.engine.encoder import EncoderSite
from jeton.models import VisionLanguage, adapt
from jeton.needs import ReceivedAttention


def squares(scores: Tensor, height: int, width: int, side: int) -> Tensor:
    """The means of `scores` (height * width,) over squares of patches, row by row; a rest is left out."""
    return F.avg_pool2d(scores.view(1, 1, height, width), side).flatten()


def heard_scores(net: nn.Module, inputs: tiny.Inputs, scores: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What a method is told of each image's tokens where patches, over all pictures in order, have these scores."""
    monkeypatch.setattr(EncoderSite, "flat", lambda site, need: scores)
    listener = Listening("encoder", {"received": ReceivedAttention(layer=-1)})
    with apply(net, listener) as run:
        tiny.run(net, inputs)
        assert run.layout is not None
        counts = run.layout.album.counts
    return [row[:count] for row, count in zip(listener.heard["received"], counts, strict=True)]


def check_that_tokens_are_made_of_the_patches_they_name(net: nn.Module, inputs: tiny.Inputs, weights: str) -> None:
    """In a tower that does not mix, a patch changes its own token and no other. weights: the last projection of its attention."""
    view = adapt(net)
    assert isinstance(view, VisionLanguage)
    for block in view.encoder.blocks:
        for value in view.encoder.attention(block).get_submodule(weights).parameters():
            value.data.zero_()
    names = ("pixel_values", "pixel_attention_mask", "image_sizes")
    given = {name: inputs[name] for name in names if name in inputs}
    geometry = view.geometry(given, "image")
    owner = torch.cat([_owner(item) for item in geometry])
    owner = torch.where(owner < 0, -1, owner + _starts(geometry))
    pixels = given["pixel_values"]
    planes = pixels.view(-1, *pixels.shape[-3:])

    @torch.no_grad()
    def features() -> Tensor:
        return torch.cat([part.flatten(0, -2) for part in view.base.get_image_features(**given).pooler_output])

    before, patch = features(), 0
    grids = view.encoder.grids(given) if "image_sizes" in given else [view.encoder.grid(pixels)] * len(geometry)
    for plane, (height, width) in zip(planes, grids, strict=True):
        for row in range(height):
            for col in range(width):
                if (patch + row) % 5 == 0:
                    at = (
                        slice(None),
                        slice(row * tiny.PATCH, (row + 1) * tiny.PATCH),
                        slice(col * tiny.PATCH, (col + 1) * tiny.PATCH),
                    )
                    plane[at] += 1
                    changed = (features() - before).abs().amax(1).gt(1e-4).nonzero().flatten().tolist()
                    plane[at] -= 1
                    assert changed == ([] if owner[patch] < 0 else [int(owner[patch])])
                patch += 1
    assert patch == len(owner)


def _owner(item) -> Tensor:
    """(patches,) the token of its picture that each patch is part of, -1 for none."""
    found = torch.full((item.patches,), -1)
    found[item.source] = torch.arange(len(item))[:, None].expand_as(item.source)
    return found


def _starts(geometry) -> Tensor:
    """(patches,) the first token of the picture of every patch."""
    first = torch.tensor([0, *map(len, geometry)]).cumsum(0)[:-1]
    return first.repeat_interleave(torch.tensor([item.patches for item in geometry]))
