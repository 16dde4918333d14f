"""Files are written in `files.writing`, and JSON is read in `files.reading`: the rest of the package calls them."""

import ast
import functools
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
OTHER = {"tests", "examples", "docs", "build"}  # no part of the package
WRITERS = {  # name of a method or function that writes to a path
    "write_text", "write_bytes", "save", "savefig", "imsave", "savetxt", "savez", "savez_compressed", "tofile", "save_file",
    "save_pretrained", "to_csv", "to_json", "to_parquet", "save_to_disk", "copy2", "copyfile", "copytree", "rename",
    "open_memmap", "dump", "FileHandler", "mkstemp", "touch", "truncate", "symlink", "symlink_to", "hardlink_to",
}  # fmt: skip
MODULE_WRITERS = {"shutil.copy", "shutil.move", "os.replace", "os.link"}  # these names have other meanings too
WRITING_MODES = set("wax+")
EXCEPTIONS = {
    # A killed run loses at most the last line, which is removed when the run is resumed.
    ("evaluation/answer_log.py", "touch"): "an append-only log",
    ("evaluation/answer_log.py", "open"): "an append-only log",
    ("evaluation/answer_log.py", "truncate"): "an append-only log",
    ("experiments/ablation.py", "open"): "an append-only log",
    ("experiments/bands.py", "open"): "an append-only log, and the temporary file of `whole_file`",
    ("experiments/bands.py", "savez"): "the temporary file of `whole_file`",
    ("experiments/photograph_ablation.py", "open"): "an append-only log",
    ("experiments/photograph_parts.py", "open"): "an append-only log",
    ("experiments/window_budget.py", "open"): "an append-only log",
    ("experiments/window_modes.py", "open"): "an append-only log",
    ("geospatial/answers.py", "open"): "an append-only log",
    ("geospatial/answers.py", "truncate"): "an append-only log",
    # Folders that get their name when they are complete.
    ("convert_checkpoint.py", "save_pretrained"): "in the temporary folder of `whole_output`",
    ("output_folders.py", "os.replace"): "the renaming of the temporary folder",
    ("training/trainer.py", "os.replace"): "the renaming of a complete checkpoint",
    ("training/demo_model/trainer.py", "save"): "in a checkpoint, which is renamed when it is complete",
    # Folders that must be new or empty.
    ("training/train_demo_model.py", "save_pretrained"): "into a new folder",
    ("experiments/ablation.py", "save_pretrained"): "into a new folder",
    ("scenes/dataset.py", "open"): "the temporary file of `whole_file`",
    ("training/demo_model/photographs.py", "symlink_to"): "links to the images of a data set, in a new folder",
    # `save_pretrained` itself.
    ("processing_mfrsvlm.py", "save_pretrained"): "the inherited method",
    ("modeling_mfrsvlm.py", "save_pretrained"): "the inherited method",
    # A module of the root, which imports no room.
    ("checksums_mfrsvlm.py", "write_text"): "a temporary file",
    ("checksums_mfrsvlm.py", "os.replace"): "the renaming of the temporary file",
    ("benchmarks/read_raster.py", "open"): "in a temporary folder",
    ("benchmarks/speed.py", "write_text"): "a command to the kernel",
}
JSON_READERS = {
    "checksums_mfrsvlm.py": "a module of the root, which imports no room",
    "released_layout.py": "a module of the root, which imports no room; errors become a ConversionError",
    "conversations_mfrsvlm.py": "the text of a tokenizer in memory",
    "training/arguments.py": "text of the command line",
}


@functools.cache
def sources():
    return list(read_sources())


def read_sources():
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if path.is_symlink():
            continue  # in a model folder
        if place.parts[0] not in OTHER and not any(part.startswith(".") or part == "site-packages" for part in place.parts):
            yield place.as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def writes(tree):
    """Names of the calls in a module that write to a path."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        whole = f"{owner.id}.{name}" if isinstance(owner, ast.Name) else name
        first = call.args[0] if call.args else None
        if name == "open":
            modes = [arg for arg in [*call.args, *(k.value for k in call.keywords if k.arg == "mode")] if is_mode(arg)]
            if any(WRITING_MODES & set(mode.value) for mode in modes):
                yield name
        elif whole in MODULE_WRITERS:
            yield whole
        elif name in ("to_csv", "to_json") and first is None:
            continue  # to text
        elif name in ("save", "to_parquet") and isinstance(first, ast.Name) and first.id in ("content", "buffer", "png"):
            continue  # into memory
        elif name in WRITERS and not (name == "rename" and owner is None):
            yield name


def is_mode(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and set(node.value) <= set("rwxabt+")


def test_files_are_written_in_one_place():
    found = {(place, name) for place, tree in sources() if place != "files/writing.py" for name in writes(tree)}
    assert found - EXCEPTIONS.keys() == set(), "write with files.writing, or give the reason in EXCEPTIONS"
    assert EXCEPTIONS.keys() - found == set(), "remove exceptions that nothing needs any more"


def test_json_is_read_in_one_place():
    found = {
        place
        for place, tree in sources()
        if place != "files/reading.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("load", "loads") and getattr(node.value, "id", "") == "json"
    }
    assert found == JSON_READERS.keys()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open(path, 'w')", ["open"]),
        ("path.open(mode='ab')", ["open"]),
        ("Image.open(path); open(path, 'rb')", []),
        ("image.save(path)", ["save"]),
        ("image.save(content, 'PNG'); table.to_csv(index=False)", []),
        ("np.save(path, array)", ["save"]),
        ("shutil.copy(a, b); model.copy()", ["shutil.copy"]),
        ("text.replace('a', 'b'); os.replace(a, b)", ["os.replace"]),
        ("path.write_text('x')", ["write_text"]),
    ],
)
def test_writers_are_found(code, expected):
    assert list(writes(ast.parse(code))) == expected
