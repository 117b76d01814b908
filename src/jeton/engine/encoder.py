"""Methods inside a vision encoder: the sites `pixels` and `block`, and the signals that later sites read from it.

Blocks are run through one generic pre-norm forward that stands in for the layer's own for the time of a run.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layout import Album
from ..learned import Learned
from ..method import Method, Unsupported
from ..models import Encoder
from ..needs import (
    IN_ENCODER,
    OF_OUTPUT,
    Need,
    PatchEntropy,
    PixelVariance,
    Trained,
)
from ..ops import pixels
from ..place import Place
from ..tokens import Reduction, Tokens
from .aside import aside, stand_in
from .head import HeadSite
from .listening import BlockListener
from .readings import features_of, of_output, restored, spread, tokens_last
from .standing import Standing

if TYPE_CHECKING:
    from .run import Run


class EncoderSite(Standing):
    """One encoder under a run. `depth`: how many of its blocks feed what is handed on. `only`: the patches a packed encoder is to
    run on, None for all."""

    def __init__(self, run: Run, encoder: Encoder, depth: int, methods: list[Method], late: set[Need], alone: bool) -> None:
        self.run, self.encoder, self.depth, self.alone = run, encoder, depth, alone
        droppers = [m for m in methods if m.site == "pixels" and not m.resizes]
        self.pixels = [m for m in methods if m.site == "pixels" and m.resizes]
        self.stepped = [m for m in methods if m.site in ("block", "attention")]
        if not encoder.packed:  # patches leave in front of block 0; those of a packed encoder have left before it runs
            self.stepped = droppers + self.stepped
        self.only: Tensor | None = None
        self.listeners: dict[int, BlockListener] = {}
        self._names = list(inspect.signature(encoder.entrance.forward).parameters)
        self.keep_special = any(m.prefix_tokens for m in methods)
        self._plans: dict[int, list[tuple[Method, list[Method | None]]]] = {}
        self.outputs = [need for need in late if isinstance(need, OF_OUTPUT)]
        self.seen = {need for need in late if isinstance(need, PatchEntropy)}
        for need in late.difference(self.outputs, self.seen):
            self._listener(self.block_of(need)).late.add(need)
        self.head = HeadSite(self)
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
        self.anew()
        self.head.last = None
        self.inputs: dict[str, Any] = {}
        self.softened: list[Tokens] = []
        self.imitated: list[Tensor] = []
        self.special: Tensor | None = None
        self.lengths: list[tuple[int, int]] = []
        self.patches = self.pictures = 0
        self.counts: list[int] = []
        self.bare_place: Place | None = None
        self.seen_by: dict[str, int] = {}
        self.looked: dict[int, tuple[int, bool]] = {}
        self.records: dict[Need, list[Tensor]] = defaultdict(list)
        self.records_at: dict[Need, Reduction | None] = {}
        self.undone: set[Need] = set()

    # -- plugging in -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self.run.hook(self.encoder.entrance.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.run.hook(self.encoder.exit.register_forward_hook(self._finish))
        blocks = self.encoder.blocks
        if self.stepped:
            for number, block in enumerate(blocks):
                self.run.stand_in(block, functools.partial(self._forward, number, block))
                self._listener(number)
        self.head.attach()
        if self.keep_special and self.encoder.prefix:
            self.run.hook(blocks[self.depth - 1].register_forward_hook(self._hear_special))
        for number, listener in self.listeners.items():
            self.run.taps.listen(self.encoder.attention(blocks[number]), listener, self.encoder.functional)

    @aside
    def _hear_special(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.special = features_of(output)[:, : self.encoder.prefix]

    def _listener(self, block: int) -> BlockListener:
        return self.listeners.setdefault(block, BlockListener(self))

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
        self.bare_place = _widened(replace(album.place, window=self.encoder.window), 0, self.patches - max(album.counts))
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
        for need in self.outputs:
            with self.run.clock.measure("selection"):
                self.records[need].append(of_output(need, features_of(output)))
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
        self._advance(replace(step.behind(self.encoder.prefix), mask=None), -1)
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
                plans.append((method, self._steps(method, count)))
                count = method.promise(count, self.depth).count
            self._plans[patches] = plans
        return self._plans[patches]

    def _steps(self, method: Method, count: int) -> list[Method | None]:
        return (
            method.lessons(count, self.depth)
            if self.run.train and isinstance(method, Learned)
            else method.steps(count, self.depth)
        )

    def _forward(self, number: int, block: nn.Module, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parts = self.encoder.parts(block)

        @stand_in
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            hidden_states = hidden_states.flatten(1, 2) if self.encoder.maps else hidden_states
            self._prepare(number, hidden_states)

            @stand_in
            def attend(y: Tensor, call: Callable[..., Any] = parts.attention) -> Tensor:
                given, handed = self._handed(block, args, kwargs)
                mixed = self.encoder.attend(block, call, y, self.lattice, given, handed)
                return mixed[0] if isinstance(mixed, tuple) else mixed

            def look(x: Tensor) -> None:
                attend(parts.norm1(x), parts.attention.forward)

            x = self._step(number, "before", hidden_states, look)
            around = self._around(number, x)
            listener = self.listeners[number]
            with listener.ahead(parts.attention):  # no name for what a half gives: it would be held until the block is through
                x = parts.add(x, parts.drop1(parts.scale1(self._half("attention", around, parts.norm1(x), attend, listener))))
            x = self._step(number, "middle", x)
            x = parts.add(x, parts.drop2(parts.scale2(self._half("mlp", around, parts.norm2(x), parts.mlp, listener))))
            self.lengths.append((self.seen_by["attention"], self.seen_by["mlp"]))
            x = self._step(number, "after", x)
            x = self._conclude(x) if number == self.depth - 1 else x
            return x.unflatten(1, self.lattice[:2]) if self.lattice is not None else x

        return forward

    @aside
    def _handed(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A block's further arguments, cut to the tokens that are left."""
        handed = self.encoder.handed(block, kwargs)
        return tuple(self._trim(value) for value in args), {name: self._trim(value) for name, value in handed.items()}

    @aside
    def _prepare(self, number: int, x: Tensor) -> None:
        """Tell the block's listener what this block's own steps will ask for."""
        asked: set[Need] = set()
        for _, step in self._at(number, x):
            if step.point != "before":
                asked |= {need for need in step.needs().values() if need.layer is None and isinstance(need, IN_ENCODER)}
        self.listeners[number].here, self.listeners[number].kept = asked, None
        self._look_away(number, x)

    def _look_away(self, number: int, x: Tensor) -> None:
        """Tell the block's listener which method says what its queries see."""
        masks: list[tuple[Learned, dict[str, Any]]] = []
        for method, steps in self.plan(self._start):
            step = steps[number] if number < len(steps) else None
            if method.site == "attention" and isinstance(step, Learned):
                masks.append((step, {"learned": self.run.modules_of(method)}))
        self.listeners[number].masks = masks

    def _at(self, number: int, x: Tensor | None = None) -> list[tuple[Method, Method]]:
        """Methods with what they do at this block."""
        plans = self.plan(self._start if x is None or number else self._started(x))
        return [(method, step) for method, steps in plans if number < len(steps) and (step := steps[number]) is not None]

    def _started(self, x: Tensor) -> int:
        self._start = x.shape[1] - self.encoder.prefix
        return self._start

    @aside
    def _step(self, number: int, point: str, x: Tensor, look: Callable[[Tensor], None] | None = None) -> Tensor:
        for method, step in self._at(number):
            if step.point != point or step.around:
                continue
            if look is not None:
                self._look_ahead(number, step, x, look)
            with self.run.clock.measure("selection"):
                x = self._undo(number, method, x) if step.undoes else self._reduce(number, method, step, x)
        return x

    def _look_ahead(self, number: int, step: Method, x: Tensor, look: Callable[[Tensor], None]) -> None:
        """What a step in front of a block asks of its attention: queries and keys of the tokens as they are."""
        asked = {need for need in step.needs().values() if need.layer is None and isinstance(need, IN_ENCODER)}
        if asked or step.ahead:
            with nullcontext() if step.ahead else self.run.clock.measure("selection"):  # else the block attends with what is seen
                self.listeners[number].look(asked, step.ahead, self.encoder.attention(self.encoder.blocks[number]), look, x)
            self.looked[number] = (x.shape[1], step.ahead)

    # -- fewer tokens for a while --------------------------------------------------------------------------------------

    @aside
    def _around(self, number: int, x: Tensor) -> list[tuple[Method, Reduction]]:
        """What steps that are undone behind each half of this block decide, on the tokens in front of it."""
        decided = []
        for method, step in self._at(number):
            if step.around:
                with self.run.clock.measure("selection"):
                    _, reduction = self._decide(number, method, step, x)
                if not reduction.is_identity:
                    decided.append((step, reduction))
        return decided

    @stand_in
    def _half(
        self,
        half: str,
        around: list[tuple[Method, Reduction]],
        x: Tensor,
        run: Callable[[Tensor], Tensor],
        listener: BlockListener,
    ) -> Tensor:
        """One half of a block, run on fewer tokens where a step stands around it; its result, and what was heard, on all."""
        held, chosen = self._state(), [(step, reduction) for step, reduction in around if half in step.around]
        if not chosen:
            self.seen_by[half] = x.shape[1]
            return run(x)
        with self.run.clock.measure("selection"):
            for step, reduction in chosen:
                after = reduction.apply(Tokens(x, self.mask, None, self.size, self.encoder.prefix))
                size = self.size if self.size is None else self.size.gather(1, reduction.index)
                x, self.mask, self.size, self.lent = after.features, after.mask, after.size if step.proportional else size, True
                self.reduction = reduction if self.reduction is None else self.reduction.then(reduction)
                listener.reduced(reduction)
        self.seen_by[half] = x.shape[1]
        before, listener.now = listener.now, {}
        x = run(x)
        with self.run.clock.measure("selection"):
            for _, reduction in reversed(chosen):
                x = reduction.restore(Tokens(x)).features
                listener.now = {need: restored(value, need, reduction) for need, value in listener.now.items()}
        listener.now = {**before, **listener.now}
        self._set(held)
        return x

    # -- one reduction -------------------------------------------------------------------------------------------------

    def _decide(self, number: int, method: Method, step: Method, x: Tensor) -> tuple[Tokens, Reduction]:
        tokens = self.tokens(x)
        listener = self.listeners[number]
        signals = {name: self._signal(need, listener, method) for name, need in step.needs().items()}
        if self.mask is not None and not isinstance(getattr(method, "keep", None), int):
            quota = self._quota(number, method)
            signals |= {} if quota is None else {"quota": quota}
        reduction = step.reduce(tokens, signals)
        self.run.costs.count(method.site, method, tokens, reduction)
        return tokens, reduction

    def _reduce(self, number: int, method: Method, step: Method, x: Tensor) -> Tensor:
        if self.run.train and step.masking:  # type: ignore[attr-defined]
            return self._soften(number, method, step, x)
        tokens, reduction = self._decide(number, method, step, x)
        after, before = reduction.apply(tokens), self._state()
        self.score, self.memory = after.score, after.memory
        if reduction.is_identity:
            return x
        if method.restores:
            self.held[id(method)] = (len(self.history), before)
            self.lent = True
        self.listeners[number].reduced(reduction)
        # sizes are carried whether or not attention sees them: they weigh the mean of later merges
        self.size, self.order, self.mask = after.size, after.order, after.mask
        self._advance(reduction, number)
        if self.variance is not None:
            self.variance = self.variance.gather(1, reduction.index)
        return after.features

    def _soften(self, number: int, method: Method, step: Method, x: Tensor) -> Tensor:
        """A step in training: all tokens stay, and blocks see them by their policy from here on."""
        assert isinstance(step, Learned)
        tokens, listener = self.tokens(x), self.listeners[number]
        signals = {name: self._signal(need, listener, method) for name, need in step.needs().items()}
        after = step.soften(tokens, {**signals, "learned": self.run.modules_of(method)})
        self.size, self.order, self.score, self.memory = after.size, after.order, after.score, after.memory
        self.policy = after.policy
        if self.policy is not None and self.mask is not None:
            self.policy = self.policy * self.mask
        self.softened.append(replace(after, policy=self.policy))
        return after.features

    @aside
    def _conclude(self, x: Tensor) -> Tensor:
        """Behind the last block: what a method hands on in place of the tokens that are left."""
        for method in self.stepped:
            if method.finishes:
                after = method.finish(self.tokens(x))
                self.forget()
                x = after.features
        return self._full(x) if self.run.restore and self.reduction is not None else x

    def _full(self, x: Tensor) -> Tensor:
        """Every patch of the pictures again, with the features of the token it went to."""
        assert self.reduction is not None
        with self.run.clock.measure("selection"):
            back = self.reduction.restore(self.tokens(x))
            lost = ~back.real if self.start_mask is None else ~back.real & self.start_mask
            if bool(lost.any()):  # known only now: a method may merge in one block and drop in another
                raise Unsupported(
                    f"{self.run.spec} drops patches inside the encoder, so there is nothing to restore them from; use a method "
                    f"that merges, e.g. tome, pitome or dymu, or leave out restore=True."
                )
        self.forget()
        return back.features

    def _signal(self, need: Need, listener: BlockListener, method: Method) -> Any:
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
            for other in self.stepped[: self.stepped.index(method)]:
                count = other.promise(count, self.depth).count
            for step in method.steps(count, self.depth)[: number + 1]:
                planned = count if step is None else getattr(step, "keep", None)
                if not isinstance(planned, int):  # its steps find their own counts
                    return None
                count = planned
            left.append([count])
        assert self.mask is not None
        return torch.tensor(left, device=self.mask.device)

    # -- what later sites read -----------------------------------------------------------------------------------------

    def flat(self, need: Need) -> Tensor:
        """A recorded signal for every patch of the batch, in order: (patches, ...)."""
        if self.encoder.packed and need not in self.seen:
            calls = [tokens_last(need, part) for part in self.records[need]]
            value = self.encoder.unpack(calls, self.inputs).movedim(-1, 1).flatten(0, 1)
            return value if self.only is None else value.new_zeros(self.patches, *value.shape[1:]).index_copy(0, self.only, value)
        value, at = self.records[need][0], self.records_at[need]
        back = need in self.undone or self.run.restore
        if at is not None and back:
            value = restored(value, need, at)
        value = tokens_last(need, value).movedim(-1, 1)
        if at is not None and not back:
            value = spread(value, at.index, self.patches + self.encoder.prefix)
        return value[:, self.encoder.prefix :].flatten(0, 1)

    @property
    def proportional(self) -> bool:
        return any(step is not None and step.proportional for _, steps in self.plan(self._start) for step in steps)


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
