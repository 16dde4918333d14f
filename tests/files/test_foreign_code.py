"""Code of others runs only at the user's word: no pickle, no trust that is written into the package."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
EXCEPTIONS = {("convert_checkpoint.py", "import pickle")}  # for the error that a rejected pickle raises
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def sources():
    """The modules of the package, its benchmarks and its examples."""
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if place.parts[0] not in ("tests", "docs", "build") and not any(
            part.startswith(".") or part in ("site-packages", "__pycache__") for part in place.parts
        ):
            yield place.as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def unsafe_calls(tree):
    """Descriptions of all places in a module that could run code of others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES and not node.level:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            yield from _unsafe_call(node)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            if any(
                is_value(key, "trust_remote_code") and not is_value(value, False) and is_fixed(value) for key, value in pairs
            ):
                yield "trust_remote_code is fixed"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            defaults = dict(zip([a.arg for a in reversed(positional)], reversed(node.args.defaults), strict=False))
            defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None}
            if is_value(defaults.get("trust_remote_code"), True):
                yield "trust_remote_code is the default"


def _unsafe_call(call):
    name = ast.unparse(call.func)
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    trust = options.get("trust_remote_code")
    if trust is not None and is_fixed(trust) and not is_value(trust, False):
        yield "trust_remote_code is fixed"
    if name == "torch.load" and not is_value(options.get("weights_only"), True):
        yield "torch.load without weights_only"
    if (
        name.endswith(("np.load", "numpy.load"))
        and "allow_pickle" in options
        and not is_value(options["allow_pickle"], False)
    ):
        yield "allow_pickle"
    if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    if name.endswith(("read_pickle", "to_pickle")):
        yield name


def is_fixed(node):
    return isinstance(node, ast.Constant)


def is_value(node, value):
    return isinstance(node, ast.Constant) and node.value == value


def test_no_module_runs_code_of_others():
    found = {(place, each) for place, tree in sources() for each in unsafe_calls(tree)}
    assert found - EXCEPTIONS == set()
    assert EXCEPTIONS - found == set(), "remove exceptions that nothing needs any more"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import pickle", ["import pickle"]),
        ("from joblib import load", ["import joblib"]),
        ("torch.load(path)", ["torch.load without weights_only"]),
        ("torch.load(path, weights_only=True)", []),
        ("Auto.from_pretrained(name, trust_remote_code=True)", ["trust_remote_code is fixed"]),
        ("Auto.from_pretrained(name, trust_remote_code=args.trust_remote_code)", []),
        ("options = {'trust_remote_code': True}", ["trust_remote_code is fixed"]),
        ("def load(name, trust_remote_code=True): pass", ["trust_remote_code is the default"]),
        ("def load(name, *, trust_remote_code=False): pass", []),
        ("np.load(path, allow_pickle=True)", ["allow_pickle"]),
        ("model.eval(); yaml.safe_load(text)", []),
        ("yaml.load(text)", ["yaml.load"]),
    ],
)
def test_what_is_found(code, expected):
    assert list(unsafe_calls(ast.parse(code))) == expected
