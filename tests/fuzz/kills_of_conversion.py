"""Conversions that are killed: the old output, the new one, or none is there, and the next run leaves nothing else."""

from collections.abc import Iterator
from pathlib import Path

from fuzz._kills import MOST, TEST_COUNT, Command, Kills, assert_same, content
from fuzz.harness import Case


__all__ = ["AREA", "MOST", "TEST_COUNT", "cases"]
AREA = "kills of conversion"
CHECKPOINT = Path(__file__).parents[1] / "reference" / "checkpoint"
OLD = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"old"}


class Conversion(Command):
    module, function, old = "mfrsvlm.convert_checkpoint", "main", True

    def arguments(self, root: Path) -> list[str]:
        parts = [str(CHECKPOINT), "--vision-tower", str(CHECKPOINT / "vision_tower")]
        return ["released", *parts, "--output", str(root / "out"), "--overwrite"]

    def make_old(self, root: Path) -> None:
        (root / "out").mkdir()
        for name, data in OLD.items():
            (root / "out" / name).write_bytes(data)

    def check_killed(self, root: Path, whole: Path, had_old: bool) -> None:
        out = root / "out"
        if out.exists():
            found = content(out)
            assert (had_old and found == OLD) or found == content(whole / "out"), f"a part of the output: {sorted(found)}"
        elif had_old:  # killed while the two were exchanged; the next run puts one of them back
            replaced = [content(path) for path in root.glob(".out.partial-*/replaced")]
            assert replaced == [OLD], f"the old output is lost: {sorted(path.name for path in root.iterdir())}"

    def check_end(self, root: Path, whole: Path) -> None:
        assert_same(content(root / "out"), content(whole / "out"))


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    yield from Kills(Conversion(), folder).cases(seed, count)
