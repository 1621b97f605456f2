# SPDX-License-Identifier: Apache-2.0
"""A time of day: 1 if the last line of the response has the reference's time and no other, else 0."""

import re

KINDS = ("short_text",)
TIME = re.compile(r"(?<![\d:.])(\d{1,2})[:.](\d{2})(?![\d:]|\.\d)\s*(?:([ap])\.?m\b)?", re.IGNORECASE)


def times(text):
    found = set()
    for hour, minute, half in TIME.findall(text):
        hours = int(hour) % 12 + 12 * (half in "pP") if half else int(hour)
        if hours < 24 and int(minute) < 60:
            found.add(60 * hours + int(minute))
    return found


def score(prompt, response, reference, extra):
    wanted = times(reference)
    if len(wanted) != 1:
        return None, "the reference is no time of day"
    said = times(response.strip().rpartition("\n")[2])
    return float(said == wanted), f"{len(said)} times in the last line"
