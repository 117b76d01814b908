"""tomesd: merged for attention, whole everywhere else; against the published steps written out plainly."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny
from jeton.method import get
from jeton.place import Place
from jeton.tokens import Tokens


def grid(height, width, x=None, batch=2):
    x = torch.randn(batch, height * width, 8, generator=torch.Generator().manual_seed(0)) if x is None else x
    return Tokens(x, place=Place.grid(len(x), height, width))


def receivers(step):
    """Tokens others merged into, at least."""
    counts = torch.zeros(step.k).scatter_add(0, step.assign[0], torch.ones(step.n))
    return step.index[0, counts > 1]


def test_one_patch_of_every_cell_receives():
    for seed in range(3):
        step = get("tomesd", keep=1, seed=seed).reduce(grid(6, 8))  # everything that can goes
        assert step.k == 12
        rows, cols = step.index // 8, step.index % 8
        assert (rows[0] // 2 * 4 + cols[0] // 2).sort().values.tolist() == list(range(12))
        assert torch.equal(step.index[0], step.index[1])  # one draw for the whole batch
        within = (rows[0] % 2 * 2 + cols[0] % 2)[(rows[0] // 2 * 4 + cols[0] // 2).argsort()].view(3, 4)
        assert (within != within[:, :1]).any() and (within != within[:1]).any()  # and one of its own for every cell
    top_left = get("tomesd", keep=1, random=False).reduce(grid(6, 8)).index[0]
    assert (top_left // 8 % 2 == 0).all() and (top_left % 8 % 2 == 0).all()


def test_a_seed_gives_the_same_draw_and_another_seed_another():
    draws = [get("tomesd", keep=1, seed=seed).reduce(grid(8, 8)).index[0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    steps = get("tomesd").steps(64, 3)
    assert len({step.seed for step in steps}) == 3 and all(step.keep == 32 for step in steps)


def test_borders_that_fill_no_cell_send():
    for seed in range(6):
        step = get("tomesd", keep=1, seed=seed).reduce(grid(5, 7))
        assert step.k == 2 * 3 and (step.index // 7 < 4).all() and (step.index % 7 < 6).all()
        assert torch.equal(step.assign[0].unique(), torch.arange(6))  # all go to one of these


def test_the_budget_is_half_and_never_below_the_receivers():
    assert get("tomesd").reduce(grid(6, 6)).k == 18
    assert get("tomesd", keep=0.1).reduce(grid(6, 6)).k == 9
    assert get("tomesd", keep=1.0).reduce(grid(6, 6)).is_identity
    assert get("tomesd").promise(36, 12).count == 36


def test_equal_groups_come_back_as_they_were():
    cells = torch.randn(1, 3, 3, 8).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    tokens = grid(6, 6, cells)
    step = get("tomesd", keep=9).reduce(tokens)
    assert step.k == 9
    torch.testing.assert_close(step.restore(step.apply(tokens)).features, cells)
    other = grid(6, 6, batch=1)
    assert not torch.allclose(step.restore(step.apply(other)).features, other.features)


def test_values_are_plain_means_whatever_tokens_stand_for():
    tokens = grid(4, 4)
    sized = Tokens(tokens.features, place=tokens.place, size=torch.rand(2, 16) + 1)
    step = get("tomesd", keep=6).reduce(sized)
    for slot in range(step.k):
        torch.testing.assert_close(
            step.mix(tokens.features)[0, slot], tokens.features[0, step.assign[0] == slot].mean(0), atol=1e-6, rtol=1e-5
        )


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="no place; use tome"):
        get("tomesd").reduce(Tokens(torch.randn(1, 9, 4)))
    for fields in ({"stride": 1}, {"around": ("head",)}, {"around": ()}):
        with pytest.raises(ValueError):
            get("tomesd", **fields)
    with pytest.raises(ValueError, match="blocks 0 to 4"):
        get("tomesd", blocks=(5,)).steps(49, 5)


# -- a whole encoder -----------------------------------------------------------------------------------------------------------


def published(model, pixels, halves, seed=0):
    """merge, op, unmerge in each block; the class token apart."""
    x = model.embeddings(pixels)
    side = tiny.SIDE
    for number, block in enumerate(model.layers):
        step = get("tomesd", keep=24, seed=seed + number).reduce(Tokens(x[:, 1:], place=Place.grid(len(x), side, side)))

        def around(half, op, y, step=step):
            if half not in halves:
                return op(y)
            short = torch.cat([y[:, :1], step.mix(y[:, 1:])], 1)
            out = op(short)
            group = step.assign[..., None].expand(-1, -1, out.shape[2])
            return torch.cat([out[:, :1], out[:, 1:].gather(1, group)], 1)

        x = x + around("attention", lambda y, block=block: block.attention(y, None)[0], block.layernorm_before(x))
        x = x + around("mlp", block.mlp, block.layernorm_after(x))
    return model.layernorm(x)


@torch.no_grad()
@pytest.mark.parametrize("halves", [("attention",), ("attention", "mlp"), ("mlp",)])
def test_a_vit_equals_the_published_steps(halves):
    model = tiny.model("ViTModel")
    inputs = tiny.inputs_for(model)
    whole = model(**inputs).last_hidden_state
    with jeton.apply(model, "tomesd", keep=0.49, around=halves) as run:
        got = model(**inputs).last_hidden_state
        report, tokens = run.report(), run.tokens
    expected = published(model, inputs["pixel_values"], halves)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    for other in (whole, published(model, inputs["pixel_values"], halves, seed=9)):  # the twins
        assert (got - other).abs().max() > 1e-2
    attended = 25.0 if "attention" in halves else 50.0
    assert report.encoder_tokens == (attended,) * 5 and [image.after for image in report.images] == [49] * 3
    assert tokens.mask is None and len(tokens) == 50 and run.reduction is None
    assert report.flops_share < 0.9


@torch.no_grad()
def test_chosen_blocks_alone():
    model = tiny.model("SiglipVisionModel")
    with jeton.apply(model, "tomesd", blocks=(1, 3)) as run:
        model(**tiny.inputs_for(model))
        assert run.report().encoder_tokens == (49.0, 24.0, 49.0, 24.0, 49.0)


@torch.no_grad()
def test_a_language_model_sees_as_many_tokens_as_ever():
    model = tiny.model("LlavaForConditionalGeneration")
    inputs = tiny.inputs_for(model)
    whole = tiny.run(model, inputs)
    with jeton.apply(model, "tomesd | divprune(keep=20)") as run:
        tiny.run(model, inputs)
        report = run.report()
    assert next((site.method, site.before, site.after) for site in report.sites) == ("tomesd", 49.0, 24.0)
    assert all((image.before, image.after) == (49, 20) for image in report.images)
    with jeton.apply(model, "tomesd"):
        assert tiny.run(model, inputs).shape == whole.shape


@torch.no_grad()
def test_a_score_heard_where_attention_was_short_is_given_back_to_all():
    """Patches of one group have the group's score: every patch may be chosen afterwards, not the receivers alone."""
    model = tiny.model("CLIPVisionModel")
    inputs = tiny.inputs_for(model)
    with jeton.apply(model, "tomesd(keep=0.3) | fastervlm(keep=30)") as run:
        model(**inputs)
        kept = run.tokens.origin[:, 1:] - 1
        (heard,) = run.site.undone
        score = run.site.flat(heard).view(3, 49, -1)
    step_receives = 15  # tokens that attention saw
    assert kept.shape[1] == 30 > step_receives and all(row.unique().numel() == 30 for row in kept)
    assert (score > 0).all() and all(len(row.unique(dim=0)) <= step_receives for row in score)
    with jeton.apply(model, "tomesd(keep=0.3) | visionzip(keep=30)") as run:
        model(**inputs)
        assert {run.site.flat(need).shape for need in run.site.undone} == {(3 * 49, 4), (3 * 49, 8)}  # scores by head, keys
    with jeton.apply(model, "tomesd(keep=0.3, blocks=(0,)) | fastervlm(keep=30)") as run:
        model(**inputs)
        assert not run.site.undone and len(run.site.flat(heard)[:49].unique(dim=0)) == 49
