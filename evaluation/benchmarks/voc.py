"""Annotations in the XML format of Pascal VOC: one file per image, with boxes in pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from ...files.reading import is_hidden, shorten
from .reading import inside, take_box, take_size
from .sample import BenchmarkError


SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VOCObject:
    """One object: its class, its box in pixels, clipped to the image, and its XML element, for other fields."""

    name: str
    box: tuple[float, ...]
    element: ElementTree.Element


@dataclass(frozen=True)
class VOCAnnotation:
    """The objects of one image, whose (width, height) is in pixels."""

    path: Path
    image: str
    size: tuple[int, int]
    objects: list[VOCObject]


def xml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".xml" and not is_hidden(path))


def read_voc(path: Path) -> VOCAnnotation:
    """Reads one file.

    Raises:
        BenchmarkError: the file is not XML, defines entities, lacks a field, or has a box outside of the image.
    """
    try:
        content = path.read_bytes()
        forbid_entities(content, path)
        annotation = ElementTree.fromstring(content)
    except BenchmarkError:
        raise
    except (ElementTree.ParseError, expat.ExpatError, LookupError, OSError, ValueError) as error:
        raise BenchmarkError(f"{path} is not XML, or it is truncated: {error}. Download it again.") from error
    size = take_size([text(annotation, f"size/{side}", path) for side in ("width", "height")], path, "size")
    return VOCAnnotation(path, text(annotation, "filename", path), size, list(_objects(annotation, size, path)))


def forbid_entities(content: bytes, path: Path) -> None:
    """Raises a `BenchmarkError` if XML defines entities, which can stand for gigabytes of text or for other files."""

    def reject(name: str, *_: Any) -> None:
        raise BenchmarkError(f"{path} defines the entity {shorten(name)}. Annotations need none, so it may be an attack.")

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = reject
    parser.Parse(content, True)


def _objects(annotation: ElementTree.Element, size: tuple[int, int], path: Path) -> Iterator[VOCObject]:
    for number, element in enumerate(annotation.findall("object")):
        where = f"object {number}"
        box = take_box([text(element, f"bndbox/{side}", path) for side in SIDES], (4,), path, where)
        yield VOCObject(text(element, "name", path), inside(box, size, path, where), element)


def text(element: ElementTree.Element, tag: str, path: Path) -> str:
    """The text of a descendant of an element, which must exist and not be blank."""
    found = (element.findtext(tag) or "").strip()
    if not found:
        raise BenchmarkError(f"{path}: <{element.tag}> has no <{tag}>, or it is blank.")
    return found
