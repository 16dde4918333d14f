"""Stand-ins for the published benchmarks: a few made-up rows and tiny images in the layout of each."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mfrsvlm.evaluation.benchmarks import BENCHMARKS
from mfrsvlm.evaluation.benchmarks.eurosat import CLASSES as EUROSAT
from mfrsvlm.scenes.dataset import DatasetPlan, write_dataset


# Pixels a side of each band of a patch of BigEarthNet.
BIGEARTHNET_SIDES = {
    "B01": 20, "B02": 120, "B03": 120, "B04": 120, "B05": 60, "B06": 60, "B07": 60, "B08": 120, "B8A": 60, "B09": 20,
    "B11": 60, "B12": 60,
}  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes the content of a file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_image(path: Path, size: tuple[int, int] = (8, 8), color: tuple[int, int, int] = (90, 120, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def published_size(name: str) -> tuple[int, int]:
    """Size of the images of a benchmark, small where it is not fixed."""
    return BENCHMARKS[name].image_size or (8, 8)


def make_rsvqa(root: Path, stem: str, images: str, kinds: tuple[str, ...], whole: tuple[str, str] | None = None) -> None:
    """Four questions about two images; a fifth row of each file is of another split.

    Args:
        whole: names of the files of all questions and answers; the text then stands there and not in the files of the split.
    """
    answers = {"presence": "yes", "count": "3", "comp": "no", "rural_urban": "urban", "area": "17m2"}
    questions = [
        {"id": 10 + i, "img_id": 5 + i // 2, "type": kind, "question": f"A question of {kind}?", "answers_ids": [70 - i]}
        for i, kind in enumerate(kinds)
    ]
    replies = [{"id": 70 - i, "question_id": 10 + i, "answer": answers[kind]} for i, kind in enumerate(kinds)]
    other = ({"id": 99, "img_id": 9, "type": "comp", "question": "Of another split?"}, {"id": 98, "answer": "no"})
    rows = {"questions": [*questions, other[0]], "answers": [*replies, other[1] | {"question_id": 99}]}
    for key, listed in rows.items():
        active = [row | {"active": row["id"] not in (98, 99)} for row in listed]
        if whole:
            write_json(root / whole[key == "answers"], {key: [row | {"active": True} for row in listed]})
            active = [{"id": row["id"], "active": row["active"]} for row in active]
        else:
            active[-1] = {"id": active[-1]["id"], "active": False}
        write_json(root / f"{stem}_{key}.json", {key: active})
    write_json(root / f"{stem}_images.json", {"images": [{"id": i, "active": i < 7} for i in range(5, 10)]})
    for image in (5, 6):
        write_image(root / images / f"{image}.tif", published_size("rsvqa-lr" if stem.startswith("LR") else "rsvqa-hr"))


def make_rsvqa_lr(root: Path) -> None:
    make_rsvqa(root, "LR_split_test", "Images_LR", ("presence", "count", "comp", "rural_urban"))


def make_rsvqa_hr(root: Path) -> None:
    kinds = ("presence", "count", "comp", "area")
    make_rsvqa(root, "USGS_split_test", "Data", kinds)
    make_rsvqa(root, "USGS_split_test_phili", "Data", kinds[:2])


def make_folders(name: str, inside: str, spell: Callable[[str], str], suffix: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for label in BENCHMARKS[name].loader.__self__.classes:
            for number in (1, 2):
                write_image(root / inside / spell(label) / f"{spell(label)}_{number}{suffix}", published_size(name))

    return make


def camel(label: str) -> str:
    return "".join(word.capitalize() for word in label.split())


def make_karpathy(name: str, captions: str, images: str, suffix: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        rows = []
        for number, split in enumerate(("train", "test", "test")):
            file = f"airport_{number}{suffix}"
            write_image(root / images / file, published_size(name))
            sentences = [{"tokens": ["many"], "raw": f"Many planes, seen {n} times . "} for n in range(5)]
            rows.append({"filename": file, "imgid": number, "split": split, "sentences": sentences})
        write_json(root / captions, {"images": rows, "dataset": "stand-in"})

    return make


def make_nwpu_captions(root: Path) -> None:
    content: dict[str, list[dict[str, Any]]] = {}
    for label in ("airplane", "river"):
        for number, split in enumerate(("train", "val", "test")):
            file = f"{label}_{number:03d}.jpg"
            write_image(root / "NWPU_images" / label / file, published_size("nwpu-captions"))
            row = {"filename": file, "imgid": number, "split": split}
            row |= {key: f"A {label}, {key}." for key in ("raw", "raw_1", "raw_2", "raw_3", "raw_4")}
            content.setdefault(label, []).append(row)
    write_json(root / "dataset_nwpu.json", content)


def make_vrsbench(root: Path) -> None:
    """The evaluation files: one image of 200 x 100 pixels, one of 8 x 8."""
    write_image(root / "Images_val" / "P0003_0002.png", (200, 100))
    write_image(root / "Images_val" / "P0007_0001.png")
    images = ("P0003_0002.png", "P0007_0001.png")
    base = [{"image_id": image, "question_id": number, "dataset": "RSBench"} for number, image in enumerate(images)]
    caption = {"question": "Describe the image in detail", "ground_truth": "A harbor with ships.", "type": "caption"}
    write_json(root / "VRSBench_EVAL_Cap.json", [row | caption for row in base])
    asked = {"question": "How many ships are there?", "ground_truth": "2", "type": "object quantity"}
    write_json(root / "VRSBench_EVAL_vqa.json", [row | asked for row in base])
    box = {"question": "The ship on the left.", "ground_truth": "{<25><40><33><60>}", "type": "ref", "unique": True}
    write_json(root / "VRSBench_EVAL_referring.json", [base[0] | box, base[1] | box | {"unique": False}])


def make_vrsbench_annotations(root: Path) -> None:
    """The same truth as `make_vrsbench`, as annotations of single images."""
    for image, size, unique in (("P0003_0002", (200, 100), True), ("P0007_0001", (8, 8), False)):
        write_image(root / "Images_val" / f"{image}.png", size)
        annotation = {
            "image": f"{image}.png",
            "caption": "A harbor with ships.",
            "qa_pairs": [{"ques_id": 0, "question": "How many ships are there?", "answer": 2, "type": "Object quantity"}],
            "objects": [
                {
                    "obj_id": 0,
                    "referring_sentence": "The ship on the left.",
                    "obj_corner": [0.33, 0.401, 0.332, 0.605, 0.251, 0.605, 0.251, 0.401],
                    "obj_cls": "ship",
                    "is_unique": unique,
                }
            ],
        }
        write_json(root / "Annotations_val" / f"{image}.json", annotation)
        write_json(root / "Annotations_val" / f"{image}_input.json", {"what": "the annotation was made from"})


def make_dior_rsvg(root: Path) -> None:
    """Three objects in two files; 0 and 2 are of the test split."""
    for stem, names in (("00001", ("ship", "dam")), ("00002", ("airport",))):
        objects = "".join(
            f"<object><name>{name}</name><pose>Unspecified</pose><bndbox><xmin>{10 * n}</xmin><ymin>2</ymin><xmax>60</xmax>"
            f"<ymax>8</ymax></bndbox><description>A large {name}</description></object>"
            for n, name in enumerate(names)
        )
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>80</width><height>40</height><depth>3</depth></size>"
            f"{objects}</annotation>"
        )
        write_image(root / "JPEGImages" / f"{stem}.jpg", (80, 40))
    for split, lines in (("train", "1\n"), ("val", "1\n"), ("test", "0\n2\n")):
        (root / f"{split}.txt").write_text(lines)


def make_vhm_eval(root: Path) -> None:
    """One list of every task, each with two conversations about one image."""
    position = "Where is the ship?\nA. top left\nB. bottom right\nAnswer with the letter."
    lists = {
        "cls_AID": [("Which of airport, bare land?", "airport"), ("Which of airport, bare land?", "bare land")],
        "RSVQA_LR-rural_urban_RSVQA": [("Is it rural or urban?", "rural"), ("Is it rural or urban?", "urban")],
        "VG_DOIR_RSVG_test": [("Where is the ship?", "[10, 2, 60, 8]"), ("Where is the dam?", "[1,2,3,4]")],
        "counting_dota-test_open": [("How many ships?", "12"), ("How many planes?", 7)],
        "abspos_dota-test_mc": [(position, "A"), (position, "B")],
    }
    for stem, asked in lists.items():
        rows = [
            {
                "image": f"{number}.png",
                "image_path": stem,
                "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
            }
            for number, (question, answer) in enumerate(asked)
        ]
        write_json(root / f"{stem}.json", rows)
        for number in range(len(asked)):
            write_image(root / stem / f"{number}.png", (80, 40))


def make_scenes(root: Path) -> None:
    write_dataset(root / "scenes", DatasetPlan("test", 3, 128, (2.0, 4.0), changes=1))
    for path in (root / "scenes").iterdir():
        path.rename(root / path.name)


def make_rsivqa(name: str) -> Callable[[Path], None]:
    """Two images, with a question of every type about the first; every file of the benchmark holds the same."""
    asked = (
        "what is the theme of this picture?harbor", "does this picture contain ship?yes",
        "how many ships are there in this picture?12", "What is the location of the ships in this picture?top left",
    )  # fmt: skip

    def make(root: Path) -> None:
        for files in BENCHMARKS[name].loader.__self__.files.values():
            for file in files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                lines = [*(f"1.tif:{text}" for text in asked), f"2.tif: {asked[1]}"]
                (root / file).write_text("\n".join(lines) + "\n")
        for image in (1, 2):
            write_image(root / "images" / f"{image}.tif", published_size(name))

    return make


def make_multilabel(root: Path) -> None:
    labels = list(BENCHMARKS["ucm-multilabel"].loader.__self__.labels)
    rows = [["IMAGE\\LABEL", *labels]]
    for number, image in enumerate(("beach00", "river01")):
        write_image(root / "Images" / image[:-2] / f"{image}.tif", published_size("ucm-multilabel"))
        rows.append([image, *(str(int(index % 3 == number)) for index in range(len(labels)))])
    (root / "LandUse_Multilabeled.txt").write_text("".join("\t".join(row) + "\n" for row in rows))


def make_rsvg_hr(root: Path) -> None:
    lines = ["a_ship.jpg,740.5,222.5,776.69,258.06,a ship, on the left", "b.jpg,408.0,772,1025.4,800.49,find a pool"]
    for split in ("train", "test"):
        (root / f"rsvg_hr_{split}.txt").write_text("\n".join(lines) + "\n")
    for line in lines:
        write_image(root / "images" / line.split(",")[0], (1024, 1024))


# Two images of 80 x 40 pixels: three ships and a car in the first, two cars in the second.
OBJECTS = {
    "a": [("ship", (0, 0, 20, 10)), ("ship", (30, 10, 50, 30)), ("ship", (60, 20, 80, 40)), ("car", (10, 20, 18, 26))],
    "b": [("car", (10, 20, 18, 26)), ("car", (40, 20, 48, 26))],
}


def make_yolo(root: Path) -> None:
    (root / "labels").mkdir()
    (root / "classes.txt").write_text("car\nship\n")
    for image, objects in OBJECTS.items():
        write_image(root / "images" / f"{image}.jpg", (80, 40))
        lines = [
            f"{int(label == 'ship')} {(x1 + x2) / 160} {(y1 + y2) / 80} {(x2 - x1) / 80} {(y2 - y1) / 40}\n"
            for label, (x1, y1, x2, y2) in objects
        ]
        (root / "labels" / f"{image}.txt").write_text("".join(lines))


def make_voc(root: Path) -> None:
    (root / "Annotations").mkdir()
    for image, objects in OBJECTS.items():
        write_image(root / "JPEGImages" / f"{image}.jpg", (80, 40))
        found = "".join(
            f"<object><name>{label}</name><bndbox>"
            + "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            + "</bndbox></object>"
            for label, box in objects
        )
        (root / "Annotations" / f"{image}.xml").write_text(
            f"<annotation><filename>{image}.jpg</filename><size><width>80</width><height>40</height></size>{found}</annotation>"
        )


def make_csv(root: Path) -> None:
    rows = ["image_path,xmin,ymin,xmax,ymax,label"]
    for image, objects in OBJECTS.items():
        write_image(root / f"{image}.jpg", (80, 40))
        rows += [",".join(map(str, (f"{image}.tif", *box, label))) for label, box in objects]
    (root / "boxes.csv").write_text("\n".join(rows) + "\n")


def make_boxes_json(root: Path) -> None:
    rows = []
    for image, objects in OBJECTS.items():
        write_image(root / "images" / f"{image}.jpg", (80, 40))
        rows.append(
            {"image": f"images/{image}.jpg", "objects": [{"class": label, "box": list(box)} for label, box in objects]}
        )
    write_json(root / "boxes.json", rows)


def write_bands(path: Path, count: int, side: int, value: int) -> None:
    """A GeoTIFF of 16 bits whose band number i, from one, holds `value + 100 * i`."""
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"count": count, "width": side, "height": side, "dtype": "uint16"}
    with rasterio.open(
        path, "w", driver="GTiff", crs="EPSG:32631", transform=rasterio.Affine(10, 0, 0, 0, -10, 0), **shape
    ) as f:
        for band in range(1, count + 1):
            f.write(np.full((side, side), value + 100 * band, np.uint16), band)


def make_eurosat_ms(root: Path) -> None:
    for label in EUROSAT:
        for number in (1, 2):
            write_bands(root / "EuroSAT_MS" / camel(label) / f"{camel(label)}_{number}.tif", 13, 64, 500)


def make_bigearthnet(root: Path) -> None:
    from pyarrow import Table, parquet

    patches = {
        "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57": "test",
        "S2B_MSIL2A_20180421T114349_N9999_R123_T29UNB_0_1": "train",
    }
    labels = [["Pastures", "Arable land"], ["Marine waters"]]
    parquet.write_table(
        Table.from_pydict({"patch_id": list(patches), "labels": labels, "split": list(patches.values())}),
        root / "metadata.parquet",
    )
    for patch in patches:
        for number, (band, side) in enumerate(BIGEARTHNET_SIDES.items()):
            write_bands(
                root / "BigEarthNet-S2" / patch.rsplit("_", 2)[0] / patch / f"{patch}_{band}.tif",
                1,
                side,
                400 + 100 * number,
            )


def make_so2sat(root: Path) -> None:
    import h5py

    rng = np.random.default_rng(0)
    for name in ("training", "validation", "testing"):
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["sen2"] = rng.uniform(0, 0.25, (3, 32, 32, 10))
            file["sen1"] = rng.uniform(0.01, 1.0, (3, 32, 32, 8))
            file["label"] = np.eye(17)[[16, 0, 9]]


# Benchmark -> what writes its stand-in into an existing folder.
MAKERS: dict[str, Callable[[Path], None]] = {
    "rsvqa-lr": make_rsvqa_lr,
    "rsvqa-hr": make_rsvqa_hr,
    "aid": make_folders("aid", "", camel, ".jpg"),
    "nwpu-resisc45": make_folders("nwpu-resisc45", "NWPU-RESISC45", lambda label: label.replace(" ", "_"), ".jpg"),
    "whu-rs19": make_folders("whu-rs19", "", camel, ".jpg"),
    "siri-whu": make_folders("siri-whu", "12class_tif", lambda label: label.replace(" ", "_"), ".tif"),
    "eurosat-ms": make_eurosat_ms,
    "bigearthnet": make_bigearthnet,
    "eurosat": make_folders("eurosat", "2750", camel, ".jpg"),
    "uc-merced": make_folders("uc-merced", "UCMerced_LandUse/Images", lambda label: label.replace(" ", ""), ".tif"),
    "meter-ml": make_folders("meter-ml", "", lambda label: label.replace(" ", "_"), ".png"),
    "rsicd": make_karpathy("rsicd", "dataset_rsicd.json", "RSICD_images", ".jpg"),
    "sydney-captions": make_karpathy("sydney-captions", "dataset.json", "imgs", ".tif"),
    "ucm-captions": make_karpathy("ucm-captions", "dataset.json", "imgs", ".tif"),
    "rsitmd": make_karpathy("rsitmd", "dataset_RSITMD.json", "images", ".tif"),
    "nwpu-captions": make_nwpu_captions,
    "vrsbench-captions": make_vrsbench,
    "vrsbench-vqa": make_vrsbench,
    "vrsbench-referring": make_vrsbench,
    "dior-rsvg": make_dior_rsvg,
    "vhm-eval": make_vhm_eval,
    **{name: make_rsivqa(name) for name in BENCHMARKS if name.startswith("rsivqa")},
    "ucm-multilabel": make_multilabel,
    "rsvg-hr": make_rsvg_hr,
    "detection-grounding": make_yolo,
    "detection-counting": make_yolo,
    "detection-all": make_yolo,
    "scenes": make_scenes,
    **({"so2sat": make_so2sat} if find_spec("h5py") else {}),  # no dependency of this package
}
# Samples in the default split of each stand-in.
COUNTS = {
    "rsvqa-lr": 4, "rsvqa-hr": 4, "aid": 60, "nwpu-resisc45": 90, "whu-rs19": 38, "siri-whu": 24, "eurosat": 20,
    "eurosat-ms": 20, "bigearthnet": 19, "so2sat": 3,
    "uc-merced": 42, "meter-ml": 14, "rsicd": 2, "sydney-captions": 2, "ucm-captions": 2, "rsitmd": 2, "nwpu-captions": 2,
    "vrsbench-captions": 2, "vrsbench-vqa": 2, "vrsbench-referring": 2, "dior-rsvg": 2, "vhm-eval": 2,
    "ucm-multilabel": 34, "rsvg-hr": 2, "detection-grounding": 1, "detection-counting": 3, "detection-all": 3,
    **{name: 5 for name in BENCHMARKS if name.startswith("rsivqa")},
}  # fmt: skip
