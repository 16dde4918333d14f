"""Writes a data set of synthetic scenes, or a contact sheet of example scenes.

python -m mfrsvlm.scenes OUT --split train --count 1000
python -m mfrsvlm.scenes --contact-sheet scenes.jpg
"""

import os
import sys
from pathlib import Path

from ..arguments import ArgumentParser
from ..files.writing import WriteError, check_file, write_image
from .contact_sheet import contact_sheet
from .dataset import DatasetPlan, write_dataset
from .drawing import SPLITS
from .questions import TASKS


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="mfrsvlm scenes", description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder for images and questions; must be new or empty")
    parser.add_argument("--contact-sheet", type=Path, metavar="PATH", help="write one image with example scenes instead")
    parser.add_argument("--split", choices=SPLITS, default="train", help="splits do not overlap (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1000, help="number of scenes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="side of the images, pixels (default: %(default)s)")
    parser.add_argument(
        "--object-pixels",
        type=float,
        nargs=2,
        default=(8.0, 16.0),
        metavar=("MIN", "MAX"),
        help="shortest and longest object, pixels (default: 8 16)",
    )
    parser.add_argument(
        "--changes", type=int, default=0, help="number of scenes with a later image and a question about both (default: 0)"
    )
    parser.add_argument(
        "--tasks", nargs="*", default=list(TASKS), metavar="TASK", help=f"any of {', '.join(TASKS)} (default: each once)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    args = parser.parse_args(arguments)
    if (args.out is None) == (args.contact_sheet is None):
        parser.error("give either the folder OUT or --contact-sheet PATH")
    try:
        if args.contact_sheet is not None:
            check_file(args.contact_sheet, is_image=True)
            write_image(args.contact_sheet, contact_sheet(), quality=80)
            print(f"Drawn: {args.contact_sheet}")
            return 0
        low, high = args.object_pixels
        plan = DatasetPlan(args.split, args.count, args.size, (low, high), args.changes, tuple(args.tasks))
        rows = write_dataset(args.out, plan, args.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, WriteError) else 1
    print(f"Written: {rows} questions about {plan.count} scenes to {args.out / plan.split}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
