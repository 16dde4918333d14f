"""The main job on one image: `python -m mfrsvlm.demo`."""
