"""Measures this model against the published algorithm and other families of the same sizes, all arms in turns.

    python benchmarks/speed.py --output DIR
    python benchmarks/speed.py --size published --device cuda --dtype bfloat16 --output DIR
    python benchmarks/speed.py --profile "as published" --output DIR

Writes `speed.json`, `speed.md` and `speed.png`. Weights are random, which costs the same. On a CPU, figures are user and
system seconds of all threads, which other processes disturb little; on an accelerator, they are wall seconds. The JSON file
has both, with all rounds. Every round also measures the ceilings: a large matrix product, and a copy.
"""

import argparse
import ctypes
import functools
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from count_operations import MODES, count, decode_bytes, size_of
from PIL import Image
from published_algorithm import PublishedAlgorithm
from same_sizes import IMAGE, PEERS, SIZES, TEXT_IDS, Sizes, ours, prompt
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaNextImageProcessorPil, LogitsProcessorList

from mfrsvlm import MFRSVLMImageProcessor, MFRSVLMProcessor
from mfrsvlm.evaluation.answering import Answerer, Prompt
from mfrsvlm.experiments import SCENE_MODEL
from mfrsvlm.files.writing import write_figure, write_file
from mfrsvlm.processing_mfrsvlm import make_chat_template


PUBLISHED, EXACT, DEFAULTS, EFFICIENT = "published algorithm", "as published", "defaults", "smallest windows, no overlap"
BARE = "the decoder alone"
CASES = ("answers", "questions", "preprocessing", "memory", "canvas")
QUESTIONS, ANSWER = 32, 4  # questions about one image, and the tokens of each answer
Span = tuple[float, float]  # wall seconds, user and system seconds


class Clock:
    """Reads wall time and the process's time, after all work of the device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> Span:
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter(), time.process_time()

    def stages(self, marks: list[Span]) -> list[Span]:
        """Spans from the first mark to each of the others."""
        return [(wall - marks[0][0], process - marks[0][1]) for wall, process in marks[1:]]

    def spent(self, run: Callable[[], Any]) -> Span:
        return self.stages([self.now(), (run(), self.now())[1]])[0]


class Marks:
    """A logits processor that notes when the logits of each token are there."""

    def __init__(self, clock: Clock, marks: list[Span]) -> None:
        self.clock, self.marks = clock, marks

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.marks.append(self.clock.now())
        return scores


def generate(model: Any, inputs: dict[str, torch.Tensor], clock: Clock, tokens: int) -> dict[str, Span]:
    """Spans from the start of `generate` to the encoded image, to the first token, and to the end."""
    marks = [clock.now()]
    encode = getattr(model.base_model, "get_image_features", None)
    if encode is not None:

        @functools.wraps(encode)  # `generate` looks at its parameters
        def marked(*args: Any, **kwargs: Any) -> Any:
            outputs = encode(*args, **kwargs)
            marks.append(clock.now())
            return outputs

        model.base_model.get_image_features = marked
    else:
        marks.append(marks[0])
    try:
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([Marks(clock, marks)]),
        )
    finally:
        vars(model.base_model).pop("get_image_features", None)
    marks.append(clock.now())
    start, encoded, first, *_, end = marks
    return dict(zip(("encode", "first", "whole"), clock.stages([start, encoded, first, end]), strict=True))


def run_published(algorithm: PublishedAlgorithm, view: torch.Tensor, ids: torch.Tensor, clock: Clock, tokens: int) -> Any:
    """As `generate`, and to the end of a short answer."""
    marks = [clock.now()]
    features = algorithm.encode(view)
    marks.append(clock.now())
    logits, cache = algorithm.prefill(features, ids)
    token = algorithm.next_token(logits)
    marks.append(clock.now())
    short = None
    for number in range(1, tokens):
        if number == ANSWER:
            short = clock.now()
        token = algorithm.step(token, cache)
    end = clock.now()
    return dict(zip(("encode", "first", "short", "whole"), clock.stages([*marks, short or end, end]), strict=True))


def ceilings(clock: Clock, dtype: torch.dtype, quick: bool) -> dict[str, tuple[Span, float]]:
    """Spans of a product of square matrices and of a copy, with their operations and bytes."""
    side = 256 if quick else 2048 if clock.device == "cpu" else 8192
    a, b = (torch.randn(side, side, dtype=dtype, device=clock.device) for _ in range(2))
    source = torch.empty((2**20 if quick else 2**28) // dtype.itemsize, dtype=dtype, device=clock.device).fill_(1)
    target = source.clone()
    repeats = 1 if clock.device == "cpu" else 50
    for run in (lambda: a @ b, lambda: target.copy_(source)):
        run()
    product = clock.spent(lambda: [a @ b for _ in range(repeats)])
    copied = clock.spent(lambda: [target.copy_(source) for _ in range(repeats)])
    return {"product": (product, 2.0 * side**3 * repeats), "copy": (copied, 2.0 * source.nbytes * repeats)}


class Arms:
    """What is measured in one type of numbers: models, and how each is run once."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, clock: Clock, cases: list[str], tokens: int) -> None:
        self.sizes, self.dtype, self.clock, self.tokens = sizes, dtype, clock, tokens
        self.runs: dict[tuple[str, str], Callable[[], dict[str, Span]]] = {}
        self.operations: dict[str, float] = {}  # of encoding
        self.first_operations: dict[str, float] = {}  # of encoding and prefill
        self.decode_bytes = 0.0
        if "answers" in cases:
            self.add_published()
            self.add_answers()
        if "questions" in cases:
            self.add_questions()

    def place(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
        model = model.eval().requires_grad_(False).to(self.clock.device, self.dtype)
        floats = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        return model, {name: value.to(self.clock.device) for name, value in floats.items()}

    def add(self, name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Adds the arm of a model, and counts its operations, which also warms it up."""
        model, inputs = self.place(model, inputs)

        def run() -> dict[str, Span]:
            return generate(model, inputs, self.clock, self.tokens)

        # The counter knows the products of this attention, and not the fused one of CPUs.
        with sdpa_kernel(SDPBackend.MATH):
            encode, text = 0.0, inputs
            if hasattr(model.base_model, "get_image_features"):
                pixels = {n: v for n, v in inputs.items() if n in ("pixel_values", "image_sizes", "image_grid_thw")}
                encode, features = count(lambda: model.base_model.get_image_features(**pixels, return_dict=True))
                text = {n: v for n, v in inputs.items() if n != "pixel_values"} | {"mm_encoder_outputs": {"image": features}}
            prefill, _ = count(lambda: model.generate(**text, max_new_tokens=1, do_sample=False))
        self.operations[name], self.first_operations[name] = encode, encode + prefill
        self.runs["answers", name] = run

    def add_published(self) -> None:
        torch.manual_seed(0)
        model, inputs = self.place(*ours(self.sizes, EXACT))
        algorithm = PublishedAlgorithm(model)
        side = self.sizes.vision["image_size"]
        view = torch.randn(1, 3, side, side, dtype=self.dtype, device=self.clock.device)
        ids = inputs["input_ids"][inputs["input_ids"] != IMAGE][None]
        self.runs["answers", PUBLISHED] = lambda: run_published(algorithm, view, ids, self.clock, self.tokens)
        self.operations[PUBLISHED], features = count(lambda: algorithm.encode(view))
        prefill, _ = count(lambda: algorithm.prefill(features, ids))
        self.first_operations[PUBLISHED] = self.operations[PUBLISHED] + prefill

    def add_answers(self) -> None:
        for name in MODES:
            self.add(name, *ours(self.sizes, name))
        for name, build in PEERS.items():
            self.add(name, *build(self.sizes))
        text = LlamaConfig(**self.sizes.text)
        model = LlamaForCausalLM(text)
        inputs = prompt([TEXT_IDS] * self.sizes.config.image_seq_length, self.sizes.text_tokens)
        length = inputs["input_ids"].shape[1]
        decoder = size_of(model, self.dtype.itemsize) - size_of(model.get_input_embeddings(), self.dtype.itemsize)
        self.decode_bytes = decode_bytes(text, decoder, length, self.tokens, self.dtype.itemsize)
        self.add(BARE, model, inputs)

    def add_questions(self) -> None:
        """One image and many questions, with `Answerer`."""
        tokenizer = AutoTokenizer.from_pretrained(SCENE_MODEL, trust_remote_code=False)
        texts = [f"Is there a ship in row {number} of the scene?" for number in range(QUESTIONS)]
        picture = [noise(512)]
        for name in (EXACT, EFFICIENT):
            model, _ = self.place(*ours(self.sizes, name))
            model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
            processor = MFRSVLMProcessor(
                MFRSVLMImageProcessor.for_model(model.config), tokenizer, chat_template=make_chat_template(tokenizer)
            )
            answerer = Answerer(model, processor, ANSWER)
            prompts = [Prompt(text, 0) for text in texts]

            def run(answerer: Answerer = answerer, prompts: list[Prompt] = prompts) -> dict[str, Span]:
                marks = [self.clock.now()]
                encoded = answerer.encode_images([picture], prompts)
                marks.append(self.clock.now())
                answerer.answer(prompts, encoded)
                marks.append(self.clock.now())
                answerer.answer(prompts[:1], encoded, max_new_tokens=1)
                marks.append(self.clock.now())
                encoded_at, whole, further = self.clock.stages(marks)
                return {
                    "encode and prefill": encoded_at,
                    "whole": whole,
                    "further": (further[0] - whole[0], further[1] - whole[1]),
                }

            answerer.checked = True  # the tests compare shared with separate answers
            self.runs["questions", name] = run


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def preprocessing(side: int) -> dict[str, Callable[[], Any]]:
    """Image processors on the same image; LLaVA-NeXT's has its published size, five crops of 336 pixels."""
    image = noise(side)
    processors = {
        "LLaVA-NeXT": LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
        DEFAULTS: MFRSVLMImageProcessor(),
        "no overlap": MFRSVLMImageProcessor(window_overlap=0.0),
        EFFICIENT: MFRSVLMImageProcessor(window_overlap=0.0, window_sizes=[168]),
    }
    return {name: functools.partial(processor, image, return_tensors="pt") for name, processor in processors.items()}


def peak_memory(name: str, sizes: Sizes, dtype: torch.dtype, device: str) -> float:
    """MiB that the peak of a first answer lies above what the process holds before it."""
    clock = Clock(device)
    arms = Arms(sizes, dtype, clock, [], 1)
    model, inputs = arms.place(*ours(sizes, EXACT if name == PUBLISHED else name))
    side = sizes.vision["image_size"]
    view = torch.randn(1, 3, side, side, dtype=dtype, device=device)
    ids = inputs["input_ids"][inputs["input_ids"] != IMAGE][None]
    algorithm = PublishedAlgorithm(model) if name == PUBLISHED else None
    if algorithm is not None:
        del model
    gc.collect()
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what building the model left behind is no memory of the answer
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
    with torch.inference_mode():
        if algorithm is not None:
            run_published(algorithm, view, ids, clock, 1)
        else:
            generate(model, inputs, clock, 1)
    peak = status("VmHWM") if device == "cpu" else torch.accelerator.max_memory_allocated()
    return (peak - before) / 2**20


def profile(name: str, sizes: Sizes, dtype: torch.dtype, clock: Clock) -> str:
    """The operators of a first answer that take longest, in a table."""
    model, inputs = Arms(sizes, dtype, clock, [], 1).place(*ours(sizes, name))
    with torch.inference_mode():
        generate(model, inputs, clock, 1)
        with torch.profiler.profile() as profiler:
            generate(model, inputs, clock, 1)
    order = "self_cpu_time_total" if clock.device == "cpu" else "self_device_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=44))


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def canvas_families(sizes: Sizes) -> dict[str, Callable[[int], Any]]:
    return {
        EFFICIENT: lambda scale: ours(sizes, EFFICIENT, scale),
        "LLaVA-NeXT": lambda scale: PEERS["LLaVA-NeXT"](sizes, scale),
        "Qwen3-VL": lambda scale: PEERS["Qwen3-VL"](sizes, scale),
    }


def measure_canvas(arms: Arms, scales: range, rounds: int, longest: float) -> dict[str, dict[int, list[Span]]]:
    """Spans of a first answer by family and canvas side. A family that takes `longest` seconds is not made to see more."""
    spans: dict[str, dict[int, list[Span]]] = {}
    families = canvas_families(arms.sizes)
    for scale in scales:
        side = scale * arms.sizes.vision["image_size"]
        for name, build in families.items():
            seen = spans.setdefault(name, {})
            if seen and max(map(min, seen[max(seen)])) > longest:
                continue
            model, inputs = arms.place(*build(scale))
            seen[side] = [generate(model, inputs, arms.clock, 1)["first"] for _ in range(rounds)]
            print(f"canvas {side}, {name}: {seen[side]}", file=sys.stderr, flush=True)
    return spans


# --- What is written --------------------------------------------------------------------------------------------------


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def exponent(points: dict[int, float]) -> float:
    """The slope of seconds over the side, both in logarithms."""
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


class Results:
    """The rounds of one type of numbers, and what follows from them.

    Args:
        spans: by case, arm and stage, one span a round.
        which: 0 for wall seconds, 1 for user and system seconds.
    """

    def __init__(self, arms: Arms, spans: dict[str, Any], which: int) -> None:
        self.arms, self.spans, self.which = arms, spans, which

    def seconds(self, case: str, arm: str, stage: str) -> list[float]:
        return [span[self.which] for span in self.spans[case][arm][stage]]

    def median(self, case: str, arm: str, stage: str) -> float:
        return statistics.median(self.seconds(case, arm, stage))

    def ratio(self, case: str, some: tuple[str, str], other: tuple[str, str], factor: float = 1.0) -> dict[str, float]:
        """Of two arms' stages, round by round."""
        pairs = zip(self.seconds(case, *some), self.seconds(case, *other), strict=True)
        return summary([factor * a / b for a, b in pairs])

    def rate(self, ceiling: str) -> float:
        """Operations or bytes a second of a ceiling, the best round."""
        amount = self.spans["amounts"][ceiling]
        return amount / min(self.seconds("ceilings", ceiling, "whole"))

    def decode(self, arm: str) -> list[float]:
        """Seconds of a further token."""
        pairs = zip(self.seconds("answers", arm, "whole"), self.seconds("answers", arm, "first"), strict=True)
        return [(whole - first) / (self.arms.tokens - 1) for whole, first in pairs]

    def table(self) -> list[str]:
        """The answers of every arm, in seconds and as shares of the ceilings."""
        product, copied = self.rate("product"), self.rate("copy")
        lines = [
            f"| {name_of(self.arms.dtype)} | encode, s | first answer, s | with {self.arms.tokens} tokens, s "
            "| encode, % of product | prefill, % of product | decode, % of copy |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for arm in self.spans["answers"]:
            cells = []
            for stage in ("encode", "first", "whole"):
                values = summary(self.seconds("answers", arm, stage))
                cells.append(f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})")
            encode, first = self.median("answers", arm, "encode"), self.median("answers", arm, "first")
            operations, prefill = self.arms.operations.get(arm, 0.0), self.arms.first_operations[arm]
            cells.append(f"{100 * operations / encode / product:.0f}" if operations else "")
            cells.append(f"{100 * (prefill - operations) / (first - encode) / product:.0f}")
            read = self.arms.decode_bytes / (self.arms.tokens - 1) / statistics.median(self.decode(arm))
            # A copy reads and writes. Only the peers with longer prompts read more than the decoder alone.
            cells.append(f"{100 * read / copied:.0f}" if arm in (*MODES, PUBLISHED, BARE) else "")
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        return lines

    def must_show(self) -> list[tuple[str, str, str]]:
        """Case, target and what was measured."""
        rows = []
        cases = self.spans
        if "answers" in cases:
            half = self.arms.dtype != torch.float32
            first = "first"
            rows += [
                (
                    "converted weights, first answer against the published algorithm",
                    f"≥ {1.6 if half else 1.8} x",
                    times(self.ratio("answers", (PUBLISHED, first), (EXACT, first))),
                ),
                (
                    "efficient mode, first answer against the published algorithm",
                    "≥ 10 x",
                    times(self.ratio("answers", (PUBLISHED, first), (EFFICIENT, first))),
                ),
                *(
                    (
                        f"{peer}, first answer against efficient mode",
                        "≥ 1 x",
                        times(self.ratio("answers", (peer, first), (EFFICIENT, first))),
                    )
                    for peer in ("Qwen3-VL", "InternVL")
                ),
            ]
            pairs = zip(self.decode(EXACT), self.decode(BARE), strict=True)
            rows.append(("decode, against the decoder alone", "≤ 1.05 x", times(summary([a / b for a, b in pairs]))))
            share = self.arms.operations[EXACT] / self.median("answers", EXACT, "encode") / self.rate("product")
            rows.append(
                (
                    "encoding of converted weights, of the product ceiling",
                    f"≥ {60 if half else 80} %",
                    f"{100 * share:.0f} %",
                )
            )
        if "questions" in cases:
            for arm in (EXACT, EFFICIENT):
                further = self.ratio("questions", (arm, "further"), (arm, "encode and prefill"), 100)
                rows.append((f"{arm}: a further question, of encoding and prefill", "≤ 5 %", f"{further['median']:.1f} %"))
            for arm in (EXACT, EFFICIENT) if "answers" in cases else ():
                ones = self.seconds("answers", PUBLISHED, "short")
                pairs = zip(ones, self.seconds("questions", arm, "whole"), strict=True)
                ratio = summary([QUESTIONS * one / whole for one, whole in pairs])
                rows.append(
                    (
                        f"{arm}: {QUESTIONS} questions with {ANSWER} tokens, against the published algorithm",
                        "≥ 20 x",
                        times(ratio),
                    )
                )
        if "preprocessing" in cases:
            ratio = self.ratio("preprocessing", ("LLaVA-NeXT", "whole"), (DEFAULTS, "whole"))
            rows.append(("LLaVA-NeXT's preprocessing against ours", "> 1 x", times(ratio)))
        if "memory" in cases:
            share = cases["memory"][EXACT] / cases["memory"][PUBLISHED]
            rows.append(
                ("peak memory over weights, converted weights against the published algorithm", "≤ 0.33", f"{share:.2f}")
            )
        if "canvas" in cases:
            for name, points in cases["canvas"].items():
                medians = {side: statistics.median(span[self.which] for span in spans) for side, spans in points.items()}
                target = "≤ 2.1" if name == EFFICIENT else ""
                text = f"{exponent(medians):.2f} ({min(medians)} to {max(medians)})" if len(medians) > 1 else "one side"
                rows.append((f"{name}: exponent of a first answer in the side of the canvas", target, text))
        return rows


def times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plot(results: list[Results], path: Path) -> None:
    """Bars of the first answers, and lines over the side of the canvas, as far as they were measured."""
    panels = [case for case in ("answers", "canvas") if any(case in result.spans for result in results)]
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(1 + 6 * max(1, len(panels)), 5), layout="constrained", squeeze=False
    )
    for case, place in zip(panels, axes[0], strict=False):
        shown = [result for result in results if case in result.spans]
        for number, result in enumerate(shown):
            label = name_of(result.arms.dtype)
            if case == "answers":
                names = [arm for arm in result.spans[case] if arm != BARE]
                height = 0.8 / len(shown)
                rows = [index + number * height for index in range(len(names))]
                place.barh(rows, [result.median(case, arm, "first") for arm in names], height, label=label)
                place.set_yticks(range(len(names)), names)
            else:
                for name, points in result.spans[case].items():
                    medians = [statistics.median(span[result.which] for span in spans) for spans in points.values()]
                    place.plot(list(points), medians, marker="o", label=f"{name}, {label}")
        if case == "answers":
            place.set(xlabel="seconds of a first answer")
            place.invert_yaxis()
        else:
            place.set(xlabel="side of the canvas, pixels", ylabel="seconds of a first answer", xscale="log", yscale="log")
        place.legend(fontsize="small")
    write_figure(path, figure, dpi=110)


def processor_name() -> str:
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], help="types of numbers (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--canvas-rounds", type=int, default=2)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--longest", type=float, default=60, help="seconds of an answer on the largest canvas of a family")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that the command works")
    parser.add_argument(
        "--profile", choices=MODES, help="print where the time of a first answer goes in this mode, and stop"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds, args.canvas_rounds, args.answer_tokens = "tiny", 2, 1, 3
    sizes, clock = SIZES[args.size], Clock(args.device)
    dtypes = [getattr(torch, name) for name in args.dtype]
    if args.profile:
        print(profile(args.profile, sizes, dtypes[0], clock))
        return
    if args.memory_of:
        print(peak_memory(args.memory_of, sizes, dtypes[0], args.device))
        return

    args.output.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        every = [Arms(sizes, dtype, clock, args.cases, args.answer_tokens) for dtype in dtypes]
        spans: list[dict[str, Any]] = [{} for _ in dtypes]

        def note(into: dict[str, Any], case: str, arm: str, stages: dict[str, Span]) -> None:
            for stage, span in stages.items():
                into.setdefault(case, {}).setdefault(arm, {}).setdefault(stage, []).append(span)

        processors = preprocessing(64 if args.quick else 1024) if "preprocessing" in args.cases else {}
        for run in processors.values():
            run()
        for number in range(args.rounds):
            for arms, into in zip(every, spans, strict=True):
                for name, (span, amount) in ceilings(clock, arms.dtype, args.quick).items():
                    note(into, "ceilings", name, {"whole": span})
                    into.setdefault("amounts", {})[name] = amount
                for (case, arm), run_arm in arms.runs.items():
                    note(into, case, arm, run_arm())
                for name, run in processors.items():
                    note(into, "preprocessing", name, {"whole": clock.spent(run)})
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        for arms, into in zip(every, spans, strict=True):
            arms.runs.clear()
            gc.collect()
            if "canvas" in args.cases and arms is every[0]:  # it takes longest, and one type shows it
                scales = range(1, 4 if args.quick else 7)
                into["canvas"] = measure_canvas(arms, scales, args.canvas_rounds, args.longest)
    if "memory" in args.cases:
        for arms, into in zip(every, spans, strict=True):
            child = [sys.executable, __file__, "--output", str(args.output), "--size", args.size, "--device", args.device]
            into["memory"] = {}
            for arm in (PUBLISHED, EXACT, DEFAULTS, EFFICIENT):
                command = [*child, "--dtype", name_of(arms.dtype), "--memory-of", arm]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                into["memory"][arm] = float(output.splitlines()[-1])

    results = [Results(arms, into, 1 if args.device == "cpu" else 0) for arms, into in zip(every, spans, strict=True)]
    device = processor_name() if args.device == "cpu" else torch.cuda.get_device_name()
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": args.size,
        "rounds": args.rounds,
        "canvas_rounds": args.canvas_rounds,
    }
    kind = "user and system" if args.device == "cpu" else "wall"
    lines = [
        f"{device}, {machine['cpu_capability']}, {machine['threads']} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, sizes `{args.size}`, {kind} seconds, "
        f"median and range of {args.rounds} rounds ({args.canvas_rounds} of the canvas)."
    ]
    for result in results:
        rows = [f"| {' | '.join(row)} |" for row in result.must_show()]
        lines += ["", f"| {name_of(result.arms.dtype)} | target | measured |", "|---|--:|--:|", *rows]
        if "answers" in result.spans:
            product, copied = result.rate("product") / 1e9, result.rate("copy") / 1e9
            lines += ["", *result.table(), "", f"Ceilings: {product:.0f} GFLOP/s, {copied:.1f} GB/s."]
    write_file(args.output / "speed.md", "\n".join(lines) + "\n")
    details = {
        name_of(result.arms.dtype): {
            "operations": {"encode": result.arms.operations, "first answer": result.arms.first_operations},
            "must_show": result.must_show(),
            "spans": result.spans,
        }
        for result in results
    }
    write_file(args.output / "speed.json", json.dumps({"machine": machine, "types": details}, indent=1) + "\n")
    plot(results, args.output / "speed.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
