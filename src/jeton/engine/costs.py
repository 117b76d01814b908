"""Counting for the report: what each site did, how many tokens each layer saw, and the FLOPs of the shapes that ran."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layout import Layout
from ..method import Method
from ..models import VisionLanguage
from ..ops.flops import block_flops
from ..tokens import Reduction, Tokens
from .flow import Flow, Step
from .report import ImageCount, Report, SiteCount
from .rules import layer_flops

if TYPE_CHECKING:
    from .run import Run


class Costs:
    """Keeps references while the model runs and does its sums when asked, so that nothing waits for the device."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.note = ""
        self.clear()

    def clear(self) -> None:
        self.note = ""
        self.flow: Flow | None = None
        self.trail: list[Step] = []
        self.sites: dict[tuple[str, str], list[Any]] = {}
        self.length = 0
        self.arrived: int | float = 0
        self.real: Tensor | None = None
        self.thinner: dict[int, tuple[int, Tensor]] = {}

    # -- while it runs -----------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout | None:
        return None if self.flow is None else self.flow.layout

    def begin(self, flow: Flow) -> None:
        """A prefill with pictures starts in the language model; what the encoder did has been counted already."""
        self.note, self.flow = "", flow
        self.thinner.clear()

    def text_only(self, cached: bool) -> None:
        if not cached:
            self.clear()
            self.note = "the prompt shows no picture, so there was nothing to reduce; the model ran unchanged"

    def count(self, site: str, method: Method, tokens: Tokens, reduction: Reduction) -> None:
        if (site, method.card.id) in self.sites:
            self.sites[site, method.card.id][1] = reduction
        else:  # only how many there were, and how wide, is asked for: the features themselves are not held
            bare = Tokens(tokens.features.new_empty(1).expand(tokens.features.shape), tokens.mask, prefix=tokens.prefix)
            self.sites[site, method.card.id] = [bare, reduction]

    def enter(self, arrived: int, new: int, mask: Tensor | None) -> None:
        """`new` tokens per prompt came to the language model's door and `arrived` went in."""
        self.length, self.arrived = new, arrived
        self.real = None if mask is None or mask.dim() != 2 else mask[:, -arrived:]

    def thinned(self, layer: int, length: int, dropped: Tensor) -> None:
        self.thinner[layer] = (length, dropped)

    # -- when asked ----------------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        run = self.run
        dtype = next(weight.dtype for weight in run.model.parameters() if weight.is_floating_point())
        ran, full = self._flops()
        images = self._images()
        return Report(
            method=run.spec,
            model=type(run.model).__name__,
            device=str(run.device),
            dtype=str(dtype).removeprefix("torch."),
            applied=bool(self.sites) or (run.rules is not None and bool(run.rules.ran)),
            note=self.note or _kept_whole(images),
            images=images,
            sites=tuple(
                SiteCount(site, name, _mean(tokens.mask, len(tokens)) - tokens.prefix, _mean(last.mask, last.k) - last.prefix)
                for (site, name), (tokens, last) in self.sites.items()
            ),
            encoder_tokens=tuple(float(before) for before, _ in self._encoder_lengths()),
            layer_tokens=tuple(self._layer_tokens()),
            flops=ran,
            flops_full=full,
            seconds=run.clock.timings(),
        )

    def _images(self) -> tuple[ImageCount, ...]:
        if self.layout is None or self.flow is None:
            return self._pictures()
        rows, layout = self.flow.scene.rows, self.flow.layout
        left = [rows.slot.shape[1]] * layout.images if rows.mask is None else rows.mask.sum(1).tolist()
        extra = layout.album.structure if self.flow.structure == "keep" else (0,) * layout.images
        return tuple(
            ImageCount(sample, image, layout.album.counts[image], left[image] + extra[image])
            for image, sample in enumerate(layout.sample)
        )

    def _pictures(self) -> tuple[ImageCount, ...]:
        """An encoder alone: every picture is an image."""
        tokens = self.run.tokens
        if tokens is None:
            return ()
        site = self.run.site
        before = [site.patches] * tokens.features.shape[0]
        if site.start_mask is not None:
            before = (site.start_mask.sum(1) - self.run.encoder.prefix).tolist()
        after = (tokens.count() - tokens.prefix).tolist()
        return tuple(ImageCount(i, i, int(b), int(a)) for i, (b, a) in enumerate(zip(before, after, strict=True)))

    def _encoder_lengths(self) -> list[tuple[float, float]]:
        """Tokens at the attention and at the MLP of every encoder block in the last forward."""
        site = self.run.site
        if site.lengths:
            return site.lengths
        blocks = len(self.run.encoder.blocks)
        if not self.run.encoder.packed:
            start = site.patches if site.reduction is None else site.reduction.k - self.run.encoder.prefix
            return [(start + self.run.encoder.prefix,) * 2] * blocks if site.pictures else []
        if self.flow is None:
            return []
        ran, album = self.flow.scene.encoded_patches, self.flow.layout.album
        return [((album.patches if ran is None else ran) / max(1, len(album)),) * 2] * blocks

    def _layer_tokens(self) -> list[float]:
        view = self.run.view
        if not isinstance(view, VisionLanguage) or not self.arrived:
            return []
        tokens = float(self.arrived) if self.real is None else self.real.sum(1).float().mean().item()
        out, lost = [], 0.0
        for layer in range(len(view.layers)):
            if layer in self.thinner:
                lost = self.thinner[layer][1].float().mean().item()
            out.append(tokens - lost)
        return out

    def _flops(self) -> tuple[float, float]:
        run = self.run
        ran, full = self._encoder_flops()
        view = run.view
        if not isinstance(view, VisionLanguage) or self.layout is None or not self.arrived:
            return ran, full
        length, rules = self.arrived, {} if run.rules is None else run.rules.ran
        for layer in range(len(view.layers)):
            length = self.thinner[layer][0] if layer in self.thinner else length
            # where merged tokens act at all their places, attention runs over the unreduced length
            attended = self.length**2 / length if run.virtual else None
            ran += layer_flops(rules.get(layer), self.layout.batch, int(length), view.dims, attended)
            full += layer_flops(None, self.layout.batch, self.length, view.dims)
        if view.projector is not None:
            each = view.projection
            assert self.flow is not None
            projected = self.flow.scene.projected
            full += each * (projected if view.mixes else self.layout.album.patches)
            ran += each * projected
        between = view.between(self.length, self.layout.album)
        return ran + between + self._mixing(), full + between

    def _mixing(self) -> float:
        """Products with dense matrices; other reductions only move and add."""
        dense = [(tokens, part) for tokens, last in self.sites.values() for part in (last.matrix, last.back) if part is not None]
        return float(sum(2 * matrix.numel() * tokens.features.shape[2] for tokens, matrix in dense))

    def _encoder_flops(self) -> tuple[float, float]:
        lengths = self._encoder_lengths()
        encoder = self.run.encoder
        width, mlp, gated = encoder.dims
        pictures = self.run.site.pictures
        if self.layout is not None:  # images and videos take one call of the encoder each
            pictures = len(self.layout.album) if encoder.packed else self.layout.album.patches // self.run.site.patches
        seen = start = float(self.run.site.patches + encoder.prefix)
        if encoder.packed and self.layout is not None:
            start = self.layout.album.patches / len(self.layout.album)
            seen = self.layout.album.patches if encoder.joint else start
        ran = full = 0.0
        for number, (before, after) in enumerate(lengths):
            keys = encoder.keys(number, seen)
            full += pictures * block_flops(start, width, mlp, gated=gated, n_keys=keys)
            # tokens that left are missed by all others alike
            ran += pictures * block_flops(before, width, mlp, gated=gated, n_mlp=after, n_keys=keys * before / start)
            ran += pictures * self._looked(number, before, width)
        own = self.run.learned.flops(round(start) - encoder.prefix) if pictures and lengths else 0.0
        return ran + pictures * own, full

    def _looked(self, number: int, before: float, width: int) -> float:
        """What a look ahead at a block costs beyond its attention: queries and keys of the tokens there were; where their map is
        used, it is that of so many tokens, and queries and keys of those left are not computed."""
        n, used = self.run.site.looked.get(number, (0, False))
        return 4 * (n - before * used) * width * width + 4 * (n**2 - before**2) * width * used

    # -- pictures --------------------------------------------------------------------------------------------------------------

    def assignment(self, image: int, block: int | None = None) -> list[Tensor]:
        """See `Run.assignment`."""
        site, layout = self.run.site, self.layout
        if block is not None and not -len(site.encoder.blocks) <= block < len(site.encoder.blocks):
            raise ValueError(f"the encoder has {len(site.encoder.blocks)} blocks; there is no block {block}.")
        images = layout.images if layout is not None else site.pictures
        if not 0 <= image < images:
            raise ValueError(f"the last forward had {images} images; there is no image {image}.")
        place = layout.album.place if layout is not None else site.bare_place
        assert place is not None
        count = layout.album.counts[image] if layout is not None else place.unit.shape[1]
        owner = torch.arange(count)
        inside = site.reduction if block is None else site.until(block)
        if inside is not None:
            owner = self._through_encoder(image, owner, inside)
        if block is None:
            for step in self.trail if self.flow is None else self.flow.scene.trail:
                owner = _follow(owner, step, image)
        return _maps(owner, place, image, count)

    def _through_encoder(self, image: int, owner: Tensor, reduction: Reduction) -> Tensor:
        """What a reduction in the encoder did to the slots of one image: each goes to its representative's slot."""
        site, layout = self.run.site, self.layout
        prefix = self.run.encoder.prefix
        assign, index = reduction.assign.cpu(), reduction.index.cpu()
        patch = layout.album.source[image, : len(owner), 0].cpu() if layout is not None else owner + image * site.patches
        picture, own = patch.clamp(min=0) // site.patches, patch.clamp(min=0) % site.patches
        new = assign[picture, own + prefix]
        target = index[picture, new.clamp(min=0)] - prefix + picture * site.patches
        slot_of = torch.full((int(max(patch.max(), target.max())) + 1,), -1)
        slot_of[patch.clamp(min=0)] = torch.arange(len(owner))
        return torch.where((new < 0) | (patch < 0), -1, slot_of[target])


def _follow(owner: Tensor, step: Step, image: int) -> Tensor:
    """Owners (slots that represent each token) after one more reduction."""
    slots, after = step.before.slot[image].cpu(), torch.nn.functional.pad(step.after.slot[image].cpu(), (0, 1), value=-1)
    assign = step.reduction.assign[image].cpu()[step.prefix :]
    went = torch.full((int(max(owner.max(), slots.max())) + 2,), -1)
    real = torch.where(assign < 0, -1, after[assign.clamp(min=0)])
    went[slots.flip(0)] = real.flip(0)  # padding repeats slot 0 at the end: the first one counts
    return torch.where(owner < 0, -1, went[owner])


def _maps(owner: Tensor, place: Any, image: int, count: int) -> list[Tensor]:
    unit, row, col = (getattr(place, name)[image, :count].cpu() for name in ("unit", "row", "col"))
    height, width = place.height[image, :count].cpu(), place.width[image, :count].cpu()
    out = []
    for number in range(int(unit.max()) + 1):
        here = (unit == number).nonzero().flatten()
        if len(here) == 0:
            continue
        grid = torch.full((int(height[here[0]]), int(width[here[0]])), -1)
        grid[row[here], col[here]] = owner[here]
        out.append(grid)
    return out


def _kept_whole(images: tuple[ImageCount, ...]) -> str:
    """Says so where some images had no more tokens than were asked for, while others lost some."""
    whole = [image.image for image in images if image.after == image.before]
    if not whole or len(whole) == len(images):
        return ""
    return f"images {whole} have no more tokens than were asked for and keep all of theirs"


def _mean(mask: Tensor | None, count: int) -> float:
    return float(count) if mask is None else mask.sum(1).float().mean().item()
