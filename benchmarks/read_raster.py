"""Seconds and peak memory of opening a very large raster and reading all of it as one image.

    python benchmarks/read_raster.py [--side 50000] [--folder FOLDER]

Makes two tiled TIFFs of three bands of 16 bits, with and without overviews. A file that is there from an earlier run
is used again. Every read runs in a process of its own, started after the imports have been paid for; memory is the peak of
that whole process.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil


TILE = 512
READ = """
import sys, time
from mfrsvlm.geospatial import Raster
start = time.perf_counter()
with Raster.open(sys.argv[1]) as scene:
    view = scene.read()
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak) / 1024, *view.image.size)
"""


def write_scene(path: Path, side: int, overviews: bool) -> None:
    """A tiled TIFF whose tiles repeat, so that it is made and stored cheaply and yet has to be decoded whole."""
    ramp = np.arange(TILE, dtype=np.uint16)
    tile = np.stack([ramp[None] // 8 * 40 + ramp[:, None] // 16 * (20 + band) + 1 for band in range(3)]).astype(np.uint16)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint16", "photometric": "RGB"}
    layout = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "zstd", "zstd_level": 1, "bigtiff": "YES"}
    place = {"crs": "EPSG:32631", "transform": rasterio.transform.from_origin(500_000, 4_000_000, 0.5, 0.5)}
    with rasterio.Env(GDAL_CACHEMAX=64), rasterio.open(path, "w", **profile, **layout, **place) as dataset:
        for top in range(0, side, TILE):
            for left in range(0, side, TILE):
                height, width = min(TILE, side - top), min(TILE, side - left)
                window = ((top, top + height), (left, left + width))
                dataset.write(tile[:, :height, :width], window=window)
        if overviews:
            dataset.build_overviews([16, 32, 64], rasterio.enums.Resampling.nearest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=50_000, help="of the square scene, pixels (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files are made and kept (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print("| raster | image | s | peak, MiB |\n|---|---|--:|--:|")
        for name, overviews in (("with overviews", True), ("without overviews", False)):
            path = folder / f"{name.replace(' ', '_')}_{args.side}.tif"
            if not path.exists():
                write_scene(path, args.side, overviews)
            result = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True)
            if result.returncode:
                sys.exit(result.stderr)
            seconds, peak, width, height = result.stdout.split()
            print(f"| {name} | {width} x {height} | {float(seconds):.1f} | {float(peak):.0f} |", flush=True)
            for note in (line for line in result.stderr.splitlines() if "RasterWarning" in line):
                print("note:", note.partition("RasterWarning: ")[2], file=sys.stderr)


if __name__ == "__main__":
    main()
