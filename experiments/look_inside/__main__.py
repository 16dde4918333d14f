"""Looks inside two trained models, one with injection and one without, to see whether injection does what it is for.

    python -m mfrsvlm.experiments.look_inside WITH_INJECTION_DIR [WITHOUT_INJECTION_DIR] \\
        --table docs/inside/table.md --plot docs/inside/inside.png

Three measurements on synthetic scenes of the test split: attention mass (`attention`), visual forgetting (`probes`) and
routing (`routing`). With one folder, the second model is the first with its injection switched off. What it reads then is
what injection adds to this model, not how well a model does that was trained without.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...files.writing import check_file
from ...scenes import KINDS, ask, draw
from ...training.demo_model.scene_images import OBJECT_PIXELS, SCENE_SIZE, plan
from ..estimates import plain
from .attention import measure_attention
from .plot import plot
from .probes import OBJECTS, probe_prompts, probe_tokens
from .reading import Reading, count_questions, load, read, switched_off
from .routing import measure_routing
from .table import write_table


def look_inside(
    with_injection: str | Path, without_injection: str | Path | None, num_scenes: int, num_probe_scenes: int
) -> dict[str, Any]:
    """Makes all measurements and returns their numbers, ready for JSON.

    Args:
        with_injection: folder of the model with injection.
        without_injection: folder of the other model; `None` for the first with its injection switched off.
        num_scenes: scenes of the test split.
        num_probe_scenes: scenes of the validation split, to fit the probes on.

    Raises:
        ValueError: too few scenes, or models whose layers cannot be compared.
    """
    if num_scenes < 2 or num_probe_scenes < 4:
        raise ValueError(f"--scenes {num_scenes} must be at least 2, and --probe-scenes {num_probe_scenes} at least 4.")
    model, processor = load(with_injection)
    other = (switched_off(model), processor) if without_injection is None else load(without_injection)
    models = {"with": (model, processor), "without": other}
    depths = [model.config.text_config.num_hidden_layers for model, _ in models.values()]
    if depths[0] != depths[1]:
        raise ValueError(f"The decoders have {depths[0]} and {depths[1]} layers, which cannot be compared one by one.")

    scenes = [plan("test", index) for index in range(num_scenes)]
    probe_scenes = [plan("validation", index) for index in range(num_probe_scenes)]
    readings: dict[str, list[Reading]] = {name: [] for name in models}
    probe_readings: dict[str, list[Reading]] = {name: [] for name in models}
    for split, kept, questions_of in (
        (scenes, readings, lambda scene: [*ask(scene), *count_questions(scene)]),
        (probe_scenes, probe_readings, count_questions),
    ):
        for scene in tqdm(split, desc="scenes", leave=False):
            image = draw(scene)
            for name, (model, processor) in models.items():
                kept[name].append(read(model, processor, image, questions_of(scene)))

    measured = {
        name: {
            "injection_layers": model.config.injection_layers,
            "attention": measure_attention(readings[name]),
            "visual_tokens": probe_tokens(probe_readings[name], probe_scenes, readings[name], scenes),
            "last_prompt_position": probe_prompts(probe_readings[name], probe_scenes, readings[name], scenes),
        }
        for name, (model, _) in models.items()
    }
    differences = {
        f"{group}: {name}": measured["with"][group][name] - measured["without"][group][name]
        for group, name in (
            ("attention", "first"),
            ("attention", "answer"),
            ("visual_tokens", "count"),
            ("last_prompt_position", "asked_count"),
            ("last_prompt_position", "any_count"),
        )
    }
    result = {
        "scenes": {
            "test": num_scenes,
            "validation (probes)": num_probe_scenes,
            "size": SCENE_SIZE,
            "object_pixels": OBJECT_PIXELS,
        },
        "columns of count and presence_auc": list(OBJECTS),
        "columns of any_count": list(KINDS),
        **measured,
        "with minus without": differences,
        "routing": measure_routing(*models["with"], num_scenes),
    }
    return plain(result)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.look_inside", description=__doc__.splitlines()[0])
    parser.add_argument("with_injection", metavar="WITH_INJECTION_DIR", help="Hub folder of the model with injection")
    parser.add_argument(
        "without_injection",
        metavar="WITHOUT_INJECTION_DIR",
        nargs="?",
        help="and of the one without; else the first, switched off",
    )
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--plot", type=Path, help="figure to write")
    parser.add_argument("--scenes", type=int, default=200, help="scenes of the test split")
    parser.add_argument("--probe-scenes", type=int, default=400, help="scenes of the validation split, to fit the probes on")
    args = parser.parse_args(arguments)
    for path in (args.table, args.plot):
        if path is not None:
            check_file(path)
    result = look_inside(args.with_injection, args.without_injection, args.scenes, args.probe_scenes)
    write_table(result, args.table)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
