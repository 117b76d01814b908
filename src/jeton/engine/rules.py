"""The site `rule`: how language-model layers run for some tokens. Layers are not replaced: for the time of a run an instance's
forward stands in, which runs the layer's own parts, or the layer's own forward where nothing is to change."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..method import Method, Unsupported
from ..models import Parts
from ..models.base import Gated
from ..needs import CoreNeurons, Skip
from ..ops import neurons
from ..ops.flops import block_flops
from .aside import aside, stand_in
from .flow import Flow
from .prompt import Prompt


class RuleSite:
    def __init__(self, prompt: Prompt, methods: list[Method]) -> None:
        self.prompt = prompt
        self.skips: dict[int, Skip] = {}
        self.cores: dict[int, CoreNeurons] = {}
        self.ran: dict[int, tuple[str, int]] = {}
        self._others: tuple[Tensor, Tensor, Tensor] | None = None
        for method in methods:
            for layer, rule in method.rules(len(prompt.view.layers)).items():
                shelf: dict[int, Any] = self.skips if isinstance(rule, Skip) else self.cores
                if layer in shelf:
                    raise ValueError(
                        f"two methods of {prompt.run.spec} change layer {layer} in the same way; leave one of them out."
                    )
                shelf[layer] = rule

    def attach(self) -> None:
        view, run = self.prompt.view, self.prompt.run
        for number, rule in self.skips.items():
            layer = view.layers[number]
            run.stand_in(layer, functools.partial(self._skipping, number, layer, rule, view.parts(layer)))
        for number, core in self.cores.items():
            gated = view.gated(view.layers[number])
            self._check(gated)
            run.hook(gated.down.register_forward_pre_hook(functools.partial(self._count, number, core)))
            mlp: Any = view.layers[number].mlp
            run.stand_in(mlp, functools.partial(self._few, number, gated))
        if self.skips:
            run.hook(view.decoder.register_forward_pre_hook(self._fresh))

    @aside
    def _fresh(self, module: nn.Module, args: tuple) -> None:
        self._others = None
        if self.prompt.flow is not None:
            self.ran.clear()
            self.prompt.run.refuse_checkpointing(module, self.prompt.view.checkpointing)

    # -- parts of a layer left out -----------------------------------------------------------------------------------------

    def _skipping(self, number: int, layer: nn.Module, rule: Skip, parts: Parts, own: Any) -> Any:
        names = list(inspect.signature(own).parameters)

        @stand_in
        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            who = self._who(rule)
            if who is None:
                return own(*args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            x = given.pop("hidden_states")
            return self._everyone(number, layer, rule, parts, x, given) if who else self._visual(number, rule, parts, x, given)

        return forward

    def _who(self, rule: Skip) -> bool | None:
        """True: all tokens of this forward; False: its visual tokens; None: nobody."""
        if self.prompt.decoding:
            return True if rule.who in ("decode", "context") else None
        if rule.who == "visual":
            return None if self.prompt.flow is None else False
        return True if rule.who in ("context", "only_context") else None

    def _everyone(self, number: int, layer: nn.Module, rule: Skip, parts: Parts, x: Tensor, given: dict) -> Tensor:
        if self.prompt.flow is not None:
            self.ran[number] = (rule.part, 0 if rule.part in ("block", "ffn") else x.shape[:2].numel())
        normed = parts.norm1(x)
        if rule.part in ("block", "attention"):
            self._remember(layer, normed, given)
            return x if rule.part == "block" else x + _mlp(parts, parts.norm2(x))
        attended = x + _attention(parts, normed, given)
        return attended if rule.part == "ffn" else attended + _mlp(parts, normed)

    def _visual(self, number: int, rule: Skip, parts: Parts, x: Tensor, given: dict) -> Tensor:
        """The visual tokens are skipped, the others are not. Attention runs for all of them, the MLP for those that need it."""
        flow = self.prompt.flow
        assert flow is not None
        skipped, others = self._split(flow, x)
        normed = parts.norm1(x)
        attended = x + _attention(parts, normed, given)
        if rule.part in ("block", "attention"):
            attended = torch.where(skipped, x, attended)
        if rule.part in ("attention", "parallel"):
            self.ran[number] = ("", x.shape[:2].numel())
            source = parts.norm2(attended)
            return attended + _mlp(parts, torch.where(skipped, normed, source) if rule.part == "parallel" else source)
        self.ran[number] = ("", len(others))
        flat = attended.flatten(0, 1)
        fed = flat[others]
        return flat.index_copy(0, others, fed + _mlp(parts, parts.norm2(fed))).view_as(x)

    def _split(self, flow: Flow, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, 1) true at visual tokens, and the numbers of the others in the flattened sequence (one host sync a stage)."""
        known = self._others
        if known is None or known[0] is not flow.columns:  # made anew by every cut
            skipped = torch.zeros(x.shape[:2].numel() + 1, dtype=torch.bool, device=x.device)
            skipped[flow.at.flatten()] = True
            skipped = skipped[:-1]
            known = self._others = (flow.columns, skipped.view(*x.shape[:2], 1), (~skipped).nonzero().flatten())
        return known[1], known[2]

    def _remember(self, layer: nn.Module, normed: Tensor, given: dict) -> None:
        """Keys and values of tokens that do not run through the attention."""
        cache = given.get("past_key_values")
        if cache is not None:
            keys, values = self.prompt.view.keys_values(layer, normed, *given["position_embeddings"])
            cache.update(keys, values, self.prompt.view.attention(layer).layer_idx)

    # -- core neurons ------------------------------------------------------------------------------------------------------

    def _check(self, gated: Gated) -> None:
        odd = [part for part in (gated.gate, gated.up, gated.down) if not _plain(part)]
        if odd:
            kind = f"{type(odd[0]).__name__} with weights of {type(odd[0].weight).__name__}"
            raise Unsupported(
                f"{self.prompt.run.spec} slices the MLP's weights, but {self.prompt.view.name} has {kind} there (quantized, "
                f"offloaded, or with an adapter); use the plain weights (merge the adapter), or neurons=1.0."
            )

    @aside
    def _count(self, number: int, core: CoreNeurons, module: nn.Module, args: tuple) -> None:
        """The prompt is running: which neurons do most of its tokens activate?"""
        prompt = self.prompt
        if prompt.flow is not None:
            with prompt.run.clock.measure("selection"):
                count = 0
                for start in range(0, args[0].shape[1], neurons.SLAB):
                    part = slice(start, start + neurons.SLAB)
                    real = None if prompt.real is None else prompt.real[:, part]
                    count = count + neurons.counts(neurons.positive(args[0][:, part], core.top), real)
                prompt.memory.core[number] = Core(neurons.core(count, core.share), gated_width=args[0].shape[2])

    def _few(self, number: int, gated: Gated, own: Any) -> Any:
        @stand_in
        @functools.wraps(own)
        def forward(x: Tensor) -> Tensor:
            core = self.prompt.memory.core.get(number) if self.prompt.decoding else None
            return own(x) if core is None else core.run(gated, x)

        return forward


def _plain(part: nn.Module) -> bool:
    """A linear layer whose weights are numbers that are here; those of a model without any weights would be."""
    elsewhere = hasattr(part, "_hf_hook") and part.weight.is_meta  # accelerate brings them when the layer runs
    return type(part) is nn.Linear and type(part.weight) is nn.Parameter and not elsewhere


class Core:
    """The core neurons (B, C) of one layer for the prompts of one cache.

    Where all prompts share them (a single prompt, and its beams) the weights are sliced, once; else the whole MLP runs with the
    other activations at zero, which is the same function.
    """

    def __init__(self, index: Tensor, gated_width: int) -> None:
        self.index, self.width = index, gated_width
        self.sliced: list[tuple[Tensor, Tensor | None]] | None = None
        self.mask: Tensor | None = None

    def run(self, gated: Gated, x: Tensor) -> Tensor:
        if self.sliced is None and self.mask is None:
            self._settle(gated)
        if self.sliced is None:
            hidden = gated.act(gated.gate(x)) * gated.up(x)
            return gated.down(hidden.masked_fill(~self.mask, 0))  # type: ignore[operator]
        gate, up, down = self.sliced
        return F.linear(gated.act(F.linear(x, *gate)) * F.linear(x, *up), *down)

    def _settle(self, gated: Gated) -> None:
        """On the first step, whether prompts share their core neurons (one host sync where there are several)."""
        index = self.index
        if index.shape[0] == 1 or bool((index == index[:1]).all()):
            rows = index[0]
            into = [(part.weight[rows], None if part.bias is None else part.bias[rows]) for part in (gated.gate, gated.up)]
            self.sliced = [*into, (gated.down.weight[:, rows], gated.down.bias)]
        else:
            mask = torch.zeros(index.shape[0], self.width, dtype=torch.bool, device=index.device)
            self.mask = mask.scatter(1, index, True)[:, None]


def layer_flops(
    rule: tuple[str, int] | None, batch: int, length: int, dims: tuple[int, int, int, bool], keys: float | None = None
) -> float:
    """FLOPs of one layer over a batch of prompts of `length` tokens; rule: what `RuleSite.ran` says of it; keys: how many keys a
    query meets, as many as there are tokens if not given."""
    width, kv, mlp, gated = dims
    if rule is None:
        return batch * block_flops(length, width, mlp, kv_dim=kv, gated=gated, n_keys=keys)
    part, fed = rule
    ffn = (6 if gated else 4) * fed * width * mlp
    if part in ("block", "attention"):  # only keys and values are projected
        return batch * 4 * length * width * kv + ffn
    return batch * block_flops(length, width, mlp, kv_dim=kv, gated=gated, n_mlp=0, n_keys=keys) + ffn


def _attention(parts: Parts, normed: Tensor, given: dict) -> Tensor:
    out = parts.attention(hidden_states=normed, **given)
    return parts.scale1(out[0] if isinstance(out, tuple) else out)


def _mlp(parts: Parts, normed: Tensor) -> Tensor:
    return parts.scale2(parts.mlp(normed))
