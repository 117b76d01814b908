"""Two methods at once: merge inside the encoder, then prune inside the language model; pictures of what was kept."""

from pathlib import Path

import jeton
from jeton.demo import prompt
from jeton.engine.picture import overlay

demo = jeton.load_demo()
example = demo.examples[0]
inputs = demo.processor(images=example.image, text=prompt(example.question), return_tensors="pt")

SPECS = ("tome(keep=72)", "fastv(layer=1, keep=36)", "tome(keep=72) | fastv(layer=1, keep=36)")

for number, spec in enumerate(SPECS):
    with jeton.apply(demo.model, spec) as run:
        ids = demo.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        kept = run.assignment()[0]
    answer = demo.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    report = run.report()
    print(f"{spec}: {answer}, {report.images[0].after} tokens at last, {report.flops_share:.0%} of the FLOPs")
    overlay(example.image, kept, size=420).save(Path(f"kept_{number}.png"))
