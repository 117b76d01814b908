"""LLaVA-Mini: one visual token, and a text that has read the picture before the language model does. What each part costs.

The bridge starts from the language model's own layers and is not trained here; `jeton train llava-mini` does that.
"""

import jeton
from jeton import bridge
from jeton.demo import prompt

demo = jeton.load_demo()
model = bridge.attach(demo.model, "llava-mini", side=1, fusion_layers=2).eval()
model.bridge.start_from(model.model.language_model)
processor = bridge.fit(demo.processor, model)

shown = demo.examples[:2]
inputs = processor(
    images=[one.image for one in shown], text=[prompt(one.question) for one in shown], padding=True, return_tensors="pt"
)
ran = []
model.bridge.fusion.register_forward_hook(lambda *_: ran.append(1))
said = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(f"prompts of {inputs['input_ids'].shape[1]} tokens, {model.bridge.tokens} visual each; fusion ran {len(ran)} time(s)")
print("generated:", processor.batch_decode(said[:, inputs["input_ids"].shape[1] :]))
