"""What stands behind an encoder and reads all its tokens (a pooling head, a mean, a query of its own): each of those that are
left counts for what it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import attention
from .aside import aside
from .readings import features_of
from .tap import Listener

if TYPE_CHECKING:
    from .encoder import EncoderSite


class HeadSite:
    def __init__(self, site: EncoderSite) -> None:
        self.site = site
        self.averaged = site.encoder.averaged(site.run.model)
        self.last: Tensor | None = None  # what left the last block

    def attach(self) -> None:
        site, run, encoder = self.site, self.site.run, self.site.encoder
        if site.stepped and encoder.pooling is not None:
            run.hook(encoder.pooling.register_forward_pre_hook(self._pool))
        if encoder.probe is not None and (site.stepped or (site.alone and run.methods)):
            run.taps.listen(encoder.probe, _ProbeListener(site), functional=True)
        if self.averaged is not None:
            run.hook(encoder.blocks[-1].register_forward_hook(self._hear_last))
            run.hook(self.averaged.register_forward_pre_hook(self._average))

    @aside
    def _pool(self, module: nn.Module, args: tuple) -> tuple:
        """The pooling head's token mask, for the tokens that are left."""
        site = self.site
        if site.policy is not None:
            return (args[0], site.policy.detach() > 0.5, *args[2:])
        return args if site.reduction is None else (args[0], site.mask, *args[2:])

    @aside
    def _hear_last(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.last = features_of(output)

    @aside
    def _average(self, module: nn.Module, args: tuple) -> tuple | None:
        """The mean of all patches that a head is handed, each of the tokens left counting for what it stands for."""
        site, encoder, tokens = self.site, self.site.encoder, self.site.run.tokens
        if tokens is None and self.last is not None:  # the head comes before the encoder's output
            tokens = site.as_tokens(self.last)
        if tokens is None:
            return None
        if tokens.size is None and tokens.mask is None and len(tokens) == tokens.prefix + site.patches and site.policy is None:
            return None
        weight = tokens.real.float() if tokens.size is None else tokens.size.float() * tokens.real
        weight = weight if site.policy is None else weight * site.policy
        if not encoder.pools_special:
            weight = weight * (tokens.origin >= encoder.prefix)
        return (encoder.pooled(tokens.features, weight), *args[1:])


class _ProbeListener(Listener):
    """In a head whose own query attends to all tokens, those count for what they stand for, and padding for nothing."""

    def __init__(self, site: EncoderSite) -> None:
        self.site = site

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        tokens = self.site.run.tokens
        tokens = self.site.as_tokens(key[:, 0]) if tokens is None else tokens
        bias = None if tokens.size is None else attention.bias(tokens.size, query.dtype)
        if tokens.mask is not None and self.site.encoder.pooling is None:  # else the head is handed the mask itself
            hidden = ~tokens.mask[:, None, None]
            bias = query.new_zeros(hidden.shape) if bias is None else bias
            bias = bias.masked_fill(hidden, torch.finfo(query.dtype).min)
        return None if bias is None else bias[..., -key.shape[2] :]  # some heads leave special tokens out
