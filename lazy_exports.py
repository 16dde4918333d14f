"""Names of a package that are imported when they are first used (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes `__getattr__` and `__dir__` for the `__init__` of a package.

    Importing a part of a package runs its `__init__` first. One that imported torch and transformers would cost every
    command seconds, `--help` included.

    Args:
        package: `__name__` of the package.
        modules: names that the package exports, each with the module inside the package that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return get, lambda: sorted({*vars(import_module(package)), *modules})
