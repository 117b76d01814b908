"""TokenAdapt: hand-worked weights, limits, real transplants, and supertokens."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers

from jeton.text._corpus import bits_per_byte, train_bpe
from jeton.text._rows import Drawn, Mean, hashed_ngrams, nearest, pieces, vectors, within
from jeton.text._vocabulary import vocabulary
from jeton.text.tokenadapt import TokenAdapt, supertokens

from .. import tiny
from .conftest import unigram


def llama(size: int, tied: bool = False, **more):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=size, tie_word_embeddings=tied, **{**sizes, **more}))


def test_hand_worked_local_weights():
    similarity, length = torch.tensor([0.9, 0.3]), torch.tensor([4 / 7, 3 / 7])
    for weighting, expected in (("softmax", (0.8187, 0.1813)), ("raw", (0.7752, 0.2248))):
        found = TokenAdapt(weighting=weighting).local_weights(similarity, length)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


def test_softmax_within_groups_is_softmax_of_each():
    score, group = torch.tensor([1.0, 5.0, 2.0, 0.5, 5.0]), torch.tensor([7, 3, 7, 7, 3])
    found = within(score, group)
    torch.testing.assert_close(found[group == 7], score[group == 7].softmax(0))
    torch.testing.assert_close(found[group == 3], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_tokenizer_changes_nothing(parallel, kind, tied):
    tokenizer = train_bpe(parallel["de"], 500) if kind == "bpe" else unigram(parallel["de"], 500)
    size = tokenizer.get_vocab_size()
    model = tiny.ready(llama(size, tied)).to(torch.bfloat16)
    before = deepcopy(model.state_dict())
    done = TokenAdapt().transplant(model, tokenizer, tokenizer, multiple=1)
    assert (done.copied, done.mixed, done.drawn) == (size, 0, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int16), before[name].view(torch.int16)), name


def test_the_share_goes_from_local_to_global(parallel):
    old, new = train_bpe(parallel["en"], 600), train_bpe(parallel["en"] + parallel["de"], 700)
    table = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    words, source = vocabulary(new), vocabulary(old)
    only_local, only_global = TokenAdapt(share=0.0).rows(old, new), TokenAdapt(share=1.0).rows(old, new)
    both = TokenAdapt().rows(old, new)
    id = next(
        id for id in words.ids if both.mixed[id] and (words.text(id) or "").isalpha() and len(source.split(words.bytes[id])) > 2
    )
    assert only_local.column[only_local.row == id].tolist() == source.split(words.bytes[id])
    near = only_global.column[only_global.row == id].tolist()
    strings = [source.text(one) for one in source.ids if source.text(one)]
    cosine = torch.cosine_similarity(hashed_ngrams([words.text(id)]), hashed_ngrams(strings))
    assert sorted(source.text(one) for one in near) == sorted(strings[at] for at in cosine.topk(3).indices)
    a, b, mixed = (rows.apply(table)[id] for rows in (only_local, only_global, both))
    torch.testing.assert_close(mixed, 0.7 * a + 0.3 * b)
    for rows in (only_local, only_global, both):
        total = torch.zeros(len(words)).scatter_add(0, rows.row, rows.weight)
        assert torch.allclose(total[rows.mixed], torch.ones(()), atol=1e-5) and not total[rows.copied >= 0].any()


def test_a_token_that_is_one_old_token_gets_its_row(parallel):
    """By the local heuristic alone: as many pieces as one, and the weight 1."""
    old = train_bpe(parallel["en"], 600)
    words = vocabulary(old)
    row, column = pieces(words, words, words.ids)
    assert torch.equal(row, column)
    weight = TokenAdapt().local_weights(torch.rand(len(row)), torch.ones(len(row)), row)
    assert torch.equal(weight, torch.ones(len(row)))


def test_pieces_of_characters_are_mixed_by_length_and_need_no_vector(parallel):
    old, new = train_bpe(parallel["en"], 400), train_bpe(parallel["ja"], 600)
    asked: list[str] = []

    def spy(strings):
        asked.extend(strings)
        return hashed_ngrams(strings)

    rows = TokenAdapt(embed=spy).rows(old, new)
    words = vocabulary(new)
    broken = [id for id in words.ids if words.text(id) is None and rows.mixed[id]]
    assert broken and not rows.drawn.any() and not any("\ufffd" in string for string in asked)
    for id in broken:
        weight = rows.weight[rows.row == id]
        torch.testing.assert_close(weight, torch.full_like(weight, 1 / len(weight)))
        assert b"".join(vocabulary(old).bytes[one] for one in rows.column[rows.row == id].tolist()) == words.bytes[id]


def test_across_kinds_of_tokenizers_the_same_bytes_are_the_same_token(parallel):
    old, new = unigram(parallel["en"], 500), train_bpe(parallel["en"], 500)
    rows, source, target = TokenAdapt().rows(old, new), vocabulary(old), vocabulary(new)
    same = (rows.copied >= 0).nonzero()[:, 0].tolist()
    assert len(same) > 100
    assert all(source.bytes[rows.copied[id]] == target.bytes[id] for id in same)
    assert target.by_bytes[b" value"] in same and source.raw[rows.copied[target.by_bytes[b" value"]]] == "▁value"


def test_copying_across_case_is_an_option():
    old, new = train_bpe([" Us"] * 9, 258), train_bpe([" US us"] * 9, 262)
    words = vocabulary(new)
    id = words.by_bytes[b" US"]
    assert TokenAdapt().rows(old, new).copied[id] == -1
    loose = TokenAdapt(ignore_case=True).rows(old, new).copied
    assert loose[id] >= 0 and vocabulary(old).text(int(loose[id])) == " Us"


def test_the_threshold_drops_neighbours(parallel):
    old, new = train_bpe(parallel["en"], 600), train_bpe(parallel["de"], 700)
    free, strict = TokenAdapt(share=1.0).rows(old, new), TokenAdapt(share=1.0, threshold=0.6).rows(old, new)
    assert 0 < len(strict.row) < len(free.row) and not strict.drawn.any()  # local stands where no neighbour is left
    never = TokenAdapt(threshold=1.01).rows(old, new)
    flat = TokenAdapt(share=0.0, embed=lambda strings: torch.eye(len(strings))).rows(old, new)
    torch.testing.assert_close(never.apply(torch.randn(600, 4)).shape, flat.apply(torch.randn(600, 4)).shape)
    assert torch.equal(never.column, flat.column)
    torch.testing.assert_close(never.weight, flat.weight)  # no similarity counts: by length alone


def test_nearest_in_chunks_and_vectors_of_strings():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(50, 8, generator=generator), torch.randn(30, 8, generator=generator)
    keys[4] = 0
    cosine = torch.cosine_similarity(query[:, None], keys[None], dim=-1)
    value, place = nearest(query, keys, 3, chunk=7)
    torch.testing.assert_close(value, cosine.topk(3).values)
    assert torch.equal(place, cosine.topk(3).indices)
    calls = []
    made = vectors(lambda strings: calls.append(strings) or [[float(len(one))] for one in strings], ["a", "bb", "a"])
    assert made.tolist() == [[1.0], [2.0], [1.0]] and calls == [["a", "bb"]]
    with pytest.raises(ValueError, match="one vector per string"):
        vectors(lambda strings: [1.0], ["a", "b"])
    spelled = torch.nn.functional.normalize(hashed_ngrams(["running", "runner", "table"]), dim=-1)
    assert spelled[0] @ spelled[1] > 0.3 > spelled[0] @ spelled[2]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_works_with_its_new_tokenizer(parallel, tied):
    special = ["<s>", "</s>", "<pad>"]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    old = transformers.PreTrainedTokenizerFast(tokenizer_object=train_bpe(parallel["en"], 500, special=special), **names)
    old.chat_template = "{{ messages[0].content }}"
    plain = train_bpe(parallel["de"], 600, special=["</s>", "[PAD]", "<s>"])
    new = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **names, pad_token="[PAD]")
    model = tiny.ready(llama(512, tied, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = [1], 0
    begin = model.get_input_embeddings().weight[0].clone()
    done = TokenAdapt().transplant(model, old, new)
    assert model.config.vocab_size == 640 and model.get_output_embeddings().weight.shape == (640, 64)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (2, 0, 1)
    assert model.generation_config.eos_token_id == 0 and new.chat_template == old.chat_template
    assert torch.equal(model.get_input_embeddings().weight[2], begin)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert done.tokens == 600 and done.copied + done.mixed + done.drawn == 600 and done.drawn == 1  # [PAD] is new
    ids = torch.tensor([new("Ein gültiger Wert").input_ids])
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, pad_token_id=1).shape[1] > ids.shape[1]


def test_what_cannot_be_transplanted_is_refused(parallel):
    old, new = train_bpe(parallel["en"], 500, special=["<image>"]), train_bpe(parallel["en"], 400)
    model = tiny.ready(llama(500))
    model.config.image_token_id = 0
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="image_token_id is <image>, which the new tokenizer has not"):
        TokenAdapt().transplant(model, old, new)
    with pytest.raises(ValueError, match="not the model's own"):
        TokenAdapt().transplant(tiny.ready(llama(300)), new, new)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for fields, message in (
        ({"weighting": "no"}, "weighting"), ({"share": 1.5}, "share"), ({"temperature": 0.0}, "temperature"), ({"k": 0}, "k=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TokenAdapt(**fields)


def test_supertokens_span_words_and_need_fewer_tokens(prose):
    train, held_out = prose
    ordinary, wide = train_bpe(train, 4096), supertokens(train, 4096)
    assert ordinary.get_vocab_size() == wide.get_vocab_size() == 4096
    count = [sum(len(encoding.ids) for encoding in one.encode_batch(held_out)) for one in (ordinary, wide)]
    assert count[1] < 0.9 * count[0]
    spanning = [
        [id for id in words.ids if " " in (words.text(id) or "")[1:].strip()] for words in map(vocabulary, (ordinary, wide))
    ]
    assert not spanning[0] and len(spanning[1]) > 100
    assert all(wide.decode(wide.encode(text).ids) == text for text in [*held_out, "  two  spaces, été 東京\n"])
    assert supertokens(train[:50], 1000).to_str() == supertokens(train[:50], 1000).to_str()
    assert supertokens(train[:50], 1000, seed=1).to_str() != supertokens(train[:50], 1000).to_str()
    with pytest.raises(ValueError, match="must sum to 1"):
        supertokens(train, 1000, words=(0.5, 0.4))
    with pytest.raises(ValueError, match="less than 256"):
        supertokens(train, 200)


def test_one_word_chunks_span_no_words(prose):
    words = vocabulary(supertokens(prose[0][:100], 2000, words=(1.0,), tail=0.0))
    assert not any(" " in (words.text(id) or "")[1:].strip() for id in words.ids)


def test_bits_per_byte_do_not_depend_on_the_batch_and_fit_a_uniform_model(parallel):
    tokenizer = train_bpe(parallel["en"], 512, special=["<s>"])
    model = tiny.ready(llama(512))
    texts = parallel["en"][:20]
    one, many = (bits_per_byte(model, tokenizer, texts, batch=size, window=16) for size in (1, 7))
    assert one == pytest.approx(many, rel=1e-4)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    assert bits_per_byte(model, fast, texts) == pytest.approx(9 * tokens / sum(len(text.encode()) for text in texts), rel=1e-5)
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model, tokenizer, [""])


@pytest.mark.slow
def test_a_trained_model_keeps_more_than_by_means_or_by_chance(prose):
    train, held_out = prose
    old, new = train_bpe(train, 1024), train_bpe(held_out, 512)
    torch.manual_seed(0)
    model = llama(1024)
    ids = torch.tensor([id for text in train for id in old.encode(text + "\n").ids])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(250):
        at = torch.randint(0, len(ids) - 64, (16,)).tolist()
        batch = torch.stack([ids[start : start + 64] for start in at])
        optimiser.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / 250)
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    found = []
    for initialiser in (TokenAdapt(), Mean(), Drawn()):
        copy = deepcopy(model)
        done = initialiser.transplant(copy, old, new)
        assert done.copied < done.tokens == 512
        found.append(bits_per_byte(copy, new, held_out))
    print("bits per byte: old", bits_per_byte(model, old, held_out), "tokenadapt, mean, drawn:", found)
    assert found[0] < found[1] < found[2]
