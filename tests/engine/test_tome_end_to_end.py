"""ToMe on a whole ViT against the published algorithm, written out step by step from the paper (arXiv 2210.09461)."""

import pytest
import torch
from torch.nn.functional import normalize
from transformers import ViTConfig, ViTModel

from jeton.engine import apply


def tiny_vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=8
    )
    model = ViTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def published(model: ViTModel, pixels: torch.Tensor, r: int, weigh: bool = True) -> torch.Tensor:
    """One picture at a time, one token at a time: slow and plain on purpose."""
    outputs = []
    for picture in pixels:
        x = model.embeddings(picture[None])[0]
        size = torch.ones(len(x))
        blocks = model.layers if hasattr(model, "layers") else model.encoder.layer
        for block in blocks:
            a, heads = block.attention, model.config.num_attention_heads
            y = block.layernorm_before(x)
            q, k, v = (part(y).view(len(x), heads, -1).transpose(0, 1) for part in (a.q_proj, a.k_proj, a.v_proj))
            logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + (size.log() if weigh else 0)
            x = x + a.o_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
            x, size = merge(x, size, k.mean(0), r)
            x = x + block.mlp(block.layernorm_after(x))
        outputs.append(model.layernorm(x)[0])
    return torch.stack(outputs)


def merge(x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    r = min(r, (len(x) - 1) // 2)
    metric = normalize(metric, dim=-1)
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    score = metric[even] @ metric[odd].T
    score[0] = -torch.inf
    best, partner = score.max(1)
    ranked = best.argsort(descending=True, stable=True).tolist()
    sources, stay = ranked[:r], sorted(ranked[r:])
    groups = {j: [odd[j]] for j in range(len(odd))}
    for s in sources:
        groups[int(partner[s])].append(even[s])
    members = [[even[s]] for s in stay] + [groups[j] for j in range(len(odd))]
    features = torch.stack([(x[m] * size[m, None]).sum(0) / size[m].sum() for m in members])
    return features, torch.stack([size[m].sum() for m in members])


@pytest.mark.parametrize("r", [3, 8, 16])
@torch.no_grad()
def test_class_token_equals_the_published_algorithm(r: int) -> None:
    model, pixels = tiny_vit(), torch.randn(3, 3, 64, 64)
    expected = published(model, pixels, r)
    with apply(model, "tome", r=r) as run:
        got = model(pixel_values=pixels).last_hidden_state
        left = 65
        for _ in range(5):
            left -= min(r, (left - 1) // 2)
        assert got.shape[1] == left
        assert run.report().images[0].after == left - 1
    torch.testing.assert_close(got[:, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_size_weighting_the_result_differs() -> None:
    model, pixels = tiny_vit(), torch.randn(2, 3, 64, 64)
    with apply(model, "tome", r=8):
        got = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert (got - published(model, pixels, 8, weigh=False)).abs().max() > 1e-3


@torch.no_grad()
def test_restoring_gives_every_patch_its_group() -> None:
    model, pixels = tiny_vit(), torch.randn(2, 3, 64, 64)
    with apply(model, "tome", r=8) as run:
        model(pixel_values=pixels)
        dense = run.reduction.restore(run.tokens)
    assert dense.features.shape[1] == 65 and bool(dense.mask.all())
    groups = run.reduction.assign
    same = groups[0, 5] == groups[0]
    torch.testing.assert_close(dense.features[0, same], dense.features[0, 5].expand(int(same.sum()), -1))
