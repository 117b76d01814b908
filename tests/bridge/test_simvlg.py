"""SimVLG: counts, the connector against transformers' BERT, the untouched class token, frames by hand, and that it learns."""

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel

import tiny
from jeton import bridge
from jeton.bridge.simvlg import Contrast, SimVLG, captioned, loss

SMALL = {"width": 32, "heads": 4, "mlp": 48, "dropout": 0.0}


def config(side=8):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=4, image_size=side * 4, patch_size=4
    )
    text = transformers.LlamaConfig(hidden_size=24, num_attention_heads=4, num_hidden_layers=1)
    return transformers.LlavaConfig(vision_config=vision, text_config=text)


def connector(side=8, seed=0, **options):
    made = SimVLG(config(side), **{"merge": 8, "depth": 3, **SMALL, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name.lower():
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return made.eval()


def attached(**options):
    model = bridge.attach(tiny.tiny_llava(side=8), "simvlg", **{"merge": 8, "depth": 3, **SMALL, **options})
    model.bridge.load_state_dict(connector_state(model.bridge))
    return model.eval()


def connector_state(made, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value if "norm" in name.lower() else 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in made.state_dict().items()
    }


def test_the_published_counts():
    with torch.device("meta"):
        made = SimVLG(config(side=16))
    assert made.counts == [257 - 19 * layer for layer in range(13)] and made.tokens == 29


@torch.no_grad()
def test_every_layer_hands_on_what_its_count_says():
    made, seen = connector(), []
    for layer in made.connector:
        layer.intermediate.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    assert made(torch.randn(2, 65, 32)).shape == (2, 41, 24)
    assert seen == made.counts[1:] == [57, 49, 41]


@torch.no_grad()
def test_without_merging_it_is_a_bert():
    """transformers' own BERT with the same weights, given the projected features; and merging is what makes it another."""
    torch.manual_seed(0)
    told = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=5)
    bert = BertModel(told).eval()
    for weight in bert.parameters():
        weight.normal_(std=0.2)
    x = torch.randn(2, 65, 32)
    for merge, same in ((0, True), (8, False)):
        made = connector(merge=merge)
        made.start_from(bert)
        out, expected = made.connect(x), bert(inputs_embeds=made.into(x)).last_hidden_state
        assert out.shape[1] == 65 - 3 * merge
        assert torch.allclose(out[:, 0], expected[:, 0], atol=1e-5) == same
        if same:
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_tokens_are_plain_means_behind_the_norm():
    """One layer, two equal patches at an odd and an even place: they are the pair that merges, whatever they weigh."""
    made = connector(merge=1, depth=1)
    x = torch.randn(1, 65, 32)
    seen = []
    made.connector[0].attention.output.register_forward_hook(lambda module, args, output: seen.append(output))
    made.connector[0].intermediate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made.positions.weight.zero_()
    x[:, 6] = x[:, 3]
    made(x)
    before, after = seen
    changed = [n for n in range(64) if not (before[0] == after[0, n]).all(1).any()]
    assert len(changed) <= 1 and after.shape[1] == 64
    torch.testing.assert_close(before[:, 6], before[:, 3])  # equal tokens leave attention equal: their mean is both
    others = [n for n in range(65) if n not in (3, 6)]
    assert all((after[0] == before[0, n]).all(1).any() for n in others)


@torch.no_grad()
def test_the_class_token_never_merges():
    """With values that are zero, attention tells it nothing: it is what the unmerged network makes of it."""
    merging, plain = connector(), connector(merge=0)
    plain.load_state_dict(merging.state_dict())
    for made in (merging, plain):
        for layer in made.connector:
            layer.attention.self.value.weight.zero_()
            layer.attention.self.value.bias.zero_()
    x = torch.randn(2, 65, 32)
    torch.testing.assert_close(merging(x)[:, 0], plain(x)[:, 0])
    assert not torch.allclose(merging(x)[:, 5], plain(x)[:, 5], atol=1e-3)


def test_only_the_connector_is_trained():
    model = attached().train()
    model.bridge.freeze(model)
    inputs = tiny.prompts(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    reached = {name.split(".")[1] for name, weight in model.named_parameters() if weight.grad is not None}
    assert reached == {"multi_modal_projector"}
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.bridge.parameters())


# -- videos ------------------------------------------------------------------------------------------------------------------


def video(frames, share):
    model = attached(frames=frames)
    with torch.no_grad():
        for part in model.bridge.temporal:
            part.share.fill_(share)
    return model


@torch.no_grad()
def test_with_a_share_of_zero_a_video_is_the_mean_of_its_frames():
    model, plain = video(4, 0.0), attached()
    plain.bridge.load_state_dict({k: v for k, v in model.bridge.state_dict().items() if "temporal" not in k})
    pixels = torch.randn(8, 3, 32, 32)
    features = plain.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    expected = plain.bridge(features.unflatten(0, (2, 4)).mean(1))
    assert torch.equal(torch.stack(model.model.get_image_features(pixels, return_dict=True).pooler_output), expected)
    other = video(4, 0.5).model.get_image_features(pixels, return_dict=True).pooler_output
    assert not torch.allclose(torch.stack(list(other)), expected, atol=1e-3)


@torch.no_grad()
def test_frames_see_each_other_at_the_same_place_by_hand():
    """Products of 32 queries and keys in each of 8 heads are scaled by the root of all 256."""
    part = video(3, 0.5).bridge.temporal[0]
    x = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(1))
    expected = torch.empty_like(x)
    for picture in range(6):
        mates = x[picture // 3 * 3 : picture // 3 * 3 + 3]
        for place in range(5):
            for head in range(8):
                wide, own = slice(32 * head, 32 * head + 32), slice(4 * head, 4 * head + 4)
                q, k = part.query(x[picture, place])[wide], part.key(mates[:, place])[:, wide]
                expected[picture, place, own] = 0.5 * (k @ q / 16).softmax(0) @ mates[:, place, own]
    torch.testing.assert_close(part(x, 3), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_equal_frames_are_their_own_mean():
    """T(x) = x where all frames are equal: one block then makes (1 + a) x + mlp(norm((1 + a) x)) of its attention's residual."""
    model = video(3, 0.5)
    block = model.model.vision_tower.encoder.layers[0]
    x = torch.randn(1, 65, 32).expand(3, -1, -1)
    torch.testing.assert_close(model.bridge.temporal[0](x, 3), 0.5 * x, atol=1e-5, rtol=1e-5)
    half = x + block.self_attn(block.layer_norm1(x))[0]
    grown = 1.5 * half
    norm = torch.nn.functional.layer_norm(grown, (32,), block.layer_norm2.weight, block.layer_norm2.bias, block.layer_norm2.eps)
    mlp = block.mlp.fc2(block.mlp.activation_fn(block.mlp.fc1(norm)))
    torch.testing.assert_close(block(x, None), grown + mlp, atol=1e-4, rtol=1e-4)


def test_at_first_only_the_shares_of_frames_get_a_gradient():
    model = video(4, 0.0).train()
    torch.stack(
        model.model.get_image_features(torch.randn(4, 3, 32, 32), return_dict=True).pooler_output
    ).square().sum().backward()
    part = model.bridge.temporal[0]
    assert part.share.grad.abs() > 0 and not part.query.weight.grad.any()


@torch.no_grad()
def test_a_video_answers_and_is_saved(tmp_path):
    model = video(2, 0.3)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[11, *[tiny.IMAGE] * model.bridge.tokens, 12, 13]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32)}
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2


# -- learning ----------------------------------------------------------------------------------------------------------------


NEWLINE = 95  # the tiny model can never say the ids below its words


class Words:
    """A tokenizer of numbers."""

    pad_token_id = tiny.PAD

    def __call__(self, texts, add_special_tokens=False):
        found = type("Found", (), {})()
        found.input_ids = [[NEWLINE if part == "\n" else tiny.WORDS + int(part) for part in text.split(" ")] for text in texts]
        return found


def test_captions_are_what_the_loss_is_over():
    model = attached()
    inputs = captioned(model, Words(), ["1 2 ", "3 4 5 "])
    assert inputs["input_ids"].shape == (2, 41 + 4)
    assert inputs["labels"][:, 41:].tolist() == [[11, 12, NEWLINE, -100], [13, 14, 15, NEWLINE]]
    assert (inputs["labels"][:, :41] == -100).all() and inputs["attention_mask"].sum(1).tolist() == [44, 45]


def test_the_contrastive_term_pulls_pairs_together():
    model, text = attached(), torch.eye(3, 8)
    inputs = {**captioned(model, Words(), ["1 ", "2 ", "3 "]), "pixel_values": torch.randn(3, 3, 32, 32)}
    assert set(loss(model, inputs)) == {"caption"}
    with pytest.raises(ValueError, match="text embeddings"):
        loss(model, inputs, beta=0.5)
    contrast = Contrast(32, 8, 16)
    both = loss(model, inputs, contrast, text, beta=0.5)
    first = model.bridge.connect(model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2])
    assert torch.allclose(both["contrast"], 0.5 * contrast(first[:, 0], text), atol=1e-5)
    perfect = Contrast(4, 4, 4)
    with torch.no_grad():
        for part in (perfect.visual, perfect.text):
            part.weight.copy_(torch.eye(4))
            part.bias.zero_()
    assert perfect(torch.eye(4), torch.eye(4)) < perfect(torch.eye(4), torch.eye(4).flip(0)) - 1


@pytest.mark.slow
def test_captions_of_64_pictures_are_learned():
    """Eight patterns on the left half times eight on the right, named by two words. Encoder and language model are frozen and
    random: all that is learned is in the connector."""
    torch.manual_seed(0)
    model = bridge.attach(tiny.tiny_llava(side=8), "simvlg", merge=8, depth=2, **SMALL).train()
    model.bridge.freeze(model)
    draw = torch.Generator().manual_seed(1)
    left, right = torch.arange(64) // 8, torch.arange(64) % 8
    patterns = torch.randn(8, 3, 4, 4, generator=draw).tile(1, 1, 8, 4)
    pixels = torch.cat([patterns[left], patterns[right]], 3)
    texts = [f"{a} {b + 8} " for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    inputs = {**captioned(model, Words(), texts), "pixel_values": pixels}
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=3e-3, weight_decay=0.0)
    history = []
    for _ in range(490):
        rows = torch.randperm(64, generator=draw)[:32]
        value = loss(model, {name: each[rows] for name, each in inputs.items()})["caption"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
        if value < 0.2 * history[0]:
            break
    assert history[-1] < 0.2 * history[0], history[::50]
