"""The site `entry`: tokens leave at the language model's door, after their features have been written into the prompt.

Whatever a conversation has lost is remembered beside its cache; several conversations may take turns under one run.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..method import Method
from ..needs import Need, PairedText, PromptNumber
from ..tokens import gather
from .aside import aside
from .deepstack import Deepstack
from .flow import Flow, Memory, whole
from .gallery import Gallery
from .masks import Whole, is_wide, made, taken
from .prompt import Prompt, padded
from .virtual import remembered
from .words import paired_text, prompt_number

_UNKNOWN = (
    "pictures were reduced before the language model, but the prompt came without input_ids that show where they stand (a "
    "prefill in chunks, or features put into inputs_embeds by hand); pass input_ids, or use a method of the site entry or layer."
)
_SHAPE = "an attention mask is (batch, length) or (batch, 1, new, length), got {}."


class Entrance:
    def __init__(self, prompt: Prompt, gallery: Gallery, methods: list[Method], virtual: bool = False) -> None:
        self.prompt, self.gallery, self.methods, self.virtual = prompt, gallery, methods, virtual
        self.deepstack = Deepstack(prompt)
        self.asked: tuple[Tensor | None, dict | None] | None = None
        self.given: Tensor | None = None
        self.memories: weakref.WeakKeyDictionary[Any, Memory] = weakref.WeakKeyDictionary()

    def attach(self) -> None:
        view, run = self.prompt.view, self.prompt.run
        run.hook(view.base.register_forward_pre_hook(self._begin, with_kwargs=True))
        run.hook(view.base.register_forward_hook(self._end))
        run.hook(view.decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
        run.hook(view.decoder.register_forward_hook(self._leave, with_kwargs=True))
        self.deepstack.attach()
        run.undo(self._forget)

    def _forget(self) -> None:
        for cache in list(self.memories):
            cache.__dict__.pop("get_seq_length", None)

    # -- the whole model -----------------------------------------------------------------------------------------------

    @aside
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A forward starts: does it bring pictures, and can they be found in its prompt?"""
        self._open(args, kwargs)
        cache = kwargs.get("past_key_values")
        if self.prompt.view.masked_above and cache is not None:
            kwargs = {**kwargs, "past_key_values": Whole(cache, cache.get_seq_length())}
        return args, kwargs

    def _open(self, args: tuple, kwargs: dict) -> None:
        names = ("input_ids", "pixel_values")
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        encoded = {stream: value for stream, value in (inputs.get("mm_encoder_outputs") or {}).items() if value is not None}
        pixels = any(value is not None for name, value in inputs.items() if name.startswith("pixel_values"))
        self.asked = self.prompt.left = None
        self.given = inputs.get("attention_mask")
        if pixels:  # this forward encodes its pictures itself: earlier ones are not in its prompt
            self.gallery.scenes.clear()
        if inputs.get("input_ids") is None and self.gallery.waits():
            raise ValueError(_UNKNOWN)
        if (pixels or encoded) and getattr(inputs.get("past_key_values"), "is_compileable", False):
            raise ValueError(
                "a static cache gives every layer the same fixed length, but jeton makes prompts shorter; leave out "
                "cache_implementation (or StaticCache) and use the default dynamic cache."
            )
        self.prompt.run.start(pictures=pixels or bool(encoded))
        if not pixels and not encoded:
            self.prompt.run.costs.text_only(inputs.get("past_key_values") is not None)
            return
        missing = [name for name in self.prompt.view.needed if inputs.get(name) is None]
        if missing:
            raise ValueError(
                f"without {', '.join(missing)} {self.prompt.view.name} does not know which tokens see each other; let the "
                f"model's processor write the prompt."
            )
        if isinstance(self.given, Tensor) and self.given.dim() not in (2, 4):
            raise ValueError(_SHAPE.format(tuple(self.given.shape)))
        self.asked = (inputs.get("input_ids"), None if pixels else encoded)

    def _show(self) -> None:
        """The features are in the prompt: read the span map."""
        prompt, run = self.prompt, self.prompt.run
        prompt.flow = prompt.scene = None
        if self.asked is None:
            return
        input_ids, encoded = self.asked
        if input_ids is not None:
            prompt.flow = self.gallery.show(input_ids, encoded)
        if prompt.flow is None and self.gallery.waits():
            raise ValueError(_UNKNOWN)
        if prompt.flow is None:
            run.costs.clear()
            run.say("the prompt's image tokens are not known (no input_ids, or features made elsewhere): nothing was reduced")
            return
        prompt.scene = prompt.flow.scene
        run.check_keeps(prompt.flow.layout.album.candidates(self.gallery.structure).slot.shape[1])
        run.costs.begin(prompt.flow)

    @aside
    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.prompt.run.finish(pictures=self.asked is not None)
        self.prompt.flow = self.prompt.scene = self.prompt.cache = self.asked = None

    # -- the language model ----------------------------------------------------------------------------------------------

    @aside
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Reduce what comes in, or line up the mask and positions of what follows with what the cache holds."""
        prompt = self.prompt
        self._show()
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Whole):
            cache = kwargs["past_key_values"] = cache.cache
        if cache is not None:
            cache.__dict__.pop("get_seq_length", None)
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        known = None if cache is None else self.memories.get(cache)
        known = Memory() if known is None else known
        held = 0 if cache is None else cache.get_seq_length()
        known.length = held + (0 if known.entry is None else known.entry.offset)
        prompt.cache = cache
        prompt.memory, prompt.new, prompt.past = known, tokens.shape[1], known.length
        prompt.stage = None
        prompt.run.enter()
        kwargs["position_ids"] = self._numbered(kwargs.get("position_ids"), tokens)
        wide = self._split(kwargs, tokens)
        prompt.mask = kwargs.get("attention_mask")
        if prompt.flow is not None:
            self.deepstack.take(prompt.flow, kwargs)
            self._shorten(prompt.flow, kwargs)
        else:
            self._follow(kwargs)
        entry = prompt.memory.entry
        arriving = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        prompt.total = prompt.past + prompt.new - (0 if entry is None else entry.offset)
        prompt.held = prompt.total - arriving.shape[1]
        prompt.ids, prompt.last = kwargs["position_ids"], _last(kwargs.get("attention_mask"), arriving.shape[1])
        prompt.real = _real(kwargs.get("attention_mask"), arriving.shape[1])
        prompt.decoding = prompt.flow is None and arriving.shape[1] == 1 and prompt.held > 0
        if prompt.flow is not None:
            prompt.run.costs.enter(arriving.shape[1], prompt.new, kwargs.get("attention_mask"))
        if wide is not None:
            kwargs["attention_mask"] = self._taken(wide)
        return (), kwargs

    def _split(self, kwargs: dict, tokens: Tensor) -> Any:
        """What says for each query what it may look at, for the whole conversation, where the language model is given such masks
        or would make some that count columns; what is left in `kwargs` is the mask (batch, length) beside it."""
        prompt, mask = self.prompt, kwargs.get("attention_mask")
        wide = mask if is_wide(mask) else None
        if wide is not None:
            kwargs["attention_mask"] = self.given if isinstance(self.given, Tensor) and self.given.dim() == 2 else None
        elif prompt.view.windowed and (prompt.flow is not None or prompt.memory.touched):
            wide = made(prompt.view.decoder, tokens, mask, prompt.past)
        for one in wide.values() if isinstance(wide, dict) else [wide]:
            if one is not None and (prompt.flow is not None or prompt.memory.touched) and one.shape[2] != prompt.new:
                raise ValueError(_SHAPE.format(tuple(one.shape)))
        return wide

    def _taken(self, wide: Any) -> Any:
        entry, made, total = self.prompt.memory.entry, self.prompt.left, self.prompt.past + self.prompt.new
        if entry is None:
            return wide
        rows = None if made is None or self.prompt.flow is None else made.index
        return taken(wide, rows, entry.columns(total), entry.real(total), self.prompt.new)

    def _numbered(self, ids: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Position ids, counted as the model would without any reduction."""
        prompt = self.prompt
        if ids is not None or not (prompt.flow is not None or prompt.memory.touched):
            return ids
        ids = torch.arange(prompt.past, prompt.past + prompt.new, device=tokens.device).expand(tokens.shape[0], -1)
        return ids if prompt.view.rotary_rows == 1 else ids.expand(prompt.view.rotary_rows, -1, -1)

    def _shorten(self, flow: Flow, kwargs: dict) -> None:
        prompt = self.prompt
        embeds, memory = kwargs["inputs_embeds"], prompt.memory
        if self.methods:
            with prompt.run.clock.measure("selection"):
                embeds = self._reduced(flow, embeds, kwargs.get("attention_mask"))
        made = flow.cut()
        kwargs["inputs_embeds"] = embeds
        if made is None:
            self._follow(kwargs)
            return
        prompt.left = made
        if self.virtual:
            memory.virtual = remembered(prompt, flow, made, kwargs["position_ids"])
        kwargs["inputs_embeds"] = gather(embeds, made.index)
        ids = pick(kwargs["position_ids"], made.index)
        past = whole(prompt.past, made.index) if memory.entry is None else memory.entry
        kwargs["position_ids"] = ids - made.before - past.dropped if prompt.run.compact else ids
        memory.entry = past.extended(prompt.past, prompt.new, made)
        mask = kwargs.get("attention_mask")
        if mask is not None or made.valid is not None or not self._cached(kwargs):
            # without a cache and without a mask, a gap in the positions would read as the seam of two packed sequences
            kwargs["attention_mask"] = self._mask(mask)

    def _reduced(self, flow: Flow, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """Let the methods decide; merged tokens are written where their representative stands."""
        prompt = self.prompt
        flat = padded(embeds.flatten(0, 1))
        tokens = prompt.tokens(flat[flow.at])
        signal = partial(self._signal, flow, embeds, mask)
        for method in self.methods:
            tokens = prompt.reduce(method, method, tokens, method.site, signal)
        if tokens.size is None:
            return embeds
        flat = flat.index_put((flow.at.flatten(),), tokens.features.flatten(0, 1).to(flat.dtype))
        return flat[:-1].view_as(embeds)

    def _signal(self, flow: Flow, embeds: Tensor, mask: Tensor | None, need: Need) -> Tensor:
        if isinstance(need, PairedText):
            return paired_text(flow, embeds, mask)
        return prompt_number(flow) if isinstance(need, PromptNumber) else self.prompt.encoded(need, 0)

    def _follow(self, kwargs: dict) -> None:
        """Nothing leaves here, but earlier columns may be gone: cut the mask to what the cache holds."""
        entry = self.prompt.memory.entry
        if entry is None:
            return
        if self.prompt.run.compact:
            kwargs["position_ids"] = kwargs["position_ids"] - entry.dropped
        if kwargs.get("attention_mask") is not None or entry.valid is not None:
            kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"))

    def _mask(self, mask: Tensor | None) -> Tensor:
        """The 2-D mask of the whole conversation, cut to the columns that are left."""
        entry, total = self.prompt.memory.entry, self.prompt.past + self.prompt.new
        assert entry is not None
        columns, real = entry.columns(total), entry.real(total)
        if mask is None:
            return torch.ones_like(columns) if real is None else real.long()
        cut = mask.gather(1, columns)
        return cut if real is None else cut * real.to(cut.dtype)

    def _cached(self, kwargs: dict) -> bool:
        if kwargs.get("past_key_values") is not None:
            return True
        use = kwargs.get("use_cache")
        return bool(self.prompt.view.decoder.config.use_cache if use is None else use)

    @aside
    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Remember what the cache holds, and let it report the length of the whole conversation."""
        prompt = self.prompt
        prompt.run.leave(prompt.flow is not None)
        cache = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is None:
            return
        self.memories[cache] = prompt.memory
        entry = prompt.memory.entry
        if entry is not None and entry.offset:
            offset, length = entry.offset, type(cache).get_seq_length
            held = weakref.ref(cache)
            cache.get_seq_length = lambda layer_idx=0: length(held()) + offset


def pick(ids: Tensor | None, index: Tensor) -> Tensor:
    """Position ids (..., B or 1, L) at the columns index (B, L')."""
    assert ids is not None
    return ids.expand(*ids.shape[:-2], index.shape[0], ids.shape[-1]).gather(-1, index.expand(*ids.shape[:-2], *index.shape))


def _real(mask: Tensor | None, new: int) -> Tensor | None:
    """(B, new) which of the new columns are no padding; None when all are."""
    return None if mask is None or mask.dim() != 2 else mask[:, -new:].bool()


def _last(mask: Tensor | None, new: int) -> Tensor | None:
    """(B,) column of each sample's last real token among the new ones; None when that is the last column for all."""
    if mask is None or mask.dim() != 2 or new == 1:
        return None
    tail = mask[:, -new:] if mask.shape[1] > new else mask
    return tail.shape[1] - 1 - tail.flip(1).to(torch.uint8).argmax(1)
