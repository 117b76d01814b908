"""A tiny text-to-image model of our own: CLIP's text encoder, a denoiser with cross-attention, and coloured shapes to learn."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from jeton.prompts._common import TextEncoder

SHAPES = ("square", "circle", "cross", "bars")
COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "yellow": (1.0, 1.0, -1.0)}
SIDE, WIDTH, LENGTH = 12, 48, 6


def tokenizer(words=(*SHAPES, *COLOURS, "sks"), length=LENGTH):
    """Word-level, but 'circle' is the two tokens 'cir' and '##cle' when asked for by tests of positions."""
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=length
    )


def clip(vocabulary, width=WIDTH, length=LENGTH, layers=1, seed=0):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=length, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = CLIPTextModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(0.2 * torch.randn_like(weight))
    return model


def masks() -> Tensor:
    """(4, 9, SIDE, SIDE) each shape at nine places: the outline of a square, a disc, two diagonals, two bars."""
    y, x = torch.meshgrid(torch.arange(7) - 3, torch.arange(7) - 3, indexing="ij")
    drawn = torch.stack([
        torch.maximum(x.abs(), y.abs()) == 3, x**2 + y**2 <= 5, x.abs() == y.abs(), x.abs() == 2,
    ])  # fmt: skip
    places = [(dy, dx) for dy in range(3) for dx in range(3)]
    out = torch.zeros(4, 9, SIDE, SIDE)
    for at, (dy, dx) in enumerate(places):
        out[:, at, dy + 1 : dy + 8, dx + 1 : dx + 8] = drawn
    return out


MASKS = masks()
PALETTE = torch.tensor(list(COLOURS.values()))


def draw(shape: Tensor, colour: Tensor, place: Tensor) -> Tensor:
    """(B, 3, SIDE, SIDE) in [-1, 1], grey background of 0."""
    return MASKS[shape, place][:, None] * PALETTE[colour][:, :, None, None]


def judge(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) shape and colour of the nearest clean picture."""
    every = (MASKS[:, None, :, None] * PALETTE[None, :, None, :, None, None]).flatten(0, 2)
    nearest = torch.cdist(images.flatten(1), every.flatten(1)).argmin(1)
    return nearest // 36, nearest // 9 % 4


class Denoiser(nn.Module):
    """Predicts the clean picture from a noisy one, its time in [0, 1] and the tokens (B, T, D) of its text that are `words`."""

    def __init__(self, hidden=192, blocks=2, heads=4):
        super().__init__()
        self.enter = nn.Linear(3 * SIDE**2 + 1, hidden)
        self.reads = nn.ModuleList(
            nn.MultiheadAttention(hidden, heads, kdim=WIDTH, vdim=WIDTH, batch_first=True) for _ in range(blocks)
        )
        self.thinks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
            for _ in range(blocks)
        )
        self.leave = nn.Linear(hidden, 3 * SIDE**2)

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor, words: Tensor) -> Tensor:
        h = self.enter(torch.cat([noisy.flatten(1), time[:, None]], 1))[:, None]
        for read, think in zip(self.reads, self.thinks):
            h = h + read(h, text, text, key_padding_mask=~words, need_weights=False)[0]
            h = h + think(h)
        return self.leave(h)[:, 0].view_as(noisy)

    def loss(self, images: Tensor, text: Tensor, words: Tensor) -> Tensor:
        time = torch.rand(len(images))
        share = time[:, None, None, None]
        return F.mse_loss(self(share * images + (1 - share) * torch.randn_like(images), time, text, words), images)

    @torch.no_grad()
    def sample(self, text: Tensor, words: Tensor, steps: int = 8, seed: int = 1) -> Tensor:
        """Euler steps along the straight path from noise to picture."""
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn(len(text), 3, SIDE, SIDE, generator=draws)
        for step in range(steps):
            time = step / steps
            clean = self(x, torch.full((len(x),), time), text, words)
            x = x + (clean - x) / (1 - time) / steps
        return x


class Painter:
    """Text encoder and denoiser, trained together on prompts of a shape, a colour or both in either order."""

    def __init__(self, steps: int, seed: int = 0, rate: float = 3e-4):
        self.tokenizer = tokenizer()
        self.text = clip(len(self.tokenizer), seed=seed)
        with torch.no_grad():  # words that differ, at positions that matter less
            nn.init.orthogonal_(self.text.get_input_embeddings().weight, gain=WIDTH**0.5 / 2)
        self.encoder = TextEncoder(self.text, self.tokenizer)
        self.denoiser = Denoiser()
        optimiser = torch.optim.AdamW([{"params": self.denoiser.parameters()}, {"params": self.text.parameters()}])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [2e-3, rate], total_steps=steps)
        for _ in range(steps):
            shape, colour, form = torch.randint(4, (96,)), torch.randint(4, (96,)), torch.randint(6, (96,))
            words = [(SHAPES[s], list(COLOURS)[c]) for s, c in zip(shape.tolist(), colour.tolist())]
            prompts = [f"{s} {c}" if f < 2 else f"{c} {s}" if f < 4 else (s, c)[f - 4] for (s, c), f in zip(words, form.tolist())]
            images = draw(shape, colour, torch.randint(9, (96,)))
            slots = self.encoder.slots(prompts)
            self.denoiser.loss(images, self.encoder(slots), slots.words).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def overfit(self, word: str, shape: int, colour: int, steps: int, captions: list[str]):
        """Textual inversion: the one embedding of `word`, begun as the shape's, learns to mean pictures of it in one colour."""
        table = self.text.get_input_embeddings().weight.requires_grad_()
        row, like = self.tokenizer.convert_tokens_to_ids([word, SHAPES[shape]])
        with torch.no_grad():
            table[row] = table[like]
        others = table.detach().clone()
        optimiser = torch.optim.Adam([table], lr=5e-3)
        slots = self.encoder.slots([captions[at % len(captions)] for at in range(48)])
        for _ in range(steps):
            images = draw(torch.full((48,), shape), torch.full((48,), colour), torch.randint(9, (48,)))
            optimiser.zero_grad()
            self.denoiser.loss(images, self.encoder(slots), slots.words).backward()
            optimiser.step()
            with torch.no_grad():
                others[row] = table[row]
                table.copy_(others)

    @torch.no_grad()
    def shares(self, prompts: list[str], read=None) -> tuple[list[float], list[float]]:
        """Share of each shape and of each colour among pictures of the prompts, whose embeddings `read` makes."""
        slots = self.encoder.slots(prompts)
        text = self.encoder(slots) if read is None else read(prompts)
        shape, colour = judge(self.denoiser.sample(text, slots.words))
        return [torch.bincount(x, minlength=4).div(len(x)).tolist() for x in (shape, colour)]
