"""One model, any number of visual tokens: M3 on the embedded model, taught for a few steps, saved and brought back.

Needs jeton[train,demo].
"""

import tempfile

from transformers import AutoModelForImageTextToText, AutoProcessor

import jeton
from jeton import bridge
from jeton.bridge.m3 import loss
from jeton.demo import prompt
from jeton.demo.batches import Batches
from jeton.train import Recipe, train

demo = jeton.load_demo()
model = bridge.attach(demo.model, "m3")


def scenes(step):
    drawn = next(Batches(demo.processor.tokenizer, 4, seed=step, tokens=model.bridge.tokens))
    return {"pixel_values": drawn.pixels, "input_ids": drawn.ids, "attention_mask": drawn.attended, "labels": drawn.labels}


told = train(model, scenes, lambda m, batch: loss(m, batch, (144, 36, 9)), Recipe(steps=8, rate=3e-4), progress=False)
print({name: f"{values[0]:.2f} -> {values[-1]:.2f}" for name, values in told.losses.items()})

with tempfile.TemporaryDirectory() as folder:
    model.bridge.scale(36)
    model.save_pretrained(folder)
    bridge.fit(demo.processor, model).save_pretrained(folder)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

one = demo.examples[0]
inputs = processor(images=one.image, text=prompt(one.question), return_tensors="pt")
said = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
print(f"{inputs['input_ids'].shape[1]} tokens: {one.question} {processor.decode(said, skip_special_tokens=True).strip()}")
