"""The site `encoder` of an encoder that stands alone: tokens leave its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layout import Rows
from ..method import Method
from ..needs import Need
from ..tokens import Tokens, gather
from .aside import aside
from .flow import Step
from .prompt import in_front
from .readings import features_of

if TYPE_CHECKING:
    from .run import Run


class Outlet:
    def __init__(self, run: Run, methods: list[Method]) -> None:
        self.run, self.methods = run, methods
        self.tokens: Tokens | None = None

    def attach(self) -> None:
        self.run.hook(self.run.encoder.entrance.register_forward_pre_hook(self._forget))
        self.run.hook(self.run.encoder.exit.register_forward_hook(self._after))

    @aside
    def _forget(self, module: nn.Module, args: tuple) -> None:
        self.tokens = None

    @aside
    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Reduce `last_hidden_state`; special tokens stay in front unless a method has decided on them itself."""
        hidden = self.run.encoder.listed(features_of(output))
        run, site, prefix = self.run, self.run.site, self.run.encoder.prefix
        index = None if site.reduction is None else site.reduction.index
        place = site.place if index is None or site.place is None else site.place.gather(index)
        tokens = Tokens(hidden, site.mask, index, site.size, prefix, place)
        with run.clock.measure("selection"):
            for method in self.methods:
                tokens = self._reduce(method, tokens)
        self.tokens = tokens
        if tokens.features is hidden:
            return None
        if isinstance(output, Tensor):
            return tokens.features
        if isinstance(output, tuple):
            return (tokens.features, *output[1:])
        output.last_hidden_state = tokens.features
        return output

    def _reduce(self, method: Method, tokens: Tokens) -> Tokens:
        prefix = tokens.prefix
        run = self.run
        own = tokens if method.prefix_tokens else _without_front(tokens, prefix)
        run.check_keep(method, len(own) - own.prefix)
        signals = {name: self._signal(need, own) for name, need in method.needs().items()}
        reduction = method.reduce(own, signals)
        run.costs.count("encoder", method, own, reduction)
        patches = len(own) - own.prefix
        if reduction.is_drop and reduction.mask is None and reduction.k - reduction.prefix == patches:
            return tokens  # every patch stays
        after = reduction.apply(own)
        before = own.origin - run.encoder.prefix
        rows = Rows(before[:, own.prefix :], None)
        run.costs.trail.append(Step(rows, reduction, own.prefix, Rows(after.origin - run.encoder.prefix, None)))
        if own is tokens:
            return after
        front = torch.arange(prefix, device=tokens.device).expand(len(before), -1)
        mask = None if after.mask is None else torch.nn.functional.pad(after.mask, (prefix, 0), value=True)
        size = None if after.size is None else torch.nn.functional.pad(after.size, (prefix, 0), value=1.0)
        features = torch.cat([tokens.features[:, :prefix], after.features], 1)
        return Tokens(features, mask, torch.cat([front, after.origin], 1), size, prefix)

    def _signal(self, need: Need, tokens: Tokens) -> Tensor:
        """A recorded signal for the tokens at hand; special tokens get zero."""
        site = self.run.site
        flat = site.flat(need)
        value = flat.unflatten(0, (tokens.features.shape[0], -1))
        at = tokens.origin[:, tokens.prefix :] - self.run.encoder.prefix
        return in_front(gather(value, at), tokens.prefix, need)


def _without_front(tokens: Tokens, prefix: int) -> Tokens:
    if prefix == 0:
        return tokens
    place = None
    if tokens.place is not None:
        rest = torch.arange(prefix, len(tokens), device=tokens.device).expand(tokens.features.shape[0], -1)
        place = tokens.place.gather(rest)
    mask = None if tokens.mask is None else tokens.mask[:, prefix:]
    size = None if tokens.size is None else tokens.size[:, prefix:]
    return Tokens(tokens.features[:, prefix:], mask, tokens.origin[:, prefix:], size, place=place)
