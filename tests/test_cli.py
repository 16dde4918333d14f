"""The console command: what it lists, how fast, and what it says about mistakes."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mfrsvlm import cli
from mfrsvlm.arguments import ArgumentParser
from mfrsvlm.training.arguments import KEYS


ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "evaluate", "matplotlib"}


def test_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert set(cli.COMMANDS) == {
        *("describe", "detect", "count", "compare"),
        *("demo", "ask", "info", "convert", "assemble", "finetune", "evaluate", "report", "serve", "app", "scenes"),
    }


def test_console_command_and_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"mfrsvlm": "mfrsvlm.cli:main"}
    assert {command.extra for command in cli.COMMANDS.values()} - {None} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_imports_nothing_that_takes_seconds(arguments):
    """What matters is not the time, which depends on the machine, but what takes it."""
    script = (
        "import sys\n"
        "from mfrsvlm.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "[]\n")
    assert result.stdout.startswith(f"usage: mfrsvlm {'COMMAND' if len(arguments) == 1 else arguments[0]}")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute"], "unknown command evalute. Did you mean evaluate?"),
        (["xyz"], "unknown command xyz. Commands are demo, ask,"),
        (["demo", "--scen", "3"], "unknown option --scen. Did you mean --scene?"),
        (["ask", "a.png", "why?", "--modle", "b"], "unknown option --modle. Did you mean --model?"),
        (["convert", "released", "a", "--vision-towr=b"], "unknown option --vision-towr. Did you mean --vision-tower?"),
        (["convert", "released", "a"], "the following arguments are required: --vision-tower, --output"),
        (["assemble", "--langauge-model", "a"], "unknown option --langauge-model. Did you mean --language-model?"),
        (["scenes", "out", "--cuont", "3"], "unknown option --cuont. Did you mean --count?"),
        (["scenes", "out", "--count", "many"], "argument --count: invalid int value: 'many'"),
        (["finetune"], "the following arguments are required: CONFIG.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_in_one_line(arguments, message, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and error.startswith(f"error: {message}")


def test_values_that_look_like_options_stay_values():
    parser = ArgumentParser(prog="x")
    parser.add_argument("--low", type=float)
    parser.add_argument("words", nargs="*")
    assert vars(parser.parse_args(["--low", "-3.5", "a", "--", "--b"])) == {"low": -3.5, "words": ["a", "--b"]}


@pytest.mark.parametrize(
    ("error", "library"),
    [
        (ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"), "peft"),
        (ImportError("\nThe Trainer requires accelerate>=1.1.0:\nrun pip"), "The Trainer requires accelerate>=1.1.0"),
        (ModuleNotFoundError("No module named 'mfrsvlm.lost'", name="mfrsvlm.lost"), None),
        (ImportError("cannot import name 'Lost' from 'transformers'", name="transformers"), None),
    ],
)
def test_missing_library(error, library):
    assert cli.missing_library(error) == library


def test_missing_extra_is_one_line(monkeypatch, capsys):
    def main(arguments):
        raise ModuleNotFoundError("No module named 'evaluate'", name="evaluate")

    monkeypatch.setattr("mfrsvlm.evaluation.__main__.main", main)
    assert cli.main(["evaluate", "--model", "a"]) == 1
    assert capsys.readouterr().err == 'error: `mfrsvlm evaluate` needs evaluate: pip install "mfrsvlm[evaluation]"\n'
    monkeypatch.setitem(cli.COMMANDS, "evaluate", cli.Command("", "evaluation.__main__"))
    with pytest.raises(ModuleNotFoundError):  # a fault of the package keeps its traceback
        cli.main(["evaluate"])


def test_keys_in_the_short_help_of_finetune_exist():
    from mfrsvlm.training.finetune import ConfigParser

    known = {action.dest for action in ConfigParser()._actions}
    named = {word.strip(",") for line in KEYS.splitlines()[1:-1] for word in line.split("  ")[1].replace(",", " ").split()}
    assert len(named) > 10 and named <= known


@pytest.mark.parametrize(
    "module",
    ["cli", "demo", "demo.ask", "scenes", "convert_checkpoint", "training.assemble", "training.finetune", "evaluation"],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_module_forms_keep_working(module, monkeypatch, capsys):
    """`python -m mfrsvlm.X`, in this process, where what takes long to import is there already."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"mfrsvlm.{module}", run_name="__main__")
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out
