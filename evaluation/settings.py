"""Settings of an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of `evaluate`.

    Attributes:
        output: folder for the files of each benchmark, `OUTPUT/BENCHMARK/SPLIT/`. `None`: nothing is written.
        model_name: name of the model in reports. `None`: its Hub id or the name of its folder.
        limit: number of samples to draw from each benchmark. `None`: all of them.
        seed: seed of the sampling with `limit`.
        blind: ask the questions without their images.
        batch_size: questions per batch.
        images_per_chunk: image groups whose features are in memory at the same time.
        share_images: encode an image once for all of its questions. `False`: encode it again for every question.
        missing_images: an image that cannot be read raises an error ("error"), or its questions score 0 ("wrong").
        progress: show a progress bar.

    Raises:
        ValueError: a number below 1, or an unknown value of `missing_images`.
    """

    output: Path | str | None = None
    model_name: str | None = None
    limit: int | None = None
    seed: int = 0
    blind: bool = False
    batch_size: int = 16
    images_per_chunk: int = 8
    share_images: bool = True
    missing_images: Literal["error", "wrong"] = "error"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "images_per_chunk", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.missing_images not in ("error", "wrong"):
            raise ValueError(f"missing_images={self.missing_images!r} must be 'error' or 'wrong'.")
        if self.output is not None:
            object.__setattr__(self, "output", Path(self.output))
