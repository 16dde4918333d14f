"""Linear probes on the features of each arm of `ablation`, without a decoder.

    python -m mfrsvlm.experiments.linear_probe --work DIR --table docs/ablation/linear_probe.md

The features that the arms see (scales, canvas, overlap, encoding, stitching, encoder) are averaged over the tokens of the
image, for each group of stacks. Ridge regression then predicts how many objects of each kind the scene holds. It costs
minutes where a trained decoder costs hours, and it has no seed. It shows what there is to be learned, and not how well a
decoder learns it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..evaluation.intervals import mean_interval
from ..files.writing import check_file, write_file
from ..scenes import KINDS, Scene
from ..training.demo_model.architecture import make_config
from ..training.demo_model.scene_images import CANVAS, SCENE_SIZE, SceneImages
from .ablation import ARMS, REFERENCE, encode_both, encoded_features, features_of, pretrain_encoders
from .estimates import Estimate, r_squared


# Objects below this length, in pixels of the canvas, count as small.
SMALL = 6.0
# Strengths of the ridge, relative to the variance of a feature (1, as features are standardized).
PENALTIES = np.logspace(-4, 2, 13)
# Share of the scenes that choose the strength.
HELD_OUT = 0.2
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


def linear_probe(states: np.ndarray, targets: np.ndarray, scene_of_row: np.ndarray, test_states: np.ndarray) -> np.ndarray:
    """Predicts targets from new states by ridge regression.

    The last fifth of the scenes chooses the strength for each target, then all scenes are fitted.
    Features are standardized, so that the scale of states, which grows with depth, plays no part.

    Args:
        states: (rows, d).
        targets: (rows, q).
        scene_of_row: (rows,). Whole scenes are held out, because rows of one scene are alike.
        test_states: (test rows, d).

    Returns:
        (test rows, q)
    """
    states, targets = states.astype(np.float64), targets.astype(np.float64)
    held_out = scene_of_row >= round((1 - HELD_OUT) * (scene_of_row.max() + 1))
    errors = []
    for penalty in PENALTIES:
        trial = ridge(penalty * (~held_out).sum()).fit(states[~held_out], targets[~held_out])
        errors.append(np.square(trial.predict(states[held_out]) - targets[held_out]).sum(0))
    best = PENALTIES[np.argmin(errors, axis=0)]  # (q,)
    return ridge(best * len(states)).fit(states, targets).predict(test_states.astype(np.float64))


def ridge(strength: Any) -> Any:
    """Ridge regression on standardized features, with one strength or one for each target."""
    return make_pipeline(StandardScaler(), Ridge(strength))


def measure(name: str, counts: dict[str, int], work: Path) -> dict[str, Any]:
    """R² over all kinds for objects of all sizes and for small ones, and exact counts; with the bootstrap for pairing."""
    features = SETS[name]
    groups = 2 * len(features.window_sizes)  # scales x depths
    states, truths = {}, {}
    for split, count in counts.items():
        states[split] = pool(features_of(features, split, count, work), groups)
        truths[split] = targets(SceneImages(work / "scenes", split, count).scenes)
    predicted = linear_probe(states["train"], truths["train"], np.arange(counts["train"]), states["test"])
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
        "encoder_passes": config.encoder_passes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.linear_probe", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, encoders and features")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--train-scenes", type=int, default=1600)
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--crowded-scenes", type=int, default=4000, help="of the encoders")
    parser.add_argument("--encoder-steps", type=int, default=3000)
    args = parser.parse_args(arguments)
    check_file(args.table)
    counts = {"train": args.train_scenes, "test": args.test_scenes}
    encoders = dict.fromkeys(features.encoder for features in SETS.values())
    pretrain_encoders(encoders, args.work, args.crowded_scenes, args.encoder_steps)
    for features in dict.fromkeys(map(encoded_features, SETS.values())):
        encode_both(features, counts, args.work)

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
    write_file(args.table, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
