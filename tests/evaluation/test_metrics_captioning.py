"""Caption metrics against the libraries' own corpus functions, plain loops, NLTK and resampling."""

import functools
import itertools
import math
import random
import re
import shutil
from collections import Counter
from statistics import mean

import numpy as np
import pytest
import sacrebleu
from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from rouge_score.rouge_scorer import RougeScorer

from mfrsvlm.evaluation.metrics import _java, load_metric
from mfrsvlm.evaluation.metrics.captioning import METEORS_WORDNET


WORDS = (
    "a the many some big large plane airplane planes bridge bridges river rivers lake road car cars building buildings tall "
    "green trees forest wood near beside over is are stand standing there white red café 森 don't well-known 3.5 1,234"
).split()
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java: default-jre-headless")


def sentence(rng):
    words = rng.choices(WORDS, k=rng.randint(1, 12))
    if rng.random() < 0.1:
        words = words[:1] * rng.randint(2, 9)  # a model that repeats itself
    text = " ".join(words) + rng.choice(["", ".", " .", "!", ' ("x")', ", a plane"])
    return rng.choice([str, str.capitalize, str.upper])(text)


def captions(seed, n):
    """Captions and one to five references, some of which they come close to; a few captions are empty."""
    rng = random.Random(seed)
    references = [[sentence(rng) for _ in range(rng.randint(1, 5))] for _ in range(n)]
    said = []
    for group in references:
        words = rng.choice(group).split()
        changed = [rng.choice(WORDS) if rng.random() < 0.25 else word for word in words]
        said.append(rng.choice([" ".join(changed), " ".join(changed), sentence(rng)]) if rng.random() > 0.02 else "")
    return said, references


def compute(said, references, variant):
    return load_metric("captioning").compute(predictions=said, references=references, variant=variant)


def values(found):
    return {name: figure["value"] for name, figure in found.items() if name not in ("parsed", "scores")}


def slow_words(text):
    """Runs of letters and digits, joined by single hyphens and apostrophes, one character after another."""
    words, word, text = [], "", text.lower() + "  "
    for here, after in itertools.pairwise(text):
        if here.isalnum() or here == "_" or (here in "-'" and word and word[-1] not in "-'" and after.isalnum()):
            word += here
        elif word:
            words.append(word)
            word = ""
    return words


def slow_bleu(said, references, n):
    """Over all captions: clipped n-grams, and the length of the closest reference, the shorter of two."""

    def grams(words, k):
        return Counter(tuple(words[i : i + k]) for i in range(len(words) - k + 1))

    logs, said_words = [], sum(map(len, said))
    for k in range(1, n + 1):
        right = total = 0
        for words, group in zip(said, references, strict=True):
            counts = grams(words, k)
            right += sum(min(c, max(grams(ref, k)[gram] for ref in group)) for gram, c in counts.items())
            total += sum(counts.values())
        logs.append(math.log(right / total))
    closest = sum(
        min((abs(len(ref) - len(words)), len(ref)) for ref in group)[1]
        for words, group in zip(said, references, strict=True)
    )
    return math.exp(mean(logs) + min(0, 1 - closest / said_words))


def slow_lcs(one, other):
    @functools.cache
    def longest(i, j):
        if not (i and j):
            return 0
        return longest(i - 1, j - 1) + 1 if one[i - 1] == other[j - 1] else max(longest(i - 1, j), longest(i, j - 1))

    return longest(len(one), len(other))


def slow_rouge(words, group, beta=1.2):
    """The F of the best precision and the best recall, which may be of two references."""
    if not words:
        return 0.0
    shared = [slow_lcs(tuple(words), tuple(ref)) for ref in group]
    precision, recall = max(shared) / len(words), max(s / len(ref) for s, ref in zip(shared, group, strict=True))
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if recall else 0.0


def slow_cider(said, references, sigma=6.0):
    """CIDEr-D by vectors over all n-grams: clipped, with a penalty for another length, counted in bigrams as published."""
    total = np.zeros(len(said))
    lengths = [[len(ref) for ref in group] for group in references]
    for k in (1, 2, 3, 4):

        def grams(words, k=k):
            return Counter(tuple(words[i : i + k]) for i in range(len(words) - k + 1))

        seen = Counter(gram for group in references for gram in {g for ref in group for g in grams(ref)})

        def weigh(words, grams=grams, seen=seen):
            return {g: c * (math.log(len(said)) - math.log(max(1, seen[g]))) for g, c in grams(words).items()}

        for index, (words, group) in enumerate(zip(said, references, strict=True)):
            one, score = weigh(words), 0.0
            for ref, length in zip(group, lengths[index], strict=True):
                other = weigh(ref)
                norms = math.hypot(*one.values()) * math.hypot(*other.values())
                dot = sum(min(weight, other.get(g, 0)) * other.get(g, 0) for g, weight in one.items())
                gap = max(len(words) - 1, 0) - max(length - 1, 0)
                score += (dot / norms if norms else 0) * math.exp(-(gap**2) / (2 * sigma**2))
            total[index] += 10 * score / len(group) / 4
    return total


SAID, REFERENCES = captions(0, 1200)


@pytest.mark.integration
def test_coco_without_java_against_loops():
    found = compute(SAID, REFERENCES, "coco_without_java")
    said, references = [slow_words(text) for text in SAID], [[slow_words(text) for text in group] for group in REFERENCES]
    assert found["parsed"] == [" ".join(words) for words in said]
    rouge = [slow_rouge(words, group) for words, group in zip(said, references, strict=True)]
    expected = {f"bleu_{n}": slow_bleu(said, references, n) for n in (1, 2, 3, 4)}
    expected |= {"rouge_l": mean(rouge), "cider": slow_cider(said, references).mean()}
    assert values(found) == pytest.approx(expected, rel=1e-6)
    assert found["scores"] == pytest.approx(rouge)
    # And NLTK, a third opinion, which counts captions without n-grams in another way.
    long = [index for index, words in enumerate(said) if len(words) >= 4]
    found = compute([SAID[i] for i in long], [REFERENCES[i] for i in long], "coco_without_java")
    expected = corpus_bleu([references[i] for i in long], [said[i] for i in long])
    assert found["bleu_4"]["value"] == pytest.approx(expected) and len(long) > 800


@pytest.mark.integration
def test_coco_without_java_is_what_the_library_makes_of_these_words():
    found = compute(SAID, REFERENCES, "coco_without_java")
    true = {i: [" ".join(slow_words(text)) for text in group] for i, group in enumerate(REFERENCES)}
    said = {i: [" ".join(slow_words(text))] for i, text in enumerate(SAID)}
    expected = dict(
        zip(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), Bleu().compute_score(true, said, verbose=0)[0], strict=True)
    )
    expected |= {"rouge_l": Rouge().compute_score(true, said)[0], "cider": Cider().compute_score(true, said)[0]}
    assert values(found) == pytest.approx(expected)


def slow_meteor(words, reference, stem):
    """METEOR of 2007, from the last word to the first: the same word, the same stem, a synonym."""
    words, reference = [word.lower() for word in words], [word.lower() for word in reference]
    left, free, pairs = list(range(len(words)))[::-1], list(range(len(reference)))[::-1], []

    def synonym(one, other):
        return any(other == lemma.name() and "_" not in other for s in METEORS_WORDNET.synsets(one) for lemma in s.lemmas())

    # NLTK looks for synonyms among the stems, and so finds few.
    for same in (lambda a, b: a == b, lambda a, b: stem(a) == stem(b), lambda a, b: synonym(stem(a), stem(b))):
        for i in list(left):
            partner = next((j for j in free if same(words[i], reference[j])), None)
            if partner is not None:
                pairs.append((i, partner))
                left.remove(i)
                free.remove(partner)
    if not pairs:
        return 0.0
    pairs.sort()
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in itertools.pairwise(pairs))
    precision, recall = len(pairs) / len(words), len(pairs) / len(reference)
    fmean = 10 * precision * recall / (recall + 9 * precision)
    return fmean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


@pytest.mark.integration
def test_upstream_against_the_corpus_functions_and_loops():
    found = compute(SAID, REFERENCES, "upstream")
    assert found["parsed"] == [" ".join(text.split()) for text in SAID]
    most = max(map(len, REFERENCES))
    streams = [[group[min(i, len(group) - 1)] for group in REFERENCES] for i in range(most)]  # as the published script
    for n in (1, 2, 3, 4):
        expected = sacrebleu.BLEU(max_ngram_order=n).corpus_score(SAID, streams).score / 100
        assert found[f"bleu_{n}"]["value"] == pytest.approx(expected)
    assert found["bleu_4"]["value"] == pytest.approx(sacrebleu.corpus_bleu(SAID, streams).score / 100)
    split = sacrebleu.metrics.bleu.BLEU().tokenizer
    words, groups = [split(text).split() for text in SAID], [[split(t).split() for t in group] for group in REFERENCES]
    assert found["bleu_4"]["value"] == pytest.approx(slow_bleu(words, groups, 4))

    stem = functools.cache(PorterStemmer().stem)
    meteor = [max(slow_meteor(t.split(), r.split(), stem) for r in g) for t, g in zip(SAID, REFERENCES, strict=True)]
    assert found["meteor"]["value"] == pytest.approx(mean(meteor))

    def stems(text):
        return tuple(stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower()))

    def f1(one, other):
        shared = slow_lcs(one, other)
        return 2 * shared / (len(one) + len(other)) if shared else 0.0

    rouge = [max(f1(stems(text), stems(ref)) for ref in group) for text, group in zip(SAID, REFERENCES, strict=True)]
    assert found["scores"] == pytest.approx(rouge) and found["rouge_l"]["value"] == pytest.approx(mean(rouge))
    library = RougeScorer(["rougeL"], use_stemmer=True).score(REFERENCES[5][0], SAID[5])["rougeL"].fmeasure
    assert f1(stems(SAID[5]), stems(REFERENCES[5][0])) == pytest.approx(library)

    cider = slow_cider([text.split() for text in SAID], [[text.split() for text in group] for group in REFERENCES])
    assert found["cider"]["value"] == pytest.approx(cider.mean())


@pytest.mark.integration
def test_synonyms_come_from_wordnet():
    found = [lemma.name() for meaning in METEORS_WORDNET.synsets("plane") for lemma in meaning.lemmas()]
    assert "airplane" in found and "ship" not in found and METEORS_WORDNET.synsets("xyzzy") == []
    same, other = (
        compute(["a big wood"], [[f"a big {word}"]], "upstream")["meteor"]["value"] for word in ("forest", "ship")
    )
    assert same > 0.9 > other > 0


@pytest.mark.integration
@pytest.mark.parametrize("variant", ["coco_without_java", "upstream"])
def test_intervals_are_those_of_drawing_captions(variant):
    """The same draws, but with every caption as often as it was drawn, and all computed anew."""
    said, references = captions(2, 12)
    found = compute(said, references, variant)
    cider = Cider().compute_score(
        dict(enumerate([[" ".join(t.split()) for t in g] for g in references])), {i: [t] for i, t in enumerate(said)}
    )[1]
    rng, bleu, means = np.random.default_rng(0), [], []
    for _ in range(1000):
        drawn = np.repeat(np.arange(12), rng.multinomial(12, np.full(12, 1 / 12)))
        some, true = [said[i] for i in drawn], [references[i] for i in drawn]
        if variant == "upstream":
            streams = [[group[min(i, len(group) - 1)] for group in true] for i in range(5)]
            bleu.append(sacrebleu.corpus_bleu(some, streams).score / 100)
        else:
            true = {i: [" ".join(slow_words(text)) for text in group] for i, group in enumerate(true)}
            some = {i: [" ".join(slow_words(text))] for i, text in enumerate(some)}
            bleu.append(Bleu().compute_score(true, some, verbose=0)[0][3])
        means.append((np.mean([found["scores"][i] for i in drawn]), cider[drawn].mean()))
    quantiles = np.quantile(bleu, [0.025, 0.975])
    assert [found["bleu_4"]["low"], found["bleu_4"]["high"]] == pytest.approx(quantiles.tolist(), rel=1e-6)
    rouge, cider = np.quantile(means, [0.025, 0.975], axis=0).T
    # Figures that are means over captions draw by themselves, and so by other luck.
    assert [found["rouge_l"]["low"], found["rouge_l"]["high"]] == pytest.approx(rouge.tolist(), abs=0.03)
    if variant == "upstream":
        assert [found["cider"]["low"], found["cider"]["high"]] == pytest.approx(cider.tolist(), abs=0.1)


@pytest.mark.parametrize(
    "variant", ["coco_without_java", "upstream", pytest.param("coco", marks=[pytest.mark.slow, needs_java])]
)
def test_captions_by_hand(variant):
    true = ["A big plane is on the runway.", "there is one plane on the runway"]
    said = [true[0], "", " ", "plane " * 30, "...", "森 café", true[1].upper()]
    found = compute(said, [true] * len(said), variant)
    scores = found["scores"]
    assert scores[0] == pytest.approx(1) and scores[1] == scores[2] == scores[4] == 0
    assert scores[3] < 0.3  # a word said over and over is right once
    assert scores[6] == pytest.approx(1) and len(found["parsed"]) == len(said)
    silent = compute(["", ""], [true, true], variant)
    assert all(value == 0 for value in values(silent).values())


@pytest.mark.parametrize("variant", ["coco_without_java", "upstream"])
def test_an_empty_caption_lowers_every_figure(variant):
    with_it = [*SAID[:50], ""]
    scored = values(compute(with_it, REFERENCES[:51], variant))
    spoken = values(compute([*SAID[:50], REFERENCES[50][0]], REFERENCES[:51], variant))
    assert all(scored[name] < spoken[name] for name in scored)


def test_a_single_sample_has_a_cider_of_0():
    assert compute(["a beach"], [["a beach"]], "coco_without_java")["cider"]["value"] == 0


def test_without_java_the_error_names_the_variant_that_does_without(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match=r'variant "coco" needs Java.*default-jre-headless.*"coco_without_java"'):
        compute(["a beach"], [["a beach"]], "coco")
    assert compute(["a beach"], [["a beach"]], "coco_without_java")["bleu_1"]["value"] == pytest.approx(1)


# With Java


@pytest.mark.slow
@needs_java
def test_coco_is_what_the_library_makes_of_captions(monkeypatch):
    """Its tokenizer and METEOR run with their own wrappers, which need to be told the encoding."""
    found = compute(SAID, REFERENCES, "coco")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    true = {i: [{"caption": text} for text in group] for i, group in enumerate(REFERENCES)}
    true = PTBTokenizer().tokenize(true)
    said = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(SAID)})
    assert found["parsed"] == [said[i][0] for i in range(len(SAID))]
    expected = dict(
        zip(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), Bleu().compute_score(true, said, verbose=0)[0], strict=True)
    )
    expected |= {"rouge_l": Rouge().compute_score(true, said)[0], "cider": Cider().compute_score(true, said)[0]}
    meteor = Meteor()
    expected["meteor"] = meteor.compute_score(true, said)[0]
    assert values(found) == pytest.approx(expected)


def slow_meteor_1_5(sums):
    """METEOR 1.5 from what is counted, by the formula and the English weights of its paper."""
    said, true, said_function, true_function = sums[:4]
    weights, delta = (1.0, 0.6, 0.8, 0.6), 0.75
    stages = [sums[4 + 4 * k : 8 + 4 * k] for k in range(4)]  # content and function words of the caption, of the reference
    said_matched, true_matched = (
        sum(w * (delta * stage[i] + (1 - delta) * stage[i + 2]) for w, stage in zip(weights, stages, strict=True))
        for i in (0, 1)
    )
    precision = said_matched / (delta * (said - said_function) + (1 - delta) * said_function)
    recall = true_matched / (delta * (true - true_function) + (1 - delta) * true_function)
    fmean = precision * recall / (0.85 * precision + 0.15 * recall)
    chunks, said_words, true_words = sums[20:]
    words = (said_words + true_words) / 2
    return fmean * (1 - 0.6 * (chunks / words) ** 0.2)


@pytest.mark.slow
@needs_java
def test_meteor_and_its_interval(monkeypatch):
    """Against the formula of its paper, and the library's value of some draws."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    said, references = captions(3, 10)
    found = compute(said, references, "coco")
    words = _java.tokenize(said)
    true = [_java.tokenize(group) for group in references]
    with _java.Meteor() as meteor:
        statistics = np.array([meteor.statistics(one, group) for one, group in zip(words, true, strict=True)])
    assert found["meteor"]["value"] == pytest.approx(slow_meteor_1_5(statistics.sum(axis=0)))
    library, rng, drawn = Meteor(), np.random.default_rng(0), []
    for turn in range(1000):
        times = rng.multinomial(10, np.full(10, 1 / 10))
        drawn.append(slow_meteor_1_5(times @ statistics))
        if turn < 20:
            some = dict(enumerate(np.repeat(np.arange(10), times)))
            value, _ = library.compute_score({i: true[j] for i, j in some.items()}, {i: [words[j]] for i, j in some.items()})
            assert value == pytest.approx(drawn[-1])
    quantiles = np.quantile(drawn, [0.025, 0.975]).tolist()
    assert [found["meteor"]["low"], found["meteor"]["high"]] == pytest.approx(quantiles)


@pytest.mark.slow
@needs_java
def test_the_tokenizer_keeps_captions_apart_in_any_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    texts = ["Two planes. (They don't move!)", "", "a\u2028b\x85c\r\nd", "Ein Fluß, 森", "", "\u200b", "...", "last"]
    words = ["two planes -lrb- they do n't move -rrb-", "", "a b c d", "ein fluß 森", "", "", "", "last"]
    assert _java.tokenize(texts) == words


@pytest.mark.slow
@needs_java
def test_a_meteor_that_stops_is_told():
    with _java.Meteor() as meteor:
        meteor.process.kill()
        meteor.process.wait()
        with pytest.raises(OSError, match="METEOR stopped"):
            meteor.statistics("a", ["a"])
