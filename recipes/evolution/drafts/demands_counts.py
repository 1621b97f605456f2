# SPDX-License-Identifier: Apache-2.0
"""A first draft, and a bad one: of the demands, only the number of words is looked at."""

import re

KINDS = ("open",)
NEEDS_REFERENCE = False


def score(prompt, response, reference, extra):
    count = re.search(r"\b(\d{1,3}) words long\b", prompt)
    if not count:
        return None, "the prompt makes no such demands"
    return float(len(response.split()) == int(count[1])), "words"
