"""Parts that tokenizers share: an encoder with latent queries, a decoder from mask tokens, and the drop of the tail.

Letters: P patches of a picture (a grid, row by row), K latent tokens, k of them in use, D width of the transformer, d of a code.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def transformer(width: int, depth: int, heads: int) -> nn.TransformerEncoder:
    """Pre-norm blocks, (B, N, D) to (B, N, D): attention and an MLP of 4 D with GELU, all with biases."""
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


def start(module: nn.Module, std: float = 0.02) -> None:
    """For `apply`: weights from a normal of this deviation cut at two of it, biases 0, norms 1."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class LatentEncoder(nn.Module):
    """A picture (B, C, H, W) to K vectors (B, K, d): ``Blocks([class ; patches ; queries])``, of which the queries are kept.

    Class token, patches and queries have learned positions; norms stand before the blocks and on the queries behind them. With
    `causal`, query i sees the picture and the queries up to i, and the picture does not see the queries. `legacy_reshape` reads
    the K x D outputs as D x K, as the first released weights of this kind need: a vector then mixes several queries.
    `batch_norm` brings each number of each vector to mean 0 and variance 1 over the batch (to running means in eval mode), so
    that none can be the same for all pictures; a batch to train on is then of two pictures at least.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        out: int,
        channels: int = 3,
        causal: bool = False,
        legacy_reshape: bool = False,
        init_std: float = 0.02,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(channels, width, patch_size, patch_size)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.position = nn.Parameter(torch.randn(patches + 1, width) * width**-0.5)
        self.queries = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.query_position = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = transformer(width, depth, heads)
        self.down = nn.Linear(width, out)
        self.norm = nn.BatchNorm1d(tokens * out, affine=False) if batch_norm else None
        self.apply(functools.partial(start, std=init_std))
        hidden = torch.zeros(patches + 1 + tokens, patches + 1 + tokens, dtype=torch.bool)
        if causal:
            hidden[:, patches + 1 :] = True
            hidden[patches + 1 :, patches + 1 :] = torch.ones(tokens, tokens).triu(1).bool()
        self.legacy_reshape = legacy_reshape
        self.register_buffer("hidden", hidden if causal else None, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        b, k = images.shape[0], self.queries.shape[0]
        patches = self.patch(images).flatten(2).mT
        picture = torch.cat([self.cls.expand(b, -1, -1), patches], 1) + self.position
        x = torch.cat([picture, (self.queries + self.query_position).expand(b, -1, -1)], 1)
        x = self.blocks(self.before(x), mask=self.hidden)
        x = self.after(x[:, -k:])
        z = self.down(x.reshape(b, -1, k).mT if self.legacy_reshape else x)
        return z if self.norm is None else self.norm(z.flatten(1)).view_as(z)


class MaskTokenDecoder(nn.Module):
    """k codes (B, k, d) to a prediction for each patch (B, P, out): ``Blocks([class ; P mask tokens ; codes])``, of which the
    mask tokens are kept and pass Linear-Tanh-Linear. The learned positions of the codes are those of the first k of K."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        code_dim: int,
        out: int,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.patches = (image_size // patch_size) ** 2
        self.up = nn.Linear(code_dim, width)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.position = nn.Parameter(torch.randn(self.patches + 1, width) * width**-0.5)
        self.code_position = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = transformer(width, depth, heads)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, out))
        self.apply(functools.partial(start, std=init_std))

    def forward(self, codes: Tensor, length: Tensor | None = None) -> Tensor:
        """`length` (B,) says how many of the k codes each row has; those behind are not seen."""
        b, k = codes.shape[:2]
        picture = torch.cat([self.cls, self.mask_token.expand(-1, self.patches, -1)], 1) + self.position
        x = torch.cat([picture.expand(b, -1, -1), self.up(codes) + self.code_position[:k]], 1)
        hidden = None
        if length is not None:
            behind = torch.arange(k, device=codes.device) >= length[:, None]
            hidden = F.pad(behind, (self.patches + 1, 0), value=False)
        x = self.blocks(self.before(x), src_key_padding_mask=hidden)
        return self.head(self.after(x[:, 1 : self.patches + 1]))


def draw_length(tokens: int, rows: int | None = None, device: torch.device | None = None) -> Tensor:
    """How many tokens are left of K when the tail is dropped: uniform on 1..K, one for the batch () or one for each row (B,)."""
    return torch.randint(1, tokens + 1, () if rows is None else (rows,), device=device)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """(B, C, H, W) a square picture of patches (B, P, C size²), row by row, each channel by channel."""
    side = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(1, (side, side)).unflatten(3, (-1, size, size))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
