"""Checksums of a model folder: `checksums.json` lists the size and the SHA-256 of its files.

Each `save_pretrained` updates the entries of the files that it writes. Files without an entry are not checked, so that a
folder without a list loads. Cards and code have no entries, because people edit them.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


CHECKSUMS = "checksums.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Patterns of the files that each `save_pretrained` writes.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model*.safetensors")
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip

ALL_FILES = (*MODEL_FILES, *ADAPTER_FILES, *PROCESSOR_FILES)


def checksum(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The entry of one file: `{"size": bytes, "sha256": hex digits}`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


def read_checksums(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The entries of a list, by file name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no list of checksums.
    """
    advice = f"Copy {path} again, or remove it to load without the check."
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({' '.join(str(error).split())[:80]}). {advice}") from error
    entries = content.items() if isinstance(content, dict) else [("", None)]
    for name, entry in entries:
        whole = isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)
        if not whole or Path(name).name != name:
            raise ValueError(f"{path} is damaged: {name[:80]!r} has no size and sha256 of a file beside it. {advice}")
    return dict(entries)


def update_checksums(folder: str | os.PathLike[str], patterns: Iterable[str] = ALL_FILES) -> None:
    """Renews the entries of the files that match, and drops those of files that are gone. The list is replaced atomically.

    Args:
        folder: the model folder.
        patterns: file names with wildcards. Entries of other files do not change.

    Raises:
        OSError: a file cannot be read, or the list cannot be written.
    """
    folder = Path(folder)
    path = folder / CHECKSUMS
    entries: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged and replaced
        entries = read_checksums(path)
    entries = {name: entry for name, entry in entries.items() if (folder / name).is_file()}
    for pattern in patterns:
        entries |= {file.name: checksum(file) for file in folder.glob(pattern) if file.is_file()}
    unfinished = folder / f".{CHECKSUMS}.{os.getpid()}.unfinished"
    try:
        unfinished.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def difference(path: str | os.PathLike[str] | None, entry: dict[str, Any]) -> str | None:
    """How a file differs from its entry, in words; `None` if it does not.

    Args:
        path: the file; `None` if there is none.
        entry: what `checksum` returned when it was saved.
    """
    if path is None or not os.path.isfile(path):
        return "is missing"
    size = os.path.getsize(path)
    if size != entry["size"]:
        return f"has {size} bytes instead of {entry['size']}"
    return None if checksum(path) == entry else "has another content than was saved"


def remove_stale_weights(folder: str | os.PathLike[str]) -> None:
    """Removes what an earlier save has left: one file beside new shards, or the index of shards that are gone.

    `transformers` removes only old shards, and would then load the one file instead of the new shards.
    """
    single, index = Path(folder) / WEIGHTS, Path(folder) / INDEX
    if single.is_file() and index.is_file():
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        stale = single if all((Path(folder) / shard).is_file() for shard in shards) else index
        stale.unlink()


__all__ = ["checksum", "difference", "read_checksums", "remove_stale_weights", "update_checksums"]
