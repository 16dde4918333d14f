"""Rules that parse answers in words. They use the answer and the possible answers, never the reference."""

import re
import unicodedata
from collections.abc import Callable


def tidy(text: str) -> str:
    """NFKC-normalized text in lower case, without surrounding space and one full stop at the end."""
    text = unicodedata.normalize("NFKC", text).lower().strip()
    return text.removesuffix(".").rstrip()


def without_spaces(text: str) -> str:
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text).lower())


def without_spaces_and_dots(text: str) -> str:
    return without_spaces(text).replace(".", "")


def letter(text: str) -> str:
    """The letter of an option, A to J, at the beginning of a text: "B", "b)", "(B) forest", "B. forest"; else "".

    A lower-case letter counts only if the text contains nothing else, since "a" is a word.
    """
    match = re.match(r"[\s(\[\"'*]*(?:([A-J])(?!\w)|([a-j])[\s).\]\"'*:]*$)", unicodedata.normalize("NFKC", text))
    return (match[1] or match[2]).upper() if match else ""


# Normalization of texts before they are compared, by rule.
READERS: dict[str, Callable[[str], str]] = {
    "exact": tidy,
    "contained": without_spaces,
    "without_spaces": without_spaces_and_dots,
    "letter": letter,
}


def agrees(rule: str, answer: str, reference: str) -> bool:
    """Whether an answer is correct, both normalized by `READERS[rule]`. An empty answer never is."""
    return bool(answer) and (answer in reference if rule == "contained" else answer == reference)


class ClassReader:
    """Parses the class that an answer names.

    Rules:
        exact: the answer equals the name, except for case, surrounding space and a full stop.
        without_spaces: the same, after removal of all spaces and full stops (as GeoChat).
        contained: the name contains the answer, in lower case and without spaces (as RSEvalKit). If several names contain
            it, it stands for all of them.
        first_mentioned: the first name that occurs in the answer as a word or phrase; of two that begin at the same
            position, the longer one.

    Raises:
        ValueError: a name that is not text or that is empty after normalization, or two names that the rule cannot
            distinguish.
    """

    RULES = ("exact", "without_spaces", "contained", "first_mentioned")

    def __init__(self, names: list[str], rule: str) -> None:
        self.rule = rule
        self.read_text = READERS.get(rule, tidy)
        self.names: dict[str, str] = {}
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"The class name {name!r} is not text.")
            key = self.read_text(name)
            if not key:
                raise ValueError(f"The class name {name!r} is empty under the rule {rule!r}: rename it.")
            if self.names.setdefault(key, name) != name:
                raise ValueError(
                    f"The classes {self.names[key]!r} and {name!r} are equal under the rule {rule!r}: rename one."
                )
        longest_first = sorted(map(re.escape, self.names), key=len, reverse=True)
        self.mention = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def read(self, answer: str) -> list[str]:
        """Names of the classes that the answer names; empty if there is none."""
        text = self.read_text(answer)
        if self.rule == "contained":
            return [name for key, name in self.names.items() if text and text in key]
        if self.rule == "first_mentioned":
            match = self.mention.search(text)
            return [self.names[match[0]]] if match else []
        return [self.names[text]] if text in self.names else []
