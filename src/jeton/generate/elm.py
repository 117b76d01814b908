"""ELM: a language model over the ids of an image tokenizer, with a vocabulary split into sub-codes.

Letters: B images, N tokens of an image, S sub-codes of a token, V ids of a sub-code, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from ..ops.sampling import cfg, cfg_schedule, mask_ratio, mask_schedule, sample_logits
from ..registry import register

SIZES = {  # depth, heads, width
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "2B": (48, 28, 1792),
}


@register(
    title="Elucidating the Design Space of Language Models for Image Generation",
    year=2024,
    source="arXiv:2410.16257",
    family="generate",
    stage="generate",
    training_free=False,
)
class ELM(nn.Module, PyTorchModelHubMixin, library_name="jeton"):  # type: ignore[call-arg]
    """Class-conditional generation of ids (B, N, S): positions one after the other, a position's sub-codes side by side.

    Each sub-code has a table (V, D) of its own; the S embeddings are joined and mapped to D, and from one hidden state S heads
    predict the next position's sub-codes, independent of each other given it. In front stands a class token; a share `label_drop`
    of labels becomes the null class in training, for guidance. The loss is the mean cross-entropy over N S ids. The body is
    transformers' `LlamaModel` (RMSNorm, SwiGLU of 8/3 D rounded up to 256, key-value cache); with `grid` = (rows, columns) its
    rotary embedding turns half of each head by the row and half by the column, without by the position.

    `mode="mlm"` is the masked variant: it sees in both directions, learns ids hidden at a drawn share (`mask_schedule`), and
    fills them in a few steps, the surest first. The study finds "ar" better. `class_rotation="zero"` is the released code's
    table of zeros for the class token, which makes every attention logit to it 0; by default it is not rotated. Released
    weights pair the channels of a head differently (interleaved). Of a tokenizer it needs nothing but ids, N, S and V.
    """

    def __init__(
        self,
        tokens: int = 256,
        codes: int = 1024,
        subcodes: int = 2,
        classes: int = 1000,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        grid: tuple[int, int] | None = (16, 16),
        mode: str = "ar",
        mask_schedule: str = "cosine",
        label_drop: float = 0.1,
        class_rotation: str = "identity",
    ) -> None:
        super().__init__()
        if grid is not None and grid[0] * grid[1] != tokens:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} has not {tokens} tokens; give grid=None for tokens in a row.")
        if mode not in ("ar", "mlm"):
            raise ValueError(f'mode must be "ar" or "mlm", got {mode!r}.')
        if class_rotation not in ("identity", "zero"):
            raise ValueError(f'class_rotation must be "identity" or "zero", got {class_rotation!r}.')
        if width % (4 * heads):
            raise ValueError(f"a width of {width} cannot be turned in {heads} heads; it must be a multiple of {4 * heads}.")
        self.tokens, self.codes, self.subcodes, self.classes = tokens, codes, subcodes, classes
        grid = None if grid is None else (grid[0], grid[1])  # a list where it is read from a file
        self.grid, self.mode, self.mask_schedule, self.label_drop = grid, mode, mask_schedule, label_drop
        rows = codes + (mode == "mlm")  # the last row stands for a hidden id
        self.embeddings = nn.ModuleList(nn.Embedding(rows, width) for _ in range(subcodes))
        self.join = nn.Linear(subcodes * width, width, bias=False) if subcodes > 1 else nn.Identity()
        self.labels = nn.Embedding(classes + 1, width)
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=-(-(8 * width // 3) // 256) * 256,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=tokens + 1,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.body = LlamaModel(config)
        self.body.embed_tokens = nn.Identity()  # embeddings come from here
        self.body.rotary_emb = _Rotary(width // heads, tokens, grid, class_rotation)
        self.heads = nn.ModuleList(nn.Linear(width, codes, bias=False) for _ in range(subcodes))
        for module in (*self.embeddings, *([self.join] if subcodes > 1 else []), self.labels):
            nn.init.normal_(module.weight, std=0.02)
        for head in self.heads:
            nn.init.zeros_(head.weight)

    @classmethod
    def preset(cls, size: str, **changes: Any) -> ELM:
        """The study's "B", "L", "XL", "XXL" or "2B", untrained; `changes` overwrite single fields."""
        if size not in SIZES:
            raise ValueError(f"there is no preset {size!r}; they are {', '.join(SIZES)}.")
        depth, heads, width = SIZES[size]
        return cls(**{"depth": depth, "heads": heads, "width": width, **changes})

    @property
    def null(self) -> int:
        """The label of no class."""
        return self.classes

    def embed(self, ids: Tensor) -> Tensor:
        """(B, N, D) of ids (B, N, S), or (B, N) where S is 1."""
        ids = ids[..., None] if ids.dim() == 2 else ids
        if ids.shape[-1] != self.subcodes:
            raise ValueError(f"a token has {self.subcodes} sub-codes here, got ids of shape {tuple(ids.shape)}.")
        return self.join(torch.cat([table(part) for table, part in zip(self.embeddings, ids.unbind(-1))], -1))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """(B, N, S, V) logits of every token: of ids (B, N, S) in front of it ("ar"), or around it ("mlm"). labels (B,)."""
        x = torch.cat([self.labels(labels)[:, None], self.embed(ids)], 1)
        if self.mode == "ar":
            return self._logits(self.body(inputs_embeds=x[:, :-1], use_cache=False).last_hidden_state)
        seen = torch.ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        return self._logits(self.body(inputs_embeds=x, attention_mask=seen, use_cache=False).last_hidden_state[:, 1:])

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of ids (B, N, S) given labels (B,); in "mlm" of the hidden ones."""
        ids = ids[..., None] if ids.dim() == 2 else ids
        if self.training and self.label_drop:
            labels = torch.where(torch.rand(labels.shape, device=labels.device) < self.label_drop, self.null, labels)
        if self.mode == "ar":
            return F.cross_entropy(self(ids, labels).flatten(0, 2), ids.flatten())
        hidden = self._hide(ids)
        logits = self(ids.masked_fill(hidden[..., None], self.codes), labels)
        each = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(ids.shape).mean(-1)
        return (each * hidden).sum() / hidden.sum()

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        scale: float = 4.0,
        schedule: str = "linear",
        temperature: float = 1.0,
        top_k: int | None = 1000,
        steps: int = 8,
        generator: torch.Generator | None = None,
        known: Tensor | None = None,
        fixed: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, N, S) for labels (B,). `scale` of guidance follows `schedule` over the tokens ("ar") or steps ("mlm").

        Where `fixed` (B, N) is true, ids are those of `known` (B, N, S). Without randomness (temperature 0 or a small top_k)
        images come out flat. `steps` is how many times "mlm" fills tokens; there `temperature` also is that of the Gumbel noise
        on the order, falling to 0.
        """
        was = self.training
        self.eval()
        try:
            draw = self._one_by_one if self.mode == "ar" else self._by_steps
            both = torch.cat([labels, torch.full_like(labels, self.null)]) if scale != 1 else labels
            options = {"temperature": temperature, "top_k": top_k, "generator": generator}
            return draw(both, scale, schedule, options, known, fixed, steps)
        finally:
            self.train(was)

    @torch.no_grad()
    def expand(self, ids: Tensor, labels: Tensor, by: int, overlap: int, axis: str = "rows", **options: Any) -> Tensor:
        """Go on beyond the grid: ids (B, h, w, S) grow by `by` rows below or columns to the right; more arguments as in
        `generate`.

        A window of the trained grid slides on: its first `overlap` rows or columns are what was there, the others are generated.
        """
        if self.grid is None:
            raise ValueError("tokens in a row have no rows or columns to expand; this needs a model with a grid.")
        if axis not in ("rows", "columns"):
            raise ValueError(f'axis must be "rows" or "columns", got {axis!r}.')
        dim = 1 if axis == "rows" else 2
        window = self.grid[dim - 1]
        if ids.shape[3 - dim] != self.grid[2 - dim] or not 0 < overlap < window or ids.shape[dim] < overlap:
            raise ValueError(
                f"ids must fit the grid {self.grid} and overlap be 1 to {window - 1}, got {tuple(ids.shape)} and {overlap}."
            )
        goal = ids.shape[dim] + by
        while ids.shape[dim] < goal:
            known = ids.new_zeros(ids.shape[0], *self.grid, self.subcodes)
            fixed = torch.zeros(known.shape[:3], dtype=torch.bool, device=ids.device)
            known.narrow(dim, 0, overlap).copy_(ids.narrow(dim, ids.shape[dim] - overlap, overlap))
            fixed.narrow(dim, 0, overlap).fill_(True)
            made = self.generate(labels, known=known.flatten(1, 2), fixed=fixed.flatten(1), **options).view(known.shape)
            ids = torch.cat([ids, made.narrow(dim, overlap, window - overlap)], dim)
        return ids.narrow(dim, 0, goal)

    @torch.no_grad()
    def locality(self, ids: Tensor, labels: Tensor) -> Tensor:
        """(layers, far + 1) where attention goes: the mean mass of a token's attention at each distance in the grid, rounded
        down.

        Distance is Euclidean between cells (along the row without a grid); what the class token gets is left out, so rows add
        up to less than 1. Computed with the eager attention, which alone keeps the maps.
        """
        with self._eager():
            x = torch.cat([self.labels(labels)[:, None], self.embed(ids)], 1)
            maps = self.body(inputs_embeds=x, use_cache=False, output_attentions=True).attentions
        columns = self.grid[1] if self.grid else self.tokens
        at = torch.arange(self.tokens, device=ids.device)
        row, col = at // columns, at % columns
        distance = ((row[:, None] - row).square() + (col[:, None] - col).square()).double().sqrt().long()
        found = []
        for each in maps:
            mass = each.float().mean((0, 1))[1:, 1:]
            total = mass.new_zeros(int(distance.max()) + 1).index_add(0, distance.flatten(), mass.flatten())
            found.append(total / self.tokens)
        return torch.stack(found)

    def _logits(self, hidden: Tensor) -> Tensor:
        return torch.stack([head(hidden) for head in self.heads], 2)

    def _guided(self, logits: Tensor, scale: float, schedule: str, i: int, n: int) -> Tensor:
        if scale == 1:
            return logits
        cond, uncond = logits.chunk(2)
        return cfg(cond, uncond, cfg_schedule(schedule, scale, i, n))

    def _one_by_one(self, labels, scale, schedule, options, known, fixed, steps):  # type: ignore[no-untyped-def]
        x, cache, made = self.labels(labels)[:, None], None, []
        for i in range(self.tokens):
            out = self.body(inputs_embeds=x, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = self._guided(self._logits(out.last_hidden_state)[:, 0], scale, schedule, i, self.tokens)
            ids, _ = sample_logits(logits, **options)
            if fixed is not None:
                ids = torch.where(fixed[:, i, None], known[:, i], ids)
            made.append(ids)
            x = self.embed((ids if scale == 1 else torch.cat([ids, ids]))[:, None])
        return torch.stack(made, 1)

    def _by_steps(self, labels, scale, schedule, options, known, fixed, steps):  # type: ignore[no-untyped-def]
        b = labels.shape[0] // (1 if scale == 1 else 2)
        ids = torch.full((b, self.tokens, self.subcodes), self.codes, device=labels.device)
        if fixed is not None:
            ids = torch.where(fixed[..., None], known, ids)
        filled = mask_schedule(steps, self.tokens, self.mask_schedule)
        for i, count in enumerate(filled):
            logits = self(ids if scale == 1 else torch.cat([ids, ids]), labels)
            drawn, p = sample_logits(self._guided(logits, scale, schedule, i, steps), **options)
            sure = p.clamp(min=1e-20).log().sum(-1)
            noise = torch.rand(sure.shape, generator=options["generator"], device=sure.device).clamp(1e-9, 1 - 1e-7)
            sure = sure - options["temperature"] * (1 - (i + 1) / steps) * (-noise.log()).log()
            hidden = ids[..., 0] == self.codes
            first = sure.masked_fill(~hidden, -torch.inf).argsort(-1, descending=True)[:, :count]
            chosen = torch.zeros_like(hidden).scatter(1, first, True) & hidden
            ids = torch.where(chosen[..., None], drawn, ids)
        return ids

    def _hide(self, ids: Tensor) -> Tensor:
        """(B, N) true where an id is hidden: for each image a share from the schedule, at least one."""
        b, n = ids.shape[:2]
        share = mask_ratio(self.mask_schedule, torch.rand(b, 1, device=ids.device))
        count = (share * n).ceil().long().clamp(1, n)
        return torch.rand(b, n, device=ids.device).argsort(-1).argsort(-1) < count

    @contextmanager
    def _eager(self) -> Iterator[None]:
        before = self.body.config._attn_implementation
        self.body.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.body.set_attn_implementation(before)


class _Rotary(nn.Module):
    """cos and sin for LlamaModel, of position 0 (the class token) and the tokens behind it."""

    def __init__(self, dim: int, tokens: int, grid: tuple[int, int] | None, class_rotation: str) -> None:
        super().__init__()
        at = torch.arange(tokens, dtype=torch.float32)
        if grid is None:
            angles = at[:, None] * _frequencies(dim)
        else:
            rate = _frequencies(dim // 2)
            angles = torch.cat([(at // grid[1])[:, None] * rate, (at % grid[1])[:, None] * rate], 1)
        angles = torch.cat([torch.zeros(1, dim // 2), angles + (0 if grid else _frequencies(dim))])  # in a row the class is 0
        cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
        if class_rotation == "zero":
            cos[0] = sin[0] = 0
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


def _frequencies(dim: int) -> Tensor:
    return 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
