"""The site `layer`: tokens leave in front of a language-model layer, for that layer and all later ones.

Caches of later layers are then shorter. Layer 0 stays whole, so the model's own counting of positions goes on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..method import Method
from ..needs import (
    Entered,
    LastAttention,
    LastSimilarity,
    LayerValues,
    Need,
    NeuronCounts,
    Neurons,
    PageRank,
    PromptNumber,
    RaterRank,
    TextAttention,
)
from ..ops import attention, budget, neurons
from ..ops.pagerank import importance, pagerank
from ..tokens import Tokens, gather
from .ahead import Ahead, Heard, is_ahead, row_mask
from .aside import aside
from .entrance import pick
from .flow import Cut, Kept, whole
from .masks import hidden as hidden_columns
from .masks import looking_back, taken
from .prompt import Prompt, padded
from .raters import Raters
from .tap import Listener
from .words import prompt_number

Plan = list[list[tuple[Method, Method]]]
NOMINAL = 576  # tokens of an image, to learn in front of which layers a method acts before any image has been seen


@dataclass
class Stage:
    """What the layers from here on hold. kept: their cache columns, as columns of the entrance. cut: which of the new columns
    are left; None when this forward brings no pictures."""

    prompt: Prompt
    kept: Kept
    cut: Cut | None = None
    fitted: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    rotary: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def fit(self, kwargs: dict, hidden: Tensor) -> dict:
        """The layer's arguments, cut to the columns that are left."""
        changed: dict[str, Any] = {"attention_mask": self._mask(kwargs.get("attention_mask"), hidden)}
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = self._embeddings(kwargs["position_embeddings"], hidden)
        if isinstance(kwargs.get("position_ids"), Tensor) and self.cut is not None:
            changed["position_ids"] = pick(kwargs["position_ids"], self.cut.index)
        return changed

    def _embeddings(self, given: tuple[Tensor, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.cut is None and not self.prompt.run.compact:
            return given
        if id(given) not in self.rotary:  # layers of one kind are given the same
            self.rotary[id(given)] = given, self._renumbered(hidden) if self.prompt.run.compact else self._gathered(given)
        return self.rotary[id(given)][1]

    def _gathered(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.cut is not None
        index = self.cut.index
        cos, sin = (gather(part.expand(index.shape[0], -1, -1), index) for part in given)
        return cos, sin

    def _renumbered(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.prompt.ids
        assert ids is not None
        if self.cut is None:
            ids = ids - self.kept.dropped
        else:  # kept.dropped counts this forward's losses too: take those out, and count them column by column
            ids = pick(ids, self.cut.index) - self.cut.before - (self.kept.dropped - self.cut.dropped)
        return self.prompt.view.rotary(hidden, ids)

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        known = self.fitted.get(id(mask))
        if known is None:
            known = (mask, self._cut(mask, hidden))
            self.fitted[id(mask)] = known
        return known[1]

    def _cut(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        columns, real = self.kept.columns(self.prompt.total), self.kept.real(self.prompt.total)
        if mask is None:
            return None if real is None else self._built(real, hidden)
        if mask.dim() == 2:
            cut = mask.gather(1, columns)
            return cut if real is None else cut * real.to(cut.dtype)
        return taken(mask, None if self.cut is None else self.cut.index, columns, real, hidden.shape[1])

    def _built(self, real: Tensor, hidden: Tensor) -> Tensor:
        """A causal mask where the model left it to its kernel, but samples now differ in length."""
        if "flash" in self.prompt.view.decoder.config._attn_implementation:
            return real.long()
        return hidden_columns(looking_back(hidden.shape[1], real), real)


class LayerSite:
    def __init__(self, prompt: Prompt, methods: list[Method]) -> None:
        self.prompt = prompt
        self.methods, self.depth = methods, len(prompt.view.layers)
        self._plans: dict[tuple[int, int], Plan] = {}
        self.start = NOMINAL
        self.first = [NOMINAL]
        self.heard: dict[tuple[int, Need], Heard] = {}
        self.fired: dict[tuple[int, float], Tensor] = {}
        self.raters: dict[str, Raters] = {}
        # by layer and need: (R, L), where visual tokens stood, and of how many columns
        self.rated: dict[tuple[int, TextAttention], tuple[Tensor, Tensor, int]] = {}
        self.ranks: dict[tuple[int, str], Tensor] = {}
        self.rotary: tuple[Tensor, Tensor] | None = None  # of the layer that runs, where a listener asks for it
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
        listened: dict[int, set[Need]] = {}
        for at, steps in enumerate(self.steps):
            for need in (need for _, step in steps for need in step.needs().values() if not is_ahead(need)):
                listened.setdefault(self._read_at(need, at), set()).add(need)
        asked = [need for needs in listened.values() for need in needs]
        rated = {need.raters for need in asked if isinstance(need, TextAttention | RaterRank)}
        run.hook(view.decoder.register_forward_pre_hook(functools.partial(self._fresh, rated), with_kwargs=True))
        for number, layer in enumerate(view.layers):
            here = listened.get(number, set())
            if any(
                isinstance(need, LastAttention | LastSimilarity | LayerValues | PageRank | TextAttention | RaterRank)
                for need in here
            ):
                run.taps.listen(view.attention(layer), _Listener(self, number, here))
            tops = {need.top for need in here if isinstance(need, Neurons | NeuronCounts)}
            if tops:
                run.hook(view.gated(layer).down.register_forward_pre_hook(functools.partial(self._fire, number, tops)))
            if number >= first:
                run.hook(layer.register_forward_pre_hook(self._in_front(number), with_kwargs=True))
            if any(isinstance(need, TextAttention) and need.unbiased for need in here):
                run.hook(layer.register_forward_pre_hook(self._turned, with_kwargs=True))

    @aside
    def _turned(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.rotary = kwargs["position_embeddings"]

    @staticmethod
    def _read_at(need: Need, layer: int) -> int:
        return layer - 1 if need.layer is None else need.layer

    @aside
    def _fire(self, number: int, tops: set[float], module: nn.Module, args: tuple) -> None:
        """The gated activations of a layer's MLP are on their way into its last projection."""
        if self.prompt.flow is not None:
            with self.prompt.run.clock.measure("selection"):
                self.fired.update({(number, top): neurons.positive(args[0], top) for top in tops})

    @aside
    def _fresh(self, rated: set[str], module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.prompt.stage = None
        for old in (self.heard, self.fired, self.rated, self.ranks, self.raters):
            old.clear()  # type: ignore[attr-defined]
        if self.prompt.scene is not None:
            self.prompt.run.refuse_checkpointing(module, self.prompt.view.checkpointing)
        prompt, scene = self.prompt, self.prompt.scene
        if rated and prompt.flow is not None:
            with prompt.run.clock.measure("selection"):
                seen = (prompt.flow, kwargs["inputs_embeds"], prompt.real)
                self.raters.update({which: Raters.choose(*seen, which) for which in rated})
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
        assert self.prompt.flow is not None
        found, flow = self.heard.get((self._read_at(need, number), need)), self.prompt.flow
        if found is not None:
            signal = found.over(flow)
            return signal if need.heads else signal.movedim(1, -1) if isinstance(need, LayerValues) else signal[:, 0]
        if isinstance(need, PromptNumber):
            return prompt_number(flow)
        if isinstance(need, TextAttention):
            rated, columns, length = self.rated[self._read_at(need, number), need]
            at = columns.gather(1, flow.scene.rows.slot)
            return rated.gather(1, (at % length).clamp(max=rated.shape[1] - 1))
        if isinstance(need, RaterRank):
            return self.ranks[self._read_at(need, number), need.raters]
        at = flow.at.clamp(max=flow.layout.batch * flow.length - 1)
        sample, column = at // flow.length, at % flow.length
        if isinstance(need, Entered):
            return torch.tensor(self.counts or [self.start] * len(at), device=at.device)[:, None]
        if isinstance(need, NeuronCounts):
            return neurons.counts(self.fired[self._read_at(need, number), need.top], self.prompt.real)[sample[:, 0]]
        if isinstance(need, Neurons):
            fired = self.fired[self._read_at(need, number), need.top]
            if need.token is None:
                return fired[sample, column]
            last = self.prompt.last
            last = torch.full_like(sample[:, 0], fired.shape[1] - 1) if last is None else last[sample[:, 0]]
            return fired[sample[:, 0], (last + 1 - need.token).clamp(min=0)]
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


class _Listener(Listener):
    """Hears the attention of one layer while pictures come in: the last token's, that of the text, its PageRank, or values."""

    def __init__(self, site: LayerSite, number: int, needs: set[Need]) -> None:
        self.site, self.number, self.needs = site, number, needs
        self.kinds = set(map(type, needs))
        self.text = [need for need in needs if isinstance(need, TextAttention)]
        self.ranks = [need for need in needs if isinstance(need, RaterRank)]

    def record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, extra: dict[str, Any]) -> None:
        prompt = self.site.prompt
        if prompt.flow is None:
            return
        past = key.shape[2] - query.shape[2]
        with prompt.run.clock.measure("selection"):
            cut = None if prompt.stage is None else prompt.stage.cut
            asked = {(need.raters, need.unbiased, need.strongest): None for need in self.text}
            for which, unbiased, strongest in {**asked, **{(need.raters, False, None): None for need in self.ranks}}:
                needs = [
                    each for each in self.text if (each.raters, each.unbiased, each.strongest) == (which, unbiased, strongest)
                ]
                plain = not unbiased and strongest is None
                *both, rank = self.site.raters[which].attention(
                    query,
                    key,
                    mask,
                    scale,
                    prompt.flow,
                    cut,
                    peaks=any(need.peak for need in needs),
                    ranked=plain and any(need.raters == which for need in self.ranks),
                    ones=self._ones(query) if unbiased else None,
                    strongest=strongest,
                    softcap=extra.get("softcap"),
                )
                if rank is not None:
                    self.site.ranks[self.number, which] = rank
                for need in needs:
                    seen = both[need.peak]
                    self.site.rated[self.number, need] = (seen[:, past:], prompt.flow.columns, prompt.flow.length)
            for need in self.needs:
                if isinstance(need, LayerValues):
                    self._hear(need, value[:, :, past:].mean(1).transpose(1, 2))
                elif isinstance(need, PageRank):
                    self._hear(need, self._ranks(need, query, key, mask, scale, extra.get("softcap"))[:, None])
            if LastAttention not in self.kinds and LastSimilarity not in self.kinds:
                return
            # (B,) the last token, among the new ones
            last = query.new_full((query.shape[0],), query.shape[2] - 1, dtype=torch.long) if prompt.last is None else prompt.last
            if mask is not None:
                mask = mask[:, None, None].bool() if mask.dim() == 2 else _row(mask, last)
            softcap = extra.get("softcap")
            for kind, states, others, at, cap in (
                (LastAttention, query, key, last, softcap),
                (LastSimilarity, value, value, last + past, None),
            ):
                if kind in self.kinds:
                    rows = attention.rows(_row(states, at), others, scale, mask, softcap=cap)[:, :, 0]
                    for need in self.needs:
                        if isinstance(need, kind):
                            self._hear(need, rows, past)

    def _ones(self, query: Tensor) -> Tensor:
        """(B, L, d) a vector of ones, rotated to the position of every column of this forward."""
        view, rotary = self.site.prompt.view, self.site.rotary
        assert rotary is not None
        cos, sin = (part.float().expand(query.shape[0], -1, -1) for part in rotary)
        ones = torch.ones_like(query[:, :1], dtype=torch.float32)
        return view.rotated(view.layers[self.number], ones, cos, sin)[:, 0]

    def _hear(self, need: Need, rows: Tensor, past: int = 0) -> None:
        assert self.site.prompt.flow is not None
        self.site.heard[self.number, need] = Heard(rows, past, self.site.prompt.flow)

    @torch.no_grad()
    def _ranks(
        self, need: PageRank, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """(B, L) over this forward's columns. Keys cached before only receive, as nothing attends to what is behind it."""
        batch, heads, length, _ = query.shape
        past, everyone = key.shape[2] - length, torch.arange(batch, device=query.device)
        real = self.site.prompt.real
        real = query.new_ones(batch, length, dtype=torch.bool) if real is None else real

        def rows(begin: int, stop: int) -> Tensor:
            keys = key[:, :, : past + stop]
            if mask is None or mask.dim() == 2:
                column = torch.arange(begin, stop, device=key.device).expand(batch, -1)
                seen = row_mask(None if mask is None else mask[:, : past + stop], keys, past, everyone, column)
            else:
                seen = mask[:, :, begin:stop, : past + stop]
            cap = None if softcap is None else softcap / need.temperature
            share = attention.rows(query[:, :, begin:stop], keys, scale / need.temperature, seen, softcap=cap)[..., past:]
            return share.masked_fill(~real[:, None, begin:stop, None], 0)  # a row of padding may see no key at all

        return importance(pagerank(rows, real / real.sum(1, keepdim=True), heads, need.rounds, need.block))


def _row(x: Tensor, at: Tensor) -> Tensor:
    """(B, H, 1, n) one row of x (B or 1, H, L, n) for each sample, at (B,)."""
    return gather(x.expand(at.shape[0], -1, -1, -1).transpose(1, 2), at[:, None]).transpose(1, 2)
