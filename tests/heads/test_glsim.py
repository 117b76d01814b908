"""GLSim's box, crop and two views."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jeton
import tiny
from jeton.heads import GLSimClassifier
from jeton.ops import boxes
from jeton.ops.similarity import to_first


def cells(rows, cols, width=14):
    return torch.tensor([[row * width + col for row in rows for col in cols]])


@pytest.mark.parametrize(
    ("index", "box"),
    [
        (cells((3, 4, 5), (7, 8, 9)), [112, 48, 144, 80]),
        (cells((3,), (7,)), [112, 48, 128, 64]),
        (cells((13,), (13,)), [208, 208, 224, 224]),
    ],
)
def test_worked_boxes(index, box):
    assert boxes.around_patches(index, 14, 16, (224, 224)).tolist() == [box]


def test_inclusive_takes_in_the_last_patches():
    assert boxes.around_patches(cells((3, 4, 5), (7, 8, 9)), 14, 16, (224, 224), inclusive=True).tolist() == [[112, 48, 160, 96]]


def test_a_planted_square_is_found_on_a_grid_that_is_not_square():
    tokens = torch.zeros(2, 1 + 6 * 10, 4)
    tokens[:, 0, 0] = 1
    tokens[:, 1:, 1] = 1
    for row, (top, left) in enumerate([(1, 4), (3, 0)]):
        for y in range(3):
            tokens[row, 1 + (top + y) * 10 + left : 1 + (top + y) * 10 + left + 3] = torch.tensor([2.0, 0, 0, 0])
    best = to_first(tokens)[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, :9]
    found = boxes.around_patches(best, 10, 8, (48, 80))
    assert found.tolist() == [[32, 8, 48, 24], [0, 24, 16, 40]]
    assert boxes.around_patches(best, 10, 8, (48, 80), inclusive=True).tolist() == [[32, 8, 56, 32], [0, 24, 24, 48]]


def test_the_cosine_does_not_see_lengths():
    x = torch.randn(2, 9, 5)
    scale = torch.rand(2, 9, 1) + 0.1
    torch.testing.assert_close(to_first(x), to_first(torch.cat([x[:, :1], x[:, 1:] * scale[:, 1:]], 1)))
    assert (to_first(x, "l2") - to_first(x * scale, "l2")).abs().max() > 0.1
    assert to_first(torch.zeros(1, 3, 4)).tolist() == [[0.0, 0.0, 0.0]]


def test_a_crop_is_the_box_enlarged_with_aligned_corners():
    pictures = torch.arange(64.0).view(1, 1, 8, 8).repeat(2, 1, 1, 1)
    crops = boxes.cut(pictures, torch.tensor([[2, 1, 6, 5], [0, 0, 8, 8]]))
    expected = torch.nn.functional.interpolate(pictures[:1, :, 1:5, 2:6], (8, 8), mode="bilinear", align_corners=True)
    torch.testing.assert_close(crops[:1], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(crops[1:], pictures[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel"])
def test_both_views_pass_the_same_encoder(name):
    torch.manual_seed(1)
    model = GLSimClassifier(tiny.BUILDERS[name](), 5, top=4).eval()
    pixels = torch.randn(3, 3, 28, 28, requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    out = model(pixels, labels)
    assert out.logits.shape == (3, 5)
    out.loss.backward()
    assert pixels.grad.abs().sum() > 0 and model.head.weight.grad.abs().sum() > 0
    alone = torch.cat([model(each[None]).logits for each in pixels.detach()])
    torch.testing.assert_close(out.logits, alone, atol=1e-4, rtol=1e-4)
    tokens = model.tokens(pixels)
    if name == "CLIPVisionModel":  # which norms the class token alone
        inner = getattr(model.encoder, "vision_model", model.encoder)
        assert torch.equal(tokens, inner.post_layernorm(model.encoder(pixel_values=pixels)[0]))
    prefix = tokens.shape[1] - 49
    best = torch.nn.functional.cosine_similarity(tokens[:, :1], tokens[:, prefix:], dim=-1).topk(4).indices
    assert torch.equal(model.boxes(pixels), boxes.around_patches(best, 7, 4, (28, 28)))
    first, second = (model.tokens(view)[:, 0] for view in (pixels, boxes.cut(pixels, model.boxes(pixels))))
    again = model.head(model.aggregator(torch.stack([first, second], 1))[:, 0])
    torch.testing.assert_close(out.logits, again)
    assert (model.head(model.aggregator(torch.stack([first, first], 1))[:, 0]) - again).abs().max() > 1e-3


def test_an_encoder_without_a_class_token_is_refused():
    with pytest.raises(jeton.Unsupported, match="class token"):
        GLSimClassifier(tiny.model("SiglipVisionModel"), 5)


class Written(TorchDispatchMode):
    """Counts the numbers that all operations write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


def test_choosing_costs_next_to_nothing():
    """Counted for ViT-B/16 at 224: a few N D, where attention rollout multiplies a 197 x 197 matrix for each of 12 layers."""
    n, width, depth = 197, 768, 12
    with Written() as written:
        to_first(torch.randn(1, n, width))
    assert written.count < 6 * n * width < 0.02 * depth * n**3
