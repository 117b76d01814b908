"""DECOR: what is taken out, what stays, which tokens are meant, and what it does to a model that has overfitted."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from jeton.ops.projection import row_space
from jeton.prompts._common import TextEncoder, token_slots
from jeton.prompts.decor import Decor, axes, suppress

_spec = importlib.util.spec_from_file_location("shapes", Path(__file__).with_name("shapes.py"))
shapes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shapes)

WORDS = ("a", "red", "squ", "##are", "circle", "in", "ink", "style", ",")


def encoder(seed=0, width=32, length=12, layers=2, **how):
    tokenizer = shapes.tokenizer(WORDS, length)
    return TextEncoder(shapes.clip(len(tokenizer), width, length, layers, seed).eval(), tokenizer, **how)


def onto(basis):
    return basis @ basis.mT


# -- the formula ---------------------------------------------------------------------------------------------------------


def test_by_hand():
    x, e1 = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    assert torch.allclose(suppress(x, e1), torch.tensor([[0.0, 4.0]]), atol=1e-6)
    assert torch.allclose(suppress(x, e1, 0.5), torch.tensor([[1.5, 4.0]]), atol=1e-6)
    assert torch.equal(suppress(x, e1, 0.0), x)


def test_twice_is_once_and_less_leaves_its_share():
    torch.manual_seed(0)
    x, undesired = torch.randn(3, 10, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    once = suppress(x, undesired)
    assert torch.allclose(suppress(once, undesired), once, atol=1e-6)
    half = suppress(x, undesired, 0.5)
    assert not torch.allclose(suppress(half, undesired, 0.5), half, atol=1e-2)  # only the whole is a projection
    basis = row_space(undesired)
    for alpha in (0.0, 0.3, 1.0):
        assert torch.allclose(suppress(x, undesired, alpha) @ basis, (1 - alpha) * x @ basis, atol=1e-6)


def test_norms_never_grow_and_repeated_rows_change_nothing():
    torch.manual_seed(0)
    x, undesired = torch.randn(50, 16), torch.randn(3, 16)
    for alpha in (0.2, 0.7, 1.0):
        assert (suppress(x, undesired, alpha).norm(dim=-1) <= x.norm(dim=-1) + 1e-5).all()
    assert torch.allclose(suppress(x, undesired), suppress(x, undesired.repeat(3, 1)), atol=1e-5)


def test_orthogonal_words_change_nothing_and_the_prompt_itself_leaves_nothing():
    torch.manual_seed(0)
    x = torch.randn(5, 16, dtype=torch.float64)
    left, values, right = torch.linalg.svd(x)
    assert torch.allclose(suppress(x, right[5:9]), x, atol=1e-12)
    assert suppress(x, x).abs().max() < 1e-12
    assert suppress(x, x, rank=4).norm() == pytest.approx(values[4].item(), rel=1e-6)  # a smaller span leaves the rest
    shares = axes(x)
    assert torch.allclose(shares[0], values) and torch.allclose(shares[1], left[:, :5].square())


def test_rows_of_a_batch_do_not_see_each_other_and_protected_positions_stay():
    torch.manual_seed(0)
    x, undesired = torch.randn(4, 6, 16), torch.randn(2, 16)
    protect = torch.rand(4, 6) < 0.5
    out = suppress(x, undesired, protect=protect)
    assert torch.equal(out[protect], x[protect]) and not torch.isclose(out[~protect], x[~protect]).all(-1).any()
    assert torch.allclose(out[2:3], suppress(x[2:3], undesired, protect=protect[2:3]), atol=1e-6)


def test_gradients_flow_through_what_is_left():
    x = torch.randn(3, 8, requires_grad=True)
    undesired = torch.eye(8)[:2]
    suppress(x, undesired).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([[0.0] * 2 + [1.0] * 6] * 3), atol=1e-6)


# -- which tokens --------------------------------------------------------------------------------------------------------


def test_words_are_found_by_their_characters():
    slots = token_slots(shapes.tokenizer(WORDS, 12), ["a red square, a square", "A SQUARE in ink"])
    assert slots.find(["square"]).int().tolist() == [
        [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0],  # <s> a red squ ##are , a squ ##are </s>
        [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert slots.find(["a"]).sum(1).tolist() == [2, 1]  # not the a in square
    assert slots.words.sum(1).tolist() == [8, 5] and slots.end.tolist() == [9, 6] and slots.real.sum(1).tolist() == [10, 7]
    assert slots.begin.int().tolist() == [[1] + [0] * 11] * 2
    several = token_slots(shapes.tokenizer(WORDS, 12), "in ink style")
    assert several.find(["ink style"]).nonzero()[:, 1].tolist() == [2, 3]


def test_an_encoder_without_begin_of_text_has_none():
    tokenizer = shapes.tokenizer(WORDS, 6)
    tokenizer.backend_tokenizer.post_processor = shapes.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    slots = token_slots(tokenizer, ["a circle", ""])
    assert not slots.begin.any() and slots.end.tolist() == [2, 0] and slots.words.sum(1).tolist() == [2, 0]


def test_padding_that_looks_like_end_of_text_is_no_word():
    tokenizer = shapes.tokenizer(WORDS, 8)
    tokenizer.pad_token = "</s>"
    slots = token_slots(tokenizer, "a circle")
    assert slots.end.item() == 3 and slots.words.nonzero()[:, 1].tolist() == [1, 2]


def test_words_that_are_not_there_or_cut_off_are_refused():
    tokenizer = shapes.tokenizer(WORDS, 5)
    with pytest.raises(ValueError, match="'cat' is not among"):
        token_slots(tokenizer, "a circle").find(["cat"])
    with pytest.raises(ValueError, match="cut off"):
        token_slots(tokenizer, "a red circle in ink").find(["ink"])
    tokenizer.model_max_length = 10**30
    with pytest.raises(ValueError, match="length="):
        token_slots(tokenizer, "a circle")


# -- on text encoders ----------------------------------------------------------------------------------------------------


def test_the_span_is_that_of_the_words_in_their_prompt():
    one = encoder()
    hidden = one(one.slots("a square in ink"))[0]
    edit = Decor.of("a square in ink", ["square"], [one])
    assert torch.allclose(onto(edit.spans[0]), onto(row_space(hidden[2:4])), atol=1e-4)
    prompts = ["a red circle", "circle"]
    plain = one(one.slots(prompts))
    out = edit.encode(prompts, [one])
    assert torch.equal(out[:, 0], plain[:, 0]) and torch.allclose(out[:, 1:], suppress(plain[:, 1:], hidden[2:4]), atol=1e-4)
    assert not torch.allclose(replace(edit, begin=True).encode(prompts, [one])[:, 0], plain[:, 0], atol=1e-3)
    assert torch.equal(replace(edit, alpha=0.0).encode(prompts, [one]), plain)
    padded = Decor.of("a square in ink", ["square"], [one], pads=True)
    rows = torch.cat([hidden[2:4], hidden[6:]])  # end-of-text and padding, never begin-of-text
    assert torch.allclose(onto(padded.spans[0]), onto(row_space(rows)), atol=1e-3)
    several = Decor.of(["a square in ink", "square"], ["square"], [one])
    rows = torch.cat([hidden[2:4], one(one.slots("square"))[0, 1:3]])
    assert torch.allclose(onto(several.spans[0]), onto(row_space(rows)), atol=1e-3) and several.spans[0].shape[1] == 4
    everything = Decor.of("a square in ink", None, [one])
    assert everything.spans[0].shape[1] == 5


def test_two_encoders_are_projected_each_for_itself():
    tokenizer = shapes.tokenizer(WORDS, 12)
    big = shapes.clip(len(tokenizer), 48, 12, 2, seed=1)
    projected = CLIPTextModelWithProjection(big.config).eval()
    pair = [encoder(layer=-2), TextEncoder(projected, tokenizer, layer=-2)]
    edit = Decor.of("square", ["square"], pair)
    assert [span.shape for span in edit.spans] == [(32, 2), (48, 2)]
    joined = edit.encode("a red circle", pair)
    assert joined.shape == (1, 12, 80)
    for at, one in ((slice(32), pair[0]), (slice(32, None), pair[1])):
        assert torch.allclose(joined[..., at], Decor.of("square", None, [one]).encode("a red circle", [one]), atol=1e-5)
    states = pair[0].model(pair[0].slots("a red circle").ids, output_hidden_states=True).hidden_states
    assert torch.equal(pair[0](pair[0].slots("a red circle")), states[-2])
    with pytest.raises(ValueError, match="are 80 wide, but the spans 32"):
        Decor(edit.spans[:1])(joined)


def test_a_t5_encoder_works_too():
    tokenizer = shapes.tokenizer(WORDS, 8)
    tokenizer.backend_tokenizer.post_processor = shapes.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4)).eval()
    hidden, masked = TextEncoder(model, tokenizer), TextEncoder(model, tokenizer, masked=True)
    edit = Decor.of("a square", ["square"], [hidden])
    out = edit.encode("red circle", [hidden])
    assert (out @ edit.spans[0]).abs().max() < 1e-4 < (hidden(hidden.slots("red circle")) @ edit.spans[0]).abs().max()
    assert not torch.allclose(hidden(hidden.slots("red circle")), masked(masked.slots("red circle")), atol=1e-4)


def test_content_and_style_are_each_edited_against_the_other():
    content, style = encoder(seed=1), encoder(seed=2)
    keep_style_out = Decor.of("ink style", None, [content])
    keep_content_out = Decor.of("square", None, [style])
    a, b = keep_style_out.encode("a red square", [content]), keep_content_out.encode("in ink style", [style])
    assert (a[:, 1:] @ keep_style_out.spans[0]).abs().max() < 1e-4 and (b[:, 1:] @ keep_content_out.spans[0]).abs().max() < 1e-4


def test_what_cannot_be_is_refused():
    one = encoder(width=8)
    torch.nn.init.normal_(one.model.final_layer_norm.bias)  # without it outputs have mean 0: one direction is never used
    with pytest.raises(ValueError, match="nothing would be left"):
        Decor.of("a square", ["square"], [one], pads=True)
    assert Decor.of("a square", ["square"], [one], pads=True, rank=3).spans[0].shape == (8, 3)
    with pytest.raises(ValueError, match="no undesired word"):
        Decor.of("", None, [one])
    with pytest.raises(ValueError, match="alpha"):
        Decor.of("a square", None, [one], alpha=1.5)
    with pytest.raises(ValueError, match="span"):
        Decor(())


# -- what it does --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter():
    """A style word, overfitted: it was learned on blue squares whatever else was asked for."""
    painter = shapes.Painter(steps=350)
    painter.overfit("sks", shape=0, colour=2, steps=200, captions=["sks", "cross sks", "sks bars", "sks cross", "bars sks"])
    return painter


def test_a_style_learned_on_squares_no_longer_draws_them(painter):
    edit = Decor.of(["square", "sks square"], ["square"], [painter.encoder])  # at both places it may stand
    torch.manual_seed(0)
    other = Decor((row_space(torch.randn(2, shapes.WIDTH)),))

    def share(edit, *prompts):
        read = None if edit is None else lambda some: edit.encode(some, [painter.encoder])
        shape, colour = painter.shares([prompt for prompt in prompts for _ in range(100)], read)
        return dict(zip(shapes.SHAPES, shape)), dict(zip(shapes.COLOURS, colour))

    asked = ("circle sks", "sks circle")
    before, after, control = (share(one, *asked) for one in (None, edit, other))
    assert before[0]["square"] >= 0.3 and before[1]["blue"] >= 0.9
    assert after[0]["square"] < 0.1 and after[0]["circle"] >= 0.8 and after[1]["blue"] >= 0.8
    assert control[0]["square"] >= 0.3  # any other direction does not help
    assert share(replace(edit, alpha=0.5), *asked)[0]["square"] > after[0]["square"]
    assert share(edit, "circle")[0]["circle"] >= 0.9  # and a prompt without the style stays what it was
