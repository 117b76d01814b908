"""Token Recycling with a visual token reduction method: fewer tokens in, and fewer forwards for those that come out."""

import jeton
from jeton.decode.token_recycling import TokenRecycling
from jeton.demo import prompt

demo = jeton.load_demo()
decoder = TokenRecycling(demo.model)  # keeps what it learns from prompt to prompt
with jeton.apply(demo.model, "divprune", keep=36):
    for example in demo.examples[:6]:
        inputs = demo.processor(images=example.image, text=prompt(example.question), return_tensors="pt")
        out = decoder.generate(**inputs, max_new_tokens=8)
        answer = demo.processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        told = out.told
        print(f"{example.question} {answer}: {told.tokens} tokens, {told.forwards} forwards after the prompt")
