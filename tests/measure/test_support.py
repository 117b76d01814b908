"""What works on a model is found by trying, on models without weights, and written down as found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import jeton
import tiny
import tiny_encoders
import with_timm
from jeton.cli import app
from jeton.measure.blank import blank
from jeton.measure.support import Verdict, families, supports, write
from jeton.models import Registry

ROOT = Path(__file__).parents[2]
QUICK = ("DINOv3ViTModel", "Siglip2VisionModel", "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in families() if name in tiny.BUILDERS]


def specs(found):
    return {verdict.method: verdict.spec for verdict in found.verdicts}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_without_weights_takes_what_a_real_one_takes(name):
    own = supports(tiny.model(name) if name != "VisionTransformer" else tiny_encoders.tiny_timm(dynamic_img_size=False))
    net = blank(name)
    assert type(net).__name__ == name and all(weight.is_meta for weight in net.parameters())
    assert specs(supports(name)) == specs(own)


def test_methods_are_tried_and_the_fields_a_refusal_names_too():
    found = supports("SiglipVisionModel")
    verdicts = {verdict.method: verdict for verdict in found.verdicts}
    assert verdicts["tome"] == Verdict("tome", "tome", "")
    assert verdicts["fastervlm"].spec == 'fastervlm(score="received")' and "class token" in verdicts["fastervlm"].reason
    assert not verdicts["fastv"].works and "without a language model" in found.refused["fastv"]
    # the first refusal names a score, and that is refused for a reason of its own
    assert verdicts["visiondrop"].spec is None and "without a language model" in verdicts["visiondrop"].reason
    assert (verdicts["dynamicvit"].spec, verdicts["dynamicvit"].how) == ("dynamicvit", "train=True")
    assert "dynamicvit with train=True" in str(found)
    assert {verdict.method for verdict in found.verdicts} == {card.id for card in jeton.methods()}
    with pytest.raises(jeton.Unsupported) as refusal:
        jeton.apply(tiny.model("SiglipVisionModel"), "fastv")
    assert found.refused["fastv"] == str(refusal.value)
    printed = str(found).replace("\n ", "")
    assert f"{len(found.works)} of {len(found.verdicts)} methods work" in printed and 'fastervlm(score="received")' in printed
    assert found.refused["aim"] in printed and found.refused["fastv"] not in printed  # the same reason, said once
    assert all(verdict.method in printed for verdict in found.verdicts)


def test_fields_and_arguments_that_refusals_name_one_after_the_other_are_put_together():
    verdicts = {verdict.method: verdict for verdict in supports("LlavaOnevisionModel").verdicts}
    assert (verdicts["evit"].spec, verdicts["evit"].how) == ('evit(score="received")', "restore=True")
    assert verdicts["evit"].reason.startswith("evit cannot be applied") and verdicts["evit"].works


def test_a_model_at_hand_is_left_as_it_was():
    net = tiny.model("ViTModel")
    before = tiny.run(net, tiny.inputs_for(net))
    assert supports(net).model == "ViTModel"
    assert torch.equal(tiny.run(net, tiny.inputs_for(net)), before)


def test_a_folder_needs_no_more_than_a_configuration(tmp_path):
    config = transformers.ViTConfig(**tiny.vision(), architectures=["ViTForImageClassification"])
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert supports(tmp_path).model == "ViTForImageClassification"
    tiny.model("LlavaForConditionalGeneration").config.save_pretrained(tmp_path)
    assert supports(str(tmp_path)).model == "LlavaForConditionalGeneration"
    assert specs(supports(tmp_path))["fastv"] == "fastv"


def test_a_configuration_that_no_method_can_act_on_says_so_for_every_method(tmp_path):
    transformers.ViTMAEConfig(**tiny.vision()).save_pretrained(tmp_path)
    found = supports(tmp_path)
    assert not found.works and set(found.refused) == {card.id for card in jeton.methods()}
    assert all("mask_ratio = 0" in reason for reason in found.refused.values())


def test_a_type_of_model_is_its_class_with_a_head():
    assert type(blank("llava")).__name__ == "LlavaForConditionalGeneration"
    assert type(blank("clip_vision_model")).__name__ == "CLIPVisionModel"


def test_models_of_timm_are_known_by_their_names():
    with_timm.timm()
    assert specs(supports("timm/vit_tiny_patch16_224"))["evit"] == "evit"


def test_what_is_no_model_or_has_no_adapter_is_told():
    with pytest.raises(ValueError, match="no class or type of model"):
        supports("./no/such/folder")
    with pytest.raises(jeton.Unsupported, match="no adapter for BertModel"):
        supports("BertModel")


def test_the_command_prints_text_or_json():
    printed = CliRunner().invoke(app, ["supports", "IJepaModel"])
    assert printed.exit_code == 0 and "IJepaModel" in printed.output and 'fastervlm(score="received")' in printed.output
    told = json.loads(CliRunner().invoke(app, ["supports", "IJepaModel", "--json"]).stdout)
    assert told == supports("IJepaModel").to_dict()
    wrong = CliRunner().invoke(app, ["supports", "BertModel"])
    assert wrong.exit_code == 2 and "no adapter" in wrong.output


def test_the_document_is_up_to_date(tmp_path):
    with_timm.timm()
    pytest.importorskip("transformers.vision_utils", reason="older transformers can do less")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for path in write(tmp_path):
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), "run make docs"


def test_every_family_and_every_method_is_in_the_document():
    text = (ROOT / "docs" / "models.md").read_text()
    for view in {*Registry.encoders.values(), *Registry.models.values()}:
        assert any(f"| `{name}` |" in text for name in [*Registry.encoders, *Registry.models] if view is _view(name))
    for card in jeton.methods():
        assert f"| [`{card.id}`](systems.md#{card.id}) |" in text


def _view(name):
    return Registry.models.get(name) or Registry.encoders.get(name)
