"""The scene in `demo/scene.png`."""

from mfrsvlm.scenes import plan_scene, scene_seed


SCENE_PLAN = plan_scene(scene_seed("demo", 6))
(BUILDING,) = (item.box for item in SCENE_PLAN.objects if item.kind == "building")  # x1, y1, x2, y2 in pixels
