"""StreamingLLM behind a visual token reduction: an answer far longer than the cache, in constant memory."""

import jeton
from jeton.cache.streamingllm import StreamingLLM
from jeton.demo import prompt

demo = jeton.load_demo()
example = demo.examples[0]
inputs = demo.processor(images=example.image, text=prompt(example.question), return_tensors="pt")
how = {"max_new_tokens": 300, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}

with jeton.apply(demo.model, "divprune", keep=36), StreamingLLM(start=4, recent=60).on(demo.model):
    out = demo.model.generate(**inputs, **how)

answer = demo.processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()
print(f"{example.question} {answer[0]}, and {len(answer) - 1} words more")
print(f"tokens seen {out.past_key_values.get_seq_length()}, tokens in the cache {out.past_key_values.layers[0].held}")
