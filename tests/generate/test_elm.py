import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jeton.generate.elm import ELM
from jeton.ops.sampling import cfg, cfg_schedule, mask_schedule, sample_logits


def small(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {"tokens": 12, "codes": 8, "subcodes": 2, "classes": 3, "width": 32, "depth": 2, "heads": 2, "grid": (3, 4)}
    model = ELM(**{**fields, **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def drawn(model, b=2, seed=1):
    shape = (b, model.tokens, model.subcodes)
    return torch.randint(model.codes, shape, generator=torch.Generator().manual_seed(seed))


class TestSchedules:
    def test_by_hand(self):
        def all_of(kind):
            return [cfg_schedule(kind, 3.0, i, 4) for i in range(4)]

        assert all_of("linear") == pytest.approx([1.5, 2, 2.5, 3])
        assert all_of("square_root") == pytest.approx([1, 2, 2.414, 2.732], abs=1e-3)
        assert all_of("const") == [3, 3, 3, 3]
        assert all_of("square") == pytest.approx([1.125, 1.5, 2.125, 3])
        assert all_of("cos") == pytest.approx([1 + 2 * math.sin(math.pi * r / 8) for r in (1, 2, 3, 4)])
        assert all_of("log")[-1] == pytest.approx(3) and all_of("log")[0] == pytest.approx(
            1 + 2 * math.log1p((math.e - 1) / 4) / math.log1p(math.e - 1)
        )
        with pytest.raises(ValueError, match="no guidance schedule"):
            cfg_schedule("steep", 3.0, 0, 4)

    def test_guidance_of_one_is_none(self):
        a, b = torch.randn(2, 5), torch.randn(2, 5)
        assert torch.allclose(cfg(a, b, 1.0), a) and torch.equal(cfg(a, b, 0.0), b)

    def test_every_token_is_filled_once(self):
        for kind in ("cosine", "arccos", "linear"):
            for steps in (1, 3, 8, 12):
                filled = mask_schedule(steps, 12, kind)
                assert sum(filled) == 12 and min(filled) >= 1 and len(filled) == steps
        assert mask_schedule(4, 256) == [20, 55, 84, 97]  # cosine: few at first
        assert mask_schedule(2, 12, "arccos") == [4, 8]

    def test_top_k_and_temperature(self):
        logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(4000, 4)
        g = torch.Generator().manual_seed(0)
        ids, p = sample_logits(logits, top_k=2, generator=g)
        assert set(ids.tolist()) == {2, 3} and (ids == 3).float().mean().item() == pytest.approx(0.731, abs=0.03)
        assert p[ids == 3][0].item() == pytest.approx(1 / (1 + math.exp(-1)))
        assert sample_logits(logits, temperature=0)[0].unique().tolist() == [3]
        assert (sample_logits(logits, temperature=100.0, generator=g)[0] == 0).float().mean().item() == pytest.approx(
            0.25, abs=0.03
        )


class TestModel:
    def test_a_position_sees_what_is_in_front_of_it_alone(self):
        model = small()
        ids, labels = drawn(model), torch.tensor([0, 1])
        other = ids.clone()
        other[:, 5] = (other[:, 5] + 1) % 8
        a, b = model(ids, labels), model(other, labels)
        assert a.shape == (2, 12, 2, 8)
        assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:], atol=1e-3)
        masked = small(mode="mlm")
        assert not torch.allclose(masked(ids, labels)[:, :5], masked(other, labels)[:, :5], atol=1e-3)

    def test_one_subcode_is_a_plain_language_model(self):
        model = small(subcodes=1, grid=None)
        config = LlamaConfig(
            vocab_size=12, hidden_size=32, intermediate_size=model.body.config.intermediate_size, num_hidden_layers=2,
            num_attention_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False, pad_token_id=None,
        )  # fmt: skip
        plain = LlamaForCausalLM(config).eval()
        plain.model.embed_tokens.weight.data[:8] = model.embeddings[0].weight.data
        plain.model.embed_tokens.weight.data[8:] = model.labels.weight.data  # label y is word 8 + y
        plain.model.layers.load_state_dict(model.body.layers.state_dict())
        plain.model.norm.load_state_dict(model.body.norm.state_dict())
        plain.lm_head.weight.data[:8] = model.heads[0].weight.data
        ids, labels = drawn(model)[..., 0], torch.tensor([0, 2])
        words = torch.cat([labels[:, None] + 8, ids], 1)
        want = plain(words).logits[:, :-1, :8]
        assert torch.allclose(model(ids, labels)[:, :, 0], want, atol=1e-5)
        assert not torch.allclose(small(subcodes=1)(ids, labels)[:, :, 0], want, atol=1e-2)  # twin: the grid's rotation

    def test_the_rotation_depends_on_offsets_in_rows_and_columns_alone(self):
        model = small()
        cos, sin = model.body.rotary_emb(torch.zeros(1), torch.arange(13)[None])
        q, k = torch.randn(16), torch.randn(16)

        def turned(v, at):
            half = torch.cat([-v[8:], v[:8]])
            return v * cos[0, at] + half * sin[0, at]

        def logit(a, b):  # tokens (row, column) behind the class token
            return turned(q, 1 + a[0] * 4 + a[1]) @ turned(k, 1 + b[0] * 4 + b[1])

        assert torch.allclose(logit((0, 0), (1, 2)), logit((1, 1), (2, 3)), atol=1e-5)
        assert not torch.allclose(logit((0, 0), (1, 2)), logit((0, 0), (2, 1)), atol=1e-2)
        assert not torch.allclose(logit((0, 0), (1, 2)), logit((0, 0), (2, 2)), atol=1e-2)
        assert torch.equal(turned(q, 0), q)
        zero = small(class_rotation="zero").body.rotary_emb
        assert zero.cos[0].abs().sum() == 0 and zero.sin[0].abs().sum() == 0  # every logit to the class token is 0

    def test_the_loss_is_the_mean_over_positions_and_subcodes(self):
        model = small()
        ids, labels = drawn(model), torch.tensor([0, 1])
        p = model(ids, labels).log_softmax(-1).gather(-1, ids[..., None])
        assert model.loss(ids, labels).item() == pytest.approx(-p.mean().item(), rel=1e-5)
        fresh = ELM(12, 8, 2, 3, 32, 1, 2, (3, 4)).eval()  # heads begin at zero: every code is equally likely
        assert fresh.loss(ids, labels).item() == pytest.approx(math.log(8), rel=1e-5)

    def test_labels_are_dropped_in_training_alone(self):
        model = small(label_drop=1.0)
        ids = drawn(model)
        with_null = model.loss(ids, torch.tensor([3, 3])).item()
        assert model.loss(ids, torch.tensor([0, 1])).item() != pytest.approx(with_null, rel=1e-4)
        assert model.train().loss(ids, torch.tensor([0, 1])).item() == pytest.approx(with_null, rel=1e-5)

    def test_weights_survive_a_folder(self, tmp_path):
        model = small()
        model.save_pretrained(tmp_path)
        again = ELM.from_pretrained(tmp_path)
        ids, labels = drawn(model), torch.tensor([0, 1])
        assert torch.equal(again(ids, labels), model(ids, labels)) and again.grid == (3, 4)

    def test_presets(self):
        with torch.device("meta"):
            sizes = {name: sum(p.numel() for p in ELM.preset(name).parameters()) for name in ("B", "L", "XL")}
        for (name, found), (depth, width, inner) in zip(sizes.items(), ((12, 768, 2048), (24, 1024, 2816), (36, 1280, 3584))):
            block = 4 * width**2 + 3 * width * inner + 2 * width
            tables = 2 * 1024 * width * 2 + 2 * width**2 + 1001 * width
            assert found == depth * block + width + tables, name
        with pytest.raises(ValueError, match="no preset"):
            ELM.preset("XS")

    def test_what_cannot_be_is_refused(self):
        for change, match in (
            ({"grid": (4, 4)}, "has not 12 tokens"),
            ({"mode": "x"}, "mode must"),
            ({"heads": 3}, "multiple of 12"),
        ):
            with pytest.raises(ValueError, match=match):
                small(**change)
        with pytest.raises(ValueError, match="2 sub-codes"):
            small()(torch.zeros(1, 12, 3, dtype=torch.long), torch.tensor([0]))


class TestGeneration:
    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_with_the_cache_is_as_without(self, scale):
        model, labels = small(), torch.tensor([0, 2, 1])
        found = model.generate(labels, scale, temperature=0)
        ids = torch.zeros(3, 12, 2, dtype=torch.long)
        for i in range(12):
            logits = model(ids, labels)[:, i]
            if scale != 1:
                logits = cfg(logits, model(ids, torch.full((3,), 3))[:, i], cfg_schedule("linear", scale, i, 12))
            ids[:, i] = logits.argmax(-1)
        assert torch.equal(found, ids)

    @pytest.mark.parametrize("mode", ["ar", "mlm"])
    def test_a_seed_decides(self, mode):
        model, labels = small(mode=mode), torch.tensor([0, 2])
        torch.manual_seed(5)
        first = model.generate(labels, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(6)
        assert torch.equal(first, model.generate(labels, generator=torch.Generator().manual_seed(0)))
        assert not torch.equal(first, model.generate(labels, generator=torch.Generator().manual_seed(1)))
        assert first.shape == (2, 12, 2) and first.min() >= 0 and first.max() < 8

    @pytest.mark.parametrize("mode", ["ar", "mlm"])
    def test_what_is_fixed_stays(self, mode):
        model, labels = small(mode=mode), torch.tensor([0, 2])
        known, fixed = drawn(model), torch.rand(2, 12) < 0.5
        made = model.generate(labels, known=known, fixed=fixed)
        assert torch.equal(made[fixed], known[fixed]) and not torch.equal(made, known) and made.max() < 8

    def test_images_grow_beyond_the_grid(self):
        model, labels = small(tokens=16, grid=(4, 4)), torch.tensor([0, 1])
        ids = model.generate(labels).view(2, 4, 4, 2)
        tall = model.expand(ids, labels, by=5, overlap=2)
        wide = model.expand(ids, labels, by=3, overlap=1, axis="columns")
        assert tall.shape == (2, 9, 4, 2) and torch.equal(tall[:, :4], ids)
        assert wide.shape == (2, 4, 7, 2) and torch.equal(wide[:, :, :4], ids)
        low = small()
        assert low.expand(low.generate(labels).view(2, 3, 4, 2), labels, by=4, overlap=3, axis="columns").shape == (2, 3, 8, 2)
        with pytest.raises(ValueError, match="overlap be 1 to 3"):
            model.expand(ids, labels, by=1, overlap=4)
        greedy = model.expand(ids, labels, by=2, overlap=2, temperature=0)
        other = model.expand(torch.cat([ids[:, :2] * 0, ids[:, 2:]], 1), labels, by=2, overlap=2, temperature=0)
        assert torch.equal(greedy[:, 4:], other[:, 4:])  # nothing in front of the overlap matters

    def test_masked_training_learns_hidden_ids_alone(self):
        torch.manual_seed(0)
        model, ids, labels = small(mode="mlm").train(), None, torch.tensor([0, 1])
        ids = drawn(model)
        model.loss(ids, labels).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        hidden = model._hide(torch.zeros(500, 12, 2, dtype=torch.long))
        assert hidden.sum(1).min() >= 1 and hidden.sum(1).float().mean().item() == pytest.approx(12 * 2 / math.pi + 0.5, abs=0.4)
        some = torch.arange(12).expand(2, -1) % 3 == 0
        model.eval()._hide = lambda ids: some
        each = model(ids.masked_fill(some[..., None], 8), labels).log_softmax(-1).gather(-1, ids[..., None])[some]
        assert model.loss(ids, labels).item() == pytest.approx(-each.mean().item(), rel=1e-5)


def test_locality_sums_attention_by_distance():
    model = small()
    ids, labels = drawn(model), torch.tensor([0, 1])
    found = model.locality(ids, labels)
    assert found.shape == (2, 4) and (found >= 0).all() and (found.sum(1) < 1).all()
    assert model.body.config._attn_implementation == "sdpa"
    near = small()
    for layer in near.body.layers:
        layer.self_attn.q_proj.weight.data.zero_()  # attention is even over what is in front
    rows, cols = torch.arange(12) // 4, torch.arange(12) % 4
    far = ((rows[:, None] - rows) ** 2 + (cols[:, None] - cols) ** 2).double().sqrt().long()
    want = torch.zeros(4)
    for i in range(12):
        for j in range(i + 1):
            want[far[i, j]] += 1 / (i + 2) / 12
    assert torch.allclose(near.locality(ids, labels)[0], want, atol=1e-5)


@pytest.mark.slow
def test_digits_are_generated_as_their_class():
    """Of 20 draws a class 87.5% were judged to be it, 6.5% with shuffled labels. That image codes are nearer to uniform than
    words, as the study finds on ImageNet, does not hold here: digits have blank corners (KL 2.15 nats, BPE text 0.54)."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    from jeton.tokenizers.binary_autoencoder import BinaryAutoencoder

    data, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(data).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    judge = SVC(gamma="scale").fit(data[:600] / 16, labels[:600])  # on pictures the generator never saw
    images, labels = images[600:], labels[600:]

    def trained(module, steps, rate, loss):
        optimizer = torch.optim.AdamW(module.train().parameters(), rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for step in range(steps):
            batch = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return module.eval()

    torch.manual_seed(0)
    bae = BinaryAutoencoder(bits=8, subcodes=2, channels=1, width=16, multipliers=(1, 2), blocks=1, code_dim=32, spread=0.1)
    trained(bae, 350, 4e-3, lambda batch: sum(bae.losses(images[batch]).values()))
    with torch.no_grad():
        ids = bae.encode(images).ids
        rebuilt = (bae.decode(ids) - images).square().mean() / images.var()

    def generator(given):
        torch.manual_seed(0)
        elm = ELM(tokens=16, codes=16, subcodes=2, classes=10, width=48, depth=2, heads=3, grid=(4, 4))
        return trained(elm, 400, 5e-3, lambda batch: elm.loss(ids[batch], given[batch]))

    wanted = torch.arange(10).repeat_interleave(20)
    found = {}
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    for name, given in (("labels", labels), ("shuffled", shuffled)):
        elm = generator(given)
        made = elm.generate(wanted, scale=2.0, top_k=None, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            drawn = bae.decode(made).clamp(0, 1).flatten(1)
        found[name] = (judge.predict(drawn.numpy()) == wanted.numpy()).mean()
        if name == "labels":
            with torch.no_grad():
                greedy = bae.decode(elm.generate(wanted, scale=2.0, temperature=0)).clamp(0, 1).flatten(1)
            spread = [np.mean([torch.pdist(part).mean().item() for part in each.split(20)]) for each in (drawn, greedy)]

    assert rebuilt < 0.2
    assert found["labels"] >= 0.7 and found["shuffled"] < 0.25
    assert spread[1] < 0.5 * spread[0]
