"""RSVG-HR: boxes of referring expressions, one per line: `IMAGE,x1,y1,x2,y2,EXPRESSION`, in pixels."""

from pathlib import Path

from .info import BenchmarkInfo
from .reading import find, inside, left_out, read_lines, read_size, require_images, take_box
from .sample import Benchmark, Sample


def load_rsvg_hr(
    name: str,
    root: Path,
    split: str,
    check_counts: bool,
    broken_rows: str = "error",
    allow_outside_images: bool = False,
) -> Benchmark:
    """One sample per line.

    Args:
        broken_rows: "error", or "skip" to skip lines without an expression or with box corners in the wrong order. One line
            of the published training list has a comma as decimal point: "216,00". They are counted in `left_out`.

    Raises:
        BenchmarkError: see `reading`; or a box outside of its image.
    """
    path = find(root, (f"rsvg_hr_{split}.txt", f"{split}.txt"), "list of expressions")
    folder = find(root, ("images", "JPEGImages"), "folder of images").name
    rows, broken = [], {}
    for number, line in read_lines(path):
        image, *numbers, expression = (part.strip() for part in [*line.split(",", 5), *[""] * 5][:6])
        x1, y1, x2, y2 = box = take_box(numbers, (4,), path, number) if expression else (0.0,) * 4
        if x1 < x2 and y1 < y2 and expression:
            rows.append((number, f"{folder}/{image}", box, expression))
        else:
            broken[number] = line
    left = left_out(broken, len(rows) + len(broken), path, "a box out of order", broken_rows)
    require_images(root, (image for _, image, _, _ in rows), allow_outside_images)
    sizes = {image: read_size(root, image, allow_outside_images) for image in {image for _, image, _, _ in rows}}
    samples = [
        Sample(
            id=str(number),
            images=(image,),
            task="grounding",
            question=expression,
            references=(),
            boxes=(inside(box, sizes[image], path, number),),
            image_size=sizes[image],
        )
        for number, image, box, expression in rows
    ]
    return Benchmark(name, split, root, samples, left_out=left)


BENCHMARK = BenchmarkInfo(
    loader=load_rsvg_hr,
    splits={"train": 2151, "test": 499},
    tasks=("grounding",),
    source="https://github.com/LANMNG/LQVG",
)
