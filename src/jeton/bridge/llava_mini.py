"""LLaVA-Mini: the text takes in what the picture shows before the language model, which then needs a single visual token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from ..layout import Geometry
from ..ops.flops import block_flops
from ..ops.squares import side
from ..registry import register
from ._common import Bridge, Projector, QueryResampler, linear_flops, square


@register(
    title="LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token",
    year=2025,
    source="arXiv:2501.03895",
    family="bridge",
    stage="projector",
    training_free=False,
    headline="1 token instead of 576 beats LLaVA-1.5 on the mean of 11 image benchmarks, with 77% fewer FLOPs",
)
class LlavaMini(Bridge):
    """`side`² visual tokens an image: C² learned queries read the N features (`QueryResampler`, no residual, no norm behind), and
    the projector maps what they read, and all N features, to the language model's width d.

    Before the language model, `fusion_layers` decoder layers of its own kind (separate weights, causal, rotary, no norm behind)
    run over [N projected; C² compressed; text]; the last rows take the place of the text, the C² before them that of the
    placeholders. Only instructions take part: padding and, in training, answers (`labels`) are masked out, positions do not count
    them, and they keep their raw embeddings. Embeddings that go in are detached. It happens once, at prefill; what is decoded, or
    asked later on the cache without pictures, stays raw: ask again with the whole conversation.

    Of several pictures (frames of a video) each is fused with the text by itself; visual tokens stand one after the other, and
    the text is the mean over pictures. tiles=2 is high resolution: pictures come as 2 x 2 tiles and a thumbnail (`tiles`), the
    compressor reads the tiles as one grid, and all features are context.

    Keys have the positions of their own grid. The released code resizes the query grid's, which for one query are the same
    everywhere: `resized_positions=True`. side=None hands all N projected features on (the paper's variant without compression).
    """

    def __init__(
        self,
        config: Any,
        side: int | None = 1,
        fusion_layers: int = 4,
        tiles: int = 1,
        heads: int = 8,
        resized_positions: bool = False,
    ) -> None:
        super().__init__(config)
        for name, value, least in (("side", side, 1), ("fusion_layers", fusion_layers, 0), ("tiles", tiles, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if side is None and tiles > 1:
            raise ValueError("side=None hands the features of one picture on; high resolution (tiles > 1) needs the compressor.")
        self.side, self.tiles = side, tiles
        self.pictures = 1 if tiles == 1 else tiles**2 + 1
        self.projector = Projector(config, self.width)
        self.compressor = None if side is None else QueryResampler(side, self.width, heads, resized_positions)
        self.fusion: nn.Module | None = None
        self.fuses = fusion_layers > 0
        if fusion_layers:
            self.fusion = _layers(config.text_config, fusion_layers)

    @property
    def tokens(self) -> int:
        return self.patches if self.side is None else self.side**2

    def start_from(self, language_model: nn.Module) -> None:
        """Copy the language model's own first layers into those of the fusion: a start for short training, not the paper's."""
        assert self.fusion is not None
        for mine, its in zip(self.fusion.layers, language_model.layers, strict=False):  # type: ignore[arg-type]
            mine.load_state_dict(its.state_dict())

    def forward(self, features: Tensor) -> Tensor:
        """(P, N, D) to (P / pictures, C² + M, d), where M = pictures N rows are context and only there if something is fused."""
        if len(features) % self.pictures:
            raise ValueError(
                f"images come as {self.tiles} x {self.tiles} tiles and a thumbnail, {self.pictures} pictures each, but there are "
                f"{len(features)}; prepare them with jeton.bridge.llava_mini.tiles."
            )
        whole = self.projector(features)
        if self.compressor is None:
            return torch.cat([whole, whole], 1) if self.fuses else whole
        groups = features.unflatten(0, (-1, self.pictures))
        tokens = self.projector(self.compressor(self._joined(groups)))
        return torch.cat([tokens, whole.unflatten(0, (-1, self.pictures)).flatten(1, 2)], 1) if self.fuses else tokens

    def _joined(self, groups: Tensor) -> Tensor:
        """(G, pictures, N, D) to one grid (G, tiles² N, D) of the tiles, the thumbnail left out."""
        if self.tiles == 1:
            return groups[:, 0]
        n = side(groups.shape[2])
        grid = groups[:, :-1].unflatten(2, (n, n)).unflatten(1, (self.tiles, self.tiles))
        return grid.transpose(2, 3).flatten(1, 4)

    def fuse(self, embeds: Tensor, visual: Tensor, tokens: Tensor, context: Tensor, instruction: Tensor) -> Tensor:
        (pictures, k), batch = tokens.shape[:2], len(embeds)
        each = visual.sum(1) // k
        sample = torch.arange(batch, device=embeds.device).repeat_interleave(each, output_size=pictures)
        seen = torch.ones(pictures, context.shape[1] + k, dtype=torch.long, device=embeds.device)
        mask = torch.cat([seen, instruction[sample].long()], 1)
        # placeholders stay where they are, hidden as padding is: one shape, however many pictures a prompt has
        rows = torch.cat([context, tokens, embeds.detach()[sample]], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        assert self.fusion is not None
        out = self.fusion(inputs_embeds=rows, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        _, shown, text = out.split([context.shape[1], k, embeds.shape[1]], 1)
        mean = torch.zeros_like(embeds).index_add(0, sample, text.to(embeds)) / each.clamp(min=1)[:, None, None]
        changed = instruction & (each > 0)[:, None]
        return torch.where(changed[..., None], mean, embeds).masked_scatter(visual[..., None], shown.to(embeds))

    def geometry(self) -> Geometry:
        """Every token has read the whole image."""
        patches = self.patches * self.pictures
        if self.side is None:
            return super().geometry()
        return square(torch.arange(patches).expand(self.tokens, -1), self.side, patches)

    def flops(self, length: int) -> float:
        read, d = self.patches * max(1, self.tiles**2), self.width
        ran = self.patches * self.pictures * linear_flops(self.projector)
        if self.compressor is not None:
            ran += self.tokens * (linear_flops(self.projector) + 4 * d * d + 4 * read * d) + read * 4 * d * d
        if self.fusion is not None:
            config = self.fusion.config
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            rows = self.patches * self.pictures + self.tokens + length
            kv = config.num_key_value_heads * head
            each = block_flops(rows, config.hidden_size, config.intermediate_size, kv_dim=kv, gated=True)  # type: ignore[arg-type]
            ran += len(self.fusion.layers) * each  # type: ignore[arg-type]
        return ran


def _layers(config: Any, count: int) -> nn.Module:
    """So many decoder layers of a language model's architecture, without embeddings and without a norm behind."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * count
    stack = AutoModel.from_config(config)
    stack.embed_tokens, stack.norm = nn.Identity(), nn.Identity()
    return stack


def tiles(image: Any, tile: int, count: int = 2) -> list[Any]:
    """The pictures of one of high resolution: count x count tiles of `tile` pixels, row by row, then the thumbnail."""
    whole = image.convert("RGB").resize((tile * count, tile * count))
    parts = [(x * tile, y * tile, (x + 1) * tile, (y + 1) * tile) for y in range(count) for x in range(count)]
    return [*(whole.crop(part) for part in parts), whole.resize((tile, tile))]
