"""Reads the number in a text answer."""

import re


UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
UNITS += "eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: value for value, word in enumerate(UNITS.split())}
WORDS |= {word: 10 * value for value, word in enumerate(TENS.split(), start=2)}
WORDS |= {"hundred": 100, "thousand": 1000, "none": 0}
WORD = rf"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})\b"
MINUS = "\N{MINUS SIGN}"
DIGITS = rf"[-+{MINUS}]?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?"
# A number does not begin inside a word or another number, and a sign does not follow one: "3-5" is 3, and then 5.
FIRST = re.compile(rf"(?<!\w)(?<!\d[.,])(?:({DIGITS})|({WORD}(?:[\s-]+(?:and\s+)?{WORD})*))", re.IGNORECASE)
LARGEST = 10**9


def read_number(text: str) -> float | None:
    """The first number in a text, or `None`."""
    match = FIRST.search(text)
    if not match:
        return None
    if match[1]:
        return max(-LARGEST, min(float(match[1].replace(",", "").replace(MINUS, "-")), LARGEST))
    total = current = 0
    for word in re.findall(WORD, match[2].lower()):
        value = WORDS[word]
        if value == 100:
            current = max(current, 1) * 100
        elif value == 1000:
            total, current = total + max(current, 1) * 1000, 0
        else:
            current += value
    return float(min(total + current, LARGEST))
