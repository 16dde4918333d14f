"""How an answer in words is read: by rules that see the answer and what may be answered, never the reference."""

import re
import unicodedata
from collections.abc import Callable


def tidy(text: str) -> str:
    """Lower case, without space around it and one full stop at its end; forms of one character that look alike are one."""
    text = unicodedata.normalize("NFKC", text).lower().strip()
    return text.removesuffix(".").rstrip()


def without_spaces(text: str) -> str:
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text).lower())


def without_spaces_and_dots(text: str) -> str:
    return without_spaces(text).replace(".", "")


def letter(text: str) -> str:
    """The letter of an option, A to J, that the text begins with: "B", "b)", "(B) forest", "B. forest"; else "".

    A small letter is one only if nothing else stands there, since "a" is a word.
    """
    match = re.match(r"[\s(\[\"'*]*(?:([A-J])(?!\w)|([a-j])[\s).\]\"'*:]*$)", unicodedata.normalize("NFKC", text))
    return (match[1] or match[2]).upper() if match else ""


# How texts are made alike before they are compared, by rule.
READERS: dict[str, Callable[[str], str]] = {
    "exact": tidy,
    "contained": without_spaces,
    "without_spaces": without_spaces_and_dots,
    "letter": letter,
}


def agrees(rule: str, answer: str, reference: str) -> bool:
    """Whether an answer is right, both as `READERS[rule]` gives them. An empty one never is."""
    return bool(answer) and (answer in reference if rule == "contained" else answer == reference)


class ClassReader:
    """Reads the class that an answer names.

    Rules:
        exact: the answer is the name, but for case, space around it and a full stop.
        without_spaces: the same, all spaces and full stops taken out (as GeoChat).
        contained: the answer, in lower case and without spaces, is a part of the name (as RSEvalKit). It may be part of
            several names; then it stands for all of them.
        first_mentioned: the name that is mentioned first in the answer, as whole words; of two that begin at the same
            place, the longer one.

    Raises:
        ValueError: a name that is no text or in which the rule leaves nothing, or two names that the rule cannot tell apart.
    """

    RULES = ("exact", "without_spaces", "contained", "first_mentioned")

    def __init__(self, names: list[str], rule: str) -> None:
        self.rule = rule
        self.read_text = READERS.get(rule, tidy)
        self.names: dict[str, str] = {}
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"The class name {name!r} is no text.")
            key = self.read_text(name)
            if not key:
                raise ValueError(f"The class name {name!r} is empty to the rule {rule!r}: rename it.")
            if self.names.setdefault(key, name) != name:
                raise ValueError(
                    f"The classes {self.names[key]!r} and {name!r} are the same to the rule {rule!r}: rename one."
                )
        longest_first = sorted(map(re.escape, self.names), key=len, reverse=True)
        self.mention = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def read(self, answer: str) -> list[str]:
        """Names of the classes that the answer stands for; empty if there is none."""
        text = self.read_text(answer)
        if self.rule == "contained":
            return [name for key, name in self.names.items() if text and text in key]
        if self.rule == "first_mentioned":
            match = self.mention.search(text)
            return [self.names[match[0]]] if match else []
        return [self.names[text]] if text in self.names else []
