"""Apply a method to the embedded model: the answer, and the truth about what it cost."""

import jeton
from jeton.demo import prompt

demo = jeton.load_demo()
example = demo.examples[0]
inputs = demo.processor(images=example.image, text=prompt(example.question), return_tensors="pt")

with jeton.apply(demo.model, "divprune", keep=14) as run:
    ids = demo.model.generate(**inputs, max_new_tokens=6, do_sample=False)

answer = demo.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"{example.question} {answer.strip()} (right: {example.answer})")
print(run.report())
