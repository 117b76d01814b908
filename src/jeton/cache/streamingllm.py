"""StreamingLLM: the first tokens and the last ones are enough to go on for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..registry import register
from ._common import Decoder, Rotary, arange


class SinkLayer(DynamicLayer):
    """Keeps the first `start` and the last `recent` tokens. Keys are kept as they are before rotation and handed out rotated to
    their place in the cache."""

    is_croppable = False

    def __init__(self, start: int, recent: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.start, self.room, self.rotary = start, start + recent, rotary
        self.cumulative_length = 0  # tokens seen

    @property
    def held(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def left(self, new: int) -> int:
        """How many cached tokens stay beside `new` ones."""
        return min(self.held, max(self.room - new, self.start))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, stay = key_states.shape[-2], self.left(key_states.shape[-2])
        self._evict(stay)
        plain = key_states if self.rotary is None else self.rotary.back(key_states, arange(stay, stay + new, key_states))
        self.keys = torch.cat([self.keys, plain], -2) if stay else plain
        self.values = torch.cat([self.values, value_states], -2) if stay else value_states
        keys, values = self.keys, self.values
        if self.rotary is not None and stay:
            keys = torch.cat([self.rotary.turn(keys[..., :stay, :], arange(0, stay, keys)), key_states], -2)
        elif self.rotary is not None:
            keys = key_states
        self.cumulative_length += new
        self._evict(self.room)
        return keys, values

    def _evict(self, room: int) -> None:
        """Let go of the tokens behind the first ones, until no more than `room` are left."""
        if self.held > room:
            at = self.held - (room - self.start)
            self.keys = torch.cat([self.keys[..., : self.start, :], self.keys[..., at:, :]], -2)
            self.values = torch.cat([self.values[..., : self.start, :], self.values[..., at:, :]], -2)

    def evict_range(self, begin: int, end: int) -> None:
        """Let go of the tokens at the places `begin` to `end` of the cache."""
        self.keys = torch.cat([self.keys[..., :begin, :], self.keys[..., end:, :]], -2)
        self.values = torch.cat([self.values[..., :begin, :], self.values[..., end:, :]], -2)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stay = self.left(query_length)
        return stay + query_length, self.cumulative_length - stay  # as if what is held were the last tokens seen

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a streaming cache lets go of tokens for good and cannot be cropped; decode without drafts.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.keys, self.values = (x.index_select(0, beam_idx.to(x.device)) for x in (self.keys, self.values))


@register(
    title="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    source="arXiv:2309.17453",
    family="cache",
    stage="cache",
    headline="stable perplexity to 4 million tokens, up to 22.2 times faster per token than recomputation",
)
@dataclass(frozen=True)
class StreamingLLM:
    """Constant memory on endless text: a cache of the first `start` tokens, the attention sinks, and the last `recent` ones, the
    current one among them, with positions counted in the cache. Training-free.

    Keys are kept before rotation. A forward of q new tokens lets go of tokens behind the first `start` until at most start +
    recent stand in the cache with the new ones (a longer prompt runs whole and is cut afterwards), rotates keys to positions 0 to
    n - 1 and queries to the last q of them, and attends causally. Decoding the tenth token with start = recent = 4, the cache
    holds tokens 0, 1, 2, 3, 6, 7, 8 and the current one, 9, at positions 0 to 7. Defaults as for chat: 4 and 2000; the paper's
    tables have 4 and 1020.

        with StreamingLLM(start=4, recent=1020).on(model) as stream:
            model.generate(**inputs)                          # or
            logits = model(ids, past_key_values=stream.cache()).logits
            cache.layers[0].evict_range(10, 20)               # lets go of any places

    Works with rotary models and with ALiBi; `Unsupported` for learned positions and for positions by time, height and width. Rows
    of a batch must be equally long, as padding on the left would become the sinks. Composes with methods that act before the
    language model: apply them first. Positions are counted in the cache, so gaps that a reduction left in them close.
    """

    start: int = 4
    recent: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("recent", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Stream]:
        """The model with such a cache, for a while; nothing remains afterwards."""
        stream = Stream(self, Decoder(model))
        handle = stream.decoder.model.register_forward_pre_hook(stream.enter, with_kwargs=True)
        try:
            yield stream
        finally:
            handle.remove()


class Stream:
    """A model under StreamingLLM."""

    def __init__(self, how: StreamingLLM, decoder: Decoder) -> None:
        self.how, self.decoder = how, decoder

    def cache(self) -> DynamicCache:
        """A fresh cache."""
        return self._filled(DynamicCache())

    def _filled(self, cache: Any) -> Any:
        cache.layers = [SinkLayer(self.how.start, self.how.recent, self.decoder.rotary) for _ in self.decoder.layers]
        return cache

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Line up the cache and the positions of the new tokens."""
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        if cache is None:
            return (), kwargs
        if not any(isinstance(layer, SinkLayer) for layer in cache.layers):
            if any(layer.get_seq_length() for layer in cache.layers):
                raise ValueError("this cache was filled without StreamingLLM; begin with an empty one, e.g. stream.cache().")
            self._filled(cache)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not bool(mask.all()):
            raise ValueError("rows of different length would make padding the attention sinks; run them one by one.")
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        new, stay = given.shape[1], cache.layers[0].left(given.shape[1])
        kwargs["position_ids"] = arange(stay, stay + new, given)[None].expand(given.shape[0], -1)
        return (), kwargs
