"""BLEU-1 to 4, METEOR, ROUGE-L and CIDEr of captions, in three variants.

Example:
    >>> from mfrsvlm.evaluation.metrics import load_metric
    >>> metric = load_metric("captioning")
    >>> figures = metric.compute(
    ...     predictions=["a plane on the runway", "many trees near a river", "a bridge over a river"],
    ...     references=[
    ...         ["a plane is on the runway", "one plane stands there"],
    ...         ["many green trees are near the river"],
    ...         ["a bridge crosses a wide river"],
    ...     ],
    ...     variant="coco_without_java",
    ... )
    >>> {name: round(figures[name]["value"], 4) for name in ("bleu_1", "bleu_2", "rouge_l", "cider")}
    {'bleu_1': 0.7585, 'bleu_2': 0.4704, 'rouge_l': 0.7524, 'cider': 2.0862}

Limitations:
- CIDEr weighs words by their frequency in the references of all samples. A part of a set therefore gives other values than
  the full set, and a single sample always gives 0. The interval uses the frequencies of the full set.
- Paraphrases are wrong, except for METEOR's synonyms. The synonyms of `upstream` come from the WordNet 3.0 in METEOR 1.5, so
  that nothing is downloaded; NLTK's own WordNet would also find synonyms of inflected words. NLTK looks for synonyms of
  stems, and so finds few.
- `rouge_score` ignores characters other than a to z and digits.
- English only.

Citation:
BLEU: Papineni et al., ACL 2002. METEOR: Denkowski and Lavie, WMT 2014 (1.5); Lavie and Agarwal, WMT 2007. ROUGE: Lin, 2004.
CIDEr: Vedantam et al., CVPR 2015. COCO captions: Chen et al., 2015. sacreBLEU: Post, WMT 2018.
"""

import functools
import re
import zipfile
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from mfrsvlm.evaluation.intervals import corpus_figure, figure
from mfrsvlm.evaluation.metrics import _java
from mfrsvlm.evaluation.metrics._checked import SOME_TEXTS, TEXT, CheckedMetric


ORDERS = (1, 2, 3, 4)  # lengths of n-grams
WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")


class Captioning(CheckedMetric):
    """Similarity of captions to one or more reference captions, by their common n-grams.

    Variants:
        coco: the COCO caption evaluation (`pycocoevalcap`): words are split by the tokenizer of the Penn Treebank, in lower
            case and without punctuation; METEOR 1.5. Both need Java.
        coco_without_java: the same BLEU, ROUGE-L and CIDEr, but words are sequences of letters, digits, inner hyphens and
            inner apostrophes, in lower case. No METEOR.
        upstream: the scripts of MF-RSVLM: BLEU by `sacrebleu` (its own tokenizer, case-sensitive, smoothed); METEOR of 2007
            by `nltk`, split at spaces, best reference; CIDEr, split at spaces, with case and punctuation; F1 of ROUGE-L by
            `rouge_score`, on stems, best reference.

    The METEOR of `nltk` uses synonyms from the WordNet 3.0 in METEOR 1.5, so that nothing is downloaded. NLTK's own WordNet
    would also look up the base form of an inflected word. This rarely matters, since words with the same stem are matched
    before synonyms.

    BLEU and the METEOR of `coco` are computed over all captions together. ROUGE-L, CIDEr and the METEOR of `upstream` are
    means over captions. A caption without a word scores 0 and is never skipped.
    """

    prediction, reference = TEXT, SOME_TEXTS

    def _compute(self, predictions, references, variant="coco"):
        """
        Args:
            predictions: list of captions, as generated.
            references: list of lists of captions.
            variant: "coco", "coco_without_java" or "upstream".

        Returns:
            bleu_1, bleu_2, bleu_3, bleu_4, meteor, rouge_l: from 0 to 1.
            cider: from 0 to 10. N-grams are weighed by their frequency in the references of all samples, see limitations.
            parsed: the words that were compared, joined by spaces.
            scores: ROUGE-L of each caption, which does not depend on the other samples.
        """
        self.one_of("variant", variant, VARIANTS)
        candidates = SPLITTERS[variant](predictions)
        split = iter(SPLITTERS[variant]([text for group in references for text in group]))
        truths = [[next(split) for _ in group] for group in references]
        for index, group in enumerate(truths):
            if not any(group):
                raise ValueError(f"{self.name}: references[{index}] has no word: {references[index]}.")
        figures, scores = VARIANTS[variant](candidates, truths)
        return {**figures, "parsed": candidates, "scores": scores}


Captions = Sequence[str]  # words joined by spaces
References = Sequence[Captions]
Result = tuple[dict[str, dict[str, Any]], list[float]]  # figures, and ROUGE-L of each caption


def coco(candidates: Captions, references: References) -> Result:
    figures, scores = coco_without_java(candidates, references)
    with _java.Meteor() as meteor:
        statistics = [meteor.statistics(text, true) for text, true in zip(candidates, references, strict=True)]
        return {**figures, "meteor": corpus_value(statistics, meteor.value)}, scores


def coco_without_java(candidates: Captions, references: References) -> Result:
    bleu = BleuScorer()
    for text, true in zip(candidates, references, strict=True):
        bleu += (text, true)
    statistics = [
        [
            *counts["correct"],
            *counts["guess"],
            counts["testlen"],
            min(counts["reflen"], key=lambda length, own=counts["testlen"]: (abs(length - own), length)),
        ]
        for counts in bleu.ctest
    ]
    rouge = Rouge()
    scores = [rouge.calc_score([text], true) if text else 0.0 for text, true in zip(candidates, references, strict=True)]
    return {
        **{f"bleu_{n}": corpus_value(statistics, functools.partial(coco_bleu, n=n)) for n in ORDERS},
        "rouge_l": figure(scores),
        "cider": cider(candidates, references),
    }, scores


def upstream(candidates: Captions, references: References) -> Result:
    bleu = BLEU(effective_order=True)  # affects only the BLEU of single captions, which is not used
    statistics = []
    for text, true in zip(candidates, references, strict=True):
        counts = bleu.sentence_score(text, true)
        statistics.append([*counts.counts, *counts.totals, counts.sys_len, counts.ref_len])
    stemmer = SimpleNamespace(stem=functools.cache(PorterStemmer().stem))
    meteor = [
        meteor_score([one.split() for one in true], text.split(), stemmer=stemmer, wordnet=METEORS_WORDNET)
        for text, true in zip(candidates, references, strict=True)
    ]
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        float(rouge.score_multi(true, text)["rougeL"].fmeasure) for text, true in zip(candidates, references, strict=True)
    ]
    return {
        **{f"bleu_{n}": corpus_value(statistics, functools.partial(sacre_bleu, n=n)) for n in ORDERS},
        "meteor": figure(meteor),
        "rouge_l": figure(scores),
        "cider": cider(candidates, references),
    }, scores


VARIANTS: dict[str, Callable[[Captions, References], Result]] = {
    "coco": coco,
    "coco_without_java": coco_without_java,
    "upstream": upstream,
}
SPLITTERS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "coco": _java.tokenize,
    "coco_without_java": lambda texts: [" ".join(WORD.findall(text.lower())) for text in texts],
    "upstream": lambda texts: [" ".join(text.split()) for text in texts],
}


def corpus_value(statistics: Sequence[Sequence[float]], value: Callable[[np.ndarray], float]) -> dict[str, Any]:
    """A figure computed from the sum of the statistics of all captions.

    Args:
        statistics: one row of numbers for each caption.
        value: function from the sum to the value.
    """
    table = np.asarray(statistics, dtype=np.float64)
    return corpus_figure(lambda drawn: value(drawn @ table), len(table))


def coco_bleu(statistics: np.ndarray, n: int) -> float:
    """BLEU-n of `pycocoevalcap`.

    Args:
        statistics: (10,): matching n-grams for n = 1 to 4, all n-grams for n = 1 to 4, number of words, and number of words
            of the closest references.
        n: the order.
    """
    scorer = BleuScorer()
    scorer.ctest = [
        {"correct": statistics[:4], "guess": statistics[4:8], "testlen": statistics[8], "reflen": [statistics[9]]}
    ]
    return float(scorer.compute_score(option="closest")[0][n - 1])


def sacre_bleu(statistics: np.ndarray, n: int) -> float:
    """BLEU-n of `sacrebleu`, from 0 to 1; arguments as of `coco_bleu`."""
    counts = [int(count) for count in statistics]
    bleu = BLEU.compute_bleu(counts[:n], counts[4 : 4 + n], *counts[8:], smooth_method="exp", max_ngram_order=n)
    return float(bleu.score / 100)


def cider(candidates: Captions, references: References) -> dict[str, Any]:
    true, predicted = dict(enumerate(references)), {index: [text] for index, text in enumerate(candidates)}
    return figure(Cider().compute_score(true, predicted)[1])


class MeteorsWordNet:
    """The part of the WordNet interface that NLTK's METEOR uses: words that share a meaning with a word."""

    @functools.cached_property
    def tables(self) -> tuple[dict[str, list[str]], dict[str, list[Any]]]:
        """Meanings by word, and words by meaning."""
        with zipfile.ZipFile(_java.METEOR) as archive:
            lines = archive.read("synonym/english.synsets").decode("utf-8").split("\n")
        meanings = {word: line.split() for word, line in zip(lines[::2], lines[1::2], strict=False)}
        words: dict[str, list[Any]] = {}
        for word, named in meanings.items():
            for meaning in named:
                words.setdefault(meaning, []).append(SimpleNamespace(name=functools.partial(str, word)))
        return meanings, words

    def synsets(self, word: str) -> list[Any]:
        meanings, words = self.tables
        return [SimpleNamespace(lemmas=functools.partial(list, words[meaning])) for meaning in meanings.get(word, [])]


METEORS_WORDNET = MeteorsWordNet()
