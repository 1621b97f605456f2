# SPDX-License-Identifier: Apache-2.0
"""The page of a report: the figures, the style and the script in one HTML file that needs nothing else.

Guarantees: what comes from a run is data, wherever it stands. In the markup Jinja escapes it; in the page's JSON every
character that could end the element is written as an escape; the script puts it into text nodes, and into values of
attributes of fixed names. And if all that failed: the page's own policy lets no script and no style run but those whose
hash it names, lets nothing be fetched, and has the browser refuse to make markup of strings (Trusted Types).

Not covered: browsers without CSS ``light-dark()`` (before 2024) show it without colours. The charts are a few hundred
lines of SVG of ours: libraries of charts are larger than the whole page may be, or want to be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

MARKER = "rlar report"
"""What the page says of who made it."""
_ESCAPED = re.compile("[<>&'\u2028\u2029\ud800-\udfff]")


def as_data(value: Any) -> str:
    """JSON that can stand in an HTML element, and be written as UTF-8, whatever is in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def render(figures: Mapping[str, Any], *, live_s: float | None = None) -> bytes:
    """The page.

    Args:
        figures: What `verl_rlar.report.figures.gather` returned.
        live_s: Every how many seconds the page asks for new figures; None: never, it is a file.
    """
    template, style, script = _parts()
    page = template.render(
        policy=policy(live=live_s is not None),
        marker=MARKER,
        css=Markup(style),
        script=Markup(script),
        data=Markup(as_data(figures)),
        live_s=live_s,
        run=figures["run"],
        made=f"made {figures['made'][:16].replace('T', ' ')} UTC",
        tools=figures["tools"],
        alarms=figures["alarms"],
    )
    return page.encode("utf-8", "backslashreplace")


@cache
def policy(*, live: bool) -> str:
    """The page's Content-Security-Policy."""
    _, style, script = _parts()
    rules = {
        "default-src": "'none'",
        "script-src": f"'{_hash(script)}'",
        "style-src": f"'{_hash(style)}'",
        "img-src": "data:",
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _parts() -> tuple[Any, str, str]:
    """The template, the style and the script."""
    folder = files(__package__)
    read = {
        name: folder.joinpath(name).read_text("utf-8")
        for name in ("template.html.j2", "report.css", "charts.js", "report.js")
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    script = f'"use strict";\n{{\n{read["charts.js"]}\n{read["report.js"]}\n}}\n'
    return environment.from_string(read["template.html.j2"]), read["report.css"], script
