"""Asks a model about an image, prints its answers and draws its boxes.

    python -m mfrsvlm.demo [IMAGE] [--question TEXT ...] [--model DIR_OR_HUB_ID] [--scene NUMBER]

Without an image, it draws a synthetic scene that the model has never seen, and prints the true answers beside the model's.
Without `--model`, it loads the small model in this folder, which was trained on synthetic scenes only.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers.utils import logging

from ..files.model_folder import load_model
from ..image_sources_mfrsvlm import open_image
from ..processing_mfrsvlm import MFRSVLMProcessor
from ..scenes import Question, ask, draw, plan_scene, scene_seed


FOLDER = Path(__file__).parent
MODEL, OUTPUT = FOLDER / "model", FOLDER / "output"
TASKS = ("classification", "area", "presence", "count", "comparison", "position", "caption", "grounding")
PANEL = 512  # pixels


def answer(model, processor, image: Image.Image | str, questions: list[str]) -> list[str]:
    """Answers of the model to questions about one image, in one batch."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    said = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def draw_answers(image: Image.Image, lines: list[tuple[str, str]], boxes: list[tuple[str, list[float]]]) -> Image.Image:
    """A picture with the image on the left and the text on the right.

    Args:
        image: RGB image.
        lines: (colour, text) of each paragraph.
        boxes: (colour, (x1, y1, x2, y2)) in pixels of the image.
    """
    scale = PANEL / max(image.size)
    left = image.resize((round(image.width * scale), round(image.height * scale)))
    picture = Image.new("RGB", (2 * PANEL + 48, PANEL), "white")
    picture.paste(left)
    pen = ImageDraw.Draw(picture)
    for colour, box in boxes:
        x1, y1, x2, y2 = (value * scale for value in box)
        pen.rectangle((x1 - 3, y1 - 3, x2 + 3, y2 + 3), outline=colour, width=2)
    font = ImageFont.load_default(13)
    y = 10
    for colour, text in lines:
        words = text.split()
        while words:  # wrap
            count = len(words)
            while count > 1 and font.getlength(" ".join(words[:count])) > PANEL + 20:
                count -= 1
            pen.text((PANEL + 14, y), " ".join(words[:count]), fill=colour, font=font)
            words, y = words[count:], y + 18
        y += 0 if text.endswith("?") else 7
    return picture


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.demo", description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="?", type=Path, help="image file; default: a synthetic scene")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--model", default=str(MODEL), help="model folder or Hub id")
    parser.add_argument("--scene", type=int, default=0, help="number of the synthetic scene")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    asked: list[Question] = []
    try:
        if args.model == str(MODEL) and not MODEL.is_dir():
            raise FileNotFoundError(f"{MODEL} is only in a clone of the repository: pass --model with a folder or Hub id.")
        start = time.perf_counter()
        model, processor = load_model(args.model, dtype=torch.float32)
        if args.image is None:
            scene = plan_scene(scene_seed("demo", args.scene))
            image = draw(scene)
            asked = ask(scene, TASKS)
        else:
            image = open_image(str(args.image))
        texts = args.question or [question.text for question in asked] or ["Describe this image."]
        if args.question:
            asked = []
        said = answer(model, processor, image, texts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    print(f"Model: {args.model}\nImage: {args.image or f'synthetic scene {args.scene}'}, {image.width} x {image.height}")
    lines, boxes = [], []
    truths = [question.answer for question in asked] or [""] * len(texts)
    for text, reply, truth in zip(texts, said, truths, strict=True):
        print(f"\nQ: {text}\nA: {reply}" + (f"   (true: {truth})" if truth else ""))
        lines += [("black", text), ("#1f5f8b", reply + (f"   (true: {truth})" if truth else ""))]
        (found,) = MFRSVLMProcessor.post_process_boxes([reply], [(image.height, image.width)])
        boxes += [("yellow", box) for box in found.tolist()]
    boxes += [("white", list(box)) for question in asked for box in question.boxes]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw_answers(image.convert("RGB"), lines, boxes).save(OUTPUT / "answers.png")
    print(f"\n{time.perf_counter() - start:.1f} s with loading. Picture: {OUTPUT / 'answers.png'}")
    if boxes and asked:
        print("Boxes: yellow is the model's, white is true.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
