"""Command-line options: a parser that suggests the closest option, and the options of the converter.

Imports neither torch nor transformers, so that `--help` is fast.
"""

import argparse
import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn


DTYPES = ("float32", "float16", "bfloat16")


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose error about an unknown option names the closest one.

    Options cannot be abbreviated: an abbreviation is an error like any other misspelling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        # Checked first, since a misspelled required option would otherwise be reported as missing. Options after a
        # subcommand belong to its own parser.
        if not any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            for word in words[: words.index("--") if "--" in words else None]:
                if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                    self.reject_option(word.partition("=")[0])
        namespace, unknown = super().parse_known_args(words, namespace)
        for word in unknown:
            if word.startswith("-"):
                self.reject_option(word.partition("=")[0])
        return namespace, unknown

    def reject_option(self, option: str) -> NoReturn:
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        self.error(f"unknown option {option}." + (f" Did you mean {close[0]}?" if close else ""))

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"error: {message} (`{self.prog} --help` lists all options)\n")


def converter_parser() -> ArgumentParser:
    """The options of `convert_checkpoint`."""
    parser = ArgumentParser(
        prog="mfrsvlm convert",
        description="Converts a released checkpoint, in the authors' layout, or a model folder, to a model folder.",
        epilog="To make a new model from parts, use `mfrsvlm assemble`.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    released = commands.add_parser("released", help="convert a checkpoint in the authors' layout")
    released.add_argument("source", type=Path, help="folder with config.json, shards and tokenizer")
    tower = "folder or Hub id of the released vision tower; its weights differ from openai/clip-vit-large-patch14-336"
    released.add_argument("--vision-tower", required=True, help=tower)
    released.add_argument("--verify", action="store_true", help="compare the result with the source, in a new process")
    add_output_arguments(released)
    widen = commands.add_parser("widen", help="give a model with three bands an encoder of more, whose new weights are zero")
    widen.add_argument("source", help="model folder or Hub id")
    widen.add_argument(
        "--bands",
        required=True,
        type=lambda text: text.split(","),
        help="names of all bands, such as red,green,blue,nir (common names of STAC)",
    )
    widen.add_argument("--mean", type=float, help="mean of new bands, 0 to 1 (default: the mean of those of the source)")
    widen.add_argument("--std", type=float, help="standard deviation of new bands (default: as for --mean)")
    add_output_arguments(widen)
    return parser


def add_loading_arguments(parser: Any) -> None:
    """The options of every command that loads a model folder: what is only done at the user's word."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the model folder")
    parser.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="warn, instead of stopping, if weights are missing, damaged or not those that were saved",
    )


def add_dtype_argument(parser: Any) -> None:
    """The type in which a command that answers questions loads the weights."""
    how = "type of the weights (default: as saved, or float32 on a CPU that is slow in that type)"
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help=how)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that writes a model folder."""
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the written weights (default: that of the source)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
