"""Calls of one processor and one model, one after the other: the same answers, and no more memory at the end.

The last of 25 cases compares the resident memory with that after the first 25, in which every buffer has grown.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fuzz._soak import draw, resident, soak
from fuzz.harness import RIGHT, Case, random_of


AREA = "soak"
MOST, TEST_COUNT = 2000, 50
EVERY = 25
ALLOWED = 24.0  # MB more than after the first calls; 12 KB for each of 2,000 calls


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    first: list[float] = []

    def check_memory() -> str:
        found = resident()
        first.append(found)
        assert found <= first[0] + ALLOWED, f"{found:.0f} MB, and {first[0]:.0f} MB after the first calls"
        return RIGHT

    assert soak().answers  # computed before the time of a case is taken
    for number in range(count):
        if number % EVERY == EVERY - 1:
            yield Case(f"{number}: memory", check_memory)
        else:
            name = draw(random_of(seed, number))
            yield Case(f"{number}: {name}", partial(call, name), seconds=120.0)


def call(name: str) -> str:
    return soak().call(name)
