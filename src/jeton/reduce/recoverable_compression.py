"""Recoverable Compression: salient patches stay, patches the question is about are recovered, the rest is condensed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import (
    Budget,
    ClassAttention,
    Keys,
    Method,
    Need,
    Promise,
    Signals,
    TextSimilarity,
    TextTower,
    check_keep,
    register,
)
from ..ops.budget import allocate, count, counts
from ..ops.outliers import local_outliers
from ..ops.selection import best_of_units, pack
from ..ops.similarity import normalise
from ..tokens import Reduction, Tokens, gather
from ._common import read, score_of


@register(
    title="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information",
    year=2024,
    source="arXiv:2409.01179",
    family="vlm",
    stage="encoder",
    headline="comparable scores on LLaVA-1.5-7B with about 10 % of the tokens, FLOPs from 8.5 to 1.5 T",
)
@dataclass(frozen=True)
class RecoverableCompression(Method):
    """Keep patches that stand out in the class token's attention, then those that stand out in likeness to the question.

    vis (N) = softmax(q_cls·k_j / √C) in the encoder's last block, all heads as one of width C. sim (N) = cosine of the projected
    patch and the projected question · P^-1/2, in CLIP's joint space of width P. How many stand out is the number of local
    outliers (1-D local outlier factor above `threshold`, `neighbours` nearest): K_v = outliers of vis, at least 1; of the others
    K_t = floor((N - K_v) / N · outliers of sim), the kept ones set to its minimum. Both stay as they are. Of the N_r tokens left,
    C = floor((K_v + K_t) / N_r · outliers of their vis, `centre_neighbours` nearest) of highest vis are centres:
    x_i <- x_i + sum_j vis_j x_j over the `cluster` other tokens left with the highest key cosine + `text_weight` · sim. One more
    token is the sum of vis_j x_j over all that are no centres. Sums are not normalised: that is the published rule.

    `keep` None is the paper: counts vary with the picture. A `keep` sets the total; the extra token is one of it, another is
    the most salient one, and the rest is shared in proportion to K_v, K_t and C. All pictures of a row are one set.

    text: a `ClipText` of the CLIP the encoder came from, with `question`: one for all images, or a tuple with one for each image
    of the call. False goes without (K_t = 0). The question is given beforehand as images are encoded before a prompt is seen.

    The default is what the paper means. The release counts outliers on both sides (upper_only=False), reads the question's
    feature at the last place of its padding (end="last"), projects patches without the encoder's last norm (post_norm=False) and
    looks up keys of left-over tokens at wrong places (own_keys=False). A merged token stands where its centre stood, the extra
    one where the most salient of its tokens did, not behind the others.
    """

    site = "encoder"
    newlines = "drop"
    keep: int | float | None = None
    text: TextTower | bool | None = None
    question: str | tuple[str, ...] | None = None
    neighbours: int = 20
    centre_neighbours: int = 10
    threshold: float = 1.5
    cluster: int = 32
    text_weight: float = 50.0
    upper_only: bool = True
    end: str = "eos"
    post_norm: bool = True
    own_keys: bool = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if self.text is True:
            raise ValueError("text=True names no text tower; pass text=jeton.ClipText(clip, tokenizer), or text=False.")
        if self.end not in ("eos", "last"):
            raise ValueError(f'end must be "eos" or "last", got {self.end!r}.')
        for name in ("neighbours", "centre_neighbours", "cluster"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a count of 1 or more, got {value!r}.")
        if self.text not in (None, False) and not self._questions:
            raise ValueError(
                'text guidance needs to know what is asked; pass question="...", or a tuple with one for each image.'
            )

    def needs(self) -> dict[str, Need]:
        seen: dict[str, Need] = {
            "attention": ClassAttention(joined=True, last=True),
            "keys": Keys(joined=True, last=True),
        }
        if self.text is False:
            return seen
        tower = self.text if not isinstance(self.text, bool) else None
        return {**seen, "similarity": TextSimilarity(None, tower, self._questions, self.end, self.post_norm)}

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        b, n, _ = tokens.features.shape
        if self.keep is not None and tokens.mask is None and count(self.keep, n) == n:
            return Reduction.identity(b, n, tokens.device)
        vis = score_of(signals, "attention", "recoverable-compression")
        keys = read(signals, "keys", "recoverable-compression", "attention keys (B, N, d)").float()
        sim = torch.zeros_like(vis) if self.text is False else self._similarity(signals)
        salient, recovered, centre, extra = self._chosen(vis, sim, tokens)
        stays = salient | recovered
        rest = tokens.real & ~stays
        first = best_of_units(vis, torch.zeros_like(tokens.origin), extra, rest & ~centre)
        chosen = stays | centre | first
        if self.keep is None:
            step = Reduction.select(chosen)
        else:
            step = pack(chosen, count(self.keep, n), ragged=tokens.mask is not None)
        matrix = self._weights(vis, sim, keys, rest, centre, first, step.index) * step.real[..., None]
        heaviest = torch.where(matrix.amax(1) > 0, matrix.argmax(1), -1)
        assign = torch.where(step.assign < 0, heaviest, step.assign)  # a representative belongs to its own token
        return Reduction(step.index, assign, matrix=matrix, mask=step.mask)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n, exact=False) if self.keep is None else Promise(Budget(self.keep).count(n))

    @property
    def _questions(self) -> tuple[str, ...]:
        return (self.question,) if isinstance(self.question, str) else tuple(self.question or ())

    def _similarity(self, signals: Signals | None) -> Tensor:
        """(B, N) likeness to each row's own question."""
        sim = read(signals, "similarity", "recoverable-compression", "likeness to the question (B, Q, N)").float()
        rows, questions = sim.shape[:2]
        if rows % questions:
            raise ValueError(f"there are {questions} questions for {rows} images; give one for all, or one for each image.")
        row = torch.arange(rows, device=sim.device)
        return sim[row, row // (rows // questions)]  # beams repeat the images of a batch one by one

    def _chosen(self, vis: Tensor, sim: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, N) the tokens kept for saliency and for the question, and the centres; (B, 1) 1 where there is an extra token."""
        mask, real = tokens.mask, tokens.real
        size, one = real.sum(1, keepdim=True), torch.zeros_like(tokens.origin)
        salient = self._standing_out(vis, self.neighbours, mask).sum(1, keepdim=True).clamp(min=1).minimum(size)
        recovered, centres = self._counts(vis, sim, salient, real)
        extra = (size > salient + recovered + centres).long()
        if self.keep is not None:
            total = counts(self.keep, size)
            extra = ((total > 1) & (total < size)).long()
            wanted = torch.cat([salient, recovered, centres], 1)
            front = torch.nn.functional.pad(torch.ones_like(total), (0, 2))
            caps = torch.cat([size - 1, (size - 1) * (self.text is not False), size - 1], 1)
            wanted = front + allocate(wanted, (total - extra - 1)[:, 0], caps)
            whole = torch.nn.functional.pad(size, (0, 2))
            salient, recovered, centres = torch.where(total < size, wanted, whole).split(1, 1)
        kept = best_of_units(vis, one, salient, mask)
        asked = best_of_units(sim, one, recovered, real & ~kept)
        centre = best_of_units(vis, one, centres, real & ~kept & ~asked)
        return kept, asked, centre, extra

    def _counts(self, vis: Tensor, sim: Tensor, salient: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1) how many tokens are recovered and how many are centres, where `salient` (B, 1) are kept."""
        size, one = real.sum(1, keepdim=True), torch.zeros(real.shape, dtype=torch.long, device=real.device)
        kept = best_of_units(vis, one, salient, real)
        recovered = torch.zeros_like(salient)
        if self.text is not False:
            least = sim.masked_fill(~real, torch.inf).amin(1, keepdim=True)
            found = self._standing_out(torch.where(kept, least, sim), self.neighbours, real).sum(1, keepdim=True)
            recovered = (size - salient) * found // size.clamp(min=1)
        kept = kept | best_of_units(sim, one, recovered, real & ~kept)
        rest = real & ~kept
        left = rest.sum(1, keepdim=True)
        found = self._standing_out(vis, self.centre_neighbours, rest).sum(1, keepdim=True)
        return recovered, ((salient + recovered) * found // left.clamp(min=1)).minimum(left)

    def _standing_out(self, score: Tensor, neighbours: int, mask: Tensor | None) -> Tensor:
        return local_outliers(score, neighbours, self.threshold, self.upper_only, mask)

    def _weights(
        self, vis: Tensor, sim: Tensor, keys: Tensor, rest: Tensor, centre: Tensor, first: Tensor, index: Tensor
    ) -> Tensor:
        """(B, K, N) the matrix: rows of kept tokens are one-hot, those of centres add their cluster, the extra one sums up."""
        n = vis.shape[1]
        if not self.own_keys:
            keys = gather(keys, (rest.cumsum(1) - 1).clamp(min=0))
        own = index[..., None] == torch.arange(n, device=index.device)
        unit = normalise(keys)
        near = gather(unit, index) @ unit.mT + self.text_weight * sim[:, None]
        best = near.masked_fill(~rest[:, None] | own, -torch.inf).topk(min(self.cluster, n), dim=2)
        inside = torch.zeros_like(near).scatter(2, best.indices, (best.values > -torch.inf).to(near.dtype))
        inside = torch.where(centre.gather(1, index)[..., None], inside, 0)
        pooled = first.gather(1, index)[..., None] & (rest & ~centre)[:, None]
        return torch.where(own & ~pooled, 1.0, (inside + pooled) * vis.masked_fill(~rest, 0)[:, None])
