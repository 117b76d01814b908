"""What a language model thinks of every token of a text, and how well a detector tells machine from human text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """For each token but the first, shifted so that column t is about token t + 1. All (B, L - 1), 0 where `mask` is false:
    `logp` its log-probability, `rank` 1 for the likeliest, `entropy` of the distribution in nats. `logits` (B, L - 1, V)."""

    logp: Tensor
    rank: Tensor
    entropy: Tensor
    mask: Tensor
    logits: Tensor


@torch.no_grad()
def token_scores(model: Any, ids: Tensor, mask: Tensor | None = None) -> TokenScores:
    """One forward pass of a causal language model over ids (B, L); `mask` (B, L) is true at real tokens, which stand together."""
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(f"ids must be (B, L) with at least two tokens, got {tuple(ids.shape)}.")
    mask = torch.ones_like(ids) if mask is None else mask
    place = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=place).logits[:, :-1].float()
    known = (mask[:, 1:].bool()) & (mask[:, :-1].bool())
    every = logits.log_softmax(-1)
    logp = every.gather(2, ids[:, 1:, None])[..., 0]
    rank = (every > logp[..., None]).sum(-1) + 1
    entropy = -(every.exp() * every.clamp(min=torch.finfo(every.dtype).min)).sum(-1)
    logp, rank, entropy = (torch.where(known, one, 0) for one in (logp, rank, entropy))
    return TokenScores(logp, rank, entropy, known, logits)


def encoded(tokenizer: Any, texts: Sequence[str], batch: int, length: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ids and masks (B, L), padded on the right; the first token is the beginning-of-text token where there is one."""
    start = [] if getattr(tokenizer, "bos_token_id", None) is None else [tokenizer.bos_token_id]
    for at in range(0, len(texts), batch):
        rows = [(start + tokenizer(text, add_special_tokens=False)["input_ids"])[:length] for text in texts[at : at + batch]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        yield ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])


def detection(human: Tensor, machine: Tensor, at: float = 0.05) -> dict[str, float]:
    """How well scores tell machine text (higher) from human text: the area under the ROC curve, ties counted half; the average
    precision; and the share of machine text found where at most the share `at` of human text is taken for it."""
    human, machine = human.double(), machine.double()
    if not len(human) or not len(machine):
        raise ValueError("both human and machine texts are needed.")
    above = torch.searchsorted(human.sort().values, machine, right=False) + torch.searchsorted(
        human.sort().values, machine, right=True
    )
    auroc = float(above.double().mean() / 2 / len(human))
    threshold = human.unique()
    false = torch.stack([(human > one).double().mean() for one in threshold])
    most = threshold[false <= at].min()
    cuts = machine.unique().flip(0)
    found = torch.stack([(machine >= cut).double().sum() for cut in cuts])
    wrong = torch.stack([(human >= cut).double().sum() for cut in cuts])
    gained = torch.diff(found, prepend=torch.zeros(1, dtype=torch.double)) / len(machine)
    precision = found / (found + wrong)
    return {"auroc": auroc, "pr_auc": float((gained * precision).sum()), "tpr": float((machine > most).double().mean())}
