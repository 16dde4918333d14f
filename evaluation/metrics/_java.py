"""The two parts of COCO's caption evaluation that are written in Java: its tokenizer, and METEOR 1.5.

Both are run from the archives that `pycocoevalcap` carries, with the same options as it. Its own wrappers are not used: they
write into the folder they are installed in, take the encoding of the terminal, and lose track if a line breaks.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pycocoevalcap.meteor.meteor
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR


COCO = Path(pycocoevalcap.meteor.meteor.__file__).parents[1]
TOKENIZER = COCO / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
METEOR = COCO / "meteor" / pycocoevalcap.meteor.meteor.METEOR_JAR


def java_command(*arguments: str) -> list[str]:
    """Raises OSError if there is no Java."""
    java = shutil.which("java")
    if java is None:
        raise OSError(
            'The captioning variant "coco" needs Java, and there is no `java` here. Install it (on Debian: apt-get install '
            'default-jre-headless), or take the variant "coco_without_java" (protocol strict-without-java), which leaves '
            "METEOR out and splits words by a plain rule."
        )
    # Text goes in and out as UTF-8 wherever this runs.
    return [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments]


def tokenize(captions: Sequence[str]) -> list[str]:
    """Words of each caption as the Penn Treebank splits them, in lower case and without punctuation, joined by spaces.

    Whether a full stop belongs to the word before it may depend on the next caption. So that all comes out as published,
    references and predictions are given apart, each in their order. Brackets are words, "-lrb-" and "-rrb-", as published.

    Raises:
        OSError: there is no Java, or it failed.
    """
    # Every kind of line break becomes a space, since a line is a caption.
    lines = [" ".join(caption.split()) for caption in captions]
    command = java_command("-cp", str(TOKENIZER), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, encoding="utf-8")
    found = done.stdout.removesuffix("\n").split("\n")
    while len(found) < len(lines) and not lines[len(found)]:
        found.append("")  # blank lines at the end
    if done.returncode or len(found) != len(lines):
        raise OSError(f"The tokenizer gave {len(found)} lines for {len(lines)} captions: {done.stderr.strip()[-500:]}")
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in found]


class Meteor:
    """METEOR 1.5 as a process that answers line by line, for use in `with`.

    Raises:
        OSError: there is no Java, or it failed.
    """

    def __enter__(self) -> "Meteor":
        command = java_command("-Xmx2G", "-jar", str(METEOR), "-", "-", "-stdio", "-l", "en", "-norm")
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, **pipes, encoding="utf-8", bufsize=1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, *parts: str) -> str:
        try:
            self.process.stdin.write(" ||| ".join(parts) + "\n")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.errors.seek(0)
            raise OSError(f"METEOR stopped: {self.errors.read().strip()[-500:]}")
        return answer.strip()

    def statistics(self, candidate: str, references: Sequence[str]) -> list[float]:
        """What METEOR counts in a caption, beside the reference that suits it best: 23 numbers that add up over captions.

        They add up as METEOR adds them: a caption that is all of the reference in its order has no chunk.

        Args:
            candidate: words joined by spaces; the references likewise.
        """
        texts = [text.replace("|", " ") for text in (*references, candidate)]
        numbers = [float(number) for number in self.ask("SCORE", *texts).split()]
        said, true, (chunks, said_matched, true_matched) = numbers[0], numbers[1], numbers[20:]
        if chunks == 1 and said_matched == said and true_matched == true:
            numbers[20] = 0.0
        return numbers

    def value(self, statistics: np.ndarray) -> float:
        """METEOR from the sum of the statistics of captions."""
        self.ask("EVAL", " ".join(map(str, statistics)))  # of the one caption that the sum is taken for
        return float(self.process.stdout.readline())  # and of all
