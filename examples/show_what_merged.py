"""Which patches merge or leave, block by block, drawn over a photograph.

    python examples/show_what_merged.py --out merged.png

The encoder is the one of the embedded model, which was trained on small scenes, not on photographs: the picture shows how the
methods work. Needs jeton[demo].
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from skimage import data

import jeton

METHODS = ("tome(keep=0.25)", "pitome(keep=0.25)", "evit(keep=0.25)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("merged.png"))
    out = parser.parse_args().out
    demo = jeton.load_demo()
    encoder = demo.model.model.vision_tower
    photo = Image.fromarray(data.astronaut()[:256, 96:352])
    pixels = demo.processor.image_processor(photo, return_tensors="pt")["pixel_values"]

    rows = []
    for method in METHODS:
        with jeton.apply(encoder, method) as run, torch.no_grad():
            encoder(pixels)
            tokens = run.report().encoder_tokens
            rows.append([run.picture(layer, of=photo, size=240) for layer in range(len(tokens))])
            print(f"{method}: tokens entering each block {[round(n) for n in tokens]}")

    canvas = Image.new("RGB", (246 * len(rows[0]) - 6, 246 * len(rows) - 6), "white")
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            canvas.paste(panel, (246 * x, 246 * y))
    canvas.save(out)
    print(f"wrote {out}: one row for each method, one column for each block")


if __name__ == "__main__":
    main()
