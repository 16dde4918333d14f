"""What goes wrong with rasters."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


LONGEST_MESSAGE = 900  # characters


class RasterError(ValueError):
    """A raster that cannot be shown to a model. The message is one line and says what to do."""

    def __init__(self, message: str) -> None:
        # Names and values from files and options may have any length.
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…")


class NoValidPixelError(RasterError):
    """A raster, or a window of it, without a single valid pixel."""


class NoOverlapError(RasterError):
    """An area, or a layer of features, that shares no pixel with a raster."""


class RasterWarning(UserWarning):
    """Something about a raster that the caller should know, such as an assumption about its bands."""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Issues no `RasterWarning`, for callers that show `Raster.notes`, which hold the same texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RasterWarning)
        yield
