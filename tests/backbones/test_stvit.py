"""STViT: seeds and regions of windows, semantic tokens that stand for the map, and image tokens that read them back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, unfold
from transformers import AutoModelForImageClassification, SwinConfig, SwinForImageClassification

import tiny
from jeton.backbones._semantic import LocalGeneration, ReadingBlock, SemanticGroup, regions, seeds
from jeton.backbones.stvit import SWINS, STSwin, STSwinConfig, STViT, STViTConfig
from jeton.measure.counts import count
from jeton.recipes import stvit as recipe

PLAIN = {
    "image_size": 16, "patch_size": 2, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4,
    "intermediate_size": 64, "sample": 3, "num_labels": 5,
}  # fmt: skip
SWIN = {  # maps of 56, 28, 14 and 7 tokens on a side
    "image_size": 56, "patch_size": 1, "stem": False, "embed_dim": 8, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 2, 4),
    "num_labels": 5, "layer_scale": None, "residual": True,
}  # fmt: skip


def plain(**more):
    return tiny.ready(STViT(STViTConfig(**{**PLAIN, **more})))


def swin(**more):
    return tiny.ready(STSwin(STSwinConfig(**{**SWIN, **more})))


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def index_map(height=14, width=14):
    return torch.arange(height * width).view(1, height, width, 1)


def test_a_14_x_14_map_has_36_seeds_and_4_regions_of_100():
    grid = index_map()
    few, around = seeds(grid.float(), (7, 7), 3), regions(grid, (7, 7), 10)
    assert few.shape == (1, 2, 2, 9, 1) and few[0, ..., 0].numel() == 36
    assert around.shape == (1, 2, 2, 100, 1)
    unfolded = unfold(grid.float().permute(0, 3, 1, 2), 10, stride=4)[0].T  # (windows, 100)
    assert torch.equal(around[0].flatten(0, 1)[..., 0].float(), unfolded)
    for row in range(2):
        for column in range(2):
            inside = set(grid[0, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7, 0].flatten().tolist())
            assert set(few[0, row, column, :, 0].long().tolist()) <= inside <= set(around[0, row, column, :, 0].tolist())


@pytest.mark.parametrize(("height", "width"), [(21, 28), (7, 14), (7, 7), (9, 9)])
def test_every_window_lies_in_its_region(height, width):
    window = (min(7, height), min(7, width)) if height % 7 == 0 else (9, 9)
    grid = index_map(height, width)
    around = regions(grid, window, 10)
    assert around.shape[1:3] == (height // window[0], width // window[1])
    assert around.shape[3] == min(10, height) * min(10, width)
    for row in range(around.shape[1]):
        for column in range(around.shape[2]):
            inside = grid[0, row * window[0] : (row + 1) * window[0], column * window[1] : (column + 1) * window[1], 0]
            assert set(inside.flatten().tolist()) <= set(around[0, row, column, :, 0].tolist())


def test_seeds_of_a_map_of_even_quadrants_are_their_values():
    values = drawn(1, 2, 2, 5)
    grid = values.repeat_interleave(7, 1).repeat_interleave(7, 2)
    few = seeds(grid, (7, 7), 3)
    assert torch.equal(few, values[:, :, :, None].expand(-1, -1, -1, 9, -1))


def test_semantic_tokens_of_all_windows_lie_in_rows_of_one_grid():
    """With a block that does nothing, the six rows of six are the maxima of the map's cells, wherever their window is."""

    class Nothing(torch.nn.Module):
        def forward(self, x, context):
            return x

    found = LocalGeneration(Nothing(), 3, 7, 10)(index_map().float().flatten(1, 2), 14, 14).view(6, 6)
    ends = [2, 4, 6, 9, 11, 13]  # the last line of each cell: three overlapping cells in each seven
    assert found.tolist() == [[14 * row + column for column in ends] for row in ends]


def test_the_first_generation_reads_seeds_and_region_by_hand():
    block = tiny.ready(ReadingBlock(8, 2, 16, bias=False))
    x = drawn(1, 49 * 4, 8)
    found = LocalGeneration(block, 3, 7, 10)(x, 14, 14)
    grid = x.view(1, 14, 14, 8)
    few, around = seeds(grid, (7, 7), 3)[0, 0, 1], grid[0, 0:10, 4:14].flatten(0, 1)  # the window above on the right
    normed = block.norm(torch.cat([few, around]))
    heads = [part.view(-1, 2, 4).transpose(0, 1) for part in (block.query(normed[:9]), block.key(normed), block.value(normed))]
    read = few + block.output(scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1))
    expected = read + block.mlp(block.norm_mlp(read))
    torch.testing.assert_close(found.view(6, 6, 8)[0:3, 3:6].flatten(0, 1), expected)


def test_recovery_gives_back_the_whole_map_and_reads_the_semantic_tokens():
    back = tiny.ready(ReadingBlock(16, 4, 32))
    x, few = drawn(2, 196, 16), drawn(2, 36, 16, seed=2).requires_grad_()
    out = back(x, few)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert (few.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("made", [lambda: plain(recover=True, num_hidden_layers=9, base=3), swin])
def test_models_with_recovery_give_maps_of_the_original_grid(made):
    model = made()
    if isinstance(model, STSwin):
        out = model(drawn(2, 3, 56, 56), output_hidden_states=True)
        assert [one.shape[-2:] for one in out.reshaped_hidden_states] == [(n, n) for n in (56, 28, 14, 7, 7)]
        assert out.logits.shape == (2, 5)
        assert model(drawn(1, 3, 72, 64)).logits.shape == (1, 5)  # maps that are no whole windows
    else:
        assert model(drawn(2, 3, 16, 16)).last_hidden_state.shape == (2, 64, 32)


def test_semantic_tokens_alone_go_to_the_end_and_their_mean_is_classified():
    model = plain()
    out = model(drawn(2, 3, 16, 16))
    assert out.last_hidden_state.shape == (2, 9, 32) and len(model.groups) == 1 and len(model.groups[0].among) == 2
    torch.testing.assert_close(out.logits, model.head(out.last_hidden_state.mean(1)))
    assert model(drawn(1, 3, 20, 20)).last_hidden_state.shape == (1, 9, 32)


def test_the_parts_of_a_group_by_hand():
    model = plain(recover=True, num_hidden_layers=8, base=2)
    group, x = model.groups[0], drawn(2, 64, 32)
    image = group.image.block(x, x)
    few = group.local(image, 8, 8)
    few = group.everywhere(few + group.table, torch.cat([few, image], 1))
    for block in group.among:
        few = block(few, few)
    torch.testing.assert_close(group(x, (8, 8))[0], group.back(image, few))
    assert isinstance(group, SemanticGroup) and len(group.among) == 2


def test_a_swin_block_alone_is_transformers_own_where_semantic_tokens_change_nothing():
    model = swin()
    for group in model.swin.encoder.layers[2].blocks:
        for linear in (group.back.output, group.back.mlp[2]):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    theirs = SwinForImageClassification(
        SwinConfig(**{**{k: SWIN[k] for k in list(SWIN)[:2] + list(SWIN)[3:7]}, "depths": (1, 1, 1, 1)})
    )
    state = {name.replace("blocks.0.image.", "blocks.0."): value for name, value in model.state_dict().items()}
    theirs.load_state_dict({name: value for name, value in state.items() if name in theirs.state_dict()})
    x = drawn(2, 3, 56, 56)
    torch.testing.assert_close(model(x).logits, theirs.eval()(x).logits)
    assert not torch.allclose(swin()(x).logits, model(x).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "share"), [("tiny", 0.81), *(pytest.param(size, 0.67, marks=pytest.mark.slow) for size in ("small", "base"))]
)
def test_swin_with_semantic_tokens_costs_a_fifth_to_a_third_less(size, share):
    width, depths = SWINS[size]
    config = STSwinConfig.preset(size, num_labels=1000)
    plain = SwinConfig(embed_dim=width, depths=depths, num_heads=config.num_heads, num_labels=1000)
    with torch.device("meta"):
        x = torch.zeros(1, 3, 224, 224)
        mine, full = count(STSwin(config), pixel_values=x), count(SwinForImageClassification(plain), pixel_values=x)
    assert mine.macs < share * full.macs and mine.params == pytest.approx(full.params, rel=2e-3)


def test_released_settings_begin_near_zero_and_the_stem_is_of_convolutions():
    config = STSwinConfig(image_size=224, embed_dim=8, depths=(1, 1, 6, 1), num_heads=(1, 1, 1, 1), num_labels=5)
    assert config.layer_scale == 1e-5 and not config.residual and not config.table
    model = STSwin(config)
    gains = [value for name, value in model.named_parameters() if name.endswith("gain")]
    assert len(gains) == 2 * (3 + 6) and all((gain == 1e-5).all() for gain in gains)
    local = model.swin.encoder.layers[2].blocks[0].local
    assert local(drawn(1, 196, 32), 14, 14).abs().max() < 1e-3
    assert local.block.query.bias is None
    assert model(drawn(1, 3, 224, 224)).logits.shape == (1, 5)


@pytest.mark.parametrize(
    "made", [plain, lambda: plain(recover=True, num_hidden_layers=8), lambda: swin(table=True, layer_scale=0.1)]
)
def test_everything_learns_is_saved_and_a_batch_equals_its_pictures(made, tmp_path):
    model = made()
    x = drawn(2, 3, *(2 * [model.config.image_size]))
    out = model.train()(pixel_values=x, labels=torch.tensor([0, 3]))
    out.loss.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(pixel_values=x).logits, model(pixel_values=x).logits)
        one_by_one = torch.cat([model(pixel_values=one[None]).logits for one in x])
        torch.testing.assert_close(model(pixel_values=x).logits, one_by_one, atol=1e-4, rtol=1e-4)


def test_bad_settings_are_refused():
    for wrong, message in (
        ({"sample": 9}, "seeds on a side"),
        ({"base": 5}, "leave no two"),
        ({"recover": True, "base": 1}, "whole groups"),
    ):
        with pytest.raises(ValueError, match=message):
            STViTConfig(**{**PLAIN, **wrong})
    for wrong, message in (
        ({"depths": (1, 1, 5, 1)}, "whole groups"),
        ({"stage": 4}, "0 to 3"),
        ({"sample": 8}, "side of a window"),
        ({"stem": True}, "patches of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            STSwinConfig(**{**SWIN, **wrong})
    with pytest.raises(ValueError, match="there are tiny"):
        STSwinConfig.preset("huge")


def test_the_small_model_of_the_recipe_costs_less_than_half_of_the_full_one():
    x = torch.zeros(1, 1, 8, 8)
    assert count(recipe.make(0), x).macs <= 0.45 * count(recipe.full(0), pixel_values=x).macs


@pytest.mark.slow
def test_nine_tokens_of_64_come_close_to_the_full_model_on_digits(tmp_path):
    """Both trained from scratch alike, three seeds."""
    pytest.importorskip("sklearn")
    told = recipe.run(tmp_path, progress=False)["accuracy"]
    assert told["full"] > 0.9 and told["9 semantic tokens"] >= told["full"] - 0.03, told
