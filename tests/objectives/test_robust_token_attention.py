"""TAP and ADL against worked values."""

import pytest
import torch

import jeton
import tiny
from jeton.demo import digits
from jeton.objectives.robust_token_attention import RobustTokenAttention, TokenAwarePooling, attach, average, diversity


def test_averages_are_pulled_to_zero_at_the_border():
    out = average(torch.ones(1, 1, 4, 4), 1)[0, 0]
    assert out[0, 0].item() == pytest.approx(4 / 9) and out[0, 1].item() == pytest.approx(6 / 9)
    assert out[1, 1].item() == pytest.approx(1) and out[3, 3].item() == pytest.approx(4 / 9)
    assert average(torch.ones(1, 1, 4, 4), 2)[0, 0, 1, 1].item() == pytest.approx(4 / 9), "two apart: one and three remain"


def test_weights_mix_the_branches_by_position():
    pool = TokenAwarePooling(3, 3).eval()
    x = torch.randn(2, 3, 5, 7)
    weights = pool.second(pool.norm(pool.first(x))).softmax(1)
    expected = sum(weights[:, k : k + 1] * (x if k == 0 else average(x, k)) for k in range(3))
    torch.testing.assert_close(pool(x), expected)
    assert weights.std(dim=(2, 3)).min() > 1e-4


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "Dinov2WithRegistersModel", "SiglipVisionModel"])
def test_one_branch_is_the_model_itself(name):
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        before = tiny.BUILDERS[name]()(pixels)[0]
        assert (attach(tiny.BUILDERS[name](), branches=1).eval()(pixels)[0] == before).all()
        assert (attach(tiny.BUILDERS[name]()).eval()(pixels)[0] - before).abs().max() > 1e-2


def test_special_tokens_pass_by_and_only_named_blocks_pool():
    model = attach(tiny.BUILDERS["DeiTModel"](), blocks=[1, 3])
    kinds = [
        type(block.layernorm_before).__name__ for block in (model.layers if hasattr(model, "layers") else model.encoder.layer)
    ]
    assert kinds == ["LayerNorm", "PooledNorm", "LayerNorm", "PooledNorm", "LayerNorm"]
    pooled = next(part for part in model.modules() if type(part).__name__ == "PooledNorm").eval()
    x = torch.randn(2, 2 + 49, 32)
    assert (pooled(x)[:, :2] == pooled.norm(x)[:, :2]).all() and (pooled(x)[:, 2:] != pooled.norm(x)[:, 2:]).any()
    with pytest.raises(ValueError, match="grid"):
        pooled(x[:, :-1])


def rows(weights):
    return torch.tensor(weights, dtype=torch.float64)[None, None]


def test_worked_diversity():
    n = 8
    one = torch.zeros(n, n)
    one[:, 3] = 1
    assert diversity([rows(one.tolist())]).item() == pytest.approx(1.0)
    assert diversity([rows(torch.eye(n).tolist())]).item() == 0
    assert diversity([rows(torch.full((n, n), 1 / n).tolist())]).item() == 0
    assert diversity([rows([[0.4, 0.2, 0.2, 0.2]] * 4)]).item() == 0  # below twice the uniform share
    half = 0.5 * torch.eye(n) + 0.5 * one
    assert diversity([torch.stack([one, torch.eye(n)])[None]]).item() == pytest.approx(0.7437, abs=1e-4)  # heads are averaged
    assert diversity([rows(half.tolist())]).item() == pytest.approx(0.7437, abs=1e-4)
    above = torch.zeros(n, n)  # what gets less than 2 / N = 0.25 of a row does not count, here 0.2 of half of the rows each
    above[:, 0], above[:4, 1], above[4:, 2] = 0.8, 0.2, 0.2
    assert diversity([rows(above.tolist())]).item() == pytest.approx(1.0)
    assert diversity([rows(half.tolist()), rows(torch.eye(n).tolist())]).item() == pytest.approx(0.7437 / 2, abs=1e-4)


def test_descent_spreads_attention():
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 1, 12, 12) + 3 * torch.randn(2, 1, 1, 12)).requires_grad_()
    first = logits.softmax(-1).mean((1, 2)).amax(-1).detach()
    for _ in range(100):
        loss = diversity([logits.softmax(-1)])
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 20 * gradient).detach().requires_grad_()
    assert (logits.softmax(-1).mean((1, 2)).amax(-1) < first - 0.01).all()


def test_the_loss_needs_maps_and_reaches_every_new_weight():
    model = attach(digits.untrained())
    pixels, labels = digits.splits()[0].pixels[:8], digits.splits()[0].labels[:8]
    with pytest.raises(ValueError, match="eager"):
        RobustTokenAttention()(model, (pixels, labels))
    model.set_attn_implementation("eager")
    found = RobustTokenAttention(weight=2.0)(model, {"pixel_values": pixels, "labels": labels})
    maps = model(pixels, output_attentions=True)
    torch.testing.assert_close(found["entropy"], torch.nn.functional.cross_entropy(maps.logits, labels))
    torch.testing.assert_close(found["diversity"], 2 * diversity(maps.attentions))
    sum(found.values()).backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if ".pooling." in name)


@pytest.mark.parametrize("name", ["Qwen2_5_VisionTransformerPretrainedModel", "SamVisionEncoder"])
def test_towers_without_lists_of_tokens_are_refused(name):
    with pytest.raises(jeton.Unsupported, match="grid of patches"):
        attach(tiny.BUILDERS[name]())
