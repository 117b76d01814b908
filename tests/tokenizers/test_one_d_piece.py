import pytest
import torch
from torch import nn

from jeton.quantizers import VQ
from jeton.tokenizers._common import LatentEncoder, draw_length, unpatchify
from jeton.tokenizers._losses import Adversary, RandomFeatures
from jeton.tokenizers.one_d_piece import SIZES, OneDPiece, SecondStage


def small(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {"image_size": 16, "patch_size": 4, "tokens": 8, "width": 32, "depth": 2, "heads": 2, "codebook_size": 32}
    model = OneDPiece(**{**fields, "code_dim": 6, "target": "pixels", **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


class Frozen(nn.Module):
    """A tokenizer of patches: the nearest of 24 codes, and a linear map back to pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.vq, self.to_pixels = VQ(48, 24), nn.Linear(48, 48)
        nn.init.normal_(self.vq.codebook)

    @property
    def codebook(self):
        return self.vq.codebook

    def encode(self, images):
        patches = nn.functional.unfold(images, 4, stride=4).mT
        return self.vq.encode(patches)

    def decode(self, codes):
        return unpatchify(self.to_pixels(codes), 4)


@torch.no_grad()
def test_any_prefix_is_a_picture():
    model, images = small(), torch.rand(3, 3, 16, 16)
    out = model.encode(images)
    assert out.ids.shape == (3, 8) and out.z_q.shape == (3, 8, 6)
    assert torch.equal(model.decode(out.ids, 8), model.decode(out.ids))
    assert torch.equal(model.decode(out.ids), model.draw(model.predict(out.z_q)))
    assert not torch.allclose(model.decode(out.ids.flip(1)), model.decode(out.ids), atol=1e-3)  # each code has its own place
    for k in (1, 3, 7):
        assert torch.equal(model.decode(out.ids, k), model.decode(out.ids[:, :k]))
        assert not torch.allclose(model.decode(out.ids, k), model.decode(out.ids), atol=1e-3)


@torch.no_grad()
def test_rows_of_different_lengths_are_as_alone():
    model, images = small(), torch.rand(3, 3, 16, 16)
    ids = model.encode(images).ids
    found = model.decode(ids, torch.tensor([1, 8, 4]))
    for row, k in enumerate((1, 8, 4)):
        assert torch.allclose(found[row], model.decode(ids[row : row + 1, :k])[0], atol=1e-5)
    assert torch.allclose(model.encode(images[1:2]).z_q, model.encode(images).z_q[1:2], atol=1e-5)


def test_the_tail_is_dropped_uniformly_in_training_and_never_in_eval():
    model, seen = small(levels=[5, 5]).train(), []
    model.encoder.forward = lambda images: torch.zeros(1, 8, 2)  # what is counted is what comes after it
    model.decoder.forward = lambda codes, length=None: seen.append(codes.shape[1]) or torch.zeros(1, 16, 48)
    image = torch.zeros(1, 3, 16, 16)
    torch.manual_seed(0)
    for _ in range(5000):
        model(image)
    counts = torch.bincount(torch.tensor(seen), minlength=9)[1:]
    assert ((counts - 625) ** 2 / 625).sum() < 24.3  # chi-square with 7 degrees of freedom: 1 in 1000
    seen.clear()
    model.eval()
    for _ in range(50):
        model(image)
    assert set(seen) == {8}
    rows = draw_length(8, 5000)
    assert rows.min() == 1 and rows.max() == 8 and ((torch.bincount(rows)[1:] - 625) ** 2 / 625).sum() < 24.3


def test_a_length_for_each_row_when_asked():
    torch.manual_seed(0)
    model, images = small(drop="row").train(), torch.rand(6, 3, 16, 16)
    found = model(images)
    assert found.length.shape == (6,) and len(set(found.length.tolist())) > 1 and torch.equal(found.tokens.length, found.length)
    assert torch.equal(small(drop=None).train()(images).prediction, small(drop=None)(images, 8).prediction)


def test_presets_have_the_parameters_of_the_paper():
    for size, (width, depth, _) in SIZES.items():
        with torch.device("meta"):
            model = OneDPiece.preset(size)
        block = 12 * width**2 + 13 * width
        sides = 2 * (depth * block + 257 * width + 256 * width + width + 4 * width)  # blocks, positions, class token, norms
        encoder = 3 * 256 * width + width + 256 * width + 12 * width + 12  # patches, queries, down
        decoder = 12 * width + width + width + 2 * width**2 + 2 * width + 2 * width * 1024 + 1024  # up, mask token, head
        assert sum(p.numel() for p in model.parameters()) == sides + encoder + decoder + 4096 * 12
        assert model.tokens == 256 and model.bytes(256) == 384 and model.bytes(32) == 48
    with pytest.raises(ValueError, match="no preset"):
        OneDPiece.preset("XL")


def test_legacy_reshape_mixes_the_latents():
    torch.manual_seed(0)
    plain = LatentEncoder(8, 4, 4, 8, 1, 2, 8)
    legacy = LatentEncoder(8, 4, 4, 8, 1, 2, 8, legacy_reshape=True)
    legacy.load_state_dict(plain.state_dict())
    for encoder in (plain, legacy):
        encoder.down = nn.Identity()
        encoder.after = nn.Identity()
        encoder.blocks.forward = lambda x, mask=None: torch.arange(-5.0, 4.0)[None, :, None].expand(1, 9, 8)  # latent i is i
    image = torch.rand(1, 3, 8, 8)
    assert plain(image)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert legacy(image)[0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@torch.no_grad()
def test_causal_queries_see_the_picture_and_the_queries_before_them():
    torch.manual_seed(0)
    encoder = LatentEncoder(16, 4, 6, 32, 2, 2, 4, causal=True).eval()
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    images = torch.rand(2, 3, 16, 16)
    before = encoder(images)
    encoder.queries.data[3] = torch.randn(32)
    after = encoder(images)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6) and not torch.allclose(before[:, 3:], after[:, 3:], atol=1e-3)


class TestCodes:
    def model(self):
        model = small(target="codes", target_codes=24)
        model.pixel_codes = Frozen().eval().requires_grad_(False)
        return model

    def test_it_learns_the_frozen_ids(self):
        model, images = self.model().train(), torch.rand(8, 3, 16, 16)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        first = model.first_stage(images)
        assert set(first) == {"codes", "codebook", "commitment"}
        for _ in range(25):
            loss = sum(model.first_stage(images).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        assert model.first_stage(images)["codes"] < 0.9 * first["codes"]

    @torch.no_grad()
    def test_pixels_are_those_of_the_expected_code(self):
        model, images = self.model(), torch.rand(2, 3, 16, 16)
        ids = model.encode(images).ids
        p = model.predict(model.quantizer.decode(ids)).softmax(-1)
        assert torch.allclose(model.decode(ids), model.pixel_codes.decode(p @ model.pixel_codes.codebook))

    def test_without_the_frozen_tokenizer_it_says_what_to_do(self):
        model = small(target="codes", target_codes=24)
        no_ids, no_images = torch.zeros(1, 8, dtype=torch.long), torch.rand(1, 3, 16, 16)
        for call in (lambda: model.decode(no_ids), lambda: model.first_stage(no_images)):
            with pytest.raises(ValueError, match=r"set model\.pixel_codes"):
                call()

    def test_the_second_stage_trains_the_decoder_alone(self):
        stage = SecondStage(self.model(), RandomFeatures(), Adversary(width=8, levels=2, begin=0)).train()
        images = torch.rand(4, 3, 16, 16)
        found = stage.losses(images)
        assert set(found) == {"pixels", "perceptual", "adversarial", "discriminator"}
        sum(found.values()).backward()
        grads = {name: p.grad for name, p in stage.named_parameters()}
        assert all(g is None for name, g in grads.items() if name.startswith(("model.encoder", "model.quantizer", "model.pixel")))
        assert grads["model.decoder.up.weight"].abs().sum() > 0 and grads["adversary.judge.0.weight"].abs().sum() > 0


class TestAdversary:
    def test_losses_by_hand_and_who_learns_from_which(self):
        adversary = Adversary(1, 4, 1, begin=0, weight=0.5, lecam=0.0).train()
        real, fake = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8, requires_grad=True)
        found = adversary(real, fake)
        d_real, d_fake = adversary.judge(real), adversary.judge(fake)
        assert found["adversarial"].item() == pytest.approx(-0.5 * d_fake.mean().item(), rel=1e-5)
        hinge = (1 - d_real).relu().mean() + (1 + d_fake).relu().mean()
        assert found["discriminator"].item() == pytest.approx(hinge.item(), rel=1e-5)
        assert torch.autograd.grad(found["discriminator"], fake, allow_unused=True, retain_graph=True)[0] is None
        weight = adversary.judge[0].weight
        assert torch.autograd.grad(found["adversarial"], weight, allow_unused=True, retain_graph=True)[0] is None
        assert torch.autograd.grad(found["adversarial"], fake)[0].abs().sum() > 0

    def test_it_begins_at_its_step_and_lecam_pulls_to_running_means(self):
        torch.manual_seed(0)
        adversary = Adversary(1, 4, 1, begin=2, lecam=1.0, decay=0.5).train()
        real, fake = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
        for _ in range(2):
            assert all(value == 0 for value in adversary(real, fake).values())
        assert adversary.means.abs().sum() == 0
        adversary(real, fake)
        want = torch.stack([adversary.judge(real).mean(), adversary.judge(fake).mean()]) / 2
        assert torch.allclose(adversary.means, want)
        d_real, d_fake = adversary.judge(real), adversary.judge(fake)
        lecam = (d_real - want[1]).relu().square().mean() + (want[0] - d_fake).relu().square().mean()
        found = adversary.eval()(real, fake)["discriminator"]
        assert found.item() == pytest.approx(((1 - d_real).relu().mean() + (1 + d_fake).relu().mean() + lecam).item(), rel=1e-5)


def test_batch_norm_leaves_no_number_the_same_for_all_pictures():
    torch.manual_seed(0)
    images = torch.rand(32, 3, 16, 16)
    plain, model = small(levels=[8, 5]).train(), small(levels=[8, 5], batch_norm=True).train()
    z = model.encode(images).z_e
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().max() < 1e-3
    assert plain.encode(images).z_e.std(0).min() < 0.5
    model.eval()
    assert torch.allclose(model.encode(images[:1]).z_e, model.encode(images).z_e[:1], atol=1e-5)


def test_a_frozen_encoder_keeps_its_running_means():
    torch.manual_seed(0)
    model, images = small(levels=[8, 5], batch_norm=True), torch.rand(8, 3, 16, 16)
    stage = SecondStage(model, RandomFeatures(), None).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    stage.losses(images)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert model.decoder.training and not model.encoder.training
    model.requires_grad_(True)
    stage.train().losses(images)
    assert not torch.equal(model.encoder.norm.running_mean, before["norm.running_mean"])


def blobs(count, seed, side=16):
    """(count, 3, side, side): three round spots of random places, widths and colours on black."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 3, 2, 1, 1, generator=draw) * side
    width = 1.5 + 2 * torch.rand(count, 3, 1, 1, generator=draw)
    colour = torch.rand(count, 3, 3, 1, 1, generator=draw)
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    far = (x - centre[:, :, 0]) ** 2 + (y - centre[:, :, 1]) ** 2
    return ((-far / (2 * width**2)).exp()[:, :, None] * colour).sum(1).clamp(max=1)


@pytest.mark.slow
def test_trained_with_the_tail_dropped_the_first_tokens_say_most():
    pytest.importorskip("accelerate")
    from jeton.train import Recipe, train

    held_out, errors = blobs(512, seed=0), {}
    for drop in ("batch", None):
        torch.manual_seed(0)
        fields = {"width": 64, "depth": 2, "heads": 4, "levels": [8, 5, 5, 5], "target": "pixels"}
        model = OneDPiece(16, 4, 16, drop=drop, init_std=0.07, batch_norm=True, **fields)
        train(model, lambda step: blobs(64, step + 1), OneDPiece.first_stage, Recipe(1000, 3e-3), progress=False)
        model.eval()
        with torch.no_grad():
            ids = model.encode(held_out).ids
            pictures = {k: model.decode(ids, k) for k in (1, 4, 8, 16)} | {"last": model.decode(ids[:, -1:])}
        errors[drop] = {k: ((x - held_out).square().mean() / held_out.var()).item() for k, x in pictures.items()}
    dropped, whole = errors["batch"], errors[None]
    assert dropped[16] < 0.5 and whole[16] < 0.5  # both have learned to draw
    assert dropped[1] > dropped[4] > dropped[8] > dropped[16]
    assert dropped[4] < whole[4] / 2
    assert dropped["last"] > dropped[1]


def test_weights_survive_a_folder(tmp_path):
    model, images = small(levels=[8, 5]), torch.rand(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    again = OneDPiece.from_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists() and torch.equal(again.encode(images).ids, model.encode(images).ids)
    assert again.codebook_size == 40


def test_what_cannot_be_is_refused():
    for change, match in (({"patch_size": 5}, "no multiple"), ({"target": "x"}, "target must"), ({"drop": "x"}, "drop must")):
        with pytest.raises(ValueError, match=match):
            small(**change)
    model = small()
    with pytest.raises(ValueError, match=r"\(B, C, 16, 16\)"):
        model.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        model.decode(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="length must be 1 to 8"):
        model.decode(torch.zeros(1, 8, dtype=torch.long), 0)
