"""What goes wrong with rasters."""


class RasterError(ValueError):
    """A raster that cannot be shown to a model. The message is one line and says what to do."""


class NoValidPixelError(RasterError):
    """A raster, or a window of it, without a single valid pixel."""


class NoOverlapError(RasterError):
    """An area, or a layer of features, that shares no pixel with a raster."""


class RasterWarning(UserWarning):
    """Something about a raster that the caller should know, such as an assumption about its bands."""
