"""DECOR on a text encoder: the directions of an undesired word are taken out of the embeddings that a pipeline would read."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from jeton.prompts import TextEncoder
from jeton.prompts.decor import Decor, axes

# a small encoder with random weights; with diffusers: TextEncoder(pipe.text_encoder, pipe.tokenizer)
words = ["<s>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog", "in", "sks", "style"]
inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", model_max_length=16)
torch.manual_seed(0)
config = CLIPTextConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_factor=10.0,
)  # fmt: skip
encoder = TextEncoder(CLIPTextModel(config).eval(), tokenizer)

prompt = "a photo of a dog in sks style"
slots = encoder.slots(prompt)
with torch.no_grad():
    plain = encoder(slots)
    for alpha in (0.5, 1.0):
        edit = Decor.of("a photo of a cat", ["cat"], [encoder], alpha=alpha)  # the style images all showed a cat
        embeds = edit.encode(prompt, [encoder])  # pipe(prompt_embeds=embeds) draws with these
        left = (embeds @ edit.spans[0]).norm(dim=-1) / (plain @ edit.spans[0]).norm(dim=-1)
        print(
            f"alpha {alpha}: of the direction of 'cat', {left[0, 1:].mean():.0%} is left at words and padding, "
            f"{left[0, 0]:.0%} at begin-of-text; 'dog' keeps {embeds[0, 5].norm() / plain[0, 5].norm():.0%} of its norm"
        )

values, shares = axes(plain)
padding = shares[0, ~slots.real[0]].sum(0)
print("share of padding in the first axes of the prompt:", ", ".join(f"{share:.0%}" for share in padding[:4].tolist()))
