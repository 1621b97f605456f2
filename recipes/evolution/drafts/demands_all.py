# SPDX-License-Identifier: Apache-2.0
"""The demands that stand in a prompt's own words: so many words, one that must be there, one that must not, a mark."""

import re

KINDS = ("open",)
NEEDS_REFERENCE = False
DESCRIPTION = "For prompts that want a note of N words that mentions one word, leaves one out, and ends with a mark."
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def score(prompt, response, reference, extra):
    count = re.search(r"\b(\d{1,3}) words long\b", prompt)
    must = re.search(r"\bmentions \"([^\"]{1,40})\"", prompt)
    never = re.search(r"\bleaves out \"([^\"]{1,40})\"", prompt)
    mark = re.search(r"\bcloses with \"(.)\"", prompt)
    if not (count and must and never and mark):
        return None, "the prompt makes no such demands"
    text = response.rpartition("</think>")[2].strip()
    words = [word.casefold() for word in WORD.findall(text[:20_000])]
    broken = [
        name
        for name, holds in (
            ("number of words", len(words) == int(count[1])),
            ("word that must be there", must[1].casefold() in words),
            ("word that must not", never[1].casefold() not in words),
            ("closing mark", text.endswith(mark[1])),
        )
        if not holds
    ]
    return float(not broken), f"broken: {', '.join(broken) or 'none'}"
