"""Patch Matters on a photograph, with the embedded model as captioner and scripted experts beside it. Needs jeton[demo].

With real models: VisionLanguageCaptioner(model, processor), ZeroShotDetector(model, processor, labels), BlipScorer(model,
processor) and ChatModel(model, tokenizer) from the same module.
"""

import re

from PIL import Image
from skimage.data import chelsea

import jeton
from jeton.perception.experts import Detection, VisionLanguageCaptioner
from jeton.perception.patch_matters import PatchMatters

photograph = Image.fromarray(chelsea())
demo = jeton.load_demo()  # it has only ever seen coloured digits
captioner = VisionLanguageCaptioner(demo.model, demo.processor, max_new_tokens=6)


def detector(image):
    return [Detection((100, 20, 330, 250), 0.9, "cat")]


def scorer(image, texts):
    """Believes in colours that are there: a stand-in for an image-text model."""
    red, _, blue = (sum(channel.histogram()[128:]) for channel in image.split())
    return [0.6 if ("red" in text and red > blue) or ("blue" in text and blue > red) else 0.1 for text in texts]


def language_model(chats, temperature):
    """Follows the prompts' formats by rule: groups equal answers, and writes what it is given."""
    answers = []
    for rules, task in ((chat[0]["content"], chat[1]["content"]) for chat in chats):
        if "in brackets" in rules:
            answers.append("[cat]")
        elif "CONTRADICTORY" in rules:
            texts = [line.partition(": ")[2] for line in task.splitlines()]
            same = [f'- "{text}"' for text in dict.fromkeys(texts) if texts.count(text) > 1]
            alone = [f'- "{text}" ({at})' for at, text in enumerate(texts, 1) if texts.count(text) == 1]
            answers.append("\n".join(["SAME", *same, "CONTRADICTORY", "UNIQUE", *alone]))
        else:
            said = [re.sub(r"^(- |Picture: |Main part: |Region .: )", "", line) for line in task.splitlines()]
            answers.append("; ".join(dict.fromkeys(said)))
    return answers


describe = PatchMatters(
    captioner, detector, scorer, language_model, question="What color is it?", short_question="What is there?"
)
told = describe(photograph)
for region in (*told.quadrants, *([told.main] if told.main else [])):
    print([round(edge) for edge in region.box.tolist()], "said", list(region.texts), "believed", list(region.kept))
print("caption:", told.caption)
