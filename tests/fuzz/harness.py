"""Runs mutated inputs through the package, and counts what becomes of them.

A module of this folder holds one area. It defines `AREA`, its name in the table, and

    def cases(seed: int, count: int, folder: Path) -> Iterator[Case]: ...

which yields `count` cases. A case and its name depend on the seed and its number alone (see `random_of`). Each case is run
before the next one is drawn, so that cases may share the files in `folder`, which is empty at first.

A module may also define `MOST`, the number of its cases in a run of all areas, if they take long; `TEST_COUNT`, their number
in the tests; and `why_not`, which says why this machine cannot run them, or returns `None`.
"""

import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import mfrsvlm


FOLDER = Path(__file__).parent
PACKAGE = Path(mfrsvlm.__file__).resolve().parent
AREAS = tuple(sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "harness" and not p.stem.startswith(("_", "test_"))))
RIGHT, REJECTED = "right", "rejected"
OUTCOMES = (RIGHT, REJECTED, "wrong", "crashed", "slow")
SLOW_SECONDS = 5.0  # of processor time, since the clock of a busy machine says little
HANGING_SECONDS = 30.0  # of the clock, for a case that waits
LONGEST_MESSAGE = 1000  # characters
SHOWN_FAILURES = 5
PEAKS: list[float] = []  # memory in MB beyond that at the start, of processes that the cases of an area start


@dataclass(frozen=True)
class Case:
    """One mutated input.

    Attributes:
        name: what was mutated, and how.
        run: returns "right" or "rejected". An `AssertionError` stands for a wrong result, any other error for a crash.
        seconds: of the clock, after which it hangs. Default: `HANGING_SECONDS`.
    """

    name: str
    run: Callable[[], str]
    seconds: float | None = None


@dataclass(frozen=True)
class Failure:
    """A case that was neither right nor rejected. `error` is the end of its traceback."""

    area: str
    seed: int
    name: str
    outcome: str
    error: str

    def __str__(self) -> str:
        return f"{self.outcome}: {self.area}, seed {self.seed}, {self.name}\n{self.error}"


@dataclass
class Result:
    """What became of the cases of one area. `peak` is the memory in MB that the process used beyond that at the start."""

    area: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    peak: float = 0.0

    @property
    def tried(self) -> int:
        return self.counts.total()

    @property
    def failed(self) -> int:
        return self.tried - self.counts[RIGHT] - self.counts[REJECTED]


class TooSlowError(BaseException):
    """Interrupts a case. No `Exception`, which the package may turn into an error of its own."""


def outcome(call: Callable[[], Any], is_right: Callable[[Any], bool], *named: str) -> str:
    """Calls a function of the package with a mutated input.

    Args:
        is_right: whether the returned value is right.
        named: what an error must name, such as the file and the row.

    Returns:
        "right", or "rejected" if the package raised a `TypeError`, `ValueError` or `OSError` of its own, in one line, with
        these names.

    Raises:
        AssertionError: the value or the message is not right.
        Exception: any other error, or one that a library raised.
    """
    try:
        value = call()
    except (TypeError, ValueError, OSError) as error:
        if not raised_here(error):
            raise
        message = str(error)
        assert "\n" not in message.strip(), f"The message has several lines: {message!r}"
        assert 0 < len(message) <= LONGEST_MESSAGE, f"The message has {len(message)} characters: {message[:LONGEST_MESSAGE]}"
        missing = [name for name in named if name not in message]
        assert not missing, f"The message does not name {missing}: {message!r}"
        return REJECTED
    assert is_right(value), f"Accepted, and wrong: {repr(value)[:200]}"
    return RIGHT


def raised_here(error: BaseException) -> bool:
    """Whether code of the package raised an error: the last frame of its traceback is in a file of the package."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    path = Path(frame.f_code.co_filename).resolve()
    return path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "tests")


def random_of(seed: int, number: int) -> Random:
    """The source of randomness of one case, which is the same however many cases are drawn."""
    return Random(f"{seed}/{number}")


def area_module(stem: str) -> ModuleType:
    return import_module(f"fuzz.{stem}")


def run_area(stem: str, seed: int, count: int, only: str | None = None) -> Result:
    """Runs the cases of an area. `only`: the name of the one case to run."""
    module = area_module(stem)
    result = Result(module.AREA)
    with tempfile.TemporaryDirectory() as folder, peak_memory(result):
        for case in module.cases(seed, count, Path(folder)):
            if only is None or case.name == only:
                run_case(case, seed, result)
    return result


def run_case(case: Case, seed: int, result: Result) -> None:
    error = ""
    start = time.process_time()
    try:
        with time_limit(case.seconds or HANGING_SECONDS):
            found = case.run()
        if found not in (RIGHT, REJECTED):
            raise ValueError(f"A case returned {found!r}, neither {RIGHT!r} nor {REJECTED!r}.")
    except TooSlowError:
        found, error = "slow", traceback.format_exc(limit=-4)
    except AssertionError as wrong:
        found, error = "wrong", str(wrong) or traceback.format_exc(limit=-2)
    except Exception:
        found, error = "crashed", traceback.format_exc(limit=-4)
    if found in (RIGHT, REJECTED) and time.process_time() - start > SLOW_SECONDS:
        found, error = "slow", f"{time.process_time() - start:.1f} s"
    result.counts[found] += 1
    if error and len(result.failures) < SHOWN_FAILURES:
        result.failures.append(Failure(result.area, seed, case.name, found, error))


@contextmanager
def time_limit(hanging: float) -> Iterator[None]:
    """Interrupts what takes too long. In the main thread only, since only it receives signals."""

    def stop(*_: Any) -> None:
        raise TooSlowError

    timers = ((signal.SIGALRM, signal.ITIMER_REAL, hanging), (signal.SIGPROF, signal.ITIMER_PROF, 2 * SLOW_SECONDS))
    before = [(sign, timer, signal.signal(sign, stop)) for sign, timer, _ in timers]
    try:
        for _, timer, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for sign, timer, handler in before:
            signal.setitimer(timer, 0)
            signal.signal(sign, handler)


@contextmanager
def peak_memory(result: Result) -> Iterator[None]:
    """Measures the highest resident memory, in MB beyond that at the start."""
    start = reset_peak()
    PEAKS.clear()
    yield
    result.peak = max(highest() - start, 0.0, *PEAKS)


def reset_peak() -> float:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins again at the present size
    except OSError:
        pass
    return highest()


def highest() -> float:
    """The peak of the resident memory in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def as_markdown(results: list[Result]) -> str:
    """The table of docs/reliability.md."""
    head = ("area", "tried", *OUTCOMES, "peak memory, MB")
    rows = [(r.area, r.tried, *(r.counts[name] for name in OUTCOMES), f"{r.peak:.0f}") for r in results]
    lines = [head, ("---", *("--:" for _ in head[1:])), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
