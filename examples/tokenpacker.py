"""A large picture through TokenPacker: tiles, each of 16 tokens in the place of 144. The bridge is not trained here; `jeton train
tokenpacker` does that.
"""

import jeton
from jeton import bridge
from jeton.bridge.tokenpacker import layout, tiles

demo = jeton.load_demo()
model = bridge.attach(demo.model, "tokenpacker", scale=3).eval()
processor = bridge.fit(demo.processor, model)

picture = demo.examples[0].image.resize((240, 160))
parts, marks = tiles(picture, tile=84)
inputs = processor(images=parts, text=f"USER: {marks}How many digits are there? ASSISTANT:", return_tensors="pt")
visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
rows, columns = layout(picture.height, picture.width, 84)
print(f"{rows} x {columns} tiles and a thumbnail: {visual} visual tokens, {144 * len(parts)} without TokenPacker")
print("generated:", processor.decode(model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]))
