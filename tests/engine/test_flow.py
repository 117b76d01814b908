"""Pictures on their way to the prompts that show them."""

from __future__ import annotations

import torch

from jeton.engine.flow import Scene, Step
from jeton.layout import Album, Geometry, Rows
from jeton.tokens import Reduction


def test_what_one_forward_decides_is_not_left_for_the_next_that_shows_the_pictures() -> None:
    """Two pictures of 2 x 2 patches, shown as they are and in another order."""
    album = Album.of((Geometry.blocks(2, 2, 1),) * 2, torch.device("cpu"))
    rows = Rows(torch.arange(4).expand(2, -1), None)
    scene = Scene(album, rows, scores={"fastv": torch.zeros(2, 4)})
    for shown in (scene.shown(album, [0, 1]), scene.shown(Album.of(album.geometry[::-1], torch.device("cpu")), [1, 0])):
        shown.trail.append(Step(rows, Reduction.identity(2, 4, rows.slot.device), 0, rows))
        shown.scores["divprune"] = torch.ones(2, 4)
        assert not scene.trail and set(scene.scores) == {"fastv"} and scene.met
