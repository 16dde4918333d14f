"""Calls of one processor and one model from four threads at the same time: each answer is that of a single thread."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fuzz._soak import draw, soak
from fuzz.harness import Case, random_of


AREA = "four threads"
MOST, TEST_COUNT = 200, 24
THREADS = 4


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    assert soak().answers  # of one thread, computed before the time of a case is taken
    names = [draw(random_of(seed, number)) for number in range(count)]
    started: list[Future[str]] = []

    def wait(number: int) -> str:
        if not started:  # all calls are queued, and each case waits for one
            started.extend(threads.submit(soak().call, name) for name in names)
        return started[number].result()

    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for number, name in enumerate(names):
                yield Case(f"{number}: {name}", lambda number=number: wait(number), seconds=120.0)
        finally:
            threads.shutdown(cancel_futures=True)
