"""One command for each table and figure in `docs/ablation` and `docs/inside`. Not part of the wheel."""

from pathlib import Path


# The start of experiments with a trained decoder: a model of scenes with 64 visual tokens, smaller than `demo/model`.
SCENE_MODEL = str(Path(__file__).with_name("scene_model"))
