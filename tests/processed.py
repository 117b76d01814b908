"""What the families' own processors make of pictures, videos and prompts, for the tiny models.

A program (`python processed.py FILE`), run in a process of its own: most of them want torchvision, and transformers must find it
when it is imported. What cannot be made for want of it, or of timm, is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image

from apart import APART, bring_in

if __name__ == "__main__" and find_spec("torchvision") is None and APART.exists():
    bring_in()

import transformers
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import tiny
import tiny_cohere2
import tiny_internvl
import tiny_pixtral
import with_timm
from tokenized import tokenizer

SIDE = tiny.SIDE * tiny.PATCH
SQUARE = {"height": SIDE, "width": SIDE}
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}  # as published checkpoints have it


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def picture(height: int, width: int, *frames: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (*frames, height, width, 3), dtype=np.uint8)


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.fromarray(picture(*size)) for size in sizes]


# -- encoders: a picture that has the right size already, so that it is only normalised, and two that have not ---------------

ENCODERS: dict[str, Callable[[], Any]] = {
    "CLIPVisionModel": lambda: CLIPImageProcessorPil(**CROPPED),
    "SiglipVisionModel": lambda: SiglipImageProcessorPil(size=SQUARE),
    "Siglip2VisionModel": lambda: Siglip2ImageProcessorPil(patch_size=tiny.PATCH, max_num_patches=tiny.SIDE**2),
    "ViTModel": lambda: ViTImageProcessorPil(size=SQUARE),
    "DeiTModel": lambda: DeiTImageProcessorPil(size=SQUARE, crop_size=SQUARE, **IMAGENET),
    "Dinov2Model": lambda: BitImageProcessorPil(**CROPPED, **IMAGENET),
    "Dinov2WithRegistersModel": lambda: BitImageProcessorPil(**CROPPED, **IMAGENET),
    "DINOv3ViTModel": lambda: transformers.DINOv3ViTImageProcessor(size=SQUARE),
    "ViTMAEModel": lambda: ViTImageProcessorPil(size=SQUARE, **IMAGENET),
    "ViTMSNModel": lambda: ViTImageProcessorPil(size=SQUARE, **IMAGENET),
    "BeitModel": lambda: BeitImageProcessorPil(size=SQUARE, do_center_crop=False),
    "IJepaModel": lambda: ViTImageProcessorPil(size=SQUARE, **IMAGENET),
    "InternVLVisionModel": lambda: GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False, **IMAGENET),
    "Aimv2VisionModel": lambda: CLIPImageProcessorPil(**CROPPED),
    "VideoMAEModel": lambda: VideoMAEImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **IMAGENET
    ),
    "VisionTransformer": lambda: timm_transform(),
}


def timm_transform() -> Callable[..., tiny.Inputs]:
    """For pictures cut to the size, as timm makes it for a model without a configuration of its weights."""
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({"input_size": (3, SIDE, SIDE), "crop_pct": 1.0})
    transform = create_transform(**config)
    return lambda shown, **kwargs: {"x": torch.stack([transform(one) for one in shown])}


def exact(name: str) -> np.ndarray:
    """The picture, or video, that has the right size already."""
    return picture(16, 16, 4) if name == "VideoMAEModel" else picture(SIDE, SIDE)


def encoder_inputs(name: str) -> list[tiny.Inputs]:
    frames = exact(name).shape[:-3]
    shown = [exact(name), picture(30, 50, *frames), picture(64, 20, *frames)]
    videos = [list(one) if frames else Image.fromarray(one) for one in shown]
    made = dict(ENCODERS[name]()(videos, return_tensors="pt"))
    made.pop("num_patches", None)
    return [made]


GRID = {"patch_size": tiny.PATCH, "size": {"shortest_edge": 64, "longest_edge": 4096}}
PACKED: dict[str, Callable[[], Any]] = {
    "Qwen2VisionTransformerPretrainedModel": lambda: Qwen2VLImageProcessorPil(**GRID),
    "Qwen2_5_VisionTransformerPretrainedModel": lambda: Qwen2VLImageProcessorPil(**GRID),
    "Qwen3VLVisionModel": lambda: Qwen2VLImageProcessorPil(**GRID, **HALF),
    "Glm4vVisionModel": lambda: Glm4vImageProcessorPil(**GRID),
    "PixtralVisionModel": lambda: PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=tiny.PATCH),
}


# -- vision-language models: a prompt with two pictures of different sizes, one with one, one with a video ---------------------

PICTURES = [pictures((30, 50), (64, 20)), pictures((20, 20))]
TEXT = ["w20 {image} w22 {image} w24", "w30 {image} w31 w32 w33"]
FILM = "w40 w41 {video} w42"


def written(processor: Any, image: str, video: str | None = None, flat: bool = False, apart: bool = False) -> list[tiny.Inputs]:
    """Batches of prompts. video: how one is written, where the family has them; apart: not in one batch with pictures."""
    text = [part.format(image=image) for part in TEXT]
    shown: Any = [one for each in PICTURES for one in each] if flat else PICTURES
    batches: list[dict[str, Any]] = [{"text": text, "images": shown}]
    if video is not None:
        film = {"text": [FILM.format(video=video)], "videos": [picture(24, 32, 4)], "do_sample_frames": False}
        batches = [*batches, film] if apart else [{**batches[0], **film, "text": text + film["text"]}]
    return [dict(processor(padding=True, return_tensors="pt", **batch)) for batch in batches]


def llava() -> list[tiny.Inputs]:
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(**CROPPED),
        tokenizer({"<image>": tiny.IMAGE}),
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return written(processor, "<image>")


def any_resolution(cls: type, *more: Any) -> Any:
    points = tiny.model("LlavaNextForConditionalGeneration").config.image_grid_pinpoints[: 4 - len(more)]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=points
    )
    words = tokenizer({"<image>": tiny.IMAGE, "<video>": tiny.VIDEO})
    parts = {"image_processor": images, "tokenizer": words} | ({"video_processor": more[0]} if more else {})
    return cls(**parts, patch_size=tiny.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)


def llava_next() -> list[tiny.Inputs]:
    return written(any_resolution(transformers.LlavaNextProcessor), "<image>")


def llava_next_video() -> list[tiny.Inputs]:
    frames = transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return written(any_resolution(transformers.LlavaNextVideoProcessor, frames), "<image>", "<video>")


def llava_onevision() -> list[tiny.Inputs]:
    size = {"height": 20, "width": 20}
    config = tiny.model("LlavaOnevisionForConditionalGeneration").config
    processor = transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer({"<image>": tiny.IMAGE, "<video>": tiny.VIDEO}),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    return written(processor, "<image>", "<video>")


FRAMES = {"patch_size": tiny.PATCH, "size": {"shortest_edge": 64, "longest_edge": 8192}}
QWEN = {"<|image_pad|>": tiny.IMAGE, "<|video_pad|>": tiny.VIDEO, "<|vision_start|>": tiny.START, "<|vision_end|>": tiny.END}
SHOWN = "<|vision_start|> <|{}_pad|> <|vision_end|>"


def qwen(processor: type, videos: type) -> list[tiny.Inputs]:
    made = processor(Qwen2VLImageProcessorPil(**GRID), tokenizer(QWEN), videos(**FRAMES))
    return written(made, SHOWN.format("image"), SHOWN.format("video"))


def glm4v() -> list[tiny.Inputs]:
    names = {"<|image|>": tiny.IMAGE, "<|video|>": tiny.VIDEO, "<|begin_of_image|>": tiny.START, "<|end_of_image|>": tiny.END}
    names |= {"<|begin_of_video|>": 7, "<|end_of_video|>": 8}
    processor = transformers.Glm4vProcessor(
        Glm4vImageProcessorPil(**GRID), tokenizer(names), transformers.Glm4vVideoProcessor(**FRAMES)
    )
    picture, film = (f"<|begin_of_{kind}|> <|{kind}|> <|end_of_{kind}|>" for kind in ("image", "video"))
    return written(processor, picture, film, apart=True)


def internvl() -> list[tiny.Inputs]:
    names = {"<img>": tiny.START, "</img>": tiny.END, "<IMG_CONTEXT>": tiny.IMAGE, "<video>": tiny.VIDEO}
    told = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    ids = {"start_image_token_id": tiny.START, "end_image_token_id": tiny.END, "context_image_token_id": tiny.IMAGE}
    size = {"height": 24, "width": 24}
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4),
        tokenizer(names, **told, **ids, video_token="<video>"),
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=tiny_internvl.TOKENS,
    )
    return written(processor, "<IMG_CONTEXT>", "<video>", flat=True)


def cohere2() -> list[tiny.Inputs]:
    size, (start, end, line) = {"height": tiny_cohere2.TILE, "width": tiny_cohere2.TILE}, tiny_cohere2.MARKS
    names = {"<|IMG_PATCH|>": tiny.IMAGE, "<|START_OF_IMG|>": start, "<|END_OF_IMG|>": end, "<|IMG_LINE_BREAK|>": line}
    told = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    told["img_line_break_token"] = "<|IMG_LINE_BREAK|>"
    ids = {f"{name}_id": names[token] for name, token in told.items()}
    images = transformers.Cohere2VisionImageProcessor(size=size, min_patches=1, max_patches=4, patch_size=4, downsample_factor=1)
    return written(transformers.Cohere2VisionProcessor(images, tokenizer(names, **told, **ids)), "<|IMG_PATCH|>", flat=True)


def pixtral(side: int) -> list[tiny.Inputs]:
    processor = transformers.PixtralProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size=tiny.PATCH * side),
        tokenizer({"[IMG]": tiny.IMAGE, "[IMG_BREAK]": tiny_pixtral.BREAK, "[IMG_END]": tiny.END}),
        patch_size=tiny.PATCH,
        spatial_merge_size=side,
    )
    return written(processor, "[IMG]")


LANGUAGE: dict[str, Callable[[], list[tiny.Inputs]]] = {
    "LlavaForConditionalGeneration": llava,
    "LlavaNextForConditionalGeneration": llava_next,
    "LlavaNextVideoForConditionalGeneration": llava_next_video,
    "LlavaOnevisionForConditionalGeneration": llava_onevision,
    "Qwen2VLForConditionalGeneration": lambda: qwen(transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor),
    "Qwen2_5_VLForConditionalGeneration": lambda: qwen(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
    "Qwen3VLForConditionalGeneration": lambda: qwen(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor),
    "Glm4vForConditionalGeneration": glm4v,
    "InternVLForConditionalGeneration": internvl,
    "Cohere2VisionForConditionalGeneration": cohere2,
    "Mistral3ForConditionalGeneration": partial(pixtral, 2),
    "LlavaForConditionalGeneration-pixtral": partial(pixtral, 1),
}


def main(path: str) -> None:
    made: dict[str, list[tiny.Inputs]] = {}
    for name, make in {**LANGUAGE, **{name: partial(encoder_inputs, name) for name in ENCODERS}}.items():
        try:
            made[name] = make()
        except ImportError:
            if with_timm.has_timm():
                raise
    torch.save(made, path)


if __name__ == "__main__":
    main(sys.argv[1])
