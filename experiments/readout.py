"""What a linear read-out counts in the features of each arm, before any decoder.

    python -m mfrsvlm.experiments.readout --work DIR --output docs/ablation

The features that the arms of `ablation` see (scales, canvas, overlap, encoding, stitching, encoder) are averaged over the
tokens of the image, stack group by stack group, and ridge regression predicts how many objects of each kind the scene
holds. It costs minutes where a trained decoder costs hours, and it has no seed: it says what there is to be learned, and
not how well a decoder learns it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfrsvlm.evaluation.intervals import mean_interval
from mfrsvlm.experiments.ablation import (
    ARMS,
    REFERENCE,
    encode_both,
    encoder_passes,
    feature_file,
    features_of,
    pretrain_encoders,
    whole,
)
from mfrsvlm.experiments.dataset import CANVAS, SCENE_SIZE, SceneImages
from mfrsvlm.experiments.encoder import measure_tokens
from mfrsvlm.experiments.geometry import make_config
from mfrsvlm.experiments.look_inside import Estimate, probe, r_squared
from mfrsvlm.scenes import KINDS, Scene


# Objects below this length, in pixels of the canvas, count as small.
SMALL = 6.0
ENCODERS = ("resnet", "vit")
SETS = {name: arm.features for name, arm in ARMS.items() if not name.startswith(("injected", "token", "cross"))}


def pool(features: np.ndarray, groups: int) -> np.ndarray:
    """Means over tokens, and over the phases of a scale and depth: (n, 1 + K, T, C) to (n, (1 + groups) * C)."""
    visual = features[:, 0].mean(1, dtype=np.float32)  # (n, C)
    if not groups:
        return visual
    details = features[:, 1:].mean(2, dtype=np.float32)  # (n, K, C)
    details = details.reshape(len(details), groups, -1, details.shape[-1]).mean(2)  # (n, groups, C)
    return np.concatenate([visual, details.reshape(len(details), -1)], axis=1)


def targets(scenes: Sequence[Scene]) -> np.ndarray:
    """(n, 2 * kinds): how many objects of each kind there are, and how many of them are small."""
    small = SMALL * SCENE_SIZE / CANVAS
    rows = []
    for scene in scenes:
        few = [sum(item.kind == kind and item.length < small for item in scene.objects) for kind in KINDS]
        rows.append([*scene.counts.values(), *few])
    return np.array(rows, dtype=np.float64)


def measure(name: str, counts: dict[str, int], work: Path) -> dict[str, Any]:
    """R² over all kinds for objects of all sizes and for small ones, and exact counts; with the bootstrap for pairing."""
    features = SETS[name]
    groups = 2 * len(features.window_sizes)  # scales x depths
    states, truths = {}, {}
    for split, count in counts.items():
        states[split] = pool(features_of(features, split, count, work), groups)
        truths[split] = targets(SceneImages(work / "scenes", split, count).scenes)
    predicted = probe(states["train"], truths["train"], np.arange(counts["train"]), states["test"])
    rows = np.arange(counts["test"])
    score = r_squared(predicted, truths["test"], rows)  # (2 * kinds)
    kinds = len(KINDS)
    present = truths["test"][:, :kinds] > 0
    right = np.rint(predicted[:, :kinds]) == truths["test"][:, :kinds]
    config = make_config(
        8,
        features.encoder,
        window_sizes=list(features.window_sizes),
        window_overlap=features.window_overlap,
        window_encoding=features.window_encoding,
        injection_layers=[1] if features.window_sizes else [],
    )
    return {
        "r2": Estimate(score.value[:kinds].mean(), score.resampled[:, :kinds].mean(1)),
        "r2_small": Estimate(score.value[kinds:].mean(), score.resampled[:, kinds:].mean(1)),
        "exact": mean_interval(right[present].astype(float).tolist()),
        "encoder_passes": encoder_passes(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.readout", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, encoders and features")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--train-scenes", type=int, default=1600)
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--crowded-scenes", type=int, default=4000, help="of the encoders")
    parser.add_argument("--encoder-steps", type=int, default=3000)
    args = parser.parse_args()
    counts = {"train": args.train_scenes, "test": args.test_scenes}
    pretrain_encoders(ENCODERS, args.work, args.crowded_scenes, args.encoder_steps)
    for features in dict.fromkeys(map(whole, SETS.values())):
        if not all(feature_file(features, split, count, args.work).exists() for split, count in counts.items()):
            encode_both(features, counts, args.work)

    args.output.mkdir(parents=True, exist_ok=True)
    results = {name: measure(name, counts, args.work) for name in SETS}
    lines = [
        "| features | encoder passes | R², all objects | R², small objects | difference, small | exact count, of 1 to 9 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = [name, f"{row['encoder_passes']:g}"]
        for estimate in (row["r2"], row["r2_small"], row["r2_small"] - results[REFERENCE]["r2_small"]):
            numbers = estimate.numbers()
            cells.append(f"{numbers['mean']:.3f} [{numbers['low']:.3f}, {numbers['high']:.3f}]")
        mean, low, high = row["exact"]
        cells.append(f"{100 * mean:.1f} ± {50 * (high - low):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    (args.output / "readout.md").write_text("\n".join(lines) + "\n")

    encoders = {
        name: measure_tokens(name, args.work / f"encoder-{name}.pt", args.work, args.test_scenes) for name in ENCODERS
    }
    lines = ["| encoder | image | presence of a kind | exact count, of 0 to 9 | exact count, of 1 to 9 | scene class |"]
    lines.append("|---" * 6 + "|")
    for encoder, views in encoders.items():
        for view, known in views.items():
            cells = [f"{100 * m:.1f} ± {50 * (high - low):.1f}" for m, low, high in known.values()]
            lines.append(f"| {encoder} | {view} | " + " | ".join(cells) + " |")
    (args.output / "encoders.md").write_text("\n".join(lines) + "\n")
    numbers = {
        name: {key: value.numbers() if isinstance(value, Estimate) else value for key, value in row.items()}
        for name, row in results.items()
    }
    text = json.dumps({"features": numbers, "encoders": encoders}, indent=1, default=float)
    (args.output / "readout.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
