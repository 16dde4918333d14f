"""Asks a model about one image and prints the answer.

    python -m mfrsvlm.demo [IMAGE] [--question TEXT] [--model DIR_OR_HUB_ID]

Without an image it draws one. Without a model it converts the tiny reference checkpoint of the repository, whose weights
are random: everything is real but the answer.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from mfrsvlm.convert_checkpoint import convert_released


ROOT = Path(__file__).parent
REFERENCE = ROOT.parent / "tests" / "reference" / "checkpoint"
OUTPUT = ROOT / "output"


def draw_scene() -> Image.Image:
    """A small airfield seen from above, 512 x 512."""
    image = Image.new("RGB", (512, 512), (96, 120, 72))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 380, 512, 512), fill=(58, 92, 122))  # water
    draw.line((20, 330, 490, 60), fill=(70, 70, 74), width=34)  # runway
    draw.line((20, 330, 490, 60), fill=(225, 225, 225), width=2)
    draw.rectangle((60, 60, 230, 170), fill=(140, 140, 136))  # apron
    for column in range(4):
        x, y = 80 + 38 * column, 110
        draw.polygon([(x, y - 14), (x + 14, y + 6), (x, y + 2), (x - 14, y + 6)], fill=(240, 240, 240))
        draw.line((x, y - 16, x, y + 16), fill=(240, 240, 240), width=4)
    for column in range(3):
        draw.ellipse((300 + 46 * column, 270, 334 + 46 * column, 304), fill=(205, 205, 200))  # tanks
    return image


def reference_model() -> Path:
    """The reference checkpoint, converted."""
    if not REFERENCE.is_dir():
        raise FileNotFoundError(f"{REFERENCE} is only in a clone of the repository: pass --model with a folder or Hub id.")
    print("Converting the reference checkpoint ...")
    folder = OUTPUT / "random-model"
    convert_released(REFERENCE, str(REFERENCE / "vision_tower"), folder, overwrite=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.demo", description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="?", type=Path, help="image file; drawn if left out")
    parser.add_argument("--question", default="How many aircraft are on the apron?")
    parser.add_argument("--model", help="model folder or Hub id")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    try:
        model_id = args.model or str(reference_model())
        image: Image.Image | str
        if args.image is None:
            OUTPUT.mkdir(parents=True, exist_ok=True)
            image = draw_scene()
            image.save(OUTPUT / "scene.png")
            print(f"Image:    {OUTPUT / 'scene.png'} (drawn)")
        else:
            image = str(args.image)
            print(f"Image:    {args.image}")
        start = time.perf_counter()
        print(f"Model:    {model_id}")
        processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(model_id, trust_remote_code=True)
        content = [{"type": "image", "image": image}, {"type": "text", "text": args.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"Question: {args.question}")
    print(f"Answer:   {answer.strip()}")
    windows = sum(window.num_windows for window in model.config.windows)
    seconds = time.perf_counter() - start
    print(f"({windows + 1} encoder passes, {inputs['input_ids'].shape[1]} prompt tokens, {seconds:.1f} s with loading)")
    if args.model is None:
        print("The weights of this model are RANDOM, so the answer means nothing. Pass --model for a trained one.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
