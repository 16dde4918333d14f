"""The small model of this package and a scene to ask it about: `mfrsvlm demo`, and `mfrsvlm ask` for any model and image.

`MODEL` is the folder of the model, `SCENE` an image of the kind that it knows. Both come with the package.
"""

from pathlib import Path


MODEL = str(Path(__file__).parent / "model")
SCENE = str(Path(__file__).parent / "scene.png")

__all__ = ["MODEL", "SCENE"]
