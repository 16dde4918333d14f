"""The lists that RSEvalKit evaluates VHM with: a JSON file for each task, conversations of one question and one answer."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...files.reading import shorten
from .info import BenchmarkInfo
from .reading import as_index, find, inside, read_json, read_size, require_images, take, take_box, take_text
from .sample import Benchmark, BenchmarkError, Sample


# The name of a file without its suffix is a split. It has a task, a group where all samples share one, and RSEvalKit's tag
# where that is not the tag of the task: `{IDK}` if the thing asked for may be absent, `{IT}` if the list has no own tag.
LISTS = {
    "cls_AID": ("classification", "", ""),
    "cls_METER_ML": ("classification", "", ""),
    "cls_NWPU_RESISC45": ("classification", "", ""),
    "cls_SIRI_WHU": ("classification", "", ""),
    "cls_WHU_RS19": ("classification", "", ""),
    "RSVQA_HR-comp_RSVQA": ("vqa", "comp", ""),
    "RSVQA_HR-presence_RSVQA": ("vqa", "presence", ""),
    "RSVQA_LR-comp_RSVQA": ("vqa", "comp", ""),
    "RSVQA_LR-presence_RSVQA": ("vqa", "presence", ""),
    "RSVQA_LR-rural_urban_RSVQA": ("vqa", "rural_urban", ""),
    "VG_DOIR_RSVG_test": ("grounding", "", ""),
    "counting_dota-test_open": ("counting", "", ""),
    "presence_mo_dota": ("vqa", "presence", "{IDK}"),
    "color_dota-test_fair1m-val_open": ("vqa", "color", "{IDK}"),
    "imgType_mcq": ("vqa", "image type", "{IT}"),
    "abspos_dota-test_mc": ("vqa", "position", "{IDK}"),
    "abspos_false_dota-test_adversarial_mc": ("vqa", "position, false premise", "{IT}"),
    "abspos_false_dota-test_popular_mc": ("vqa", "position, false premise", "{IT}"),
    "abspos_false_dota-test_random_mc": ("vqa", "position, false premise", "{IT}"),
    "relpos_dota-test_mc": ("vqa", "relative position", "{IDK}"),
    "relpos_false_dota-test_adversarial_mc": ("vqa", "relative position, false premise", "{IT}"),
    "relpos_false_dota-test_popula_mc": ("vqa", "relative position, false premise", "{IT}"),
    "relpos_false_dota-test_random_mc": ("vqa", "relative position, false premise", "{IT}"),
}
# Lists of RSEvalKit that no metric of this package can score, and what they ask for.
WITHOUT_METRIC = {
    "gsd_dota_fbp": "meters a pixel, scored by mean absolute error",
    "obj_meas_dota_test": "lengths in meters, scored by mean absolute error",
    "mlc_fbp_test": "several labels at once",
    "mlc_gid_test": "several labels at once",
    "bfv_crowdai_val": "outlines of buildings",
    "color_false_dota-test_adversarial_open": "free answers that RSEvalKit does not score either",
    "color_false_dota-test_popular_open": "free answers that RSEvalKit does not score either",
    "color_false_dota-test_random_open": "free answers that RSEvalKit does not score either",
    "color_false_pan_dota-test": "free answers that RSEvalKit does not score either",
}
LARGEST = 10**9  # above all counts
MULTIPLE_CHOICE = ("_mc", "_mcq")  # suffixes of multiple-choice lists

_OPTION = re.compile(r"^\s*\(?([A-E])[.):]\s*(.+?)\s*$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def load_vhm_eval(name: str, root: Path, split: str, check_counts: bool, allow_outside_images: bool = False) -> Benchmark:
    """One sample for each conversation of the list `split`. The question is kept as published, without its image marker.

    The classes are all answers in the list. Options of a multiple choice are the lines of the question that begin with a
    letter.

    Raises:
        BenchmarkError: see `reading`; or a conversation that is not one question and one answer, a count that is not an
            integer, or a box that is not four numbers.
    """
    base = root / "datasets_eval" if (root / "datasets_eval").is_dir() else root
    path = find(base, (f"{split}.json",), "list")
    task, group, tag = LISTS[split]
    samples = []
    for number, row in enumerate(read_json(path, list)):
        file = Path(take_text(row, "image_path", path, number)) / take_text(row, "image", path, number)
        question, answer = _conversation(row, path, number)
        samples.append(
            Sample(
                id=str(number),
                images=((base.relative_to(root) / file).as_posix(),),
                task=task,
                question=question,
                references=() if task == "grounding" else (_reference(answer, task, path, number),),
                group=group or (answer if task == "classification" else ""),
                boxes=(take_box(_NUMBER.findall(answer), (4,), path, number),) if task == "grounding" else (),
                choices=_choices(question) if split.endswith(MULTIPLE_CHOICE) else (),
            )
        )
    if task == "grounding":
        require_images(root, (sample.images[0] for sample in samples), allow_outside_images)
        sizes = [read_size(root, sample.images[0], allow_outside_images) for sample in samples]
        samples = [
            replace(sample, boxes=(inside(sample.boxes[0], size, path, sample.id),), image_size=size)
            for sample, size in zip(samples, sizes, strict=True)
        ]
    class_names = sorted({sample.references[0] for sample in samples}) if task == "classification" else []
    return Benchmark(name, split, root, samples, class_names, tag=tag)


def _conversation(row: Any, path: Path, number: int) -> tuple[str, str]:
    turns = take(row, "conversations", list, path, number)
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if speakers != ["human", "gpt"]:
        raise BenchmarkError(f"{path}, row {number}: expected one question (human) and one answer (gpt), got {speakers}.")
    question = take_text(turns[0], "value", path, number).replace("<image>", "").strip()
    return question, take_text(turns[1], "value", path, number, numbers=True)


def _reference(answer: str, task: str, path: Path, number: int) -> str:
    if task == "counting" and as_index(answer, LARGEST) is None:
        raise BenchmarkError(f"{path}, row {number}: the count {shorten(answer)} is not an integer from 0 to {LARGEST - 1}.")
    return answer


def _choices(question: str) -> tuple[str, ...]:
    """Options on lines that begin with A, B and so on, in order; () if there are fewer than two."""
    found = _OPTION.findall(question)
    letters = "".join(letter for letter, _ in found)
    return tuple(text for _, text in found) if len(found) > 1 and "ABCDE".startswith(letters) else ()


BENCHMARK = BenchmarkInfo(
    loader=load_vhm_eval,
    splits=dict.fromkeys(LISTS),
    default_split=None,
    tasks=("classification", "vqa", "grounding", "counting"),
    complete_prompts=True,
    without_metric=WITHOUT_METRIC,
    source="https://huggingface.co/datasets/FitzPC/VHM_eval_dataset",
)
