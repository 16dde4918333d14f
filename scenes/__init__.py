"""Synthetic overhead scenes with exact annotations.

`drawing` plans a scene from a seed and draws it. `questions` makes questions and answers. `sensors` makes further bands.
`python -m mfrsvlm.scenes` writes images and a JSONL file for training and evaluation. The benchmark `scenes` of
`mfrsvlm.evaluation` scores answers.
"""

from .drawing import CLASSES, KINDS, Scene, SceneObject, draw, plan_change, plan_scene, scene_seed
from .questions import TASKS, Question, ask, ask_change
from .sensors import SENSOR_TASKS, ask_sensors, sense


__all__ = [
    "CLASSES",
    "KINDS",
    "SENSOR_TASKS",
    "TASKS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "ask_change",
    "ask_sensors",
    "draw",
    "plan_change",
    "plan_scene",
    "scene_seed",
    "sense",
]
