"""Synthetic overhead scenes whose truth is known.

`drawing` plans and draws a scene from a seed, and `questions` asks about it and knows the answers. `python -m
mfrsvlm.scenes` writes images and the JSON that training and evaluation read. The benchmark `scenes` of `mfrsvlm.evaluation`
scores answers.
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
