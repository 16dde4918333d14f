"""Scenes that are drawn once and cached on disk at the two input sizes of the model: the canvas and the global view.

Training needs every scene many times, and drawing one costs more than encoding it.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from ...files.reading import read_json
from ...files.writing import whole_array, write_file
from ...processing_mfrsvlm import cut_windows
from ...scenes import Scene, draw, plan_scene, scene_seed
from ...scenes.drawing import SceneObject


SCENE_SIZE = 512
CANVAS, VIEW = 256, 128
# Lengths of objects in a drawn scene: 4 to 8 pixels of the canvas, 2 to 4 of the global view.
OBJECT_PIXELS = (8.0, 16.0)


class SceneImages:
    """Canvas and global view of the first `count` scenes of a split, as the image processor resizes them.

    Args:
        folder: where drawn scenes are kept.
        split: see `scene_seed`.
        count: number of scenes.
        crowding: see `plan_scene`.
        workers: processes that draw.
        sides: sides of canvas and global view, pixels.
        object_pixels: shortest and longest object of a drawn scene.

    Attributes:
        canvases: (count, s, s, 3) uint8, with s = `sides[0]`.
        views: (count, s, s, 3) uint8, with s = `sides[1]`.
        scenes: their plans.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        count: int,
        crowding: int = 1,
        workers: int = 2,
        sides: tuple[int, int] = (CANVAS, VIEW),
        object_pixels: tuple[float, float] = OBJECT_PIXELS,
    ) -> None:
        stem = f"{split}-{count}" + (f"-crowded-{crowding}" if crowding > 1 else "")
        stem += "-{}-{}".format(*sides) if sides != (CANVAS, VIEW) else ""
        stem += "-objects-{:g}-{:g}".format(*object_pixels) if object_pixels != OBJECT_PIXELS else ""
        plans, canvases, views = (folder / f"{stem}-{name}" for name in ("plans.json", "canvas.npy", "view.npy"))
        folder.mkdir(parents=True, exist_ok=True)
        if not plans.exists():
            write_file(plans, json.dumps([asdict(plan(split, index, crowding, object_pixels)) for index in range(count)]))
        self.scenes = [
            Scene(**{**fields, "objects": tuple(SceneObject(**each) for each in fields["objects"])})
            for fields in read_json(plans)
        ]
        if not views.exists():  # written last
            draw_all(self.scenes, canvases, views, workers, sides)
        self.canvases = np.load(canvases, mmap_mode="r")
        self.views = np.load(views, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.scenes)

    def pixel_values(self, start: int, stop: int, config: Any, canvas_source: str = "image") -> torch.Tensor:
        """Scenes `start` to `stop` - 1 as the image processor packs them for a model with this config; (n, L)."""
        views = to_pixels(self.views[start:stop])
        pixels = views.flatten(1)
        if not config.has_details:
            return pixels
        if canvas_source == "image":
            canvases = to_pixels(self.canvases[start:stop])
        else:
            side = config.canvas_scale * config.image_size
            canvases = F.interpolate(views, size=(side, side), mode="bilinear", align_corners=False)
        windows = np.stack([cut_windows(canvas, config.windows) for canvas in canvases.numpy()])
        return torch.cat([pixels, torch.from_numpy(windows)], dim=1)

    def batches(self, config: Any, canvas_source: str = "image", size: int = 4) -> Iterator[torch.Tensor]:
        """`pixel_values` of all scenes, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.pixel_values(start, min(start + size, len(self)), config, canvas_source)


def plan(split: str, index: int, crowding: int = 1, object_pixels: tuple[float, float] = OBJECT_PIXELS) -> Scene:
    return plan_scene(scene_seed(split, index), SCENE_SIZE, object_pixels, crowding)


def draw_all(scenes: list[Scene], canvases: Path, views: Path, workers: int, sides: tuple[int, int]) -> None:
    count = len(scenes)
    with (
        whole_array(views, np.uint8, (count, sides[1], sides[1], 3)) as small,
        whole_array(canvases, np.uint8, (count, sides[0], sides[0], 3)) as large,
        ProcessPoolExecutor(workers) as pool,
    ):
        drawn = pool.map(partial(canvas_and_view, sides=sides), scenes, chunksize=32)
        for index, (canvas, view) in enumerate(tqdm(drawn, total=count, desc=canvases.stem, mininterval=5)):
            large[index], small[index] = canvas, view


def canvas_and_view(scene: Scene, sides: tuple[int, int] = (CANVAS, VIEW)) -> tuple[np.ndarray, np.ndarray]:
    image = draw(scene)
    canvas, view = (np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for side in sides)
    return canvas, view


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float32 in [-1, 1], as the image processor normalizes."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
