"""A question only a picture answers: which colour has this cell? Small LLaVAs of the real classes are trained on it."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from jeton import bridge
from jeton.train import Recipe, train

SIDE, PATCH, COLOURS = 4, 2, 4
PAD, BOS, IMAGE, CELL = 0, 1, 2, 3  # cell c is asked for by the token CELL + c
ANSWER = CELL + SIDE**2  # and answered by ANSWER + colour
_PALETTE = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])


def llava(seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=SIDE * PATCH, patch_size=PATCH)
    text = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, vocab_size=ANSWER + COLOURS, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None,
        initializer_range=0.15, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=SIDE**2, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def scenes(seed: int, size: int, tokens: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    colour = torch.randint(COLOURS, (size, SIDE**2), generator=draw)
    cell = torch.randint(SIDE**2, (size,), generator=draw)
    pixels = _PALETTE[colour].view(size, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    pixels = pixels.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    answer = ANSWER + colour.gather(1, cell[:, None])
    asked = torch.cat([torch.full((size, 1), BOS), torch.full((size, tokens), IMAGE), CELL + cell[:, None]], 1)
    ids = torch.cat([asked, answer], 1)
    labels = torch.cat([torch.full_like(asked, -100), answer], 1)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def learn(model: bridge.BridgedLlava, steps: int, loss=None, rate: float = 3e-3, size: int = 64) -> bridge.BridgedLlava:
    tokens = model.bridge.tokens
    loss = loss or (lambda m, batch: m(**batch).loss)
    recipe = Recipe(steps=steps, rate=rate, warmup=0.1)
    train(model, lambda step: scenes(1 + step, size, tokens), loss, recipe, progress=False)
    return model


@torch.no_grad()
def accuracy(model: bridge.BridgedLlava, size: int = 512) -> float:
    batch = scenes(0, size, model.bridge.tokens)
    answer = batch.pop("labels")[:, -1]
    asked = {name: value if name == "pixel_values" else value[:, :-1] for name, value in batch.items()}
    return (model.eval()(**asked).logits[:, -1].argmax(-1) == answer).float().mean().item()
