"""Methods inside a vision encoder: the sites `pixels` and `block`, and the signals that later sites read from it.

Blocks are run through one generic pre-norm forward that stands in for the layer's own for the time of a run.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layout import Album
from ..method import Method
from ..models import Encoder
from ..needs import (
    AnchorAttention,
    ClassAttention,
    ClassSimilarity,
    Keys,
    MeanAttention,
    Need,
    PatchEntropy,
    PixelVariance,
    ReceivedAttention,
    TextSimilarity,
    Values,
)
from ..ops import attention, pixels
from ..place import Place
from ..tokens import Reduction, Tokens, gather
from .aside import aside
from .tap import Listener

if TYPE_CHECKING:
    from .run import Run


class EncoderSite:
    """One encoder under a run. `depth`: how many of its blocks feed what is handed on. `only`: the patches a packed encoder is to
    run on, None for all."""

    def __init__(self, run: Run, encoder: Encoder, depth: int, methods: list[Method], late: set[Need], alone: bool) -> None:
        self.run, self.encoder, self.depth, self.alone = run, encoder, depth, alone
        droppers = [m for m in methods if m.site == "pixels" and not m.resizes]
        self.pixels = [m for m in methods if m.site == "pixels" and m.resizes]
        self.stepped = [m for m in methods if m.site == "block"]
        if not encoder.packed:  # patches leave in front of block 0; those of a packed encoder have left before it runs
            self.stepped = droppers + self.stepped
        self.only: Tensor | None = None
        self.listeners: dict[int, _Listener] = {}
        self._names = list(inspect.signature(encoder.model.forward).parameters)
        self.keep_special = any(m.prefix_tokens for m in methods)
        self._plans: dict[int, list[tuple[Method, list[Method | None]]]] = {}
        self.texts = [need for need in late if isinstance(need, TextSimilarity)]
        self.seen = {need for need in late if isinstance(need, PatchEntropy)}
        for need in late.difference(self.texts, self.seen):
            self._listener(self.block_of(need)).late.add(need)
        self.clear()

    def block_of(self, need: Need) -> int:
        """The encoder block a need names; negative layers count back from the block that feeds what is handed on."""
        if getattr(need, "last", False):
            return len(self.encoder.blocks) - 1
        layer = need.layer or 0
        block = layer + self.depth if layer < 0 else layer
        if not 0 <= block < self.depth:
            raise ValueError(
                f"the encoder's features come out of block {self.depth - 1}, so layer={layer} does not exist; "
                f"use 0 to {self.depth - 1}, or -1 to -{self.depth} counted from there."
            )
        return block

    def clear(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.reduction: Reduction | None = None
        self.size: Tensor | None = None
        self.order: Tensor | None = None
        self.score: Tensor | None = None
        self.mask: Tensor | None = None
        self.place: Place | None = None
        self.special: Tensor | None = None
        self.lengths: list[tuple[int, int]] = []
        self.patches = self.pictures = 0
        self.counts: list[int] = []
        self.start_mask: Tensor | None = None
        self.bare_place: Place | None = None
        self.history: list[tuple[int, Reduction]] = []
        self.variance: Tensor | None = None
        self.records: dict[Need, list[Tensor]] = defaultdict(list)
        self.records_at: dict[Need, Reduction | None] = {}

    # -- plugging in -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        model = self.encoder.model
        self.run.hook(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.run.hook(model.register_forward_hook(self._finish))
        blocks = self.encoder.blocks
        if self.stepped:
            for number, block in enumerate(blocks):
                self.run.stand_in(block, functools.partial(self._forward, number, block))
                self._listener(number)
        if self.stepped and self.encoder.pooling is not None:
            self.run.hook(self.encoder.pooling.register_forward_pre_hook(self._pool))
        if self.keep_special and self.encoder.prefix:
            self.run.hook(blocks[self.depth - 1].register_forward_hook(self._hear_special))
        for number, listener in self.listeners.items():
            self.run.taps.listen(self.encoder.attention(blocks[number]), listener)

    @aside
    def _pool(self, module: nn.Module, args: tuple) -> tuple:
        """The pooling head's token mask, for the tokens that are left."""
        return args if self.reduction is None else (args[0], self.mask, *args[2:])

    @aside
    def _hear_special(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.special = (output[0] if isinstance(output, tuple) else output)[:, : self.encoder.prefix]

    def _listener(self, block: int) -> _Listener:
        return self.listeners.setdefault(block, _Listener(self))

    # -- one forward ---------------------------------------------------------------------------------------------------

    @aside
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Start of the encoder's forward: fresh state, and a smaller picture where a method asks for one."""
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.clear()
        self.inputs = inputs
        if self.stepped:
            self.run.refuse_checkpointing(module, self.encoder.blocks[0])
        self._started_at = self.run.clock.now()
        if self.alone:
            self.run.clock.begin("encoder")
            self.run.clock.begin("selection")
            self.run.costs.clear()
        if self.encoder.packed:
            self._look(inputs)
            if self.only is None:
                return args, kwargs
            self.patches = inputs["hidden_states"].shape[0]
            self.inputs = self.encoder.shortened(inputs, self.only)
            return (), self.inputs
        album = Album.of(tuple(self.encoder.geometry(inputs)), inputs["pixel_values"].device)
        self.mask = self.start_mask = self._with_prefix_mask(self.encoder.token_mask(inputs))
        self.patches = self.mask.shape[1] - self.encoder.prefix if self.mask is not None else max(album.counts)
        self.pictures = inputs["pixel_values"].shape[0]
        self.counts = list(album.counts)
        self.bare_place = _widened(album.place, 0, self.patches - max(album.counts))
        self.place = behind(self.bare_place, self.encoder.prefix)
        for method in self.pixels:
            inputs = self._shrink_picture(method, inputs, len(album))
        self.inputs = inputs
        self._look(inputs)
        return (), inputs

    def _look(self, inputs: dict) -> None:
        """Record the signals that are read from the pictures themselves."""
        for need in self.seen:
            assert isinstance(need, PatchEntropy)
            with self.run.clock.measure("selection"):
                value = pixels.entropy(self.encoder.grey(inputs, need.mean, need.std))
            self.records[need].append(torch.nn.functional.pad(value, (self.encoder.prefix, 0)))
            self.records_at[need] = self.reduction

    @aside
    def _finish(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.run.clock.add("encoder", self._started_at)
        for need in self.texts:
            assert need.tower is not None
            with self.run.clock.measure("selection"):
                self.records[need].append(need.tower.similarity(output[0], need.questions, need.end, need.normed))
                self.records_at[need] = self.reduction
        if self.only is None:
            return None
        # the model splits what comes out by picture: lay it out on the full map
        group = len(self.only) // len(output.pooler_output)
        full = output.pooler_output.new_zeros(self.patches // group, output.pooler_output.shape[-1])
        output.pooler_output = full.index_copy(0, self.only[::group] // group, output.pooler_output)
        return output

    def _shrink_picture(self, method: Any, inputs: dict, pictures: int) -> dict:
        picture = inputs["pixel_values"]
        height, width = self.encoder.grid(picture)
        place = Place.grid(pictures, height, width, picture.device)
        blank = Tokens(picture.new_zeros(pictures, height * width, 1), place=place)
        with self.run.clock.measure("selection"):
            self.run.check_keep(method, height * width)
            grid = method.grid(height, width)
            step = method.reduce(blank)
            step = replace(step, index=step.index[:, : grid[0] * grid[1]], mask=None)
            small = self.encoder.smaller(inputs, method.picture, grid)
        self._advance(_shift(step, self.encoder.prefix), -1)
        self.run.costs.count("pixels", method, blank, step)
        return small

    def _with_prefix_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or self.encoder.prefix == 0:
            return mask
        return torch.nn.functional.pad(mask, (self.encoder.prefix, 0), value=True)

    def plan(self, patches: int) -> list[tuple[Method, list[Method | None]]]:
        """Every block method with its step at each block, for pictures of so many patches."""
        if patches not in self._plans:
            plans, count = [], patches
            for method in self.stepped:
                self.run.check_keep(method, count)
                plans.append((method, method.steps(count, self.depth)))
                count = method.promise(count, self.depth).count
            self._plans[patches] = plans
        return self._plans[patches]

    def _forward(self, number: int, block: nn.Module, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parts, points = self.encoder.parts(block), {method.point for method in self.stepped}

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x, args, kwargs = self._prepare(number, hidden_states, args, kwargs)
            mixed = parts.attention(parts.norm1(x), *args, **kwargs)
            mixed = mixed[0] if isinstance(mixed, tuple) else mixed
            x = parts.drop1(parts.scale1(mixed)) + x
            x = self._between(number, x)
            x = parts.drop2(parts.scale2(parts.mlp(parts.norm2(x)))) + x
            return self._step(number, "after", x) if "after" in points else x

        return forward

    @aside
    def _prepare(self, number: int, x: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
        """What comes into a block: methods that act before it do so, and masks are cut to the tokens that are left."""
        self._expect(number, x)
        x = self._step(number, "before", x)
        self.lengths.append((x.shape[1], x.shape[1]))
        args = tuple(self._trim(value) for value in args)
        return x, args, {name: self._trim(value) if name == "attention_mask" else value for name, value in kwargs.items()}

    @aside
    def _between(self, number: int, x: Tensor) -> Tensor:
        """Behind a block's attention."""
        x = self._step(number, "middle", x)
        self.lengths[-1] = (self.lengths[-1][0], x.shape[1])
        return x

    def _expect(self, number: int, x: Tensor) -> None:
        """Tell the block's listener what this block's own steps will ask for."""
        asked: set[Need] = set()
        for method, steps in self.plan(self._started(x) if number == 0 else self._start):
            step = steps[number] if number < len(steps) else None
            if step is not None and method.point != "before":
                asked |= {need for need in step.needs().values() if need.layer is None}
        self.listeners[number].here = asked

    def _started(self, x: Tensor) -> int:
        self._start = x.shape[1] - self.encoder.prefix
        return self._start

    @aside
    def _step(self, number: int, point: str, x: Tensor) -> Tensor:
        for method, steps in self.plan(self._start):
            step = steps[number] if number < len(steps) else None
            if step is None or method.point != point:
                continue
            with self.run.clock.measure("selection"):
                x = self._reduce(number, method, step, x)
        return x

    def _reduce(self, number: int, method: Method, step: Method, x: Tensor) -> Tensor:
        place = self.place
        if place is not None and self.reduction is not None:
            place = place.gather(self.reduction.index)
        tokens = Tokens(x, self.mask, None, self.size, self.encoder.prefix, place, self.order, self.score)
        listener = self.listeners[number]
        signals = {name: self._signal(need, listener) for name, need in step.needs().items()}
        if self.mask is not None and isinstance(getattr(method, "keep", None), float):
            quota = self._quota(number, method)
            signals |= {} if quota is None else {"quota": quota}
        reduction = step.reduce(tokens, signals)
        self.run.costs.count(method.site, method, tokens, reduction)
        after = reduction.apply(tokens)
        self.score = after.score
        if reduction.is_identity:
            return x
        # sizes are carried whether or not attention sees them: they weigh the mean of later merges
        self.size, self.order, self.mask = after.size, after.order, after.mask
        self._advance(reduction, number)
        if self.variance is not None:
            self.variance = self.variance.gather(1, reduction.index)
        return after.features

    def _signal(self, need: Need, listener: _Listener) -> Tensor:
        if not isinstance(need, PixelVariance):
            return listener.now[need]
        if self.variance is None:
            of_patches = pixels.variance(self.encoder.patches(self.inputs["pixel_values"]))
            self.variance = torch.nn.functional.pad(of_patches, (self.encoder.prefix, 0))
        return self.variance

    def _quota(self, number: int, method: Method) -> Tensor | None:
        """(B, 1) patches that pictures of different lengths keep at a block, each by the plan for its own length."""
        left = []
        for count in self.counts:
            for step in method.steps(count, self.depth)[: number + 1]:
                if step is not None and not hasattr(step, "keep"):  # its steps find their own counts
                    return None
                count = count if step is None else step.keep  # type: ignore[attr-defined]
            left.append([count])
        assert self.mask is not None
        return torch.tensor(left, device=self.mask.device)

    def _advance(self, step: Reduction, number: int) -> None:
        self.history.append((number, step))
        self.reduction = step if self.reduction is None else self.reduction.then(step)

    def _trim(self, mask: Any) -> Any:
        """An attention mask of the full sequence, cut to the tokens that are left."""
        if not isinstance(mask, Tensor) or mask.dim() != 4 or self.reduction is None:
            return mask
        index = self.reduction.index
        keys = gather(mask.expand(index.shape[0], -1, -1, -1).permute(0, 3, 1, 2), index).permute(0, 2, 3, 1)
        if keys.shape[2] == 1:
            return keys
        return gather(keys.transpose(1, 2), index).transpose(1, 2)

    # -- what later sites read -----------------------------------------------------------------------------------------

    def flat(self, need: Need) -> Tensor:
        """A recorded signal for every patch of the batch, in order: (patches, ...)."""
        if self.encoder.packed and need not in self.seen:
            calls = [_tokens_last(need, part) for part in self.records[need]]
            value = self.encoder.unpack(calls, self.inputs).movedim(-1, 1).flatten(0, 1)
            return value if self.only is None else value.new_zeros(self.patches, *value.shape[1:]).index_copy(0, self.only, value)
        value = _tokens_last(need, self.records[need][0]).movedim(-1, 1)
        at = self.records_at[need]
        if at is not None:
            value = _spread(value, at.index, self.patches + self.encoder.prefix)
        return value[:, self.encoder.prefix :].flatten(0, 1)

    @property
    def proportional(self) -> bool:
        return any(step is not None and step.proportional for _, steps in self.plan(self._start) for step in steps)


class _Listener(Listener):
    """Listens to the attention of one encoder block."""

    def __init__(self, site: EncoderSite) -> None:
        self.site = site
        self.late: set[Need] = set()
        self.here: set[Need] = set()
        self.now: dict[Need, Tensor] = {}

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        site = self.site
        bias = attention.bias(site.size, query.dtype) if site.size is not None and site.proportional else None
        if site.mask is not None and site.reduction is not None:
            hidden = torch.zeros_like(site.mask, dtype=query.dtype).masked_fill(~site.mask, torch.finfo(query.dtype).min)
            hidden = hidden[:, None, None]
            bias = hidden if bias is None else (bias + hidden).clamp(min=torch.finfo(query.dtype).min)
        return bias

    def record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, extra: dict[str, Any]) -> None:
        if not self.here and not self.late:
            return
        with self.site.run.clock.measure("selection"):
            real = self.site.mask
            self.now = {need: _measure(need, query, key, value, mask, real, scale) for need in self.here}
            for need in self.late:
                for part in self._calls(query, key, value, mask, extra):
                    self.site.records[need].append(_measure(need, *part, real, scale))
                self.site.records_at[need] = self.site.reduction

    def _calls(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """q, k, v and mask. Where all pictures of a packed encoder come in one call, it is split as if each had its own."""
        encoder, ends = self.site.encoder, extra.get("cu_seq_lens_q")
        if ends is not None:
            sizes = (ends[1:] - ends[:-1]).tolist()
        elif encoder.joint:
            sizes = [item.patches for item in encoder.geometry(self.site.inputs)]
        else:
            return [(query, key, value, mask)]
        parts = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
        return [(*part, None) for part in parts]


def _measure(
    need: Need, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, real: Tensor | None, scale: float
) -> Tensor:
    """One signal from one attention call."""
    if getattr(need, "joined", False):
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
        scale = query.shape[-1] ** -0.5
    first = None if mask is None else mask[:, :, :1]
    if isinstance(need, ClassAttention):
        return attention.rows(query[:, :, :1], key, scale, first, logits=need.logits)[:, :, 0]
    if isinstance(need, MeanAttention):
        return attention.rows(_mean_row(query, real), key, scale, first)[:, :, 0]
    if isinstance(need, ClassSimilarity):
        return attention.rows(value[:, :, :1], value, 1.0, first)[:, :, 0]
    if isinstance(need, ReceivedAttention):
        return attention.received(query, key, scale, real)
    if isinstance(need, AnchorAttention):
        return attention.anchored(query, key, need.threshold, scale, real)
    if isinstance(need, Keys):
        return key.mean(1)
    if isinstance(need, Values):
        return value.mean(1)
    raise TypeError(f"{need} cannot be read in an encoder.")


def _mean_row(query: Tensor, real: Tensor | None) -> Tensor:
    """(B, H, 1, d) the mean of the queries of real tokens."""
    if real is None:
        return query.float().mean(2, keepdim=True)
    shown = query.float().masked_fill(~real[:, None, :, None], 0)
    return shown.sum(2, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None, None]


def _tokens_last(need: Need, value: Tensor) -> Tensor:
    return value.transpose(1, 2) if value.dim() == 3 and (not need.heads or isinstance(need, TextSimilarity)) else value


def _spread(value: Tensor, index: Tensor, n: int) -> Tensor:
    out = value.new_zeros(value.shape[0], n, *value.shape[2:])
    shape = index.shape + (1,) * (value.dim() - 2)
    return out.scatter(1, index.reshape(shape).expand_as(value), value)


def behind(place: Place, prefix: int) -> Place:
    """The same places with special tokens in front, which stand nowhere (-1)."""
    return _widened(place, prefix, 0)


def _widened(place: Place, front: int, back: int) -> Place:
    """The same places with so many tokens more that stand nowhere."""
    if front == back == 0:
        return place
    fields = {
        name: torch.nn.functional.pad(value, (front, back), value=-1)
        for name, value in vars(place).items()
        if isinstance(value, Tensor)
    }
    return replace(place, **fields)


def _shift(step: Reduction, prefix: int) -> Reduction:
    """A reduction of patches alone as one that leaves special tokens in front untouched."""
    if prefix == 0:
        return step
    batch = step.index.shape[0]
    front = torch.arange(prefix, device=step.index.device).expand(batch, -1)
    index = torch.cat([front, step.index + prefix], 1)
    assign = torch.cat([front, torch.where(step.assign < 0, -1, step.assign + prefix)], 1)
    weight = None if step.weight is None else torch.nn.functional.pad(step.weight, (prefix, 0), value=1.0)
    return Reduction(index, assign, weight, prefix=prefix)
