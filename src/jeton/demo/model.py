"""The demo checkpoint's parts, untrained: a small LLaVA of real transformers classes, its tokenizer and processor."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jeton.demo.chat import EOS, TEMPLATE, user_turn
from jeton.demo.data import COLOURS, NUMBERS, PATCH, SIZE
from jeton.demo.questions import PLACES, all_questions

BOS, PAD, IMAGE = "<s>", "<pad>", "<image>"
WIDTH, ENCODER_HEADS, DECODER_HEADS = 96, 6, 3
ENCODER_BLOCKS, DECODER_LAYERS = 5, 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges are learned from the demo's own sentences; any other text still has bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sentences = [user_turn(question, first) for question in all_questions() for first in (True, False)]
    sentences += [" " + answer for answer in (*NUMBERS, *COLOURS, *PLACES)]
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        additional_special_tokens=[IMAGE], model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Processor whose image side runs on PIL, so that torchvision is not needed."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE, chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """LLaVA with a CLIP encoder that has a class token, an MLP projector and a Llama decoder: about 1 M parameters."""
    vision = CLIPVisionConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=ENCODER_BLOCKS, num_attention_heads=ENCODER_HEADS, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=DECODER_HEADS, num_key_value_heads=DECODER_HEADS, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=WIDTH**-0.5,  # Llama's 0.02 suits a width of 4096, not this one
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = _grid_waves(SIZE // PATCH, WIDTH)
    return model


def _grid_waves(grid: int, width: int) -> torch.Tensor:
    """Sine and cosine waves over a grid: (grid * grid, width), as strong as the patch embeddings at the start.

    Neighbouring patches start with similar positions, which a random start takes many steps to find out.
    """
    frequency = 0.02 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], -1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return 0.15 * torch.cat([rows, columns], -1).flatten(0, 1)
