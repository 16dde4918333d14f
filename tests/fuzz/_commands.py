"""Runs commands of the package in processes that can be killed.

Run as a program, it imports `MODULES`, and then forks a process for each request. So a command starts in milliseconds, and a
random moment falls into its work, not into the import of torch.
"""

import atexit
import functools
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


MODULES = (
    "mfrsvlm.convert_checkpoint",
    "mfrsvlm.evaluation.__main__",
    "mfrsvlm.evaluation.evaluate",
    "mfrsvlm.evaluation.plots",
    "mfrsvlm.evaluation.report",
    "mfrsvlm.model_card.results",
    "mfrsvlm.training.finetune",
    "transformers.models.auto.processing_auto",
    "transformers.models.llama.modeling_llama",
)
EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate")
LONGEST = 300.0  # seconds of a command


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, negative for a signal.
        seconds: its duration.
        events: number of changes to files below `root`, as far as Python makes them.
        peak: its memory in MB beyond that at the start.
        log: what it printed.
    """

    status: int
    seconds: float
    events: int
    peak: float
    log: str


class Runner:
    """Starts the program below."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )

    def run(
        self, function: str, arguments: list[str], root: Path, after: float | None = None, event: int | None = None
    ) -> Ended:
        """Runs `module:function` with arguments.

        Args:
            root: folder whose changes are events. The log is written beside it.
            after: seconds after which the process is killed.
            event: number of the event before which the process is killed.
        """
        request = {"function": function, "arguments": arguments, "root": str(root), "after": after, "event": event}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()  # ends at the end of its input


@functools.cache
def runner() -> Runner:
    """The one of this process."""
    started = Runner()
    atexit.register(started.close)
    return started


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(vars(handle(json.loads(line)))) + "\n")
        answers.flush()


def handle(request: dict[str, Any]) -> Ended:
    root = Path(request["root"])
    log = root.with_name(f"{root.name}.log")
    shared = mmap.mmap(-1, 16)  # with the child: number of events, resident pages at its start
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        work(request, root, log, shared)
    status, peak = wait_for(child, LONGEST if request["after"] is None else request["after"])
    seconds = time.perf_counter() - start
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    events, pages = (int.from_bytes(shared[start : start + 8], "little") for start in (0, 8))
    return Ended(status, seconds, events, max(peak - pages * mmap.PAGESIZE / 2**20, 0.0), text)


def wait_for(child: int, limit: float) -> tuple[int, float]:
    """Exit status and highest memory in MB of a process, which is killed after `limit` seconds, with what it started."""
    end = time.perf_counter() + limit
    found, status, usage = os.wait4(child, os.WNOHANG)
    while not found:
        if time.perf_counter() >= end:
            kill(child)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.001)
        found, status, usage = os.wait4(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024


def kill(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(child, signal.SIGKILL)


def work(request: dict[str, Any], root: Path, log: Path, shared: mmap.mmap) -> None:
    """The forked process."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place, count = f"{root}{os.sep}", 0
    shared[8:] = int(Path("/proc/self/statm").read_text().split()[1]).to_bytes(8, "little")

    def on_event(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if name == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif name not in EVENTS:
            return
        if any(isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(place) for path in arguments[:2]):
            if count == request["event"]:
                os.killpg(os.getpid(), signal.SIGKILL)
            count += 1
            shared[:8] = count.to_bytes(8, "little")

    status: Any = 70
    try:
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        sys.addaudithook(on_event)
        status = function(request["arguments"])
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


if __name__ == "__main__":
    serve()
