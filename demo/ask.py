"""Asks a model about one image: `mfrsvlm ask IMAGE QUESTION ... --model FOLDER_OR_HUB_ID`."""

import json
import sys
from dataclasses import asdict

from ..arguments import DTYPES, ArgumentParser


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mfrsvlm ask", description="Asks a model about one image and prints answers and boxes.")
    parser.add_argument("image", help="image file or URL")
    parser.add_argument("questions", nargs="+", metavar="question", help="one or more questions, each in quotes")
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object; boxes are x1, y1, x2, y2 in pixels")
    parser.add_argument("--picture", metavar="PATH", help="write an image with the boxes and the answers to this file")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum length of an answer (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="type of the weights (default: as saved)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the model folder")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    # Imported here: `--help` and wrong options need none of it.
    from transformers.utils import logging

    from ..image_sources_mfrsvlm import open_image
    from .answering import answer, load
    from .picture import draw_answers

    logging.disable_progress_bar()
    try:
        image = open_image(args.image)
        model, processor = load(args.model, args.dtype, args.device, args.trust_remote_code)
        answers = answer(model, processor, image, args.questions, args.max_new_tokens)
        if args.picture is not None:
            lines = [(reply.question, reply.text) for reply in answers]
            boxes = [("yellow", box) for reply in answers for box in reply.boxes]
            draw_answers(image.convert("RGB"), lines, boxes).save(args.picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        sizes = {"width": image.width, "height": image.height}
        rows = [asdict(reply) for reply in answers]
        print(json.dumps({"model": args.model, "image": args.image, **sizes, "answers": rows}))
        return 0
    for reply in answers:
        print(f"Q: {reply.question}\nA: {reply.text}")
        for box in reply.boxes:
            print("   box in pixels: " + ", ".join(f"{value:.0f}" for value in box))
    return 0


if __name__ == "__main__":
    sys.exit(main())
