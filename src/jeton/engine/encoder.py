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
from ..learned import Learned
from ..method import Method
from ..models import Encoder
from ..needs import (
    IN_ENCODER,
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
    Trained,
    Values,
)
from ..ops import attention, pixels
from ..ops.policy import policy_softmax
from ..place import Place
from ..tokens import Reduction, Tokens, gather
from .aside import aside
from .tap import Attention, Listener, add_bias

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
        self._names = list(inspect.signature(encoder.entrance.forward).parameters)
        self.keep_special = any(m.prefix_tokens for m in methods)
        self._plans: dict[int, list[tuple[Method, list[Method | None]]]] = {}
        self.texts = [need for need in late if isinstance(need, TextSimilarity)]
        self.seen = {need for need in late if isinstance(need, PatchEntropy)}
        for need in late.difference(self.texts, self.seen):
            self._listener(self.block_of(need)).late.add(need)
        self.averaged = encoder.averaged(run.model)
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
        self.memory: Tensor | None = None
        self.policy: Tensor | None = None
        self.softened: list[Tokens] = []
        self.mask: Tensor | None = None
        self.place: Place | None = None
        self.special: Tensor | None = None
        self.last: Tensor | None = None
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
        self.run.hook(self.encoder.entrance.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.run.hook(self.encoder.exit.register_forward_hook(self._finish))
        blocks = self.encoder.blocks
        if self.stepped:
            for number, block in enumerate(blocks):
                self.run.stand_in(block, functools.partial(self._forward, number, block))
                self._listener(number)
        if self.stepped and self.encoder.pooling is not None:
            self.run.hook(self.encoder.pooling.register_forward_pre_hook(self._pool))
        if self.averaged is not None:
            self.run.hook(blocks[-1].register_forward_hook(self._hear_last))
            self.run.hook(self.averaged.register_forward_pre_hook(self._average))
        if self.keep_special and self.encoder.prefix:
            self.run.hook(blocks[self.depth - 1].register_forward_hook(self._hear_special))
        for number, listener in self.listeners.items():
            self.run.taps.listen(self.encoder.attention(blocks[number]), listener, self.encoder.functional)

    @aside
    def _pool(self, module: nn.Module, args: tuple) -> tuple:
        """The pooling head's token mask, for the tokens that are left."""
        return args if self.reduction is None else (args[0], self.mask, *args[2:])

    @aside
    def _hear_special(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.special = features_of(output)[:, : self.encoder.prefix]

    @aside
    def _hear_last(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.last = features_of(output)

    @aside
    def _average(self, module: nn.Module, args: tuple) -> tuple | None:
        """The mean of all patches that a head is handed, each of the tokens left counting for what it stands for."""
        tokens = self.run.tokens
        if tokens is None and self.last is not None:  # the head comes before the encoder's output
            index = None if self.reduction is None else self.reduction.index
            tokens = Tokens(self.last, self.mask, index, self.size, self.encoder.prefix)
        if tokens is None or (tokens.size is None and tokens.mask is None and len(tokens) == tokens.prefix + self.patches):
            return None
        weight = tokens.real.float() if tokens.size is None else tokens.size.float() * tokens.real
        if not self.encoder.pools_special:
            weight = weight * (tokens.origin >= self.encoder.prefix)
        return (self.encoder.pooled(tokens.features, weight), *args[1:])

    def _listener(self, block: int) -> _Listener:
        return self.listeners.setdefault(block, _Listener(self))

    # -- one forward ---------------------------------------------------------------------------------------------------

    @aside
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Start of the encoder's forward: fresh state, and a smaller picture where a method asks for one."""
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        name = self.encoder.argument
        if name != "pixel_values":
            inputs["pixel_values"] = inputs.pop(name)
        self.clear()
        self.inputs = inputs
        if self.stepped:
            self.run.refuse_checkpointing(self.encoder.model, self.encoder.checkpointing)
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
        self.inputs = inputs = self.encoder.arranged(inputs)
        self._look(inputs)
        return (), {name if key == "pixel_values" else key: value for key, value in inputs.items()}

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
                self.records[need].append(need.tower.similarity(features_of(output), need.questions, need.end, need.normed))
                self.records_at[need] = self.reduction
        if self.only is None:
            return None
        # the model splits what comes out by picture: lay it out on the full map
        for name in self.encoder.outputs:
            made = getattr(output, name)
            setattr(output, name, self._laid_out(made) if isinstance(made, Tensor) else [self._laid_out(part) for part in made])
        return output

    def _laid_out(self, made: Tensor) -> Tensor:
        """What was made of the groups that stayed (g, D), on the full map, zero elsewhere."""
        assert self.only is not None
        group = len(self.only) // len(made)
        full = made.new_zeros(self.patches // group, made.shape[-1])
        return full.index_copy(0, self.only[::group] // group, made)

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
        parts, last = self.encoder.parts(block), number == self.depth - 1
        after = last or any(method.point == "after" for method in self.stepped)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x, args, kwargs = self._prepare(number, block, hidden_states, args, kwargs)
            mixed = parts.attention(parts.norm1(x), *args, **kwargs)
            mixed = mixed[0] if isinstance(mixed, tuple) else mixed
            x = parts.drop1(parts.scale1(mixed)) + x
            x = self._between(number, x)
            x = parts.drop2(parts.scale2(parts.mlp(parts.norm2(x)))) + x
            return self._finally(number, x) if after else x

        return forward

    @aside
    def _prepare(self, number: int, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
        """What comes into a block: methods that act before it do so, and masks are cut to the tokens that are left."""
        self._expect(number, x)
        x = self._step(number, "before", x)
        self.lengths.append((x.shape[1], x.shape[1]))
        args = tuple(self._trim(value) for value in args)
        return x, args, {name: self._trim(value) for name, value in self.encoder.handed(block, kwargs).items()}

    @aside
    def _between(self, number: int, x: Tensor) -> Tensor:
        """Behind a block's attention."""
        x = self._step(number, "middle", x)
        self.lengths[-1] = (self.lengths[-1][0], x.shape[1])
        return x

    @aside
    def _finally(self, number: int, x: Tensor) -> Tensor:
        """Behind a block."""
        x = self._step(number, "after", x)
        return self._conclude(x) if number == self.depth - 1 else x

    def _expect(self, number: int, x: Tensor) -> None:
        """Tell the block's listener what this block's own steps will ask for."""
        asked: set[Need] = set()
        for method, steps in self.plan(self._started(x) if number == 0 else self._start):
            step = steps[number] if number < len(steps) else None
            if step is not None and method.point != "before":
                asked |= {need for need in step.needs().values() if need.layer is None and isinstance(need, IN_ENCODER)}
        self.listeners[number].here = asked

    def _started(self, x: Tensor) -> int:
        self._start = x.shape[1] - self.encoder.prefix
        return self._start

    def _step(self, number: int, point: str, x: Tensor) -> Tensor:
        for method, steps in self.plan(self._start):
            step = steps[number] if number < len(steps) else None
            if step is None or method.point != point:
                continue
            with self.run.clock.measure("selection"):
                x = self._reduce(number, method, step, x)
        return x

    def _reduce(self, number: int, method: Method, step: Method, x: Tensor) -> Tensor:
        tokens = self._tokens(x)
        listener = self.listeners[number]
        signals = {name: self._signal(need, listener, method) for name, need in step.needs().items()}
        if self.run.train:
            return self._soften(method, step, tokens, signals)
        if self.mask is not None and not isinstance(getattr(method, "keep", None), int):
            quota = self._quota(number, method)
            signals |= {} if quota is None else {"quota": quota}
        reduction = step.reduce(tokens, signals)
        self.run.costs.count(method.site, method, tokens, reduction)
        after = reduction.apply(tokens)
        self.score, self.memory = after.score, after.memory
        if reduction.is_identity:
            return x
        # sizes are carried whether or not attention sees them: they weigh the mean of later merges
        self.size, self.order, self.mask = after.size, after.order, after.mask
        self._advance(reduction, number)
        if self.variance is not None:
            self.variance = self.variance.gather(1, reduction.index)
        return after.features

    def _tokens(self, x: Tensor) -> Tokens:
        place, index = self.place, None if self.reduction is None else self.reduction.index
        if place is not None and index is not None:
            place = place.gather(index)
        return Tokens(
            x, self.mask, index, self.size, self.encoder.prefix, place, self.order, self.score, self.memory, self.policy
        )

    def _soften(self, method: Method, step: Method, tokens: Tokens, signals: dict[str, Any]) -> Tensor:
        """A step in training: all tokens stay, and blocks see them by their policy from here on."""
        assert isinstance(step, Learned)
        after = step.soften(tokens, {**signals, "learned": self.run.modules_of(method)})
        self.size, self.order, self.score, self.memory = after.size, after.order, after.score, after.memory
        self.policy = after.policy
        if self.policy is not None and self.mask is not None:
            self.policy = self.policy * self.mask
        self.softened.append(replace(after, policy=self.policy))
        return after.features

    def _conclude(self, x: Tensor) -> Tensor:
        """Behind the last block: what a method hands on in place of the tokens that are left."""
        for method in self.stepped:
            if method.finishes:
                after = method.finish(self._tokens(x))
                self.reduction, self.mask = None, self.start_mask
                self.size, self.order, self.score, self.memory, self.policy = None, None, None, None, None
                x = after.features
        return x

    def _signal(self, need: Need, listener: _Listener, method: Method) -> Any:
        if isinstance(need, Trained):
            return self.run.modules_of(method)
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
                planned = count if step is None else getattr(step, "keep", None)
                if not isinstance(planned, int):  # its steps find their own counts
                    return None
                count = planned
            left.append([count])
        assert self.mask is not None
        return torch.tensor(left, device=self.mask.device)

    def _advance(self, step: Reduction, number: int) -> None:
        self.history.append((number, step))
        self.reduction = step if self.reduction is None else self.reduction.then(step)

    def _trim(self, value: Any) -> Any:
        """An attention mask or rotary tables of the full sequence, cut to the tokens that are left; anything else as it is."""
        if self.reduction is None:
            return value
        index = self.reduction.index
        if isinstance(value, tuple) and all(isinstance(part, Tensor) and part.dim() == 2 for part in value):
            return tuple(self._turned(part, index) for part in value)
        if not isinstance(value, Tensor) or value.dim() != 4:
            return value
        mask = value
        keys = gather(mask.expand(index.shape[0], -1, -1, -1).permute(0, 3, 1, 2), index).permute(0, 2, 3, 1)
        if keys.shape[2] == 1:
            return keys
        return gather(keys.transpose(1, 2), index).transpose(1, 2)

    def _turned(self, table: Tensor, index: Tensor) -> Tensor:
        """(B, 1, K, d) the rows of a rotary table (P, d) for the tokens left; special tokens it does not know are not turned."""
        still = self._start + self.encoder.prefix - table.shape[0]
        return table[index[:, still:] - still][:, None]

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
        if self.site.policy is not None:  # in training signals are read as if masked tokens had left
            mask = add_bias(mask, self.site.policy.detach().log()[:, None, None].to(query.dtype))
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

    def attend(self, original: Attention, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Any:
        """In training, attention under the policy."""
        policy = self.site.policy
        if policy is None:
            return None
        logits = attention.rows(query, key, extra.get("scaling"), self.bias(query, key), logits=True)
        weights = torch.nn.functional.dropout(policy_softmax(logits, policy).to(value.dtype), extra.get("dropout", 0.0))
        return (weights @ value).transpose(1, 2).contiguous(), weights


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
        return attention.rows(_mean_row(query, real), key, scale, _mean_mask(mask, real))[:, :, 0]
    if isinstance(need, ClassSimilarity):
        return attention.rows(value[:, :, :1], value, 1.0, first)[:, :, 0]
    if isinstance(need, ReceivedAttention):
        return attention.received(query, key, scale, real, bias=mask)
    if isinstance(need, AnchorAttention):
        return attention.anchored(query, key, need.threshold, scale, real, bias=mask)
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


def _mean_mask(mask: Tensor | None, real: Tensor | None) -> Tensor | None:
    """The mask of the mean query: a bias that differs by query is averaged over real tokens as the logits are."""
    if mask is None or mask.dtype == torch.bool or mask.shape[2] == 1:
        return None if mask is None else mask[:, :, :1]
    if real is None:
        return mask.float().mean(2, keepdim=True)
    shown = mask.float().masked_fill(~real[:, None, :, None], 0).sum(2, keepdim=True)
    return shown / real.sum(1).clamp(min=1)[:, None, None, None]


def features_of(output: Any) -> Tensor:
    """(B, N, D) the tokens of a module's output, which is or starts with them."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


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
