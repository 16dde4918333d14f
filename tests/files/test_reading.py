"""Readers of files lose nothing: they are held against Python's own codecs and JSON."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfrsvlm.files.reading import NotJSON, list_images, read_json, read_rows, read_text, shorten


LINES = ["Ein Fluß", "河", "a\u2028b", ""]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_text_does_not_depend_on_mark_or_line_ends(tmp_path, mark, end):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + end.join(LINES).encode())
    assert read_text(path) == "\n".join(LINES)


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32"])
def test_other_unicode_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "a.json"
    mark = "" if encoding in ("UTF-16", "UTF-32") else "\ufeff"
    path.write_bytes((mark + "[1]").encode(encoding))
    with pytest.raises(ValueError, match=encoding[:6]):
        read_text(path)


def test_bytes_of_another_encoding_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Fluß".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: .* at byte 3"):
        read_text(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(JSON, min_size=1, max_size=5), escaped=st.booleans())
def test_rows_are_the_same_from_json_and_jsonl(tmp_path_factory, rows, escaped):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=escaped), encoding="utf-8", errors="surrogatepass")
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    (folder / "a.JSONL").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    expected = list(enumerate(rows, start=1))
    assert read_rows(folder / "a.json") == expected
    assert read_rows(folder / "a.JSONL") == expected


def test_a_broken_line_keeps_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2\n{"id": 3}\n')
    (first, one), (second, broken), (third, three) = read_rows(path)
    assert (first, second, third, one["id"], three["id"]) == (1, 3, 4, 1, 3)
    assert isinstance(broken, NotJSON) and "column" in broken.reason


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("[]", "holds no rows"), ('{"a": 1}', "holds a dict, not a list"), ("[1", "is not JSON"), ("[" * 100_000, "nested")],
)
def test_files_without_rows_are_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"rows\.json .*{complaint}"):
        read_rows(path)


def test_json_names_its_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"a\.json is not JSON, or it is truncated"):
        read_json(path)


def test_images_are_listed_without_what_systems_leave_behind(tmp_path):
    wanted = ["a.JPG", "b.jpeg", "c.TIF", "d.png", "inner/e.Png"]
    other = ["._a.JPG", ".hidden.png", "Thumbs.db", ".DS_Store", "readme.txt", "__MACOSX/a.JPG", ".git/x.png", "g.png/h.txt"]
    for name in wanted + other:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.jpeg", "c.TIF", "d.png"]
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path, recursive=True)] == wanted


@given(JSON)
def test_messages_stay_short(value):
    assert len(shorten(value)) < 120


def test_a_shortened_value_says_how_long_it_is():
    assert shorten("x" * 347_195).endswith("(347195 characters)")
    assert shorten([1, 2]) == "[1, 2]"


AMBIGUOUS = [
    ('{"a": 1, "b": 2, "a": 3}', "key 'a' occurs more than once"),
    ("NaN", "NaN is no number"),
    ("-Infinity", "-Infinity is no number"),
    ("1e999", "number '1e999' is beyond"),
    ("1" * 5000, "5000 characters.* is beyond"),
    (r'"a\ud800"', "lone surrogate"),
    (r'{"\udfff": 1}', "lone surrogate"),
    ("[" * 102 + "]" * 102, "nested deeper than 100 levels"),
    ("[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "reason"), AMBIGUOUS)
def test_ambiguous_json_is_rejected_with_its_place(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json is not JSON: .*{reason}"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text(f'{{"id": 1}}\n{text}\n{{"id": 2}}\n')
    (_, first), (number, row), (_, last) = read_rows(tmp_path / "a.jsonl")
    assert first == {"id": 1} and last == {"id": 2} and number == 2
    assert isinstance(row, NotJSON) and re.search(reason, row.reason)
    if text != "[" * 100_000:  # wrong syntax concerns the whole file
        (tmp_path / "b.json").write_text(f'[{{"id": 1}}, {text}]')
        (_, first), (number, row) = read_rows(tmp_path / "b.json")
        assert first == {"id": 1} and number == 2 and re.search(reason, row.reason)


def test_escaped_pairs_of_surrogates_are_characters(tmp_path):
    (tmp_path / "a.json").write_text(r'{"\ud83d\ude00": ["\ud83d\ude00"]}')
    assert read_json(tmp_path / "a.json") == {"😀": ["😀"]}


def test_nan_is_read_where_the_caller_allows_it(tmp_path):
    (tmp_path / "a.json").write_text("[NaN, -Infinity]")
    value, infinity = read_json(tmp_path / "a.json", allow_nan=True)
    assert value != value and infinity == -float("inf")


def test_nul_bytes_are_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["a\0b"]')
    with pytest.raises(ValueError, match=r"a\.json is not text: byte 3 is NUL"):
        read_json(tmp_path / "a.json")
