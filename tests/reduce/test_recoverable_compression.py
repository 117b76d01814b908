"""Recoverable Compression against its card."""

from __future__ import annotations

import pytest
import torch
import transformers
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor
from witness import spied

import jeton
import tiny
from jeton.engine import apply
from jeton.method import get
from jeton.needs import ClassAttention, Keys, TextSimilarity
from jeton.tokens import Tokens

LLAVA, NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"
NAME = "recoverable-compression"


def picture(seed: int, n: int = 64, peaks: int = 3) -> tuple[Tokens, dict[str, Tensor]]:
    """Flat scores with some peaks and some spread far below, and a few tokens that are about the question."""
    generator = torch.Generator().manual_seed(seed)
    vis = 0.05 + 0.001 * torch.rand(1, n, generator=generator)
    sim = 0.005 * torch.rand(1, 1, n, generator=generator)
    vis[0, torch.randperm(n, generator=generator)[:peaks]] += 0.05 * torch.arange(1, peaks + 1)
    sim[0, 0, torch.randperm(n, generator=generator)[:4]] += torch.tensor([0.02, 0.026, 0.03, 0.036])
    vis[0, 40:52] = 0.002 + 0.0035 * torch.arange(12)
    keys = torch.randn(1, n, 6, generator=generator)
    return Tokens(torch.randn(1, n, 8, generator=generator)), {"attention": vis, "similarity": sim, "keys": keys}


def outliers(score: Tensor, neighbours: int) -> Tensor:
    flagged = LocalOutlierFactor(n_neighbors=min(neighbours, len(score) - 1)).fit(score[:, None].double().numpy())
    return torch.from_numpy(flagged.negative_outlier_factor_ < -1.5)


def naive(
    x: Tensor, vis: Tensor, sim: Tensor, keys: Tensor, wrong_keys: bool = False
) -> tuple[Tensor, list[int], list[int], int]:
    """The published steps on one picture, both sides of outliers counted, in the published order; and what was kept, the centres,
    and how many of the kept are recovered."""
    n = len(vis)
    visual = vis.argsort(descending=True)[: max(1, int(outliers(vis, 20).sum()))].tolist()
    asked = sim.clone()
    asked[visual] = sim.min()
    k_t = int((n - len(visual)) * int(outliers(asked, 20).sum()) / n)
    recovered = [i for i in sim.argsort(descending=True).tolist() if i not in visual][:k_t]
    kept = sorted(visual + recovered)
    rest = [i for i in range(n) if i not in kept]
    many = int(len(kept) * int(outliers(vis[rest], 10).sum()) / len(rest))
    centres = sorted(rest, key=lambda i: -float(vis[i]))[:many]
    key = {i: keys[at if wrong_keys else i] for at, i in enumerate(rest)}
    rows = [x[i] for i in kept]
    for i in centres:
        near = {j: float(torch.cosine_similarity(key[i], key[j], dim=0) + 50 * sim[j]) for j in rest if j != i}
        rows.append(x[i] + sum(vis[j] * x[j] for j in sorted(near, key=lambda j: -near[j])[:32]))
    rows.append(sum(vis[j] * x[j] for j in rest if j not in centres))
    return torch.stack(rows), kept, centres, k_t


@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_published_computation(seed, own_keys):
    tokens, signals = picture(seed)
    step = get(NAME, upper_only=False, own_keys=own_keys).reduce(tokens, signals)
    x, vis, sim, keys = tokens.features[0], signals["attention"][0], signals["similarity"][0, 0], signals["keys"][0]
    rows, kept, centres, recovered = naive(x, vis, sim, keys, wrong_keys=not own_keys)
    assert recovered > 0 and centres
    left = [j for j in range(64) if j not in kept and j not in centres]
    extra = max(left, key=lambda j: (float(vis[j]), -j))
    where = {slot: number for number, slot in enumerate([*kept, *centres, extra])}
    assert step.index[0].tolist() == sorted(where)
    got = step.apply(tokens).features[0]
    torch.testing.assert_close(got, rows[[where[slot] for slot in sorted(where)]], atol=1e-5, rtol=1e-5)
    other = naive(x, vis, sim, keys, wrong_keys=own_keys)[0]
    assert not torch.allclose(got, other[[where[slot] for slot in sorted(where)]], atol=1e-4)


@pytest.mark.parametrize("keep", [None, 12, 0.3])
def test_kept_tokens_are_disjoint_from_merged_ones(keep):
    tokens, signals = picture(0)
    step = get(NAME, keep=keep).reduce(tokens, signals)
    matrix = step.dense[0]
    alone = (matrix > 0).sum(1) == 1
    own = matrix[alone].argmax(1)
    assert bool((step.index[0].diff() > 0).all()) and torch.equal(own, step.index[0][alone])
    assert not bool((matrix[~alone][:, own] > 0).any())
    rest = (matrix[~alone] > 0).any(0)
    assert int(alone.sum()) + int(rest.sum()) == 64 and int(alone.sum()) > 0


@pytest.mark.parametrize("seed", range(5))
def test_a_patch_the_question_is_about_is_recovered_however_little_attention_it_gets(seed):
    tokens, signals = picture(seed)
    planted = 20 + seed
    signals["attention"][0, planted] = 0.0
    signals["similarity"][0, 0, planted] = 768**-0.5  # the cosine is 1
    alone = {}
    for text in (None, False):
        step = get(NAME, text=text).reduce(tokens, signals)
        row = step.dense[0][step.index[0] == planted]
        alone[text] = bool(len(row)) and int((row > 0).sum()) == 1
    assert alone == {None: True, False: False}


@pytest.mark.parametrize("keep", [None, 7])
def test_constant_scores_keep_the_first_token_and_condense_the_rest(keep):
    n = 30
    signals = {"attention": torch.full((2, n), 1 / n), "keys": torch.ones(2, n, 4), "similarity": torch.zeros(2, 1, n)}
    tokens = Tokens(torch.randn(2, n, 3))
    step = get(NAME, keep=keep).reduce(tokens, signals)
    assert step.k == (2 if keep is None else 7)
    if keep is None:
        assert step.index.tolist() == [[0, 1]] * 2
        torch.testing.assert_close(step.apply(tokens).features[:, 1], tokens.features[:, 1:].sum(1) / n)


@pytest.mark.parametrize("n", [1, 2, 3, 12, 34])
@pytest.mark.parametrize("keep", [None, 2, 0.5])
def test_pictures_smaller_than_a_cluster_work(n, keep):
    generator = torch.Generator().manual_seed(n)
    signals = {"attention": torch.rand(2, n, generator=generator) ** 6, "keys": torch.randn(2, n, 4, generator=generator)}
    step = get(NAME, keep=keep, text=False).reduce(Tokens(torch.randn(2, n, 3)), signals)
    assert bool(step.apply(Tokens(torch.randn(2, n, 3))).features.isfinite().all()) and step.k >= 1
    if keep is not None:
        assert step.k == get(NAME, keep=keep).promise(n).count


def test_a_budget_is_shared_as_the_outliers_say():
    tokens, signals = picture(0)
    vis, sim = signals["attention"], signals["similarity"][:, 0]
    found = [int(part.sum()) for part in get(NAME, upper_only=False)._chosen(vis, sim, tokens)]
    assert found[0] > 3 and min(found[1:3]) > 0 and found[3] == 1
    assert 1 <= int(get(NAME)._chosen(vis, sim, tokens)[0].sum()) <= 3  # the low ones do not count
    for keep in (8, 15, 40):
        shares = [int(part.sum()) for part in get(NAME, upper_only=False, keep=keep)._chosen(vis, sim, tokens)]
        assert sum(shares) == keep and shares[3] == 1
        assert all(abs(share - part * (keep - 2) / sum(found[:3])) < 2 for share, part in zip(shares, found[:3], strict=False))
    assert [int(part.sum()) for part in get(NAME, keep=63, text=False)._chosen(vis, sim, tokens)][1] == 0


# -- in a model, with a text tower -------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of letters: begin, the text, end, padding with the end as CLIP's does."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = [[58, *[ord(letter) % 50 for letter in text][: max_length - 2], 59] for text in texts]
        ids = torch.tensor([row + [59] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


def clip(width: int = 32) -> transformers.CLIPModel:
    text = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": 16, "bos_token_id": 58, "eos_token_id": 59},
        vision_config=tiny.vision(hidden_size=width),
        projection_dim=12,
    )
    return tiny.ready(transformers.CLIPModel(config), seed=5)


CLIP = clip()
GUIDE = jeton.ClipText(CLIP, Words())


@torch.no_grad()
def by_hand(net, inputs, question: str, end: str, normed: bool) -> Tensor:
    """(pictures, N) similarity from the whole CLIP's own parts, the tower being the language model's."""
    hidden = net.model.vision_tower(inputs["pixel_values"]).last_hidden_state[:, 1:]
    hidden = CLIP.vision_model.post_layernorm(hidden) if normed else hidden
    patches = CLIP.visual_projection(hidden)
    words = Words()([question], "max_length", True, 16, "pt")
    read = CLIP.text_model(**words).last_hidden_state[0]
    at = int(words["attention_mask"].sum()) - 1 if end == "eos" else -1
    text = CLIP.text_projection(read[at])
    return torch.cosine_similarity(patches, text[None, None], dim=-1) / 12**0.5


def heard(net, inputs, method) -> dict[str, Tensor]:
    spy, decided = spied(method)
    got: dict[str, Tensor] = {}
    inner = spy.inner.reduce
    object.__setattr__(spy.inner, "reduce", lambda tokens, signals=None: (got.update(signals), inner(tokens, signals))[1])
    with apply(net, spy):
        tiny.run(net, inputs)
    assert decided
    return got


@pytest.mark.parametrize(("end", "normed"), [("eos", True), ("last", True), ("eos", False)])
def test_likeness_to_the_question_is_that_of_clip(end, normed):
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    got = heard(net, inputs, get(NAME, text=GUIDE, question="a red cat", end=end, post_norm=normed))["similarity"]
    torch.testing.assert_close(got[:, 0], by_hand(net, inputs, "a red cat", end, normed))
    for other in (("last" if end == "eos" else "eos", normed), (end, not normed)):
        assert not torch.allclose(got[:, 0], by_hand(net, inputs, "a red cat", *other), atol=1e-3)


def test_every_image_may_have_its_own_question():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    questions = ("a red cat", "how many", "where is it", "left or right")
    own = heard(net, inputs, get(NAME, text=GUIDE, question=questions))["similarity"]
    for image, question in enumerate(questions):
        torch.testing.assert_close(own[image, image], by_hand(net, inputs, question, "eos", True)[image])
    decided = []
    for asked in (questions, *questions):
        spy, made = spied(get(NAME, text=GUIDE, question=asked, keep=9))
        with apply(net, spy):
            tiny.run(net, inputs)
        decided.append(made[0].dense)
    assert all(torch.equal(decided[0][image], decided[1 + image][image]) for image in range(4))
    assert not torch.equal(decided[0][0], decided[2][0])
    with apply(net, NAME, text=GUIDE, question=questions[:3]), pytest.raises(ValueError, match="3 questions for 4 images"):
        tiny.run(net, inputs)


def test_crops_are_compared_with_their_images_question():
    net = tiny.model(NEXT)
    inputs = tiny.inputs_for(net)
    one = heard(net, inputs, get(NAME, text=GUIDE, question="how many"))["similarity"]
    many = heard(net, inputs, get(NAME, text=GUIDE, question=("a", "b", "how many", "c")))["similarity"]
    torch.testing.assert_close(one[2, 0], many[2, 2])
    with apply(net, NAME, text=GUIDE, question="how many", keep=20) as run:
        tiny.run(net, inputs)
        assert [image.after for image in run.report().images] == [20] * 4


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saliency_and_keys_are_those_of_one_wide_head_of_the_last_block(attention):
    net = tiny.model(LLAVA, attention)
    inputs = tiny.inputs_for(net)
    got = heard(net, inputs, get(NAME, text=False))
    states = net.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layer = net.model.vision_tower.encoder.layers[-1] if hasattr(net.model.vision_tower, "encoder") else None
    layer = layer if layer is not None else net.model.vision_tower.vision_model.encoder.layers[-1]

    def one_head(hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = layer.layer_norm1(hidden)
        q, k = layer.self_attn.q_proj(x), layer.self_attn.k_proj(x)
        return ((q[:, :1] @ k.mT)[:, 0] / 32**0.5).softmax(-1)[:, 1:], k[:, 1:]

    vis, keys = one_head(states[-2])  # the last block reads the very features that the model hands on
    torch.testing.assert_close(got["attention"][:, 0], vis)
    torch.testing.assert_close(got["keys"], keys)
    assert not torch.allclose(vis, one_head(states[-3])[0], atol=1e-3)


def test_an_encoder_alone_may_be_asked_too():
    net = tiny.model("CLIPVisionModel")
    with apply(net, NAME, text=GUIDE, question="what", keep=10) as run:
        tiny.run(net, tiny.inputs_for(net))
        assert run.tokens.count().tolist() == [11] * 3
    assert get(NAME, text=False).needs() == {
        "attention": ClassAttention(joined=True, last=True),
        "keys": Keys(joined=True, last=True),
    }


def test_generation_is_guided_too():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    with apply(net, NAME, text=GUIDE, question="a red cat", keep=9) as run:
        net.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert [image.after for image in run.report().images] == [9] * 4


def test_without_a_fitting_text_tower_it_is_refused_with_a_way_out():
    net = tiny.model(LLAVA)
    with pytest.raises(jeton.Unsupported, match=r"jeton.ClipText\(clip, tokenizer\).*text=False"):
        apply(net, NAME)
    with pytest.raises(jeton.Unsupported, match=r"width 32.*16 wide.*text=False"):
        apply(net, NAME, text=jeton.ClipText(clip(16), Words()), question="what")
    with pytest.raises(ValueError, match="what is asked"):
        get(NAME, text=GUIDE)
    with pytest.raises(ValueError, match="names no text tower"):
        get(NAME, text=True)
    with pytest.raises(TypeError, match="whole CLIPModel"):
        jeton.ClipText(net, Words())
    need = get(NAME, text=GUIDE, question="what").needs()["similarity"]
    assert need == TextSimilarity(None, GUIDE, ("what",))


@pytest.mark.parametrize(
    ("fields", "words"), [({"end": "first"}, "end"), ({"neighbours": 0}, "neighbours"), ({"cluster": 1.5}, "cluster")]
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get(NAME, **fields)
