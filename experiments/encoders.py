"""Measures the predictions of the pretrained encoders from their tokens on held-out scenes, without a decoder.

python -m mfrsvlm.experiments.encoders --work DIR --table docs/ablation/encoders.md
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..evaluation.intervals import mean_interval
from ..files.writing import check_file, write_file
from ..modeling_mfrsvlm import MFRSVLMModel
from ..scenes import CLASSES
from ..training.demo_model.architecture import IMAGE_SIZE, PATCH_SIZE, make_config
from ..training.demo_model.encoder import TokenHeads, encode, load_encoder
from ..training.demo_model.scene_images import VIEW, SceneImages, to_pixels
from .ablation import pretrain_encoders


ENCODERS = ("resnet", "vit")


@torch.inference_mode()
def measure_tokens(encoder: str, path: Path, work: Path, scenes: int) -> dict[str, dict[str, tuple[float, float, float]]]:
    """What the tokens of a pretrained encoder know of held-out scenes, without any language.

    A kind is counted by the tokens that say it is present: two objects in one token count as one. The canvas is read in
    four windows side by side, the global view in one.

    Returns:
        For the canvas and the global view: share of right answers and its 95 % interval for the presence and the count
        of a kind, the count where it is present, and the class of the scene.
    """
    config = make_config(16, encoder)
    model = MFRSVLMModel(config)
    load_encoder(model, path)
    model.eval()
    head = TokenHeads(config.vision_feature_size, IMAGE_SIZE // PATCH_SIZE)
    state = torch.load(path, weights_only=True)["heads"]
    last = len(config.detail_feature_layers) - 1
    head.load_state_dict({name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{last}.")})
    images = SceneImages(work / "scenes", "test", scenes)
    result = {}
    for view, source in (("canvas", images.canvases), ("global view", images.views)):
        right: dict[str, list[float]] = {"presence": [], "count": [], "count of present": [], "class": []}
        for index, scene in enumerate(images.scenes):
            pixels = to_pixels(source[index : index + 1])  # (1, 3, s, s)
            tiles = pixels.unfold(2, VIEW, VIEW).unfold(3, VIEW, VIEW).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
            objects, _, classes = head(encode(model, tiles)[-1])
            predicted = (objects[..., 0] > 0).sum((0, 1)).tolist()
            for number, true in zip(predicted, scene.counts.values(), strict=True):
                right["presence"].append(float((number > 0) == (true > 0)))
                right["count"].append(float(number == true))
                if true:
                    right["count of present"].append(float(number == true))
            right["class"].append(float(list(CLASSES)[int(classes.mean(0).argmax())] == scene.scene_class))
        result[view] = {name: mean_interval(values) for name, values in right.items()}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.encoders", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes and encoders")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--crowded-scenes", type=int, default=4000, help="of the encoders")
    parser.add_argument("--encoder-steps", type=int, default=3000)
    args = parser.parse_args(arguments)
    check_file(args.table)
    pretrain_encoders(ENCODERS, args.work, args.crowded_scenes, args.encoder_steps)
    lines = ["| encoder | image | presence of a kind | exact count, of 0 to 9 | exact count, of 1 to 9 | scene class |"]
    lines.append("|---" * 6 + "|")
    for encoder in ENCODERS:
        known = measure_tokens(encoder, args.work / f"encoder-{encoder}.pt", args.work, args.test_scenes)
        for view, figures in known.items():
            cells = [f"{100 * m:.1f} ± {50 * (high - low):.1f}" for m, low, high in figures.values()]
            lines.append(f"| {encoder} | {view} | " + " | ".join(cells) + " |")
    write_file(args.table, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
