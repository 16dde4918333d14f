"""Synthetic overhead scenes whose truth is known: drawn, questioned and scored.

`drawing` plans and draws a scene from a seed, `questions` asks about it and knows the answers, `scoring` marks what a
model says, and `python -m mfrsvlm.scenes` writes images and the JSON that training and evaluation read.
"""

from .drawing import CLASSES, KINDS, Scene, SceneObject, draw, plan_change, plan_scene, scene_seed
from .questions import TASKS, Question, ask, ask_change
from .scoring import caption_facts, iou, score


__all__ = [
    "CLASSES",
    "KINDS",
    "TASKS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "ask_change",
    "caption_facts",
    "draw",
    "iou",
    "plan_change",
    "plan_scene",
    "scene_seed",
    "score",
]
