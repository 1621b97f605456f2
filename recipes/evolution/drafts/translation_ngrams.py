# SPDX-License-Identifier: Apache-2.0
"""How near a translation is to the reference, by what characters follow each other; a copy of the source gets 0."""

from collections import Counter

DESCRIPTION = "F-score of character n-grams (1 to 6) against a reference translation; 0 for a copy of the source."


def grams(text, size):
    text = "".join(text.split())
    return Counter(text[at : at + size] for at in range(len(text) - size + 1))


def near(one, other):
    shares = []
    for size in range(1, 7):
        ours, theirs = grams(one, size), grams(other, size)
        common = sum((ours & theirs).values())
        if ours and theirs:
            precision, recall = common / sum(ours.values()), common / sum(theirs.values())
            shares.append(5 * precision * recall / (4 * precision + recall) if common else 0.0)
        elif ours or theirs:
            shares.append(0.0)
    return sum(shares) / len(shares) if shares else 0.0


def score(prompt, response, reference, extra):
    if not reference or not reference.strip():
        return None, "no reference"
    text = response.rpartition("</think>")[2].strip()
    room = max(100, len(reference))
    if len(text) > 20 * room:
        return 0.0, "far too long"
    source = extra.get("source") or prompt
    if text and text in source and near(text, reference) < 0.999:
        return 0.0, "a copy of the source"
    value = near(text, reference)
    if len(text) > 1.5 * len(reference):
        value *= 1.5 * len(reference) / len(text)
    return value, "n-grams"
