"""A second question on the cache of the first equals a recomputation of the whole conversation with the same kept sets."""

from __future__ import annotations

import pytest
import torch
from cases import AT_ONCE, LANGUAGE, LANGUAGE_CASES, RECOMPUTABLE, Case, as_recomputed, both_attentions, each
from references import CLOSE, difference, generated
from torch import Tensor, nn
from witness import Replay, spied

import tiny
from jeton.engine import apply
from jeton.method import Method
from jeton.tokens import Reduction


def question(batch: int, length: int = 5) -> Tensor:
    return torch.cat([tiny.words(length, 50 + row) for row in range(batch)])


def whole(net: nn.Module, conversation: tiny.Inputs, method: Method, decided: list[Reduction]) -> Tensor:
    """Logits of a whole conversation without a cache."""
    inputs = {**conversation, "position_ids": tiny.positions(net, conversation)}
    with apply(net, Replay(method, list(decided))):
        return tiny.run(net, inputs, use_cache=False)


def next_positions(net: nn.Module, conversation: tiny.Inputs, new: int) -> Tensor:
    return tiny.positions(net, conversation)[..., -new:]


@torch.no_grad()
@both_attentions
@each(RECOMPUTABLE)
def test_a_second_question_by_a_plain_forward(case: Case, attention: str) -> None:
    net = case.net(attention)
    inputs = tiny.inputs_for(net)
    asked = question(inputs["input_ids"].shape[0])
    conversation = tiny.extended(inputs, asked)
    spy, decided = spied(case.made())
    with apply(net, spy):
        first = net(**inputs, position_ids=tiny.positions(net, inputs), use_cache=True)
        second = net(
            input_ids=asked,
            attention_mask=conversation["attention_mask"],
            position_ids=next_positions(net, conversation, asked.shape[1]),
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    reference = whole(net, conversation, case.made(), decided)[:, -asked.shape[1] :]
    assert difference(second.logits, reference) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_second_question_needs_neither_positions_nor_mask_where_nothing_is_padded(name: str) -> None:
    """As a hand-written loop does it: the model counts positions from the cache, whatever was dropped."""
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.one_image(net))
    asked = question(1)
    spy, decided = spied_random()
    with apply(net, spy):
        first = net(**inputs, use_cache=True)
        second = net(input_ids=asked, past_key_values=first.past_key_values, use_cache=True)
    reference = whole(net, tiny.extended(inputs, asked), spy.inner, decided)[:, -asked.shape[1] :]
    assert difference(second.logits, reference) < CLOSE


def spied_random():
    from jeton.method import get

    return spied(get("random", keep=0.3))


@each(RECOMPUTABLE)
def test_a_second_question_by_generate(case: Case) -> None:
    """Answer, ask again on the returned cache, answer again; then compute the whole conversation at once."""
    net = case.net()
    inputs = tiny.inputs_for(net)
    spy, decided = spied(case.made())
    with apply(net, spy):
        first = generated(net, inputs, max_new_tokens=4)
        said = first.sequences[:, inputs["input_ids"].shape[1] :]
        asked = torch.cat([said, question(said.shape[0])], 1)
        conversation = tiny.extended(inputs, asked)
        text = {name: value for name, value in conversation.items() if name in ("input_ids", "attention_mask")}
        second = generated(net, text, max_new_tokens=6, past_key_values=first.past_key_values)
    new = second.sequences[:, -6:]
    reference = whole(net, tiny.extended(conversation, new[:, :-1]), case.made(), decided)[:, -6:]
    assert difference(torch.stack(second.logits, 1), reference) < CLOSE
    assert torch.equal(reference.argmax(-1), new)


@torch.no_grad()
@each([as_recomputed(case) for case in LANGUAGE_CASES if not case.fields])
def test_two_conversations_take_turns_under_one_run(case: Case) -> None:
    net = case.net()
    talks = [tiny.prompts(net, [sample]) for sample in tiny.samples(net)[:2]]
    asked = [question(1, 3), question(1, 6)]
    spy, decided = spied(case.made())
    caches, made, later = [], [], []
    with apply(net, spy):
        for talk in talks:
            decided.clear()
            caches.append(net(**talk, position_ids=tiny.positions(net, talk), use_cache=True).past_key_values)
            made.append(list(decided))
        for talk, words, cache, past in zip(talks, asked, caches, made, strict=True):
            longer = tiny.extended(talk, words)
            ids = next_positions(net, longer, words.shape[1])
            output = net(
                input_ids=words, attention_mask=longer["attention_mask"], position_ids=ids, past_key_values=cache, use_cache=True
            )
            later.append((longer, past, output.logits))
    for longer, past, logits in later:
        reference = whole(net, longer, case.made(), past)[:, -logits.shape[1] :]
        assert difference(logits, reference) < CLOSE


@torch.no_grad()
@each([case for case in LANGUAGE_CASES if not case.fields and case.made().site != "layer" and case.model not in AT_ONCE])
def test_a_second_question_may_bring_another_picture(case: Case) -> None:
    """What images lose does not depend on the turn in which they come (inside the language model it may)."""
    net = case.net()
    both = tiny.prompts(net, [tiny.samples(net)[1]])
    images = (both["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    cut = int(images[images.diff().argmax()]) + 2  # the first picture and one word
    second = _later_picture(both, cut)
    ids = tiny.positions(net, both)
    with apply(net, case.made()):
        whole = net(**both, position_ids=ids).logits
        cache = net(**_earlier_picture(both, cut), position_ids=ids[..., :cut], use_cache=True).past_key_values
        last = net(**second, position_ids=ids[..., cut:], past_key_values=cache, use_cache=True)
    assert difference(last.logits[:, -5:], whole[:, -5:]) < CLOSE


def _earlier_picture(both: tiny.Inputs, cut: int) -> tiny.Inputs:
    """The first `cut` columns of a prompt with two pictures, and the first picture, as it is in the whole."""
    return {name: _split(name, value, both, cut)[0] for name, value in both.items()}


def _later_picture(both: tiny.Inputs, cut: int) -> tiny.Inputs:
    """The rest of the prompt with the second picture; the mask covers the whole conversation."""
    rest = {name: _split(name, value, both, cut)[1] for name, value in both.items()}
    return {**rest, **{name: both[name] for name in ("attention_mask", "token_type_ids") if name in both}}


def _split(name: str, value: Tensor, both: tiny.Inputs, cut: int) -> tuple[Tensor, Tensor]:
    if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        return value[:, :cut], value[:, cut:]
    if name == "batch_num_images":  # both pictures are single tiles, in whichever turn they come
        return value, value
    axis, first = tiny.first_picture(both) if name.startswith("pixel") else (0, 1)
    return value.narrow(axis, 0, first), value.narrow(axis, first, value.shape[axis] - first)
