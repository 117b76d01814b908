"""Pictures say the truth about every patch."""

import numpy as np
import pytest
import torch
from PIL import Image

from jeton.engine.picture import DARK, overlay, sheet


@pytest.fixture
def image():
    """Four quarters of 20 pixels: red, green, blue, white."""
    made = Image.new("RGB", (40, 40), "red")
    for colour, corner in (("lime", (20, 0)), ("blue", (0, 20)), ("white", (20, 20))):
        made.paste(colour, (*corner, corner[0] + 20, corner[1] + 20))
    return made


def pixels(image):
    return np.asarray(image).astype(int)


def test_keeping_everything_changes_nothing(image):
    assert (pixels(overlay(image, torch.arange(4).view(2, 2))) == pixels(image)).all()


def test_dropped_patches_are_dark_and_kept_ones_untouched(image):
    drawn = pixels(overlay(image, torch.tensor([[0, -1], [-1, 1]])))
    assert (drawn[:20, :20] == (255, 0, 0)).all() and (drawn[20:, 20:] == 255).all()
    assert drawn[:20, 20:].max() <= 255 * DARK and drawn[20:, :20].max() <= 255 * DARK


def test_merged_patches_share_a_colour_and_an_outline(image):
    drawn = pixels(overlay(image, torch.tensor([[0, 0], [1, 2]])))
    left, right = drawn[5, 5], drawn[5, 30]
    assert left[0] > right[0] and left[1] < right[1]
    assert left[1] > 50 and right[0] > 50, "each takes on some of the other's colour"
    assert (drawn[19, 5:35] == 255).all(), "the group is closed off from what lies below"
    assert (drawn[5, 19:21] != 255).any(), "but not inside"
    assert (drawn[30, 5] == (0, 0, 255)).all()


def test_a_map_that_does_not_divide_the_picture_covers_it(image):
    drawn = pixels(overlay(image, torch.full((3, 3), -1)))
    assert drawn.max() <= 255 * DARK


def test_rows_and_columns_of_a_map_are_those_of_the_picture(image):
    drawn = pixels(overlay(image, torch.tensor([[0, 1, -1]])))
    assert (drawn[:, :26] == pixels(image)[:, :26]).all() and drawn[:, 27:].max() <= 255 * DARK


def test_the_size_is_the_width_and_the_shape_stays():
    assert overlay(Image.new("RGB", (40, 20)), torch.zeros(1, 1, dtype=torch.long), size=100).size == (100, 50)


def test_units_stand_side_by_side(image):
    one = torch.arange(4).view(2, 2)
    assert sheet([image], [one], 40).size == (40, 40)
    assert sheet([image, image, image], [one, one, one], 40).size == (40 * 3 + 4, 40)
    assert sheet([image], [one, one], 40).size == (82, 40)


def test_a_flat_map_is_refused(image):
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        overlay(image, torch.arange(4))
