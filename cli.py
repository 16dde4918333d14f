"""The console command `mfrsvlm`: a common name for the commands `python -m mfrsvlm.X`.

The module of a command is imported when the command runs, so that `mfrsvlm --help` imports neither torch nor transformers.
If the module takes long to import, a parser in a light module checks the options first.
"""

import difflib
import sys
from dataclasses import dataclass
from importlib import import_module

from . import __version__


@dataclass(frozen=True)
class Command:
    """The implementation of `mfrsvlm NAME`.

    Attributes:
        summary: description in `mfrsvlm --help`.
        module: module of the package with the function `run`.
        run: function that takes the arguments and returns an exit status.
        first: arguments before those of the user.
        parser: `module:function` that makes the parser, for modules that take long to import.
        extra: extra of pyproject.toml that the command may need.
    """

    summary: str
    module: str
    run: str = "main"
    first: tuple[str, ...] = ()
    parser: str | None = None
    extra: str | None = None


COMMANDS = {
    "demo": Command("run the small model on a synthetic scene", "demo.__main__"),
    "ask": Command("ask any model about images", "demo.ask", extra="training"),
    "describe": Command("describe rasters", "geospatial.commands", first=("describe",), extra="geospatial"),
    "detect": Command("find objects in rasters", "geospatial.commands", first=("detect",), extra="geospatial"),
    "count": Command("count objects in rasters", "geospatial.commands", first=("count",), extra="geospatial"),
    "compare": Command("ask about two dates", "geospatial.commands", first=("compare",), extra="geospatial"),
    "info": Command("show what a model sees of a raster", "geospatial.__main__", extra="geospatial"),
    "convert": Command(
        "convert a released checkpoint to a model folder", "convert_checkpoint", parser="arguments:converter_parser"
    ),
    "assemble": Command(
        "make a new, untrained model from parts", "training.assemble", parser="training.arguments:assemble_parser"
    ),
    "finetune": Command(
        "fine-tune a model", "training.finetune", "run", parser="training.arguments:finetune_parser", extra="training"
    ),
    "evaluate": Command("evaluate a model on benchmarks", "evaluation.__main__", first=("run",), extra="evaluation"),
    "report": Command("write tables and plots of evaluations", "evaluation.__main__", first=("report",), extra="evaluation"),
    "serve": Command("serve a model over HTTP, as OpenAI's chat route", "serving.__main__", extra="serving"),
    "app": Command("open a web page for questions about photographs and rasters", "app.__main__", extra="app"),
    "scenes": Command("write a data set of synthetic scenes", "scenes.__main__"),
}


def usage() -> str:
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mfrsvlm COMMAND [options]",
            "",
            "MF-RSVLM: a vision-language model for remote sensing imagery.",
            "",
            *lines,
            "",
            "`mfrsvlm COMMAND --help` lists the options of a command. `mfrsvlm --version` prints the version.",
        ]
    )


def run(name: str, arguments: list[str]) -> int:
    """Runs one command and returns its exit status. A missing library of an extra is reported in one line."""
    command = COMMANDS[name]
    arguments = [*command.first, *arguments]
    if command.parser is not None:
        module, function = command.parser.split(":")
        # Exits here for `--help` and invalid options, before the slow import of the module.
        getattr(import_module(f".{module}", __package__), function)().parse_args(arguments)
    try:
        status: int = getattr(import_module(f".{command.module}", __package__), command.run)(arguments)
    except ImportError as error:
        missing = missing_library(error)
        if missing is None or command.extra is None:
            raise
        print(f'error: `mfrsvlm {name}` needs {missing}: pip install "mfrsvlm[{command.extra}]"', file=sys.stderr)
        return 1
    return status


def missing_library(error: ImportError) -> str | None:
    """The library that is not installed, or `None` if the error has another cause, such as a wrong name in a module."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        library = error.name.partition(".")[0]
        return None if library == __package__ else library
    # transformers raises an ImportError without a name if a library that it needs is missing or too old.
    return str(error).strip().splitlines()[0].rstrip(":.") if error.name is None and str(error).strip() else None


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else f" Commands are {', '.join(COMMANDS)}."
        print(f"error: unknown command {name}.{hint}", file=sys.stderr)
        return 2
    try:
        return run(name, rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
