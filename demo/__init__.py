"""The small model of this package and an example image: `mfrsvlm demo`, and `mfrsvlm ask` for any model and image.

`MODEL` is the folder of the model, `SCENE` the path of a synthetic scene. Both are part of the package.
"""

from pathlib import Path


MODEL = str(Path(__file__).parent / "model")
SCENE = str(Path(__file__).parent / "scene.png")

__all__ = ["MODEL", "SCENE"]
