# SPDX-License-Identifier: Apache-2.0
"""The pages that are made from the code whenever the documentation is built: settings and commands.

    python docs/reference.py configuration|commands      # the same as Markdown, without MkDocs

Guarantees: every key of `verl_rlar.config.RlarConfig` with its default, its values and its docstring, and the help of
every command of `rlar`, as they are in the package that is imported: nothing here can be out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from verl_rlar import versions
from verl_rlar.cli import app
from verl_rlar.config import RlarConfig

WIDTH = 120
"""Columns of a command's help."""


def configuration() -> str:
    """All settings, a table for each section."""
    lines = [
        "# Settings",
        "",
        "Every key stands under `rlar`. On verl's command line it is overridden like verl's own, "
        "`rlar.scoring.timeout_s=5`; for the command `rlar` it is `--set scoring.timeout_s=5`. An unknown key or a bad "
        "value is refused by name before anything starts. Secrets are never settings: only the names of the "
        "environment variables that hold them are.",
        "",
        "Made from `verl_rlar/config.py`.",
        "",
    ]
    for name, model in sections(RlarConfig, "rlar"):
        own = {key: field for key, field in model.model_fields.items() if _section_of(field.annotation) is None}
        if not own:
            continue
        lines += [f"## `{name}`", ""]
        if said := inspect.cleandoc(model.__doc__ or ""):
            if model is not RlarConfig and said != inspect.cleandoc(BaseModel.__doc__ or ""):
                lines += [_prose(said), ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for key, field in own.items():
            cells = (f"`{key}`", _type(field), _default(field), _prose(field.description or ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def sections(model: type[BaseModel], name: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and those within it, by their place in the tree of settings."""
    yield name, model
    for key, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from sections(inner, f"{name}.{key}")
            continue
        for held in _held(field.annotation):
            yield from sections(
                held, f"{name}.{key}.NAME" if get_origin(field.annotation) is dict else f"{name}.{key}[N]"
            )


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _held(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a mapping or a list holds."""
    return [held for one in get_args(annotation) if (held := _section_of(one)) is not None]


def _type(field: FieldInfo) -> str:
    limits = []
    for one in field.metadata:
        for sign, name in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le")):
            if (value := getattr(one, name, None)) is not None:
                limits.append(f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}")
    return _of_type(field.annotation) + (f" {', '.join(limits)}" if limits else "")


def _of_type(annotation: Any) -> str:
    arguments = [one for one in get_args(annotation) if one is not Ellipsis]
    origin = get_origin(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_of_type, arguments)))
    if origin is tuple:
        return f"list of {_of_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_of_type(arguments[0])} to {_of_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return annotation.__name__.lower()
    if _section_of(annotation):
        return "the settings below"
    return {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    if isinstance(value, dict) and value and all(one is None for one in value.values()):
        return "null for each"
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) < 800 else "see `verl_rlar/config.py`"


def _prose(text: str) -> str:
    """A docstring in one line, its double backquotes single as Markdown wants them."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split()))


def commands() -> str:
    """The help of every command."""
    command = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "`rlar` comes with the package; `python -m verl_rlar` is the same. Every command takes `--json`, `--set "
        "KEY=VALUE` and `--help`; tab completion: `rlar --install-completion` (bash, zsh, fish, PowerShell). Made from "
        "the commands themselves.",
        "",
    ]
    for name, one in leaves(command, "rlar"):
        lines += [f"## `{name}`", "", "```text", help_of(one, name), "```", ""]
    return "\n".join(lines)


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A command and all below it, by what is typed."""
    yield name, command
    for key, one in sorted(getattr(command, "commands", {}).items()):
        yield from leaves(one, f"{name} {key}")


def help_of(command: Any, name: str) -> str:
    """What ``NAME --help`` prints."""
    context = command.make_context(name, [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines()).strip()


def supported() -> str:
    """The supported versions, as a table."""
    (major, first), (_, past) = versions.PYTHON
    lines = ["| what | versions |", "|---|---|", f"| Python | {major}.{first} to {major}.{past - 1} |"]
    lines += [f"| {name} | {', '.join(tried)} |" for name, tried in versions.TRIED.items()]
    return "\n".join(lines)


PAGES = {"configuration.md": configuration, "commands.md": commands}


def on_files(files: Any, config: Any) -> Any:
    """For MkDocs: adds the pages."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


MARKED = re.compile(r"^<!-- (file|needs): (.+?) -->\n(?:<!-- .+? -->\n)*```(\w+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """For MkDocs: fills in the supported versions, and shows which file a fence is, or what its commands need."""
    titled = MARKED.sub(
        lambda match: f'```{match[3]} title="{match[2] if match[1] == "file" else f"needs: {match[2]}"}"', markdown
    )
    return titled.replace("{{ supported versions }}", supported())


if __name__ == "__main__":
    page = PAGES.get(f"{sys.argv[1]}.md") if len(sys.argv) == 2 else None
    print(page() if page else __doc__)
    sys.exit(page is None and 2)
