"""Synthetic overhead scenes with exact annotations.

`drawing` plans a scene from a seed and draws it. `questions` makes questions and answers. `python -m mfrsvlm.scenes`
writes images and a JSONL file for training and evaluation. The benchmark `scenes` of `mfrsvlm.evaluation` scores answers.
"""

from .drawing import CLASSES, KINDS, Scene, SceneObject, draw, plan_change, plan_scene, scene_seed
from .questions import TASKS, Question, ask, ask_change


__all__ = [
    "CLASSES",
    "KINDS",
    "TASKS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "ask_change",
    "draw",
    "plan_change",
    "plan_scene",
    "scene_seed",
]
