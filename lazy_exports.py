"""Names of a package that are imported when they are first used (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes `__getattr__` and `__dir__` for the `__init__` of a package.

    Importing a submodule runs the `__init__` of its package first. If that imported torch and transformers, every command
    would take seconds longer, including `--help`.

    Args:
        package: `__name__` of the package.
        modules: exported names, each with the module of the package that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return get, lambda: sorted({*vars(import_module(package)), *modules})
