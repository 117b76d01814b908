"""What the adapters say of a picture: how its tokens lie, which patches make them, which are newlines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

import jeton
import tiny
import tiny_encoders
from jeton.engine import apply, watch
from jeton.engine.readings import features_of
from jeton.layout import Geometry
from jeton.models import Encoder, VisionLanguage, adapt
from jeton.models.registry import encoder_in
from jeton.place import Lattice

LANGUAGE = [name for name in tiny.BUILDERS if tiny.is_language(tiny.model(name))]
ENCODERS = [name for name in tiny.BUILDERS if name not in LANGUAGE]


def seen(name: str) -> VisionLanguage:
    view = adapt(tiny.model(name))
    assert isinstance(view, VisionLanguage)
    return view


@pytest.mark.parametrize("name", LANGUAGE)
def test_geometry_has_as_many_tokens_as_the_model_makes(name: str) -> None:
    net, view = tiny.model(name), seen(name)
    inputs = tiny.inputs_for(net)
    for stream in view.streams():
        own = _own(inputs, stream)
        if not own:  # a family that takes no batch of images and videos
            continue
        with torch.no_grad():
            features = tiny.encoded(view.base, stream, own)
        geometry = view.geometry(own, stream)
        made = [len(item) for item in geometry], [len(part) for part in features]
        assert sum(made[0]) == sum(made[1]) if view.told_by_prompt else made[0] == made[1]


def _own(inputs: tiny.Inputs, stream: str) -> tiny.Inputs:
    """The arguments of the method that encodes one kind of picture."""
    names = {
        "image": ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    return {name: inputs[name] for name in names[stream] if name in inputs}


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_patch_is_used_at_most_once_and_stands_inside_its_grid(name: str) -> None:
    net, view = tiny.model(name), seen(name)
    inputs = tiny.inputs_for(net)
    for stream in filter(lambda stream: _own(inputs, stream), view.streams()):
        for geometry in view.geometry(_own(inputs, stream), stream):
            used = geometry.source[geometry.source >= 0]
            # a map that is resized makes neighbouring tokens of the same patches
            assert len(used.unique()) == len(used) or "Onevision" in name
            assert int(used.max()) < geometry.patches
            shown = geometry.unit >= 0
            assert bool((geometry.row[shown] < geometry.height[shown]).all())
            assert bool((geometry.col[shown] < geometry.width[shown]).all())
            assert bool((geometry.source[~shown] < 0).all())
            assert int(geometry.unit.max()) < len(geometry.kinds)


def _numbered(count: int, side: int) -> Tensor:
    """Features (count, side², 3) that say where they come from: picture, row, column."""
    cells = torch.arange(side**2)
    picture = torch.arange(count)[:, None].expand(-1, side**2)
    return torch.stack([picture, (cells // side).expand(count, -1), (cells % side).expand(count, -1)], -1).float()


@pytest.mark.parametrize("size", [(24, 24), (40, 46), (20, 47), (48, 25), (16, 70), (30, 31), (10, 71), (48, 24)])
def test_llava_next_crops_lie_where_the_model_packs_them(size: tuple[int, int]) -> None:
    """The model's own packing of features that carry their address, against the geometry's addresses."""
    net, view = tiny.model("LlavaNextForConditionalGeneration"), seen("LlavaNextForConditionalGeneration")
    geometry = view.geometry({"pixel_values": None, "image_sizes": torch.tensor([size])}, "image")[0]
    features = _numbered(len(geometry.kinds), 6)
    newline = torch.tensor([-9.0, -9.0, -9.0])
    packed, _ = net.model.pack_image_features([features], torch.tensor([size]), "default", image_newline=newline)
    said = torch.stack([geometry.unit, geometry.row, geometry.col], 1).float()
    said[geometry.unit < 0] = -9.0
    assert torch.equal(packed[0], said)
    patch = geometry.source[:, 0]
    assert torch.equal(torch.where(patch < 0, -1, patch // 36), geometry.unit.clamp(min=-1))
    rows, cols = int(geometry.crop_rows.max()), int(geometry.crop_cols.max())
    crops = geometry.unit > 0
    assert torch.equal(geometry.unit[crops], 1 + geometry.crop_row[crops] * cols + geometry.crop_col[crops])
    assert len(geometry.kinds) == 1 + rows * cols and geometry.kinds[0] == "thumbnail"


def _check_shares(geometry: Geometry, shares: Tensor) -> None:
    """shares (M, patches): how much of every patch the model puts into each token."""
    shown = geometry.unit >= 0
    assert torch.allclose(shares[shown].sum(1), torch.ones(int(shown.sum())), atol=1e-5)
    named = torch.zeros(shares.shape[0], shares.shape[1] + 1).scatter(1, geometry.source % (shares.shape[1] + 1), 1)[:, :-1]
    assert bool((named[shown][shares[shown] > 1e-5] == 1).all())  # no patch is forgotten
    assert float((shares[shown] * named[shown]).sum(1).min()) > 0.999


ONEVISION_SIZES = [(36, 40), (20, 36), (36, 20), (58, 20), (33, 25), (20, 20), (40, 21)]


@pytest.mark.parametrize("size", ONEVISION_SIZES)
def test_llava_onevision_tokens_are_made_of_the_patches_they_name(size: tuple[int, int]) -> None:
    """The model's own packing of features that are one-hot in their patch, against the geometry's addresses."""
    net, view = tiny.model("LlavaOnevisionForConditionalGeneration"), seen("LlavaOnevisionForConditionalGeneration")
    geometry = view.geometry({"image_sizes": torch.tensor([size])}, "image")[0]
    units = len(geometry.kinds)
    features = torch.eye(geometry.patches).unflatten(0, (units, 25))
    packed, _ = net.model.pack_image_features(
        [features], torch.tensor([size]), image_newline=torch.full((geometry.patches,), -9.0), vision_aspect_ratio="anyres_max_2"
    )
    assert len(packed[0]) == len(geometry)
    assert torch.equal(packed[0][:, 0] == -9, geometry.unit < 0)
    _check_shares(geometry, packed[0])
    crops = (packed[0].unflatten(1, (units, 25)).sum(2)[geometry.unit > 0] > 0.5).long()  # where most of a token lies in one crop
    sure = crops.sum(1) == 1
    assert torch.equal(crops.argmax(1)[sure], geometry.unit[geometry.unit > 0][sure]) and bool(sure.any())
    seats = torch.stack([geometry.unit, geometry.row, geometry.col], 1)[geometry.unit >= 0]
    assert len(seats.unique(dim=0)) == len(seats)  # no two tokens share a place
    per_crop = seats[seats[:, 0] > 0][:, 0].unique()
    assert torch.equal(per_crop, torch.arange(1, units))


def test_llava_onevision_cuts_only_images_that_are_alone() -> None:
    view = seen("LlavaOnevisionForConditionalGeneration")
    sizes = torch.tensor([(36, 40), (36, 40), (36, 40)])
    told = view.geometry({"image_sizes": sizes, "batch_num_images": torch.tensor([2, 0, 1])}, "image")
    assert [len(item.kinds) for item in told] == [1, 1, 5]
    assert [int((item.unit < 0).sum()) for item in told[:2]] == [1, 1] and [len(item) for item in told[:2]] == [26, 26]
    assert [len(item.kinds) for item in view.geometry({"image_sizes": sizes}, "image")] == [5, 5, 5]


@torch.no_grad()
@pytest.mark.parametrize("name", ["LlavaOnevisionForConditionalGeneration", "LlavaNextVideoForConditionalGeneration"])
def test_tokens_of_video_frames_are_made_of_the_patches_they_name(name: str) -> None:
    net, view = tiny.model(name), seen(name)
    geometry = view.geometry({"pixel_values_videos": torch.zeros(2, 3, 3, 8, 8)}, "video")
    assert len(geometry) == 2 and geometry[0].kinds == ("frame",) * 3
    frame = geometry[0].patches // 3
    features = torch.eye(frame * 3).unflatten(0, (3, frame))
    pooled = net.model.apply_pooling(features) if "Onevision" in name else net.model.vision_resampler(features)
    shares = pooled.flatten(0, 1)
    newline = shares.new_zeros(len(geometry[0]) - len(shares), shares.shape[1])
    assert len(newline) == int((geometry[0].unit < 0).sum()) == ("Onevision" in name)
    _check_shares(geometry[0], torch.cat([shares, newline]))


@pytest.mark.parametrize("name", [name for name in LANGUAGE if not name.endswith("Model")])
def test_a_token_is_made_of_the_patches_that_it_is_said_to_be_made_of(name: str) -> None:
    """In a tower that does not attend, the gradient of a token reaches the pixels of its own patches, and no others."""
    net, view = tiny.model(name), seen(name)
    inputs = tiny.inputs_for(net)
    encoder = view.encoder
    for stream in view.streams():
        own = _own(inputs, stream)
        if not any(value.is_floating_point() for value in own.values()):
            continue
        caught: list[Tensor] = []
        handles = [encoder.attention(block).register_forward_hook(_nothing) for block in encoder.blocks]
        handles.append(encoder.entrance.register_forward_pre_hook(_catch(encoder, caught), with_kwargs=True))
        try:
            features = torch.cat(tiny.encoded(view.base, stream, own))
        finally:
            for handle in handles:
                handle.remove()
        (pixels,) = caught
        start, tokens = 0, []
        for item in view.geometry(own, stream):
            tokens += [torch.where(source < 0, -1, source + start) for source in item.source]
            start += item.patches
        assert len(tokens) == len(features)
        direction = torch.randn(features.shape[1])
        for token in [*range(0, len(tokens), 7), len(tokens) - 1]:
            grad = torch.autograd.grad(features[token] @ direction, pixels, retain_graph=True, allow_unused=True)[0]
            reached = [] if grad is None else _touched(encoder, grad, own.get("image_sizes"))
            named = sorted({int(patch) for patch in tokens[token] if patch >= 0})
            # a map that is resized takes some of its neighbours with a share of zero
            assert reached == named or ("Onevision" in name and set(reached) < set(named)), token


def _nothing(module: torch.nn.Module, args: tuple, output: Any) -> Any:
    """Attention that adds nothing."""
    return torch.zeros_like(output) if isinstance(output, Tensor) else (torch.zeros_like(output[0]), *output[1:])


def _catch(encoder: Encoder, caught: list[Tensor]) -> Any:
    """A hook that hands the encoder pixels of which gradients can be asked."""

    def catch(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name = "hidden_states" if "hidden_states" in kwargs else encoder.argument
        caught.append((args[0] if args else kwargs[name]).detach().requires_grad_())
        return ((caught[0], *args[1:]), kwargs) if args else (args, {**kwargs, name: caught[0]})

    return catch


def _touched(encoder: Encoder, grad: Tensor, sizes: Tensor | None) -> list[int]:
    """The patches of an encoder call with a gradient, counted over all pictures; those of Pixtral are padded to one size."""
    patches = encoder.patches(grad).flatten(-2)
    touched = patches.flatten(0, -2).abs().amax(1) > 0
    if encoder.name == "PixtralVisionModel":
        real = torch.zeros(len(grad), *encoder.grid(grad), dtype=torch.bool)
        for picture, size in zip(real, sizes.tolist(), strict=True):
            picture[: size[0] // encoder.patch_size, : size[1] // encoder.patch_size] = True
        assert not bool(touched[~real.flatten()].any())
        touched = touched[real.flatten()]
    return touched.nonzero().flatten().tolist()


def test_qwen_video_frames_are_units() -> None:
    net, view = tiny.model("Qwen2_5_VLForConditionalGeneration"), seen("Qwen2_5_VLForConditionalGeneration")
    geometry = view.geometry({"video_grid_thw": torch.tensor([[3, 4, 6]])}, "video")[0]
    assert geometry.kinds == ("frame",) * 3 and geometry.unit.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert (geometry.row * 3 + geometry.col).tolist() == [*range(6)] * 3
    assert net.config.video_token_id == tiny.VIDEO


@torch.no_grad()
def test_a_windowed_tower_is_counted_by_what_its_blocks_attend_to() -> None:
    net, seen_keys = tiny.model("Qwen2_5_VisionTransformerPretrainedModel"), []

    class Hearing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen_keys.append(args[1].shape[2])
            return func(*args, **(kwargs or {}))

    with Hearing():
        net(torch.randn(64, 96), grid_thw=torch.tensor([(1, 8, 8)]))
    view = adapt(net)
    assert isinstance(view, Encoder)
    said = [view.keys(block, 64) for block in range(5)]
    assert seen_keys == [keys for keys in said for _ in range(64 // keys)] and said == [16, 64, 16, 16, 64]


def test_an_encoder_is_not_looked_for_inside_a_model_with_language() -> None:
    with pytest.raises(jeton.Unsupported, match="not an encoder of another"):
        encoder_in(tiny.model("LlavaForConditionalGeneration"))


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_feature_block_is_the_one_whose_output_the_model_hands_on(name: str) -> None:
    """Zero the attention and MLP outputs after it: the image features do not change; at it: they do."""
    net = tiny.BUILDERS[name]()
    view = adapt(net)
    inputs = tiny.inputs_for(net)
    stream = next(iter(view.streams()))

    def features() -> Tensor:
        with torch.no_grad():
            return torch.cat(tiny.encoded(view.base, stream, _own(inputs, stream)))

    before = features()
    for number in range(len(view.encoder.blocks) - 1, view.feature_block, -1):
        _silence(view.encoder.blocks[number])
    assert torch.equal(features(), before)
    _silence(view.encoder.blocks[view.feature_block])
    assert not torch.equal(features(), before)


@torch.no_grad()
def _silence(block: torch.nn.Module) -> None:
    for weight in block.parameters():
        weight.zero_()


# -- encoders --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ENCODERS if not adapt(tiny.model(name)).packed])
def test_parts_put_together_are_the_block(name: str) -> None:
    """x + drop1(scale1(attention(norm1(x)))), then the same with the MLP, is what the model's block computes."""
    net = tiny.model(name)
    view = adapt(net)
    assert isinstance(view, Encoder)
    calls: list[tuple] = []
    handles = [block.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for block in view.blocks]
    tiny.run(net, tiny.inputs_for(net))
    for handle in handles:
        handle.remove()
    assert [call[0] for call in calls] == view.blocks
    for block, (x, *args), kwargs, own in calls:
        parts, own = view.parts(block), features_of(own)
        x, own = (each.flatten(1, 2) if view.maps else each for each in (x, own))
        lattice = Lattice(tiny.SIDE, tiny.SIDE, view.window) if view.maps else None
        mixed = features_of(view.attend(block, parts.attention, parts.norm1(x), lattice, tuple(args), view.handed(block, kwargs)))
        mine = x + parts.drop1(parts.scale1(mixed))
        mine = mine + parts.drop2(parts.scale2(parts.mlp(parts.norm2(mine))))
        assert torch.allclose(mine, own, atol=1e-5)


@pytest.mark.parametrize("name", [*ENCODERS, "Dinov2Model-gated", "DINOv3ViTModel-gated", "Ovis2Model"])
def test_the_sizes_that_flops_are_counted_by_are_those_of_the_modules(name: str) -> None:
    gated = {"Dinov2Model-gated": lambda: tiny.tiny_dinov2(use_swiglu_ffn=True)}
    gated["DINOv3ViTModel-gated"] = lambda: tiny_encoders.tiny_dinov3(use_gated_mlp=True)
    view = adapt(gated[name]() if name in gated else tiny.model(name))
    encoder = view if isinstance(view, Encoder) else view.encoder
    width, mlp, three = encoder.dims
    block = encoder.blocks[0]
    of_attention = {id(weight) for weight in encoder.attention(block).parameters()}
    matrices = [part.weight for part in block.modules() if isinstance(part, torch.nn.Linear)]
    matrices = [weight for weight in matrices if id(weight) not in of_attention]
    assert all(width in weight.shape for weight in matrices) and width != mlp
    assert sum(weight.numel() for weight in matrices) == (2 + three) * width * mlp  # some versions join two of them


@pytest.mark.parametrize("name", [name for name in ENCODERS if not adapt(tiny.model(name)).packed])
def test_special_tokens_and_patches_add_up(name: str) -> None:
    net = tiny.model(name)
    view = adapt(net)
    assert isinstance(view, Encoder)
    inputs = tiny.inputs_for(net)
    with watch(net) as run:
        tiny.run(net, inputs)
        hidden = run.tokens.features
    mask = view.token_mask(inputs)
    patches = [len(item) for item in view.geometry({"pixel_values": inputs.get(view.argument), **inputs})]
    real = [hidden.shape[1] - view.prefix] * 3 if mask is None else mask.sum(1).tolist()
    assert patches == real
    prefixes = {"DeiTModel": 2, "Dinov2WithRegistersModel": 4, "SiglipVisionModel": 0, "Siglip2VisionModel": 0}
    prefixes |= {"IJepaModel": 0, "VideoMAEModel": 0, "DINOv3ViTModel": 3}
    prefixes |= {"Aimv2VisionModel": 0, "SamVisionEncoder": 0}
    prefixes |= {"VisionTransformer": 3, "VisionTransformerDistilled": 2}
    prefixes |= {"Idefics3VisionTransformer": 0, "SmolVLMVisionTransformer": 0}
    assert view.prefix == prefixes.get(name, 1) and view.has_class == (view.prefix > 0)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel", "Dinov2ForImageClassification"])
def test_an_encoder_with_a_head_on_top_is_found(name: str) -> None:
    configs = {
        "ViTForImageClassification": lambda: transformers.ViTConfig(**tiny.vision()),
        "Dinov2ForImageClassification": lambda: transformers.Dinov2Config(**tiny.vision()),
        "CLIPModel": lambda: transformers.CLIPConfig(
            vision_config=tiny.vision(),
            text_config={
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "intermediate_size": 32,
                "vocab_size": 50,
            },
        ),
    }
    net = tiny.ready(getattr(transformers, name)(configs[name]()))
    pixels = torch.randn(2, 3, 28, 28)
    call = net.get_image_features if name == "CLIPModel" else net
    with torch.no_grad():
        before = _first(call(pixel_values=pixels))
        with watch(net):
            assert torch.equal(_first(call(pixel_values=pixels)), before)
        with apply(net, "tome", keep=0.5) as run:
            assert not torch.equal(_first(call(pixel_values=pixels)), before)
            assert [image.after for image in run.report().images] == [24, 24]
        assert torch.equal(_first(call(pixel_values=pixels)), before)


def _first(output: object) -> Tensor:
    for name in ("logits", "pooler_output"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    assert isinstance(output, Tensor)
    return output


def test_llava_that_hands_its_class_token_on_is_refused() -> None:
    net = tiny.tiny_llava()
    net.config.vision_feature_select_strategy = "full"
    inputs = tiny.prompts(net, [tiny.Sample(((),), (2, 2), 1)])
    with pytest.raises(jeton.Unsupported, match="class token"), apply(net, "random", keep=0.3):
        tiny.run(net, inputs)
