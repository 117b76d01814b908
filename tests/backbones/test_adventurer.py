"""Adventurer: its block by hand, what its tokens see, and that it is saved as transformers saves."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from jeton.backbones.adventurer import AdventurerConfig, AdventurerForImageClassification, Block, turned

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "state_size": 8,
    "head_dim": 16,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 5,
}


def small(**more):
    torch.manual_seed(0)
    return AdventurerForImageClassification(AdventurerConfig(**{**TINY, **more})).eval()


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("flip", [False, True])
def test_an_identity_mixer_doubles_the_residual(flip):
    block = Block(6, nn.Identity(), Nothing(), flip=flip)
    block.norm1 = nn.Identity()
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(block(x), 2 * x)


def test_the_mixer_is_given_the_mean_first_and_flipped_patches():
    seen = []

    class Listen(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.cumsum(1)

    x = torch.arange(8.0).view(1, 4, 2)
    block = Block(2, Listen(), Nothing(), flip=True)
    out = block.mix(x)
    assert seen[0][0].tolist() == [[3, 4], [4, 5], [2, 3], [0, 1], [6, 7]], (
        "mean, patches from the last to the first, class token"
    )
    assert out[0].tolist() == [[9, 13], [9, 12], [7, 9], [15, 20]], "back in their places, without the mean's own output"
    assert turned(turned(x)).equal(x)


def test_which_blocks_flip():
    def flips(kind, depth=8):
        return [block for block in range(depth) if AdventurerConfig(flip=kind).flips(block)]

    assert flips("pairs") == [2, 3, 6, 7] and flips("released") == [2, 3] and flips("never") == []


def test_the_class_token_sees_everything_and_the_mean_reaches_the_first():
    model = small(flip="never")
    x = torch.randn(1, 1 + 16, 32, requires_grad=True)
    model.layers[0](x)[0, 0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all(), "the first token hears of the others by the mean alone"
    made, pixels = [], torch.randn(2, 3, 8, 8)
    handle = model.layers[-1].register_forward_hook(lambda module, args, output: made.append(output))
    logits = model(pixels).logits
    handle.remove()
    assert torch.equal(logits, model.head(model.norm_f(made[0][:, -1]))) and logits.shape == (2, 5)
    assert model(torch.randn(2, 3, 12, 8)).logits.shape == (2, 5), "positions of other grids are interpolated"


def test_saved_and_loaded(tmp_path):
    model, pixels = small(), torch.randn(2, 3, 8, 8)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (again(pixels).logits == model(pixels).logits).all()
    loss = model(pixels, labels=torch.tensor([1, 2])).loss
    loss.backward()
    assert all(value.grad is not None for value in model.parameters())


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="flip"):
        AdventurerConfig(flip="always")
    with pytest.raises(ValueError, match="do not fill"):
        AdventurerConfig(image_size=30, patch_size=4)
    with pytest.raises(ValueError, match="no Adventurer"):
        AdventurerConfig.preset("giant")
