"""The small models of this package and an example image: `mfrsvlm demo`, and `mfrsvlm ask` for any model and image.

`MODEL` is the folder of the model of synthetic scenes, `PHOTO_MODEL` of the one of aerial photographs, and `SCENE` the path
of a synthetic scene. All are part of the package.
"""

from pathlib import Path


MODEL = str(Path(__file__).parent / "model")
PHOTO_MODEL = str(Path(__file__).parent / "real_model")
SCENE = str(Path(__file__).parent / "scene.png")

__all__ = ["MODEL", "PHOTO_MODEL", "SCENE"]
