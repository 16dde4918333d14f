"""Kills commands at random moments, runs them again as a user would, and compares with a run that was not killed."""

import shutil
import signal
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from random import Random

from fuzz._commands import Ended, runner
from fuzz.harness import PEAKS, RIGHT, Case, random_of


MOST, TEST_COUNT = 20, 1
HANGING = 600.0  # seconds of a case, which runs its command up to four times
LEFT = (".partial-", "unfinished")  # in the names of temporary files


class Command:
    """A command of the package, and what its output must be.

    Attributes:
        module, function: where the command is.
        old: whether half of the runs have an old output to replace.
    """

    module: str
    function: str
    old = False

    def prepare(self, folder: Path) -> None:
        """Makes what the command reads."""

    def arguments(self, root: Path) -> list[str]:
        """The command, which writes to `root / "out"`."""
        raise NotImplementedError

    def again(self, root: Path) -> list[str]:
        """The command after a kill. It may remove what the command asks the user to remove."""
        return self.arguments(root)

    def make_old(self, root: Path) -> None:
        """Makes an old output."""

    def check_killed(self, root: Path, whole: Path, had_old: bool) -> None:
        """Asserts that nothing was lost when the command was killed. `whole`: of the run that was not killed."""

    def check_end(self, root: Path, whole: Path) -> None:
        """Asserts that the output is that of `whole`."""
        raise NotImplementedError


class Kills:
    """The cases of one command."""

    def __init__(self, command: Command, folder: Path) -> None:
        self.command, self.folder = command, folder

    @cached_property
    def whole(self) -> Ended:
        """The run that is not killed, after one that warms up."""
        self.command.prepare(self.folder)
        for name in ("warm", "whole"):
            (self.folder / name).mkdir()
            ended = self.call(self.folder / name, self.command.arguments(self.folder / name))
        return ended

    def call(self, root: Path, arguments: list[str], **kill: float | int | None) -> Ended:
        ended = runner().run(f"{self.command.module}:{self.command.function}", arguments, root, **kill)
        PEAKS.append(ended.peak)
        assert ended.status in (0, -signal.SIGKILL if kill else 0), f"exit status {ended.status}\n{ended.log[-1000:]}"
        return ended

    def cases(self, seed: int, count: int) -> Iterator[Case]:
        for number in range(count):
            random = random_of(seed, number)
            kills = [draw(random) for _ in range(random.choice((1, 1, 2)))]
            has_old = self.command.old and random.random() < 0.5
            name = f"{number}: killed at {' and '.join(f'{100 * when:.0f}% of the {what}' for what, when in kills)}"
            name += ", old output" if has_old else ""
            yield Case(name, partial(self.run, f"{seed}-{number}", kills, has_old), HANGING)

    def run(self, name: str, kills: list[tuple[str, float]], has_old: bool) -> str:
        root, whole = self.folder / name, self.whole
        root.mkdir()
        if has_old:
            self.command.make_old(root)
        arguments = self.command.arguments(root)
        for what, when in kills:
            kill = {"after": when * whole.seconds} if what == "time" else {"event": int(when * whole.events)}
            self.call(root, arguments, **kill)
            self.command.check_killed(root, self.folder / "whole", has_old)
            arguments = self.command.again(root)
        self.call(root, arguments)
        self.command.check_end(root, self.folder / "whole")
        left = [str(path.relative_to(root)) for path in root.rglob("*") if any(part in path.name for part in LEFT)]
        assert not left and [path.name for path in root.iterdir()] == ["out"], f"left behind: {left}"
        shutil.rmtree(root)
        return RIGHT


def draw(random: Random) -> tuple[str, float]:
    """A moment: a part of the duration, or of the changes to files, most of which come in a short time."""
    return random.choice(("time", "changes")), random.random()


def content(folder: Path, *without: str) -> dict[str, bytes]:
    """The files of a folder by their path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in without)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not different, f"missing, new or changed: {', '.join(different[:10])}"
