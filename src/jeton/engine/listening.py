"""Listening in an encoder's blocks: queries and keys are heard in flight or looked at ahead of the block, and attention is told
of sizes, masks and policies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..learned import Learned
from ..needs import Need, ReceivedAttention
from ..ops import attention
from ..ops.policy import policy_softmax
from ..tokens import Reduction
from .fused import MapAhead
from .readings import measure
from .tap import Attention, Listener, add_bias

if TYPE_CHECKING:
    from .encoder import EncoderSite

# the usual names of an attention module's projections
QUERIES, KEYS, VALUES, OUTPUTS = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out_proj")


class BlockListener(Listener):
    """Listens to the attention of one encoder block."""

    def __init__(self, site: EncoderSite) -> None:
        self.site = site
        self.late: set[Need] = set()
        self.here: set[Need] = set()
        self.now: dict[Need, Tensor] = {}
        self.looking = False
        self.kept: MapAhead | None = None
        self.masks: list[tuple[Learned, dict[str, Any]]] = []

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        bias = self._per_key(query, key)
        for step, signals in self.masks:
            with self.site.run.clock.measure("selection"):
                seen = step.sight(query, key, self.site.tokens(query.transpose(1, 2).flatten(2)), signals)
            if seen is not None:
                hidden = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
                bias = hidden if bias is None else (bias + hidden).clamp(min=torch.finfo(query.dtype).min)
        return bias

    def _per_key(self, query: Tensor, key: Tensor) -> Tensor | None:
        site = self.site
        bias = attention.bias(site.size, query.dtype) if site.size is not None and site.proportional else None
        if site.mask is not None and site.reduction is not None:
            hidden = torch.zeros_like(site.mask, dtype=query.dtype).masked_fill(~site.mask, torch.finfo(query.dtype).min)
            hidden = hidden[:, None, None]
            bias = hidden if bias is None else (bias + hidden).clamp(min=torch.finfo(query.dtype).min)
        return bias

    def record(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, extra: dict[str, Any]) -> None:
        site = self.site
        if self.looking and self.kept is not None:
            self.kept.hear(query, key, mask, scale)
            if ReceivedAttention(layer=None) in self.here and site.mask is None and site.policy is None:
                self.kept.draw()
        if site.run.train and not self.looking:
            for step, signals in self.masks:
                part = step.imitated(query, key, scale, site.tokens(query.transpose(1, 2).flatten(2)), signals)
                site.imitated += [] if part is None else [part]
        if not self.here and (not self.late or self.looking):
            return
        if site.policy is not None:  # in training signals are read as if masked tokens had left
            mask = add_bias(mask, site.policy.detach().log()[:, None, None].to(query.dtype))
        with site.run.clock.measure("selection"):
            self.now = {need: self._now(need, query, key, value, mask, scale) for need in self.here}
            late = set() if self.looking else self.late
            calls = self._calls(query, key, value, mask, extra) if late else []
            for need in late:
                site.records[need] += [measure(need, *call, site.mask, scale) for call in calls]
                site.records_at[need] = site.reduction
                if site.lent:
                    site.undone.add(need)

    def _now(self, need: Need, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if self.looking and self.kept is not None and self.kept.map is not None and isinstance(need, ReceivedAttention):
            return attention.received_in(self.kept.map)
        return measure(need, query, key, value, mask, self.site.mask, scale)

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

    def attend(
        self, original: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: dict[str, Any]
    ) -> Any:
        """What stands in for the block's attention: nothing while it is only looked at, what was looked ahead of, or in training
        attention under the policy."""
        if self.looking:
            return query.new_zeros(()).expand(query.transpose(1, 2).shape), None
        if self.kept is not None:
            timed = functools.partial(self.site.run.clock.measure, "selection")
            return self.kept.attend(original, value, extra.get("dropout", 0.0), timed), None
        policy = self.site.policy
        if policy is None:
            return None
        logits = attention.rows(query, key, extra.get("scaling"), mask, logits=True)
        weights = torch.nn.functional.dropout(policy_softmax(logits, policy).to(value.dtype), extra.get("dropout", 0.0))
        return (weights @ value).transpose(1, 2).contiguous(), weights

    # -- the attention of the tokens there were in front of the block -----------------------------------------------------

    def look(self, asked: set[Need], ahead: bool, module: nn.Module, call: Callable[[Tensor], None], x: Tensor) -> None:
        """Run the block's attention on x as far as queries and keys, and measure what is asked."""
        here, kept = self.here, MapAhead() if ahead else self.kept
        self.here, self.looking, self.kept = asked, True, kept if ahead else None
        try:
            with idle(module, *VALUES, *OUTPUTS):
                call(x)
        finally:
            self.here, self.looking, self.kept = here, False, kept

    def reduced(self, reduction: Reduction) -> None:
        """The tokens in front of the block have changed."""
        if self.kept is not None:
            self.kept.reduced(reduction)

    @contextmanager
    def ahead(self, module: nn.Module) -> Iterator[None]:
        """While the block's attention runs: where it was looked ahead of, its own queries and keys are not needed again."""
        if self.kept is not None and self.kept.reduction is None:
            self.kept = None
        try:
            with nullcontext() if self.kept is None or self.here or self.late else idle(module, *QUERIES, *KEYS):
                yield
        finally:
            self.kept = None


@contextmanager
def idle(module: nn.Module, *names: str) -> Iterator[None]:
    """Let linear maps of these names rest: what they would give is not needed. Where a model names them otherwise they run."""
    resting = [part for name in names if isinstance(part := getattr(module, name, None), nn.Linear)]
    saved = [part.__dict__.get("forward") for part in resting]

    def rest(width: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.new_zeros(()).expand(*x.shape[:-1], width)

    for part in resting:
        part.forward = rest(part.out_features)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part, own in zip(resting, saved, strict=True):
            if own is None:
                del part.forward
            else:
                part.forward = own
