"""MLlama (Llama 3.2 Vision) has no visual tokens in its prompts: cross-attention layers look at the encoder's states."""

from __future__ import annotations

from .registry import Registry

Registry.refused |= dict.fromkeys(
    ("MllamaForConditionalGeneration", "MllamaModel", "MllamaForCausalLM", "MllamaVisionModel"),
    "keeps what it sees out of the sequence, as states that cross-attention layers look at, with one token an image in the "
    "prompt; jeton takes tokens out of sequences and finds none here. Use a model whose prompts hold the visual tokens, e.g. "
    "Gemma 3, Aya Vision or Qwen2.5-VL; MLlama itself sees less with a lower max_image_tiles in its processor.",
)
