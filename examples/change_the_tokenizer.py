"""Give a language model another tokenizer without training: what happens to its tokens, and what it costs in bits per byte."""

import pydoc_data.topics
from copy import deepcopy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jeton.text import Drawn, Mean, bits_per_byte, train_bpe
from jeton.text.tokenadapt import TokenAdapt

texts = [" ".join(text.split())[:4000] for text in pydoc_data.topics.topics.values()]
train, test = texts[10:], texts[:10]
old, new = train_bpe(train, 500), train_bpe(test, 400)

# your model and tokenizers here: AutoModelForCausalLM.from_pretrained(...), AutoTokenizer.from_pretrained(...)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=500, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
)
ids = torch.tensor([id for text in train for id in old.encode(text).ids])
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    at = torch.randint(0, len(ids) - 64, (8,)).tolist()
    batch = torch.stack([ids[start : start + 64] for start in at])
    optimiser.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    optimiser.step()

print(f"before: {bits_per_byte(model, old, test):.3f} bits per byte")
for name, initialiser in {"tokenadapt": TokenAdapt(), "mean": Mean(), "at random": Drawn()}.items():
    changed = deepcopy(model)
    done = initialiser.transplant(changed, old, new)
    bits = bits_per_byte(changed, new, test)
    print(
        f"{name}: {bits:.3f} bits per byte; of {done.tokens} tokens {done.copied} copied, {done.mixed} mixed, {done.drawn} drawn"
    )
