"""BLEU-1 to 4, METEOR, ROUGE-L and CIDEr of captions, in the three ways in which they are computed in this field.

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
- CIDEr counts in the references of all samples how rare words are: a part of a set gives other values than the whole, and a
  single sample always gives 0. For the interval these counts stay as they are in the whole set.
- Words that say the same in other ways are wrong, but for METEOR's synonyms. Those of `upstream` come from the WordNet 3.0
  that is part of METEOR 1.5, so that nothing is downloaded; NLTK's own WordNet would also find those of inflected words.
  NLTK looks for synonyms among stems, and so finds few.
- `rouge_score` knows only the letters a to z and digits.
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
    """How close captions are to one or more reference captions, by the words and runs of words that they share.

    Variants:
        coco: as the COCO caption evaluation (`pycocoevalcap`): captions are split into words by the tokenizer of the Penn
            Treebank, in lower case and without punctuation; METEOR 1.5. Both need Java.
        coco_without_java: the same BLEU, ROUGE-L and CIDEr, but words are runs of letters and digits, held together by
            hyphens and apostrophes, in lower case. No METEOR.
        upstream: as the scripts of MF-RSVLM: BLEU by `sacrebleu` (its own tokenizer, with case, smoothed), METEOR of 2007 by
            `nltk` on what stands between spaces, the best reference; CIDEr on what stands between spaces, with case and
            punctuation; F1 of ROUGE-L by `rouge_score`, on stems, the best reference.

    Synonyms of the METEOR by `nltk` are taken from the WordNet 3.0 that comes with METEOR 1.5, so that nothing has to be
    downloaded. Its own reader of WordNet would also look up the base form of an inflected word, which rarely matters, since
    words with the same stem are paired before synonyms are looked for.

    BLEU, and the METEOR of `coco`, are taken over all captions together; ROUGE-L, CIDEr and the METEOR of `upstream` are
    means over captions. A caption without a word scores 0 and is never left out.
    """

    prediction, reference = TEXT, SOME_TEXTS

    def _compute(self, predictions, references, variant="coco"):
        """
        Args:
            predictions: list of captions, as the model gave them.
            references: list of lists of captions.
            variant: "coco", "coco_without_java" or "upstream".

        Returns:
            bleu_1, bleu_2, bleu_3, bleu_4, meteor, rouge_l: from 0 to 1.
            cider: from 0 to 10. How rare a run of words is, is counted in the references of all samples, so that a part of
                a set gives other values than the whole, and a single sample always gives 0. For the interval it stays as
                counted in all.
            parsed: the words that were compared, joined by spaces.
            scores: ROUGE-L of each caption, which does not depend on the other samples.
        """
        self.one_of("variant", variant, VARIANTS)
        candidates = SPLITTERS[variant](predictions)
        split = iter(SPLITTERS[variant]([text for group in references for text in group]))
        truths = [[next(split) for _ in group] for group in references]
        for index, group in enumerate(truths):
            if not any(group):
                raise ValueError(f"{self.name}: references[{index}] holds no word: {references[index]}.")
        figures, scores = VARIANTS[variant](candidates, truths)
        return {**figures, "parsed": candidates, "scores": scores}


Captions = Sequence[str]  # words joined by spaces
References = Sequence[Captions]
Result = tuple[dict[str, dict[str, Any]], list[float]]  # figures, and ROUGE-L of each caption


def coco(candidates: Captions, references: References) -> Result:
    figures, scores = coco_without_java(candidates, references)
    with _java.Meteor() as meteor:
        statistics = [meteor.statistics(said, true) for said, true in zip(candidates, references, strict=True)]
        return {**figures, "meteor": corpus_value(statistics, meteor.value)}, scores


def coco_without_java(candidates: Captions, references: References) -> Result:
    bleu = BleuScorer()
    for said, true in zip(candidates, references, strict=True):
        bleu += (said, true)
    statistics = [
        [
            *counts["correct"],
            *counts["guess"],
            counts["testlen"],
            min(counts["reflen"], key=lambda length, said=counts["testlen"]: (abs(length - said), length)),
        ]
        for counts in bleu.ctest
    ]
    rouge = Rouge()
    scores = [rouge.calc_score([said], true) if said else 0.0 for said, true in zip(candidates, references, strict=True)]
    return {
        **{f"bleu_{n}": corpus_value(statistics, functools.partial(coco_bleu, n=n)) for n in ORDERS},
        "rouge_l": figure(scores),
        "cider": cider(candidates, references),
    }, scores


def upstream(candidates: Captions, references: References) -> Result:
    bleu = BLEU(effective_order=True)  # which matters for single captions only, whose BLEU is not used
    statistics = []
    for said, true in zip(candidates, references, strict=True):
        counts = bleu.sentence_score(said, true)
        statistics.append([*counts.counts, *counts.totals, counts.sys_len, counts.ref_len])
    stemmer = SimpleNamespace(stem=functools.cache(PorterStemmer().stem))
    meteor = [
        meteor_score([text.split() for text in true], said.split(), stemmer=stemmer, wordnet=METEORS_WORDNET)
        for said, true in zip(candidates, references, strict=True)
    ]
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        float(rouge.score_multi(true, said)["rougeL"].fmeasure) for said, true in zip(candidates, references, strict=True)
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
    """A figure of what is taken from the sum of the statistics of all captions.

    Args:
        statistics: one row of numbers for each caption.
    """
    table = np.asarray(statistics, dtype=np.float64)
    return corpus_figure(lambda drawn: value(drawn @ table), len(table))


def coco_bleu(statistics: np.ndarray, n: int) -> float:
    """BLEU-n of `pycocoevalcap`.

    Args:
        statistics: (10,): right n-grams and n-grams said, for n = 1 to 4 each, words said, words of the closest references.
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
    true, said = dict(enumerate(references)), {index: [text] for index, text in enumerate(candidates)}
    return figure(Cider().compute_score(true, said)[1])


class MeteorsWordNet:
    """What NLTK's METEOR wants of a WordNet: words that have a meaning in common with a word."""

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
