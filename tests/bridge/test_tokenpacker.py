"""TokenPacker: what a window reads, by hand; that it reads nothing else; what pooling cannot see; tiles of large pictures."""

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import jeton
from jeton import bridge
from jeton.bridge.tokenpacker import TokenPacker, layout, layouts, tiles

WIDTH = 32


def packer(side=4, **options):
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_hidden_layers=4, image_size=side * 2, patch_size=2
    )
    text = transformers.LlamaConfig(hidden_size=24, num_attention_heads=4, num_hidden_layers=1)
    made = TokenPacker(transformers.LlavaConfig(vision_config=vision, text_config=text), **{"layers": [1, 3], **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return made.eval()


def features(batch=2, cells=16):
    return torch.randn(batch, cells, 3 * WIDTH)


def values(made, x):
    """What every feature would hand on if it were the only one read."""
    v = made.norm_value(made.to_value(x[..., WIDTH:]))
    attention = made.read.attention
    v = nn.functional.linear(v, attention.in_proj_weight[2 * WIDTH :], attention.in_proj_bias[2 * WIDTH :])
    return nn.functional.linear(v, attention.out_proj.weight)


@torch.no_grad()
def test_with_equal_keys_a_window_hands_on_the_mean_of_its_values():
    made, x = packer(), features()
    for part in made.to_key.parameters():
        part.zero_()
    out, each, bias = made.pack(x), values(made, x), made.read.attention.out_proj.bias
    for row, window in enumerate(([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15])):
        torch.testing.assert_close(out[:, row], each[:, window].mean(1) + bias, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(out[:, 0], each[:, [0, 1, 2, 3]].mean(1) + bias, atol=1e-3)


@torch.no_grad()
def test_a_detail_reaches_the_token_of_its_own_window_only():
    made, x = packer(), features(batch=1)
    before = made(x)
    for cell in range(16):
        other = x.clone()
        other[:, cell, WIDTH:] += 1.0
        changed = (made(other) != before).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [cell // 4 // 2 * 2 + cell % 4 // 2]


@torch.no_grad()
def test_at_scale_one_every_token_hands_on_its_own_value():
    made, x = packer(scale=1), features()
    torch.testing.assert_close(made.pack(x), values(made, x) + made.read.attention.out_proj.bias, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_pictures_do_not_mix_in_a_batch():
    made, x = packer(), features(batch=3)
    for one in range(3):
        torch.testing.assert_close(made(x)[one], made(x[one : one + 1])[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_residual_is_an_option():
    plain, added = packer(), packer(residual=True)
    added.load_state_dict(plain.state_dict())
    x = features()
    query = plain.norm_query(plain.to_query(bilinear(x[..., :WIDTH])))
    torch.testing.assert_close(added.pack(x), plain.pack(x) + query)


def bilinear(x):
    grid = x.transpose(1, 2).unflatten(2, (4, 4))
    return nn.functional.interpolate(grid, size=(2, 2), mode="bilinear").flatten(2).transpose(1, 2)


def test_weights_start_small_and_biases_at_zero():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=2),
        text_config=transformers.LlamaConfig(hidden_size=64, num_hidden_layers=1),
    )
    made = TokenPacker(config)
    weights = [value for name, value in made.named_parameters() if value.dim() == 2]
    assert all(abs(value.std().item() - 0.02) < 2e-3 and value.abs().max() <= 2 for value in weights)
    assert all(not value.any() for name, value in made.named_parameters() if name.endswith("bias"))
    assert made.layers == (-2, 6, 8, 11, 12) and made.tokens == 4 and made.to_query.bias is None


def task(draw, size=256):
    """One of the four details of each of four windows is lit; the label is which, of the first window. The coarse features say
    nothing, every detail also says which of its window it is, as an encoder's positions do."""
    lit = torch.randint(4, (size, 4), generator=draw)
    place = torch.eye(4)[torch.arange(16) % 4 % 2 + 2 * (torch.arange(16) // 4 % 2)]
    window = torch.arange(16) // 4 // 2 * 2 + torch.arange(16) % 4 // 2
    shine = (place.argmax(1) == lit[:, window]).float()
    x = 0.1 * torch.randn(size, 16, 3 * WIDTH, generator=draw)
    x[..., WIDTH : WIDTH + 4] += place
    x[..., WIDTH + 4] += shine
    return x, lit


def taught(read, steps=200):
    """Share of right answers about all four windows after training `read` with a classifier on top."""
    torch.manual_seed(0)
    head = nn.Linear(24, 4)
    optimizer = torch.optim.AdamW([*read.parameters(), *head.parameters()], lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, lit = task(draw, 64)
        loss = nn.functional.cross_entropy(head(read(x)).flatten(0, 1), lit.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, lit = task(torch.Generator().manual_seed(2), 512)
    with torch.no_grad():
        return (head(read(x)).argmax(-1) == lit).float().mean().item()


class Pooled(nn.Module):
    """The same features averaged over each window, then an MLP."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(3 * WIDTH, 64), nn.GELU(), nn.Linear(64, 24))

    def forward(self, x):
        from jeton.ops.squares import pool

        return self.mlp(pool(x, 4))


def test_it_sees_which_detail_of_a_window_is_lit_where_pooling_cannot():
    packed, pooled = taught(packer().train()), taught(Pooled())
    assert packed > pooled + 0.15 and packed > 0.8, (packed, pooled)


# -- large pictures ----------------------------------------------------------------------------------------------------------


def test_layouts_are_all_those_of_few_enough_tiles():
    assert layouts()[:3] == ((1, 1), (1, 2), (2, 1)) and len(layouts()) == 23
    assert all(rows * columns <= 9 for rows, columns in layouts())


@pytest.mark.parametrize(
    ("size", "expected"),
    [((336, 336), (1, 1)), ((672, 336), (2, 1)), ((336, 672), (1, 2)), ((672, 672), (3, 3)), ((1008, 1008), (3, 3)),
     ((300, 2600), (1, 9))],
)  # fmt: skip
def test_a_layout_suits_its_picture(size, expected):
    assert layout(*size, 336) == expected


def test_a_layout_by_hand():
    """400 x 300 pixels: 1 x 1 fills 336·252/336² = 0.75, and its IoU with 560 x 420 is 336²/235200 = 0.48; 4 x 3 is not offered,
    3 x 2 fills 896·672/(1008·672) = 0.8889 with an IoU of 235200/677376 = 0.3472."""
    one, six = 0.75 + 0.1 * 0.48, 0.8889 + 0.1 * 0.3472
    assert six > one and layout(400, 300, 336, [(1, 1), (3, 2)]) == (3, 2)


def test_tiles_are_cut_row_by_row_and_the_rest_is_black():
    image = Image.new("RGB", (60, 20), "red")
    parts, text = tiles(image, 20, choices=[(1, 1), (2, 3)])
    assert text == "<image>,<image>,<image>\n<image>,<image>,<image>\n<image>\n" and len(parts) == 7
    assert [part.size for part in parts] == [(20, 20)] * 6 + [(60, 20)]
    assert parts[0].getpixel((10, 10)) == (255, 0, 0) and parts[3].getpixel((10, 10)) == (0, 0, 0)
    parts, text = tiles(Image.new("RGB", (20, 20)), 20)
    assert len(parts) == 1 and text == "<image>\n"


def test_a_large_picture_goes_through_the_model():
    demo = jeton.load_demo()
    model = bridge.attach(demo.model, "tokenpacker", scale=3)
    processor = bridge.fit(demo.processor, model)
    parts, text = tiles(demo.examples[0].image.resize((168, 84)), 84)
    inputs = processor(images=parts, text=f"USER: {text}How many digits are there? ASSISTANT:", return_tensors="pt")
    assert len(parts) == 3 and (inputs["input_ids"] == model.config.image_token_id).sum() == 3 * 16
    assert model.eval().generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
