"""Backbones have the published numbers of parameters and multiply-adds, and their mixers do what the papers say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import with_timm
from jeton.backbones import create
from jeton.backbones.davit import DaViT
from jeton.backbones.metaformer_baselines import MetaFormerBaseline, RandomMixing
from jeton.measure.counts import count

with_timm.timm()

SMALL = {"tiny", "identityformer_s12", "randformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18"}
PUBLISHED = [
    pytest.param(cls, name, marks=[] if name in SMALL else pytest.mark.slow)
    for cls in (DaViT, MetaFormerBaseline)
    for name, size in cls.sizes.items()
    if size.params
]


@pytest.mark.parametrize(("cls", "name"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_counts_are_the_published_ones(cls, name):
    size = cls.sizes[name]
    with torch.device("meta"):
        counts = count(cls(name), torch.zeros(1, 3, 224, 224))
    assert counts.params == size.params
    if size.macs is not None:
        assert counts.macs / 1e9 == pytest.approx(size.macs, abs=6e-4)


def test_counting_fused_attention_counts_its_products():
    class Attend(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    assert count(Attend(), torch.zeros(1, 2, 5, 8)).macs == 2 * 2 * 5 * 5 * 8


@pytest.mark.parametrize("name", ["davit-tiny", "metaformer-baselines-randformer_s12", "metaformer-baselines-caformer_s18"])
def test_logits_and_maps(name):
    net = create(name, num_classes=7).eval()
    with torch.no_grad():
        pixels = torch.randn(2, 3, 224, 224)
        maps = net.maps(pixels)
        assert net(pixels).shape == (2, 7) and [part.shape[-1] for part in maps] == [56, 28, 14, 7]


def test_davit_takes_any_size():
    with torch.no_grad():
        assert create("davit-tiny").eval()(torch.randn(1, 3, 100, 70)).shape == (1, 1000)


def test_channel_attention_does_not_care_for_the_order_of_positions_and_window_attention_does():
    torch.manual_seed(0)
    net, order = DaViT("tiny").net, torch.randperm(49)
    window, by_channel = net.stages[0].blocks[0]
    channel, x = by_channel.attn, torch.randn(2, 49, 96)
    whole = flat(window(as_map(x)))
    assert torch.allclose(channel(x[:, order]), channel(x)[:, order], atol=1e-6)
    assert not torch.allclose(flat(window(as_map(x[:, order]))), whole[:, order], atol=1e-3)


def as_map(x):
    return x.transpose(1, 2).reshape(x.shape[0], -1, 7, 7)


def flat(x):
    return x.flatten(2).transpose(1, 2)


def test_channel_attention_costs_twice_as_much_for_twice_the_positions():
    with torch.device("meta"):
        mixer = DaViT("tiny").net.stages[1].blocks[0][1].attn
        one, two = count(mixer, torch.zeros(1, 784, 192)), count(mixer, torch.zeros(1, 1568, 192))
    assert two.macs == 2 * one.macs


def test_a_channel_alone_in_its_group_passes_its_query_on():
    from timm.models.davit import ChannelAttention

    torch.manual_seed(0)
    mixer, x = ChannelAttention(4, num_heads=4, qkv_bias=True), torch.randn(1, 6, 4)
    query = mixer.qkv(x)[..., :4]
    assert torch.allclose(mixer(x), mixer.proj(query), atol=1e-6)
    value = mixer.qkv(x)[..., 8:]
    assert not torch.allclose(mixer(x), mixer.proj(value), atol=1e-2)  # as if roles were the usual ones


def test_star_relu_has_the_published_moments():
    from timm.models.metaformer import StarReLU

    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    plain = StarReLU()(x)
    assert plain.mean().item() == pytest.approx(0.5, abs=0.01) and plain.var().item() == pytest.approx(1.25, abs=0.02)
    scaled = StarReLU(scale_value=1.25**-0.5, bias_value=-0.5 * 1.25**-0.5)(x)
    assert scaled.mean().item() == pytest.approx(0, abs=0.01) and scaled.var().item() == pytest.approx(1, abs=0.02)


def test_a_random_mixer_keeps_a_constant_map_and_is_kept_but_not_trained():
    torch.manual_seed(0)
    mixer = RandomMixing(8, {8: 49})
    assert torch.allclose(mixer.matrix.sum(-1), torch.ones(49))
    assert torch.allclose(mixer(torch.full((2, 8, 7, 7), 3.0)), torch.full((2, 8, 7, 7), 3.0), atol=1e-5)
    x = torch.randn(2, 8, 7, 7)
    assert torch.allclose(mixer(x).flatten(2)[0, 0], mixer.matrix @ x.flatten(2)[0, 0], atol=1e-6)
    net = create("metaformer-baselines-randformer_s12", num_classes=2, img_size=64)
    net(torch.randn(1, 3, 64, 64)).sum().backward()
    frozen = [(name, value) for name, value in net.named_parameters() if not value.requires_grad]
    assert len(frozen) == 8 and all(value.grad is None for _, value in frozen)
    assert all(name in net.state_dict() for name, _ in frozen)
    with pytest.raises(ValueError, match="img_size"):
        net(torch.randn(1, 3, 96, 96))


def test_frozen_numbers_of_randformer_s12():
    with torch.device("meta"):
        counts = count(create("metaformer-baselines-randformer_s12"), torch.zeros(1, 3, 224, 224))
    assert counts.params - counts.trainable == 6 * 38416 + 2 * 2401 == 235_298


def test_identityformer_and_poolformer_hold_the_same_weights():
    torch.manual_seed(0)
    plain, pooled = MetaFormerBaseline("identityformer_s12").eval(), MetaFormerBaseline("poolformerv2_s12").eval()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in pooled.state_dict().items()}
    pooled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        differ = (plain(x) - pooled(x)).abs().max()
        for block in (block for stage in pooled.net.stages for block in stage.blocks):
            block.token_mixer = nn.Identity()
        assert differ > 1e-3 and torch.equal(plain(x), pooled(x))


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="Did you mean davit-tiny"):
        create("davit-tin")
    with pytest.raises(ValueError, match="there are tiny, small"):
        DaViT("tiniest")
    with pytest.raises(ValueError, match="no weights"):
        MetaFormerBaseline("randformer_s12", pretrained=True)
