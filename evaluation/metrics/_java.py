"""The two parts of COCO's caption evaluation that are written in Java: its tokenizer, and METEOR 1.5.

Both are run from the archives in `pycocoevalcap`, with the same options. Its own wrappers are not used: they write into the
folder of the package, depend on the encoding of the terminal, and fail on line breaks in captions.
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
    """A Java command line. Raises OSError if Java is not installed."""
    java = shutil.which("java")
    if java is None:
        raise OSError(
            'The captioning variant "coco" needs Java, but there is no `java` here. Install it (on Debian: apt-get install '
            'default-jre-headless), or use the variant "coco_without_java" (protocol strict-without-java), which leaves '
            "METEOR out and splits words by a simple rule."
        )
    # UTF-8 on all platforms.
    return [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments]


def tokenize(captions: Sequence[str]) -> list[str]:
    """Words of each caption, split as in the Penn Treebank, in lower case and without punctuation, joined by spaces.

    Whether a full stop belongs to the word before it may depend on the next caption. As in the published evaluation,
    references and predictions are therefore tokenized separately, in their order. Brackets become "-lrb-" and "-rrb-".

    Raises:
        OSError: Java is not installed, or it failed.
    """
    # Line breaks become spaces, since the tokenizer takes one caption per line.
    lines = [" ".join(caption.split()) for caption in captions]
    command = java_command("-cp", str(TOKENIZER), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, encoding="utf-8")
    found = done.stdout.removesuffix("\n").split("\n")
    while len(found) < len(lines) and not lines[len(found)]:
        found.append("")  # blank lines at the end
    if done.returncode or len(found) != len(lines):
        raise OSError(f"The tokenizer returned {len(found)} lines for {len(lines)} captions: {done.stderr.strip()[-500:]}")
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in found]


class Meteor:
    """METEOR 1.5 as a child process, a context manager.

    Raises:
        OSError: Java is not installed, or it failed.
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
        """The 23 statistics of METEOR for a caption and its best reference. They are summed over captions.

        As in METEOR's own sum, a caption that equals its reference has no chunk.

        Args:
            candidate: words joined by spaces.
            references: words joined by spaces.
        """
        texts = [text.replace("|", " ") for text in (*references, candidate)]
        numbers = [float(number) for number in self.ask("SCORE", *texts).split()]
        predicted, true, (chunks, predicted_matched, true_matched) = numbers[0], numbers[1], numbers[20:]
        if chunks == 1 and predicted_matched == predicted and true_matched == true:
            numbers[20] = 0.0
        return numbers

    def value(self, statistics: np.ndarray) -> float:
        """METEOR from the sum of the statistics of captions."""
        self.ask("EVAL", " ".join(map(str, statistics)))  # the score of the sum as a single caption
        return float(self.process.stdout.readline())  # the score of all captions
