"""Trains the small model of the repository from nothing: scenes, encoder, decoder, Hub folder, accuracy, card.

    python -m mfrsvlm.experiments.box --work DIR --output demo/model

Stages whose result lies in the work folder are not done again, so that a run that was cut off goes on.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mfrsvlm.experiments.accuracy import measure
from mfrsvlm.experiments.dataset import CANVAS, OBJECT_PIXELS, SCENE_SIZE, SceneImages
from mfrsvlm.experiments.decoder import (
    Prompts,
    encode_scenes,
    make_processor,
    make_tokenizer,
    start_places,
    train_decoder,
    whiten_projector,
)
from mfrsvlm.experiments.encoder import load_encoder, pretrain
from mfrsvlm.experiments.geometry import make_config
from mfrsvlm.model_card.card import write_model_card
from mfrsvlm.modeling_mfrsvlm import MFRSVLMForConditionalGeneration


# Boxes need to know which phase a feature came from, which the weights of whole stacks cannot say.
ARCHITECTURE = {"routing": "token", "routing_size": 32, "injection_layers": [0, 1, 2, 3]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.box", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, encoder and features (12 GB)")
    parser.add_argument("--output", type=Path, required=True, help="Hub folder to write")
    parser.add_argument("--scenes", type=int, default=24000, help="training scenes")
    parser.add_argument("--crowded-scenes", type=int, default=8000, help="of the encoder")
    parser.add_argument("--encoder-steps", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=5000, help="of the decoder")
    parser.add_argument("--batch", type=int, default=12, help="scenes a step of the decoder")
    parser.add_argument("--test-scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty: remove it first, or choose another folder.")

    args.work.mkdir(parents=True, exist_ok=True)
    record = args.work / "box.json"
    facts: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}

    def timed(stage: str, start: float) -> None:
        facts[stage] = time.perf_counter() - start
        record.write_text(json.dumps(facts, indent=2))

    start = time.perf_counter()
    encoder = args.work / "box-encoder.pt"
    if not encoder.exists():
        crowded = SceneImages(args.work / "scenes", "train", args.crowded_scenes, crowding=4)
        pretrain("resnet", crowded, encoder, args.encoder_steps, args.seed)
        timed("encoder", start)

    start = time.perf_counter()
    images = SceneImages(args.work / "scenes", "train", args.scenes)
    tokenizer = make_tokenizer(images.scenes[:500])
    torch.manual_seed(args.seed)
    model = MFRSVLMForConditionalGeneration(make_config(len(tokenizer), **ARCHITECTURE))
    load_encoder(model.model, encoder)
    processor = make_processor(model.config, tokenizer)
    encoded = args.work / f"box-features-{args.scenes}.npy"
    features = encode_scenes(model, images, encoded, "image")
    if "features" not in facts:
        timed("features", start)

    weights = args.work / "box.pt"
    if not weights.exists():
        start = time.perf_counter()
        whiten_projector(model, features, args.seed)
        start_places(model, features)
        prompts = Prompts(processor)
        train_decoder(model, prompts, images.scenes, features, args.steps, args.batch, seed=args.seed, rounds=3)
        torch.save(model.state_dict(), weights)
        timed("decoder", start)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.generation_config.max_new_tokens = 64
    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)

    # The folder is marked, as a user would load it.
    processor = AutoProcessor.from_pretrained(args.output, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.output, trust_remote_code=True, dtype=torch.float32).eval()
    for name, blind in (("seeing", False), ("blind", True)):
        if name not in facts:
            facts[name] = measure(model, processor, args.test_scenes, blind)
            record.write_text(json.dumps(facts, indent=2))
    facts["command"] = (
        f"python -m mfrsvlm.experiments.box --work DIR --output DIR --scenes {args.scenes} "
        f"--crowded-scenes {args.crowded_scenes} --encoder-steps {args.encoder_steps} --steps {args.steps} "
        f"--batch {args.batch} --test-scenes {args.test_scenes} --seed {args.seed}"
    )
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    facts["hardware"] = f"{threads} thread(s) of {platform.machine()} ({capability}), torch {torch.__version__}"
    record.write_text(json.dumps(facts, indent=2))
    (args.output / "accuracy.json").write_text(json.dumps({name: facts[name] for name in ("seeing", "blind")}, indent=1))
    name = "MF-RSVLM, a small model of synthetic scenes"
    write_model_card(args.output, model.config, "trained", name, evidence(facts), license="apache-2.0")


def evidence(facts: dict[str, Any]) -> str:
    """Markdown: what the model was trained on, how, and how well it does."""
    percent = "{:.1f}".format
    rows = ["| task | accuracy | 95 % interval | n | blind | chance |", "|---|---|---|---|---|---|"]
    for task, row in facts["seeing"].items():
        chance = percent(100 * row["chance"]) if "chance" in row else "-"
        interval = f"{percent(100 * row['low'])} - {percent(100 * row['high'])}"
        cells = [task, percent(100 * row["accuracy"]), interval, str(row["n"])]
        rows.append("| " + " | ".join([*cells, percent(100 * facts["blind"][task]["accuracy"]), chance]) + " |")
    minutes = {stage: facts[stage] / 60 for stage in ("encoder", "features", "decoder")}
    low, high = (value * CANVAS / SCENE_SIZE for value in OBJECT_PIXELS)
    unlearned = [task for task, row in facts["seeing"].items() if row["low"] <= row.get("chance", 0.0)]
    return f"""\
**A demonstration, not a product.** It was trained from nothing, on synthetic scenes only (`mfrsvlm.scenes`), to show on
two CPU cores that every part works. It knows 15 classes of scenes, five kinds of objects and eight kinds of questions,
asked in one wording, and nothing about real images.

Per cent of correct answers to questions about held-out scenes, generated freely and greedily. Objects are {low:g} to
{high:g} pixels long on the canvas of {CANVAS}, half of that in the global view. A box is right if it overlaps the true one
by half (IoU 0.5); a caption, if every fact in it is; *caption facts* is the F1 of those facts. *Blind* is the same model
without the image, which it has never been asked without; *chance* the best guess. No better than chance:
{", ".join(unlearned) or "nothing"}.

{chr(10).join(rows)}

First the encoder learned to say what stands in each token, then the decoder to answer, on frozen features; beside the
answers it was taught which visual tokens the nouns of a question speak of (`experiments/guidance.py`). Made by

`{facts["command"]}`

on {facts["hardware"]}: encoder {minutes["encoder"]:.0f} minutes, features
{minutes["features"]:.0f}, decoder {minutes["decoder"]:.0f}."""


if __name__ == "__main__":
    main()
