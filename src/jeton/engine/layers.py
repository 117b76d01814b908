"""The site `layer`: tokens leave in front of a language-model layer, for that layer and all later ones.

Caches of later layers are then shorter. Layer 0 stays whole, so the model's own counting of positions goes on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..method import Method
from ..needs import Entered, Need, PromptNumber
from ..ops import budget
from ..tokens import Tokens, gather
from .ahead import Ahead, is_ahead
from .aside import aside
from .flow import Cut, whole
from .hearing import Hearing
from .prompt import Prompt, padded
from .stage import Stage
from .words import prompt_number

Plan = list[list[tuple[Method, Method]]]
NOMINAL = 576  # tokens of an image, to learn in front of which layers a method acts before any image has been seen


class LayerSite:
    def __init__(self, prompt: Prompt, methods: list[Method]) -> None:
        self.prompt = prompt
        self.methods, self.depth = methods, len(prompt.view.layers)
        self._plans: dict[tuple[int, int], Plan] = {}
        self.start = NOMINAL
        self.first = [NOMINAL]
        self.hearing = Hearing(prompt, self._asked())
        self.counts: list[int] | None = None

    def plan(self, count: int, first: int) -> Plan:
        """For every layer, the methods that reduce in front of it, each with its step, for images of so many tokens that had
        `first` tokens before anything left."""
        if (count, first) not in self._plans:
            steps: Plan = [[] for _ in range(self.depth)]
            left = count
            for method in self.methods:
                n = first if method.of_all else left
                for layer, step in enumerate(method.steps(n, self.depth)):
                    if step is not None:
                        steps[layer].append((method, step))
                left = max(1, method.promise(n, self.depth).count)  # where none is left, later steps do nothing
            self._plans[count, first] = steps
        return self._plans[count, first]

    @property
    def steps(self) -> Plan:
        return self.plan(self.start, max(self.first))

    def attach(self) -> None:
        """Hook the layers from the first one in front of which something may leave."""
        view, run = self.prompt.view, self.prompt.run
        acting = [layer for layer, steps in enumerate(self.steps) if steps]
        if not acting:
            return
        first = min([*acting, *(layer for method in self.methods if (layer := method.shrinks(self.depth)) is not None)])
        run.hook(view.decoder.register_forward_pre_hook(self._fresh, with_kwargs=True))
        for number, layer in enumerate(view.layers):
            if number >= first:
                run.hook(layer.register_forward_pre_hook(self._in_front(number), with_kwargs=True))
        self.hearing.attach()  # behind those hooks: it hears of rotary embeddings that have been cut

    def _asked(self) -> dict[int, set[Need]]:
        """By layer what is read of it while it runs."""
        asked: dict[int, set[Need]] = {}
        for at, steps in enumerate(self.steps):
            for need in (need for _, step in steps for need in step.needs().values() if not is_ahead(need)):
                asked.setdefault(self._read_at(need, at), set()).add(need)
        return asked

    @staticmethod
    def _read_at(need: Need, layer: int) -> int:
        return layer - 1 if need.layer is None else need.layer

    @aside
    def _fresh(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        prompt, scene = self.prompt, self.prompt.scene
        prompt.stage = None
        if scene is not None:
            prompt.run.refuse_checkpointing(module, prompt.view.checkpointing)
        self.hearing.begin(kwargs.get("inputs_embeds"))
        self.start = NOMINAL if scene is None else scene.rows.slot.shape[1]
        self.first = [NOMINAL] if prompt.flow is None else prompt.flow.first
        self.counts = None if scene is None or scene.rows.mask is None else scene.rows.mask.sum(1).tolist()

    def _in_front(self, number: int) -> Any:
        @aside
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.steps[number] and self.prompt.flow is not None:
                hidden = self._thin(number, hidden, kwargs)
            else:
                self._pass(number, hidden)
            if self.prompt.stage is None:
                return None
            kwargs = {**kwargs, **self.prompt.stage.fit(kwargs, hidden)}
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _pass(self, number: int, hidden: Tensor) -> None:
        """Nothing leaves here, but this layer's cache may hold fewer of the earlier columns than the one before it."""
        prompt = self.prompt
        kept, cut = prompt.memory.layers.get(number), None
        if kept is None:
            return
        if prompt.flow is not None:
            cut = None if prompt.stage is None else prompt.stage.cut
            kept = kept.extended(prompt.held, prompt.total - prompt.held, Cut.nothing(hidden) if cut is None else cut)
            prompt.memory.layers[number] = kept
        prompt.stage = Stage(prompt, kept, cut)

    def _thin(self, number: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Let the methods of this layer decide, and go on with what they leave."""
        prompt, flow = self.prompt, self.prompt.flow
        assert flow is not None
        new = prompt.total - prompt.held
        with prompt.run.clock.measure("selection"):
            hidden = self._reduced(number, hidden, kwargs)
            made = flow.cut()
        known = prompt.memory.layers.get(number)
        if made is None and known is None and self.prompt.stage is None:
            return hidden
        made = Cut.nothing(hidden) if made is None else made
        hidden = gather(hidden, made.index)
        prompt.cut(made)
        cut = made if prompt.stage is None or prompt.stage.cut is None else prompt.stage.cut.then(made)
        kept = (whole(prompt.held, hidden) if known is None else known).extended(prompt.held, new, cut)
        prompt.memory.layers[number] = kept
        self.prompt.stage = Stage(prompt, kept, cut)
        prompt.run.costs.thinned(number, hidden.shape[1], cut.dropped)
        return hidden

    def _quota(self, method: Method, number: int) -> Tensor | None:
        """(R, 1) tokens that images of different lengths keep in front of a layer, each by the plan for its own length."""
        if self.counts is None:
            return None
        left = []
        for count, first in zip(self.counts, self.first, strict=True):
            for earlier in itertools.takewhile(lambda each: each is not method, self.methods):
                count = max(1, earlier.promise(first if earlier.of_all else count, self.depth).count)
            count = first if method.of_all else count
            for step in method.steps(count, self.depth)[: number + 1]:
                keep = None if step is None else getattr(step, "keep", None)
                if step is not None and keep is None:  # its steps find their own counts
                    return None
                count = count if keep is None else budget.count(keep, count)
            left.append([count])
        assert self.prompt.scene is not None
        return torch.tensor(left, device=self.prompt.scene.rows.slot.device)

    def _signal(self, number: int, ahead: Ahead | None, need: Need) -> Tensor:
        if ahead is not None and is_ahead(need):
            return ahead.signal(need)
        heard = self.hearing.signal(self._read_at(need, number), need)
        if heard is not None:
            return heard
        flow = self.prompt.flow
        assert flow is not None
        if isinstance(need, PromptNumber):
            return prompt_number(flow)
        if isinstance(need, Entered):
            return torch.tensor(self.counts or [self.start] * len(flow.at), device=flow.at.device)[:, None]
        return self.prompt.encoded(need, 0)

    def _ahead(self, number: int, hidden: Tensor, kwargs: dict) -> Ahead:
        fitted = kwargs if self.prompt.stage is None else {**kwargs, **self.prompt.stage.fit(kwargs, hidden)}
        return Ahead(self.prompt, number, hidden, fitted["position_embeddings"], fitted.get("attention_mask"))

    def _reduced(self, number: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Merged tokens are written where their representative stands."""
        prompt, flow = self.prompt, self.prompt.flow
        assert flow is not None
        if not flow.at.shape[1]:
            return hidden
        flat = padded(hidden.flatten(0, 1))
        tokens = prompt.tokens(flat[flow.at])
        for method, step in self.steps[number]:
            ahead = self._ahead(number, hidden, kwargs) if any(map(is_ahead, step.needs().values())) else None
            signal = functools.partial(self._signal, number, ahead)
            if step.zeroes:
                self._zero(kwargs.get("past_key_values"), number - 1, step, tokens, signal)
                continue
            tokens = prompt.reduce(method, step, tokens, "layer", signal, self._quota(method, number))
        if tokens.size is None:
            return hidden
        flat = flat.index_put((flow.at.flatten(),), tokens.features.flatten(0, 1).to(flat.dtype))
        return flat[:-1].view_as(hidden)

    def _zero(self, cache: Any, number: int, step: Method, tokens: Tokens, signal: Callable[[Need], Tensor]) -> None:
        """Keys and values of a layer that has run become zero where tokens stood that the step would drop."""
        prompt, flow = self.prompt, self.prompt.flow
        assert flow is not None
        if cache is None:
            return
        layer = cache.layers[number]
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"{prompt.run.spec} writes zeros into the cache, which jeton does in a DynamicCache of plain layers; this one "
                f"has {type(layer).__name__}. Leave out cache_implementation."
            )
        gone = step.reduce(tokens, {name: signal(need) for name, need in step.needs().items()}).assign < 0
        zero = torch.zeros(flow.layout.batch * flow.length + 1, dtype=torch.bool, device=gone.device)
        zero = zero.index_put((flow.at.flatten(),), gone.flatten())[:-1].view(flow.layout.batch, 1, flow.length, 1)
        zero = torch.nn.functional.pad(zero, (0, 0, layer.keys.shape[2] - flow.length, 0))
        layer.keys, layer.values = (states.masked_fill(zero, 0) for states in (layer.keys, layer.values))
