"""PH-Reg: views and their averages, what the student is, and what training does to a planted artifact."""

import pytest
import torch
import transformers
from transformers import Dinov2WithRegistersModel

import jeton
import tiny
from jeton.models import adapt
from jeton.objectives.ph_reg import PHReg, Views, denoised, student
from jeton.ops.selection import farthest
from jeton.train import Recipe, train


def encoder(name):
    """The tiny encoder, its MLP a whole multiple of its width."""
    if name == "ViTModel":
        return tiny.ready(transformers.ViTModel(transformers.ViTConfig(**tiny.vision(intermediate_size=64))))
    return tiny.BUILDERS[name]()


def views(batch=3, side=(6, 7), count=10, seed=0, reach=0.3):
    return Views.draw(batch, side, count, reach, torch.Generator().manual_seed(seed))


def test_farthest_points_by_hand():
    points = torch.tensor([[[0.0, 0], [1, 0], [5, 0], [5, 1], [2, 0]]])
    assert farthest(points, 4).tolist() == [[0, 3, 4, 1]]


def test_the_first_view_is_the_picture_and_offsets_stay_within_reach():
    drawn = views(50, (20, 40), reach=0.15)
    assert (drawn.offset[:, 0] == 0).all() and not drawn.flip[:, 0].any()
    assert drawn.offset[..., 0].abs().max() == 3 and drawn.offset[..., 1].abs().max() == 6
    assert 0.4 < drawn.flip[:, 1:].float().mean() < 0.6
    assert (drawn.offset[0] != drawn.offset[1]).any(), "each picture has its own"


def test_a_shift_by_hand():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    moved = Views(torch.tensor([[[0, 1]]]), torch.tensor([[False]])).shift(x, 0, 1, -1.0)
    assert moved[0, 0].tolist() == [[1, 2, -1], [4, 5, -1]]
    mirrored = Views(torch.tensor([[[1, 1]]]), torch.tensor([[True]])).shift(x, 0, 1, -1.0)
    assert mirrored[0, 0].tolist() == [[-1, 5, 4], [-1, -1, -1]]
    filled = Views(torch.tensor([[[0, 2]]]), torch.tensor([[False]])).shift(x.repeat(1, 2, 1, 1), 0, 1, torch.tensor([7.0, 8.0]))
    assert filled[0, :, 0, 1].tolist() == [7, 8]


def test_coordinates_come_back_from_any_views():
    coordinates = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")).expand(3, -1, -1, -1)
    pixels = coordinates.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for seed in range(5):
        found = denoised(lambda seen: seen[:, :, ::4, ::4].flatten(2).mT, pixels, views(seed=seed), 4, -50.0)
        assert (found == coordinates.flatten(2).mT).all()


def test_what_belongs_to_the_input_averages_out():
    """A teacher that looks at each patch alone, with noise of its own in each view: the noise's variance falls by the count."""
    torch.manual_seed(0)
    pixels, drawn, noise = torch.randn(3, 3, 24, 28), views(), []

    def encode(seen):
        return torch.nn.functional.avg_pool2d(seen, 4).flatten(2).mT

    def noisy(seen):
        made = torch.randn(3, 42, 200)
        noise.append(made)
        return made

    torch.testing.assert_close(denoised(encode, pixels, drawn, 4, 9.0), encode(pixels))
    left = denoised(noisy, pixels, drawn, 4).var(-1)
    ones = denoised(lambda seen: torch.ones(3, 42, 1), pixels, drawn, 4)
    assert (ones == 1).all()
    grid = torch.arange(42).view(1, 1, 6, 7).expand(3, -1, -1, -1)
    count = torch.stack([(drawn.shift(grid, view, 1, -1).flatten(1)[..., None] == torch.arange(42)).sum(1) for view in range(10)])
    shown = count.sum(0)
    assert shown.max() == 10 and shown.min() < 8
    assert ((left * shown).mean() - 1).abs() < 0.05


def test_a_planted_artifact_shrinks_by_the_number_of_views():
    drawn, artifact = views(1, count=8, seed=3), torch.zeros(1, 42, 5)
    artifact[:, 17] = 8.0
    target = denoised(lambda seen: artifact, torch.zeros(1, 3, 24, 28), drawn, 4)
    assert target.norm(dim=-1).max() < 0.5 * artifact.norm(dim=-1).max()
    assert target[0, 17].norm() > 0 and (target.norm(dim=-1) > 0).sum() >= 6, "spread over the places it was seen at"


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel"])
def test_the_student_is_the_teacher_with_registers(name):
    teacher, pixels = encoder(name), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(student(teacher, 0)(pixels)[0], teacher(pixels)[0], atol=1e-5, rtol=1e-4)
        made = student(teacher, 5)
        assert made(pixels)[0].shape[1] == 1 + 5 + 49 and adapt(made).prefix == 6
        again, drawn = (torch.Generator().manual_seed(3) for _ in range(2))
        registers = dict(student(teacher, 5, again).named_parameters())
        found = next(value for name, value in registers.items() if "register_tokens" in name)
        torch.testing.assert_close(found, torch.randn(1, 5, 32, generator=drawn) / 32**0.5)
    with jeton.apply(made, "tome", keep=10) as run, torch.no_grad():
        assert made(pixels)[0].shape[1] == 6 + 10
        assert run.tokens.prefix == 6


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel"])
def test_only_the_named_parameters_learn(name):
    teacher = encoder(name)
    made = student(teacher, 4)
    named = {key for key, value in made.named_parameters() if value.requires_grad}
    last = [key for key in named if any(part in key for part in ("layers.4.", "layer.4."))]
    rest = named.difference(last)
    assert len(last) >= 12 and all(
        any(part in key for part in ("regist", "position_embedding", "patch_embedding")) for key in rest
    )
    assert len(rest) == (3 if name == "CLIPVisionModel" else 4), "CLIP's patch embedding has no bias"
    before = {key: value.clone() for key, value in made.state_dict().items()}
    loss, optimizer = PHReg(teacher, views=3), torch.optim.AdamW([v for v in made.parameters() if v.requires_grad], 1e-2)
    kept = {key: value.clone() for key, value in teacher.state_dict().items()}
    for _ in range(5):
        optimizer.zero_grad()
        sum(loss(made, torch.randn(2, 3, 28, 28)).values()).backward()
        optimizer.step()
    moved = {key for key, value in made.state_dict().items() if (value != before[key]).any()}
    assert moved == named
    assert all((value == kept[key]).all() for key, value in teacher.state_dict().items())


def test_a_student_of_a_vit_is_saved_as_transformers_saves(tmp_path):
    made, pixels = student(encoder("ViTModel"), 4), torch.randn(1, 3, 28, 28)
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        assert (Dinov2WithRegistersModel.from_pretrained(tmp_path)(pixels)[0] == made(pixels)[0]).all()


def test_other_encoders_are_refused():
    with pytest.raises(jeton.Unsupported, match="ViTModel, a Dinov2Model or a CLIPVisionModel"):
        student(tiny.model("SiglipVisionModel"))
    with pytest.raises(jeton.Unsupported, match="whole multiple"):
        student(tiny.model("ViTModel"))


@pytest.mark.slow
def test_training_takes_a_planted_artifact_away():
    """A toy teacher that looks at each patch alone, but for a vector at two places of its position table: tokens of high norm,
    whatever the picture shows. Seen from many views they spread thin, and the student unlearns them."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**tiny.vision(intermediate_size=64), "num_hidden_layers": 2})
    teacher, places = tiny.ready(transformers.ViTModel(config)), [10, 38]
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            if ".o_proj." in name or "attention.output" in name or "position_embeddings" in name:
                weight.zero_()
        teacher.layernorm.weight.fill_(1.0)
        teacher.embeddings.position_embeddings[:, [1 + place for place in places]] = 40 * torch.randn(32)

    def high(model, pixels):
        """The share of patches whose norm in front of the last layer norm is twice the median."""
        seen = []
        handle = model.layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -49:].norm(dim=-1)))
        with torch.no_grad():
            model(pixels)
        handle.remove()
        return (seen[0] > 2 * seen[0].median()).float().mean().item()

    pictures = torch.randn(256, 3, 28, 28)
    assert high(teacher, pictures[:32]) == pytest.approx(2 / 49, abs=5e-3)
    made = student(teacher, 4, torch.Generator().manual_seed(0))
    loss = PHReg(teacher, views=8, fill=(0.0,) * 3)
    train(made, pictures, loss, Recipe(steps=60, rate=1.0, batch=16), progress=False)
    assert high(made, pictures[:32]) < 0.25 * high(teacher, pictures[:32])
