"""Commands that write to a full disk, or to one that cannot be written: one line, and the old files stay whole.

Each command runs in a process with mounts of its own, on a small disk in memory. Without the right to mount one (outside of
Linux, or in some containers) there are no cases.
"""

import contextlib
import ctypes
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

from fuzz._commands import runner
from fuzz._kills import LEFT, Command, content
from fuzz.harness import PACKAGE, PEAKS, REJECTED, RIGHT, Case, random_of
from fuzz.kills_of_conversion import Conversion
from fuzz.kills_of_evaluation import Evaluation
from fuzz.kills_of_training import Training

from mfrsvlm.training.trainer import UNFINISHED


AREA = "full and read-only disks"
MOST, TEST_COUNT = 50, 2
HANGING = 600.0
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of unshare
READ_ONLY, REMOUNT, ALL_PRIVATE = 1, 32, 16384 | 1 << 18  # of mount
DISK = 256 * 2**20  # bytes
RAN = 3  # exit status of `on_disk`: the report is written


class Report(Command):
    """Writes the figures of an evaluation into a model card, and tables beside it."""

    module, function = "mfrsvlm.evaluation.__main__", "main"

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        evaluation = Evaluation()
        evaluation.prepare(folder)
        ended = runner().run(f"{self.module}:{self.function}", evaluation.arguments(folder), folder)
        assert ended.status == 0, ended.log
        for path in (folder / "out").rglob("summary.json"):  # as of the full split, which alone goes into a card
            summary = json.loads(path.read_text())
            whole = summary["counts"]["published"] or summary["counts"]["in_split"]
            summary["counts"] |= {"samples": whole, "in_split": whole}
            path.write_text(json.dumps({**summary, "limit": None}))

    def make_old(self, root: Path) -> None:
        (root / "model").mkdir()
        shutil.copy(PACKAGE / "demo" / "model" / "README.md", root / "model")
        (root / "out").mkdir()
        (root / "out" / "results.md").write_text("old")

    def arguments(self, root: Path) -> list[str]:
        return [
            "report",
            str(self.folder / "out"),
            "--card",
            str(root / "model"),
            "--output",
            str(root / "out"),
            "--no-plots",
        ]


class Cast(Conversion):
    """A conversion whose tensors are cast in files that are mapped into memory."""

    def arguments(self, root: Path) -> list[str]:
        return [*super().arguments(root), "--dtype", "bfloat16"]


COMMANDS: dict[str, Callable[[], Command]] = {
    "conversion of the type": Cast,
    "fine-tuning": Training,
    "conversion": Conversion,
    "evaluation": Evaluation,
    "report --card": Report,
}


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    for number in range(count):
        random = random_of(seed, number)
        name = list(COMMANDS)[number % len(COMMANDS)]
        # Of what the command writes. The first files are the small ones, so that half of the disks are nearly full.
        free = None if random.random() < 0.3 else random.choice((random.random(), random.random() / 50))
        kind = "read-only" if free is None else f"free for {100 * free:.1f}% of the output"
        yield Case(f"{number}: {name}, {kind}", partial(run, folder / name, name, free), HANGING)


@functools.cache
def prepared(name: str, folder: Path) -> tuple[Command, int, dict[str, str]]:
    """A command, the number of bytes that it writes, and the new content of old files."""
    command = COMMANDS[name]()
    folder.mkdir()
    (folder / "source").mkdir()
    command.prepare(folder / "source")
    found = report_of(command, folder, name, 1.0, DISK // 2)
    assert found["status"] == 0, found["log"][-2000:]
    return command, found["written"], found["changed"]


def run(folder: Path, name: str, free: float | None) -> str:
    command, written, changed = prepared(name, folder)
    found = report_of(command, folder, name, free, written)
    assert found["changed"].items() <= changed.items(), f"neither old nor new: {found['changed']}"
    assert not found["left"], f"left behind: {found['left']}"
    if found["status"] == 0:
        assert free, "success on a disk that cannot be written"
        return RIGHT
    assert "Traceback" not in found["log"], found["log"][-2500:]
    errors = [line for line in found["log"].splitlines() if "error: " in line]
    assert len(errors) == 1 and "Errno" not in errors[0], f"not one plain line: {found['log'][-1000:]}"
    return REJECTED


def report_of(command: Command, folder: Path, name: str, free: float | None, written: int) -> dict:
    (folder / "disk").mkdir(exist_ok=True)
    settings = {"name": name, "folder": str(folder), "free": None if free is None else int(free * written)}
    ended = runner().run("fuzz.disks:on_disk", [json.dumps(settings)], folder / "disk")
    PEAKS.append(ended.peak)
    assert ended.status == RAN, ended.log[-2000:]
    return json.loads((folder / "found.json").read_text())


def on_disk(arguments: list[str]) -> int:
    """Runs a command on a disk of its own, and writes what became of the old files. In the forked process."""
    settings = json.loads(arguments[0])
    folder, free = Path(settings["folder"]), settings["free"]
    root, command = folder / "disk", COMMANDS[settings["name"]]()
    command.folder = folder / "source"  # type: ignore[attr-defined]
    mount_disk(root)
    command.make_old(root)
    (root / "other.txt").write_text("old")
    before = content(root)
    if free is None:
        mount(root, READ_ONLY | REMOUNT)
    else:
        fill(root / "filling", free)
    log = io.StringIO()
    with contextlib.redirect_stderr(log), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = getattr(import_module(command.module), command.function)(command.arguments(root))
        except SystemExit as stop:
            status = stop.code
        except Exception:
            status = 1
            traceback.print_exc()
    after = content(root, "filling")
    found = {
        "status": status,
        "log": log.getvalue(),
        "changed": {name: digest(after.get(name)) for name in before if after.get(name) != before[name]},
        "left": [
            str(path) for path in root.rglob("*") if any(part in path.name for part in LEFT) and path.name != UNFINISHED
        ],
        "written": sum(map(len, after.values())) - sum(map(len, before.values())),
    }
    (folder / "found.json").write_text(json.dumps(found))
    return RAN


def digest(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def fill(path: Path, free: int) -> None:
    """Writes a file that leaves this number of bytes on its disk."""
    room = shutil.disk_usage(path.parent).free - free
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(room, 1))


def mount_disk(place: Path) -> None:
    """Mounts a disk for this process alone, as root or as a user who may make namespaces."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER):
        raise OSError(ctypes.get_errno(), "no namespace")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if library.mount(b"none", b"/", None, ALL_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "mounts are shared")
    mount(place, 0)


def mount(place: Path, flags: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, f"size={DISK}".encode()):
        raise OSError(ctypes.get_errno(), "no mount")


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot run the cases."""
    if not sys.platform.startswith("linux"):
        return "needs mounts of Linux"
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            try:
                mount_disk(Path(folder))
            except OSError:
                os._exit(1)
            os._exit(0)
        return "this user may not mount a disk" if os.waitpid(child, 0)[1] else None
