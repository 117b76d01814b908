"""Idefics3 and SmolVLM: tiles and a thumbnail behind them, each announced by text; squares of patches are shuffled into a token.

Frames of SmolVLM's videos come as images: nothing in what the model is given tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..layout import Geometry
from ..method import Unsupported
from .base import Encoder, Inputs, VisionLanguage
from .clip import Siglip
from .registry import adapter


@adapter("Idefics3VisionTransformer", "SmolVLMVisionTransformer")
class IdeficsTower(Siglip):
    """A SigLIP whose learned positions are spread over pictures of any shape."""

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        mask = inputs.get("patch_attention_mask")
        if mask is not None and not bool(mask.all()):
            raise Unsupported(
                f"{self.name} was given pictures with hidden patches (patch_attention_mask), which the family's own processor "
                "never makes; resize pictures to whole tiles instead of padding them."
            )
        return super().geometry(inputs)

    def smaller(self, inputs: Inputs, picture: Callable[[Tensor, tuple[int, int], int], Tensor], grid: tuple[int, int]) -> dict:
        return {"pixel_values": picture(inputs["pixel_values"], grid, self.patch_size)}


@adapter("Idefics3ForConditionalGeneration", "Idefics3Model")
class Idefics3(VisionLanguage):
    language = "text_model"
    mixes = True
    told_by_prompt = True
    marks = "the names of tiles, and what stands around them,"

    def vision(self) -> Encoder:
        return IdeficsTower(self.base.vision_model)

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        """One for each tile that is not padding, which the model tells by its zeros. What makes an image only the prompt says."""
        pixels = inputs["pixel_values"]
        real = self.real((pixels.to(self.base.dtype) != 0).flatten(2).any(2).flatten())
        if real == 0:
            raise ValueError(
                f"{self.name} takes pictures of zeros alone for padding and drops them, and this batch has no others; change "
                "one pixel of a picture that is all zeros after normalisation to have it seen."
            )
        tile = Geometry.blocks(*self.encoder.grid(pixels), self.model.config.scale_factor)
        return [tile] * real

    def real(self, shown: Tensor) -> int:
        """How many tiles are encoded, of those `shown` (n,) is true for where they show something."""
        return int(shown.sum())

    def prompted(self, geometry: tuple[Geometry, ...], input_ids: Tensor, visual: Tensor) -> tuple[Geometry, ...]:
        tile = geometry[0]
        copies, rest = divmod(int(visual.sum()), len(tile) * len(geometry))
        if copies == 0 or rest:
            return geometry  # the span map will say that the prompts do not fit the pictures
        told = zip(input_ids.cpu()[::copies], visual.cpu()[::copies], strict=True)  # beams repeat prompts
        grids = [grid for ids, here in told for grid in _grids(ids.tolist(), here.nonzero().flatten().tolist(), tile, self.name)]
        return tuple(tile if grid is None else Geometry.tiles(tile, *grid) for grid in grids)


@adapter("SmolVLMForConditionalGeneration", "SmolVLMModel")
class SmolVLM(Idefics3):
    def real(self, shown: Tensor) -> int:
        """Where there is nothing to see, the first picture counts all the same."""
        return max(1, super().real(shown))


def _grids(words: list[int], visual: list[int], tile: Geometry, model: str) -> list[tuple[int, int] | None]:
    """For each image of a prompt its (rows, columns) of tiles, None for one that was not cut.

    Two tokens announce a tile: a mark, and the tile's name. Between tiles of a row there is nothing else; at the end of a row a
    line break stands in front of them; an image is closed by the mark.
    """
    images: list[list[int]] = []
    each = len(tile)
    starts = visual[::each]
    for number, start in enumerate(starts):
        between = words[starts[number - 1] + each : start] if number else []
        if number and len(between) == 2:
            images[-1][-1] += 1
        elif len(between) > 2 and between[0] != between[-2]:
            images[-1].append(1)
        else:
            images.append([1])
    if len({words[start - 2] for start in starts}) > 1 or any(not _whole(tiles) for tiles in images):
        raise ValueError(
            f"the tiles in this prompt of {model} are not announced as its processor does it (a mark and the name of the tile in "
            "front of each, line breaks between rows, the thumbnail last); let the model's processor write the prompt."
        )
    return [None if tiles == [1] else (len(tiles) - 1, tiles[0]) for tiles in images]


def _whole(tiles: list[int]) -> bool:
    """Whether rows of so many tiles are one picture, or rows of the same length with a thumbnail behind."""
    return tiles == [1] or (tiles[-1] == 1 and len({*tiles[:-1]}) == 1 and sum(tiles) > 2)
