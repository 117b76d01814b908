"""SimVLG: a BERT that merges similar visual tokens in every layer connects a frozen encoder to a frozen language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from ..layout import Geometry
from ..method import Unsupported
from ..models import Encoder, adapt
from ..ops.flops import block_flops
from ..ops.matching import by_parity, merge_pairs
from ..registry import register
from ..tokens import Tokens
from ._common import Bridge
from ._model import BridgedLlava


@register(
    title="Expedited Training of Visual Conditioned Language Generation via Redundancy Reduction",
    year=2023,
    source="arXiv:2310.03291",
    family="bridge",
    stage="projector",
    training_free=False,
    headline="about 5 times faster pre-training than BLIP-2's at similar quality; a tenth of the data for comparable results",
)
class SimVLG(Bridge):
    """(P, N, D) features, a class token in front, to (P, N - merge · depth, d): 257 to 29 with the published 12 layers and 19.

    h = LN(W x + positions + type 0); in each of `depth` layers of BERT, behind self attention (output, residual, LayerNorm),
    ToMe's matching by the keys, averaged over heads, merges `merge` tokens into plain means, with no sizes and nothing added to
    attention; then the feed-forward half. The class token neither moves nor receives. A linear map leads to the language model's
    width. Encoder and language model stay frozen (`freeze`); `loss` is that of the caption alone. `start_from` takes the
    weights of a trained BERT of the same shape, its word embeddings aside.

    Videos: with `frames` = F an image is F pictures. In every block of the encoder, between attention and MLP, x <- x + a T(x),
    where T attends over the frames at the same place, and a is a learned number that begins at 0; features are averaged over
    frames at the end. `merge=0` makes the connector an ordinary encoder. Tokens are handed on in the order of their
    representatives, not in that of the published listing.
    """

    whole = True

    def __init__(
        self,
        config: Any,
        merge: int = 19,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        mlp: int = 3072,
        dropout: float = 0.1,
        frames: int = 1,
    ) -> None:
        super().__init__(config)
        self.special = int(config.vision_config.model_type == "clip_vision_model")
        self.merge, self.pictures = merge, frames
        self.counts = self._plan(self.patches + self.special, merge, depth)
        told = BertConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.into = nn.Linear(self.width, width)
        self.positions = nn.Embedding(max(told.max_position_embeddings, self.counts[0]), width)
        self.kind = nn.Parameter(torch.zeros(width))
        self.norm, self.dropout = nn.LayerNorm(width, eps=told.layer_norm_eps), nn.Dropout(dropout)
        self.connector = nn.ModuleList(MergingLayer(told, merge, self.special) for _ in range(depth))
        self.leave = nn.Linear(width, self.out)
        blocks, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
        used = layer if layer >= 0 else blocks + layer + 1
        self.temporal = nn.ModuleList(Temporal(self.width) for _ in range(used if frames > 1 else 0))
        self.apply(_start)

    @staticmethod
    def _plan(n: int, merge: int, depth: int) -> list[int]:
        """Tokens in front of each layer and behind the last."""
        counts = [n - merge * layer for layer in range(depth + 1)]
        if isinstance(merge, bool) or not isinstance(merge, int) or merge < 0 or depth < 1:
            raise ValueError(f"merge must be a whole number of tokens and depth at least 1, got {merge!r} and {depth!r}.")
        if merge and counts[-2] // 2 < merge:
            raise ValueError(
                f"{depth} layers cannot merge {merge} of {n} tokens each: in front of the last {counts[-2]} are left, of which "
                f"half can go; use merge={max(0, (n - 2) // (depth + 1))} or fewer."
            )
        return counts

    @property
    def tokens(self) -> int:
        return self.counts[-1]

    def forward(self, features: Tensor) -> Tensor:
        return self.leave(self.connect(features))

    def connect(self, features: Tensor) -> Tensor:
        """(P, N, D) to (P / frames, K, width): what the connector makes, in front of the language model's width."""
        if self.pictures > 1:
            features = features.unflatten(0, (-1, self.pictures)).mean(1)
        x = self.into(features)
        x = self.dropout(self.norm(x + self.positions.weight[: x.shape[1]] + self.kind))
        order = None
        for layer in self.connector:
            x, order = layer(x, order)
        return x

    def start_from(self, bert: BertModel) -> None:
        """Take the weights of a BERT of the same shape; its word embeddings and pooler are left out."""
        embeddings, own = bert.embeddings, len(self.connector)
        if len(bert.encoder.layer) < own or bert.config.hidden_size != self.into.out_features:
            raise ValueError(
                f"a BERT of {own} layers of width {self.into.out_features} fits, this one has {len(bert.encoder.layer)} of width "
                f"{bert.config.hidden_size}."
            )
        with torch.no_grad():
            rows = min(len(self.positions.weight), len(embeddings.position_embeddings.weight))
            self.positions.weight[:rows] = embeddings.position_embeddings.weight[:rows]
            self.kind.copy_(embeddings.token_type_embeddings.weight[0])
        self.norm.load_state_dict(embeddings.LayerNorm.state_dict())
        for layer, its in zip(self.connector, bert.encoder.layer):
            layer.load_state_dict(its.state_dict())

    def enter(self, tower: nn.Module) -> None:
        """Let the frames of a video see each other between attention and MLP of the encoder's blocks."""
        if self.pictures == 1:
            return
        view = adapt(tower)
        assert isinstance(view, Encoder)
        for block, temporal in zip(view.blocks, self.temporal):
            parts = view.parts(block)
            if parts.scale2 is not type(parts).scale2 or not isinstance(parts.norm2, nn.Module):
                raise Unsupported(f"simvlg(frames={self.pictures}) cannot enter the blocks of a {view.name}; use a CLIP encoder.")
            between = _Between(temporal, self.pictures)
            parts.norm2.register_forward_pre_hook(between.before)
            parts.mlp.register_forward_hook(between.after)  # type: ignore[attr-defined]

    def freeze(self, model: BridgedLlava) -> None:
        """Leave nothing of the model to be trained but this connector."""
        model.requires_grad_(False)
        self.requires_grad_(True)

    def geometry(self) -> Geometry:
        """Which tokens merge depends on the picture, so they lie on no grid: a line, each over an equal share of the patches."""
        at = torch.arange(self.tokens)
        source = (at * self.patches * self.pictures // self.tokens)[:, None]
        return Geometry.of(
            source, torch.zeros_like(at), torch.zeros_like(at), at, [(1, self.tokens)], self.patches * self.pictures, ("image",)
        )

    def flops(self, length: int) -> float:
        width, mlp = self.into.out_features, self.connector[0].intermediate.dense.out_features
        maps = 2.0 * width * (self.counts[0] * self.width + self.tokens * self.out)
        layers = zip(self.counts, self.counts[1:])
        blocks = sum(block_flops(before, width, mlp, n_mlp=after) for before, after in layers)
        each = len(self.temporal) * self.counts[0] * (2 * 2 * self.width * Temporal.HIDDEN)
        return maps + blocks + self.pictures * each


class MergingLayer(BertLayer):
    """A layer of BERT, by its names, that merges tokens behind its attention."""

    def __init__(self, config: BertConfig, merge: int, special: int) -> None:
        super().__init__(config)
        self.merge, self.special = merge, special

    def forward(self, x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """x (B, N, C) and the rank of each token in the published listing to (B, N - merge, C) and theirs."""
        own = self.attention.self
        q, k, v = (
            part(x).unflatten(2, (own.num_attention_heads, -1)).transpose(1, 2) for part in (own.query, own.key, own.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=own.dropout.p if self.training else 0.0)
        x = self.attention.output(mixed.transpose(1, 2).flatten(2), x)
        if self.merge:
            keys = Tokens(k.mean(1).detach(), prefix=self.special, order=order)
            pairs = by_parity(keys.features, self.special, order)
            step = merge_pairs(keys, pairs, x.shape[1] - self.special - self.merge)
            x, order = step.mix(x), step.order
        return self.feed_forward_chunk(x), order


class Temporal(nn.Module):
    """T: attention over the frames at the same place. Queries and keys are maps to 256, their products scaled by 256^-1/2 in each
    of 8 heads; values are the features themselves, split among the heads. `share` is the learned number a."""

    HIDDEN, HEADS = 256, 8

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % self.HEADS:
            raise ValueError(f"features of width {width} cannot be split among {self.HEADS} heads.")
        self.query, self.key = nn.Linear(width, self.HIDDEN), nn.Linear(width, self.HIDDEN)
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(B · F, N, D) to a T(x), of the same shape."""
        x = x.unflatten(0, (-1, frames)).transpose(1, 2)  # (B, N, F, D)
        q, k, v = (y.unflatten(3, (self.HEADS, -1)).transpose(2, 3) for y in (self.query(x), self.key(x), x))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.HIDDEN**-0.5)
        return self.share * mixed.transpose(2, 3).flatten(3).transpose(1, 2).flatten(0, 1)


class _Between:
    """Adds to the residual stream between the halves of a block: in front of the second norm, and behind the MLP once more, since
    that is added to what was there before."""

    def __init__(self, temporal: Temporal, frames: int) -> None:
        self.temporal, self.frames = temporal, frames
        self.more: Tensor | None = None

    def before(self, module: nn.Module, args: tuple) -> tuple:
        if args[0].shape[0] % self.frames:
            raise ValueError(f"videos of {self.frames} frames were expected, got {args[0].shape[0]} pictures.")
        self.more = self.temporal(args[0], self.frames)
        return (args[0] + self.more,)

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        assert self.more is not None
        more, self.more = self.more, None
        return output + more


def _start(part: nn.Module) -> None:
    if isinstance(part, nn.Linear | nn.Embedding):
        nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


# -- training ------------------------------------------------------------------------------------------------------------


def captioned(model: BridgedLlava, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of prompts that are a picture and its caption with a newline, padded on the right; the
    loss is over the caption alone."""
    told = tokenizer([f"{caption}\n" for caption in captions], add_special_tokens=False).input_ids
    length, pad = max(len(ids) for ids in told), tokenizer.pad_token_id or 0
    front = [model.config.image_token_id] * model.bridge.tokens
    ids = torch.tensor([front + each + [pad] * (length - len(each)) for each in told])
    real = torch.tensor([[1] * (len(front) + len(each)) + [0] * (length - len(each)) for each in told])
    labels = ids.masked_fill(real == 0, -100)
    labels[:, : len(front)] = -100
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


class Contrast(nn.Module):
    """The optional term: the connector's first token and a frozen text embedding of its caption, mapped to `width`, must find
    each other in the batch: cross-entropy both ways, smoothed by 0.1, of cosines divided by a learned temperature."""

    def __init__(self, visual: int, text: int, width: int = 256) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(visual, width), nn.Linear(text, width)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, first: Tensor, text: Tensor) -> Tensor:
        near = F.normalize(self.visual(first), dim=-1) @ F.normalize(self.text(text), dim=-1).mT
        near = near / self.temperature.clamp(0.001, 0.5)
        right = torch.arange(len(near), device=near.device)
        return (F.cross_entropy(near, right, label_smoothing=0.1) + F.cross_entropy(near.mT, right, label_smoothing=0.1)) / 2


def loss(
    model: BridgedLlava,
    inputs: Mapping[str, Tensor],
    contrast: Contrast | None = None,
    text: Tensor | None = None,
    beta: float = 0.0,
) -> dict[str, Tensor]:
    """The caption's cross-entropy, and with `beta` above 0 so much of the contrast with its text embedding (B, E), for
    `jeton.train` to add. `inputs` are those of `captioned` and pixel_values."""
    if beta == 0:
        return {"caption": model(**inputs).loss}
    if contrast is None or text is None:
        raise ValueError("a contrastive term needs a Contrast and the captions' text embeddings.")
    held: list[Tensor] = []
    handle = model.bridge.leave.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    try:
        caption = model(**inputs).loss
    finally:
        handle.remove()
    return {"caption": caption, "contrast": beta * contrast(held[0][:, 0], text)}
