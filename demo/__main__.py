"""Asks the small model about an image, prints the answers and draws them: `mfrsvlm demo`.

Without an image, it draws a held-out synthetic scene and also prints the true answers. Without `--model`, it loads one of
the two small models in this folder: that of synthetic scenes, or for an image that of aerial photographs.
"""

import sys
import time

from ..arguments import ArgumentParser, add_loading_arguments
from ..files.writing import WriteError, check_file, write_image
from . import MODEL, PHOTO_MODEL


TASKS = ("classification", "area", "presence", "count", "comparison", "position", "caption", "grounding")
PHOTO_QUESTIONS = ("What is the class of this scene?", "Describe this image in one sentence.", "Does this image show trees?")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mfrsvlm demo", description="Asks the small model about an image, prints the answers and draws them."
    )
    parser.add_argument("image", nargs="?", help="image file (default: a synthetic scene)")
    parser.add_argument("--question", action="append", help="may be given several times")
    help_model = "model folder or Hub id (default: the small model of photographs for an image, else that of scenes)"
    parser.add_argument("--model", help=help_model)
    parser.add_argument("--scene", type=int, default=0, help="number of the synthetic scene (default: %(default)s)")
    parser.add_argument("--picture", default="answers.png", help="file to draw (default: %(default)s)")
    add_loading_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    # Imported here: `--help` and wrong options need none of it.
    from transformers.utils import logging

    from ..evaluation.answering import load
    from ..image_sources_mfrsvlm import open_image
    from ..scenes import ask, draw, plan_scene, scene_seed
    from .answering import answer
    from .picture import draw_answers

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        check_file(args.picture, is_image=True)
        start = time.perf_counter()
        name = args.model or (MODEL if args.image is None else PHOTO_MODEL)
        model, processor = load(
            name,
            dtype="float32",
            trust_remote_code=args.trust_remote_code,
            allow_incomplete=args.allow_incomplete,
        )
        if args.image is None:
            scene = plan_scene(scene_seed("demo", args.scene))
            image, asked = draw(scene), ask(scene, TASKS)
        else:
            image, asked = open_image(args.image), []
        if args.question:
            asked = []
        texts = args.question or [question.text for question in asked] or list(PHOTO_QUESTIONS)
        answers = answer(model, processor, image, texts)
        print(f"Model: {name}\nImage: {args.image or f'synthetic scene {args.scene}'}, {image.width} x {image.height}")
        lines = []
        truths = [f"   (true: {question.answer})" for question in asked] or [""] * len(texts)
        for reply, truth in zip(answers, truths, strict=True):
            print(f"\nQ: {reply.question}\nA: {reply.text}{truth}")
            lines.append((reply.question, reply.text + truth))
        found = [("yellow", box) for reply in answers for box in reply.boxes]
        true = [("white", list(box)) for question in asked for box in question.boxes]
        write_image(args.picture, draw_answers(image.convert("RGB"), lines, found + true))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, WriteError) else 1
    print(f"\n{time.perf_counter() - start:.1f} s with loading. Picture: {args.picture}")
    if found and true:
        print("Boxes: yellow is the model's, white is true.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
