"""What a language model's next token rests on (ReAGent), and how machine-like texts look to it (Lastde)."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jeton.measure.lastde import Lastde
from jeton.measure.reagent import ReAGent
from jeton.measure.replacement import faithfulness, uniform

# your model here: AutoModelForCausalLM.from_pretrained(...). This one learns to repeat the token that follows a 1.
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=24, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
)


def prompts(count):
    ids = torch.randint(2, 24, (count, 8))
    place = torch.randint(0, 6, (count, 1))
    return ids.scatter(1, place, 1), place[:, 0] + 1


optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(250):
    ids, place = prompts(64)
    optimiser.zero_grad()
    answer = ids.gather(1, place[:, None])[:, 0]
    torch.nn.functional.cross_entropy(model(ids).logits[:, -1], answer).backward()
    optimiser.step()

ids, place = prompts(4)
importance = ReAGent(sampler=uniform(24), keep=2, top=1, steps=200).explain(model, ids)
for row, weights in zip(ids.tolist(), importance.tolist()):
    print("  ".join(f"{token}:{weight:.2f}" for token, weight in zip(row, weights)))
print("faithfulness:", faithfulness(model, ids, importance, "soft_nc", draws=50).mean().item())
print("of chance:", faithfulness(model, ids, torch.rand(4, 8), "soft_nc", draws=50).mean().item())

# Lastde().detect(model, tokenizer, texts) scores texts; here log-probabilities of tokens, made up
steady, restless = -torch.rand(1, 120), -6 * torch.rand(1, 120) ** 3
print("lastde:", Lastde().score(torch.cat([steady, restless])).tolist())
