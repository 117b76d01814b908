"""tomesd in diffusers' models: a UNet's and a DiT's blocks attend with fewer tokens, and give all of them."""

from __future__ import annotations

import pytest
import torch

from jeton import Unsupported
from jeton.engine import around
from jeton.method import get
from jeton.place import Place
from jeton.tokens import Tokens

diffusers = pytest.importorskip("diffusers")


def ready(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def unet():
    return ready(
        diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16, attention_head_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def dit():
    return ready(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=12,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
        )
    )  # fmt: skip


def drawn(unet, side=8, batch=2):
    generator = torch.Generator().manual_seed(1)
    sample, words = torch.randn(1, 4, side, 6, generator=generator), torch.randn(batch, 5, 16, generator=generator)
    return unet(sample.expand(batch, -1, -1, -1), 7, words).sample


def heard(model):
    """Tokens every self attention gets."""
    lengths = []

    def note(module, args, kwargs):
        lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    blocks = [part for part in model.modules() if hasattr(part, "attn1")]
    handles = [block.attn1.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    return lengths, handles


@torch.no_grad()
def test_a_unet_merges_at_its_finest_grid_and_gives_a_whole_picture(unet):
    whole = drawn(unet)
    with around(unet, "tomesd", keep=0.5) as held:
        lengths, handles = heard(unet)
        fewer = drawn(unet)
        for handle in handles:
            handle.remove()
    fine = [count for count in lengths if count == 24]
    assert len(fine) == 3 and set(lengths) == {24, 12}  # 8 x 6 tokens halved; 4 x 3 left alone
    assert held.counts and set(held.counts.values()) == {(48, 24)}
    assert fewer.shape == whole.shape and (fewer - whole).abs().max() > 1e-4
    assert torch.equal(drawn(unet), whole)  # nothing is left behind


@torch.no_grad()
def test_keeping_everything_changes_no_bit_and_a_seed_gives_the_same(unet):
    whole = drawn(unet)
    with around(unet, "tomesd", keep=1.0):
        assert torch.equal(drawn(unet), whole)
    outputs = []
    for seed in (0, 0, 1):
        with around(unet, "tomesd", keep=0.3, seed=seed):
            outputs.append(drawn(unet))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    with around(unet, "tomesd", keep=0.3):
        assert not torch.equal(drawn(unet), drawn(unet))  # every forward draws its own receivers


def test_every_block_of_every_forward_draws_receivers_of_its_own(dit):
    held, x = around(dit, "tomesd"), torch.randn(1, 36, 16)
    held.remove()
    held.shape, drawn = (6, 6), set()
    for held.forwards in range(3):
        drawn |= {tuple(held.decide(number, x).index[0].tolist()) for number in range(3)}
    assert len(drawn) == 9


@torch.no_grad()
def test_coarser_grids_are_merged_where_asked(unet):
    with around(unet, "tomesd", downsample=2, around=("attention", "mlp")) as held:
        drawn(unet)
        assert set(held.counts.values()) == {(48, 24), (12, 6)}


@torch.no_grad()
def test_a_dits_blocks_equal_the_published_steps(dit):
    """merge, attention, unmerge, in front of the residual; by hand on the first block."""
    pixels, label = torch.randn(2, 4, 12, 12), torch.tensor([3, 3])
    block, seen = dit.transformer_blocks[0], {}
    handle = block.register_forward_hook(lambda m, a, k, out: seen.update(x=a[0], kwargs=k, out=out), with_kwargs=True)
    with around(dit, "tomesd", keep=0.5, seed=4):
        dit(pixels, timestep=torch.tensor([5]), class_labels=label)
    handle.remove()
    x, kwargs = seen["x"], seen["kwargs"]
    step = get("tomesd", keep=0.5, seed=4).reduce(Tokens(x, place=Place.grid(2, 6, 6)))
    normed, gate, shift, scale, gate_mlp = block.norm1(x, kwargs["timestep"], kwargs["class_labels"], hidden_dtype=x.dtype)
    out = block.attn1(step.mix(normed))
    x = x + gate[:, None] * out.gather(1, step.assign[..., None].expand(-1, -1, out.shape[2]))
    expected = x + gate_mlp[:, None] * block.ff(block.norm3(x) * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-4)


def test_what_has_no_such_blocks_or_does_not_give_back_is_refused(unet):
    with pytest.raises(Unsupported, match="BasicTransformerBlock"):
        around(torch.nn.Linear(2, 2))
    with pytest.raises(Unsupported, match="use tomesd"):
        around(unet, "tome")
