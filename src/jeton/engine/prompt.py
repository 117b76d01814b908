"""What the sites around a language model share: the flow of one forward, and how a method is asked to decide on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..method import Method
from ..models import VisionLanguage
from ..needs import Carried, Need
from ..tokens import Reduction, Tokens
from .encoder import EncoderSite, behind
from .flow import Cut, Flow, Memory, Rows, Scene, Step

if TYPE_CHECKING:
    from .run import Run
    from .stage import Stage


class Prompt:
    """One vision-language model under a run. `scene` holds the pictures at hand, `flow` is set while a forward brings them.

    held, total: columns the entrance's cache holds before and after this forward. ids: position ids of what came through the
    entrance. last: (B,) column of each sample's last real token, None for the last one. left: the columns that are left of this
    forward's, None while none is gone. past, new, mask: columns of the unreduced conversation before this forward and in it, and
    its 2-D attention mask. stage: what the language model's layers hold from the last reducing one on, None for everything. real:
    (B, L) which of the columns at hand are no padding, None if all are. decoding: this forward brings single tokens that continue
    a cache.
    """

    def __init__(self, run: Run, view: VisionLanguage, encoder: EncoderSite) -> None:
        self.run, self.view, self.encoder = run, view, encoder
        self.scene: Scene | None = None
        self.flow: Flow | None = None
        self.memory = Memory()
        self.ids: Tensor | None = None
        self.last: Tensor | None = None
        self.held = self.total = 0
        self.left: Cut | None = None
        self.real: Tensor | None = None
        self.decoding = False
        self.cache: Any = None
        self.past = self.new = 0
        self.mask: Tensor | None = None
        self.stage: Stage | None = None

    def cut(self, made: Cut) -> None:
        """Columns of this forward are leaving in front of a layer."""
        self.left = made if self.left is None else self.left.then(made)
        if self.last is not None:
            self.last = (made.index == self.last[:, None]).to(torch.uint8).argmax(1)
        if self.real is not None:
            self.real = self.real.gather(1, made.index)
        if made.valid is not None:
            self.real = made.valid if self.real is None else self.real & made.valid

    def tokens(self, features: Tensor) -> Tokens:
        """The remaining visual tokens with these features (R, K, D)."""
        assert self.scene is not None
        rows = self.scene.rows
        return Tokens(features, rows.mask, rows.slot, place=self.scene.album.place.gather(rows.slot))

    def with_class_tokens(self, tokens: Tokens) -> Tokens:
        """The encoder's class token of every picture in front of its image's tokens."""
        scene = self.scene
        assert scene is not None and tokens.place is not None
        if scene.special is None:
            return tokens
        counts = [len(item.kinds) for item in scene.album.geometry]
        most, device = scene.album.place.units, tokens.device
        starts = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=device)
        unit = torch.arange(most, device=device)
        exists = unit < torch.tensor(counts, device=device)[:, None]
        front = scene.special[:, 0][(starts[:, None] + unit).clamp(max=scene.special.shape[0] - 1)]
        mask = tokens.mask
        if mask is not None or len(set(counts)) > 1:
            mask = torch.cat([exists, tokens.real], 1)
        origin = torch.nn.functional.pad(tokens.origin, (most, 0), value=-1)
        features = torch.cat([front, tokens.features], 1)
        return Tokens(features, mask, origin, prefix=most, place=behind(tokens.place, most))

    def reduce(
        self,
        method: Method,
        step: Method,
        tokens: Tokens,
        site: str,
        signal: Callable[[Need], Tensor] | None = None,
        quota: Tensor | None = None,
    ) -> Tokens:
        """Let a method decide, and carry the decision to the scene. `signal` reads the signals, by default from the encoder;
        `quota` (R, 1) is what each image keeps where a plan over several steps differs between images."""
        scene = self.scene
        assert scene is not None
        read = signal or (lambda need: self.encoded(need, tokens.prefix))
        signals = {name: read(need) for name, need in step.needs().items()}
        if quota is not None:
            signals["quota"] = quota
        reduction = step.reduce(tokens, signals)
        self.run.costs.count(site, method, tokens, reduction)
        if reduction.is_identity:
            self._carry(method, reduction, tokens.prefix)
            return tokens
        after = reduction.apply(tokens)
        before = scene.rows
        scene.rows = _seat(reduction, tokens, before, after.mask) if tokens.prefix else Rows(after.origin, after.mask)
        scene.trail.append(Step(before, reduction, tokens.prefix, scene.rows))
        scene.deep = [reduction.mix(features) for features in scene.deep]
        self._carry(method, reduction, tokens.prefix)
        mixed = tokens.size is not None or not reduction.is_drop
        place = scene.album.place.gather(scene.rows.slot)
        return Tokens(after.features, after.mask, scene.rows.slot, after.weight if mixed else None, place=place)

    def encoded(self, need: Need, prefix: int) -> Tensor:
        """A signal of the encoder for the tokens at hand: (R, K, ...) or, with heads, (R, H, K). A token made of several patches
        gets their mean, a structure token zero."""
        scene = self.scene
        assert scene is not None
        if need in scene.given:
            return scene.given[need]
        if isinstance(need, Carried):
            return in_front(scene.scores[need.of].gather(1, scene.rows.slot), prefix, need)
        if need not in scene.signals:  # the encoder has just run
            scene.signals[need] = self.encoder.flat(need)
        flat = padded(scene.signals[need])
        source = scene.album.source
        source = source.gather(1, scene.rows.slot[..., None].expand(-1, -1, source.shape[-1]))
        none = source < 0
        parts = flat[source.masked_fill(none, flat.shape[0] - 1)]
        count = (~none).sum(2).clamp(min=1)
        value = parts.sum(2) / count.reshape(*count.shape, *(1,) * (parts.dim() - 3))
        return in_front(value, prefix, need)

    def _carry(self, method: Method, reduction: Reduction, prefix: int) -> None:
        """Keep the score a method hands on over all tokens of each image; padding, which repeats slots, is left out."""
        if reduction.score is None:
            return
        assert self.scene is not None
        rows, most, score = self.scene.rows, self.scene.album.source.shape[1], reduction.score[:, prefix:]
        slot = rows.slot if rows.mask is None else rows.slot.masked_fill(~rows.mask, most)
        self.scene.scores[method.card.id] = score.new_zeros(len(slot), most + 1).scatter(1, slot, score)[:, :most]


def in_front(value: Tensor, prefix: int, need: Need) -> Tensor:
    """A signal (R, K, ...) as methods expect it, heads and questions before tokens, with zeros for special tokens in front."""
    value = torch.nn.functional.pad(value.movedim(1, -1), (prefix, 0))
    return value if need.heads or value.dim() == 2 else value.movedim(-1, 1)


def padded(x: Tensor) -> Tensor:
    """x (N, ...) with one row of zeros behind it, where padding indices point."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def _seat(reduction: Reduction, tokens: Tokens, rows: Rows, mask: Tensor | None) -> Rows:
    """Slots for a reduction that may keep special tokens: those take the image's first slots that nobody else keeps."""
    prefix = tokens.prefix
    special = reduction.index < prefix
    own = (reduction.index - prefix).clamp(min=0)
    real = reduction.real if mask is None else mask
    used = torch.zeros(rows.slot.shape[0], rows.slot.shape[1] + 1, dtype=torch.bool, device=own.device)
    used = used.scatter(1, own.masked_fill(special | ~real, rows.slot.shape[1]), True)[:, :-1]
    if rows.mask is not None:
        used = used | ~rows.mask
    free = torch.argsort(used.to(torch.uint8), dim=1, stable=True)
    seat = free.gather(1, (special.cumsum(1) - 1).clamp(min=0))
    return Rows(rows.slot.gather(1, torch.where(special, seat, own)), mask)
