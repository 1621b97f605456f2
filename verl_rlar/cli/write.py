# SPDX-License-Identifier: Apache-2.0
"""`rlar write`: has an LLM agent write a verifier or a rubric for a task, and admits it if it passes the exam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    Json,
    Output,
    Set,
    app,
    complain,
    configured,
    library_folder,
    new_library_folder,
    print_json,
    progress_bar,
    run,
    submitted,
    visible,
)
from verl_rlar.cli.exam import Then
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError
from verl_rlar.inbox import Submission, record_of
from verl_rlar.library import EventKind, spec_to_json
from verl_rlar.purse import folder_of
from verl_rlar.tools.rubric import Rubric
from verl_rlar.types import Kind

if TYPE_CHECKING:
    from verl_rlar.agents.bench import Trial  # the exam's imports take a second
    from verl_rlar.agents.coder import Written

SAID = {
    "fault": "unusable",
    "own_cases": "contradicts its own cases",
    "duplicate": "a duplicate",
    "open": "fails on open cases",
    "sealed": "fails on sealed cases",
    "admitted": "admitted",
}
COLOURS = {"admitted": "green", "sealed": "red", "fault": "red"}
WHY_CHARS = 90


@app.command("write", short_help="Have an LLM write a verifier or a rubric.")
def write_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task in a sentence: what makes a response right.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Rows of the task. Repeatable.")
    ] = None,
    cases: Annotated[
        list[str] | None, typer.Option("--cases", metavar="FILE", help="A case file, as of `rlar exam`. Repeatable.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", min=1, max=32, help="Most drafts, each by its own scheme.")
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="The tool's name. Default: made from TASK.")] = "",
    kind: Annotated[
        list[Kind] | None, typer.Option("--kind", help="What it is for. Default: what the rows are. Repeatable.")
    ] = None,
    rubric: Annotated[
        bool | None,
        typer.Option("--rubric/--verifier", help="What to write. Default: a rubric where rows have preferences only."),
    ] = None,
    seed: Annotated[int, typer.Option(help="As of `rlar exam`.")] = 0,
    folder: Annotated[
        str | None, typer.Option("--in", metavar="FOLDER", help="A library, or a run: an admitted tool goes there.")
    ] = None,
    then: Annotated[Then, typer.Option(help="With --in: what becomes of an admitted tool.")] = Then.LIVE,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the source of an admitted tool there.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the traffic with the LLM in this cassette.")
    ] = None,
    note: Annotated[
        str, typer.Option(metavar="TEXT", help="What the cassette says about who wrote the LLM's answers.")
    ] = "",
    replay: Annotated[Path | None, typer.Option(metavar="FILE", help="Use this cassette instead of the LLM.")] = None,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Have an LLM write a verifier for a task: planned, drafted, tried in a box, repaired, and examined.

    The agent sees the task, some rows, and the open cases that its drafts get wrong; the sealed cases of the exam, which
    it never sees, decide. The LLM is any OpenAI-compatible endpoint (agents.url, agents.model). Caps: agents.steps,
    tokens, dollars, wall_s for this task; agents.run_calls, run_tokens, run_dollars, run_s for all agents of a run;
    agents.rpm, tpm for its pace. If one is reached, raise it, and the same command goes on from there; so it does where
    the endpoint was gone.
    Exit code: 0 a verifier was admitted, 1 none was.
    Where no program can check (open dialogue), a rubric is written instead: yes/no questions that the same LLM then
    answers about each response, in scoring and in training, too. It takes the same exam; rubrics.exam_tokens caps that.

    \b
    Examples:
      rlar write "the final number is right" --data gsm8k.jsonl --set agents.url=http://127.0.0.1:8000/v1 --set agents.model=Qwen/Qwen3-32B
      rlar write "a helpful answer" --data preferences.jsonl --rubric --in checkpoints/qwen3-8b/rlar --set ...
      rlar write "a time of day" --cases recipes/custom_tool/cases.jsonl --n 5 --in checkpoints/qwen3-8b/rlar --set ...
      rlar write "a time of day" --cases recipes/custom_tool/cases.jsonl --out clock.py --record clock.cassette.jsonl --set ...
      rlar write "a time of day" --cases recipes/custom_tool/cases.jsonl --replay clock.cassette.jsonl --json
    """  # noqa: E501
    run(
        lambda: _write(
            task, data or [], cases or [], n, name, kind or [], rubric, seed, folder, then.value, out, record, note,
            replay, as_json, configured(settings),
        )
    )  # fmt: skip


def _write(
    task: str,
    data: list[str],
    cases: list[str],
    n: int | None,
    name: str,
    kinds: list[Kind],
    rubric: bool | None,
    seed: int,
    folder: str | None,
    then: str,
    out: Path | None,
    record: Path | None,
    note: str,
    replay: Path | None,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar.agents.coder import write

    if not task.strip():
        raise ConfigError("TASK is empty: say what makes a response right, for example 'the final number is right'")
    if not data and not cases:
        raise ConfigError("nothing to write it from: give --data FILE or --cases FILE")
    if record and replay:
        raise ConfigError("--record and --replay exclude each other: what is replayed is recorded already")
    if out and (out.is_file() or out.is_dir()):
        raise ConfigError(f"--out {out} is there already: name another file")
    if out and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: there is no folder {out.absolute().parent}")
    library = library_folder(folder) or new_library_folder(folder) if folder else None
    if n is not None:
        config = config.model_copy(update={"agents": config.agents.model_copy(update={"drafts": n})})
    console = Output()

    def on_event(kind: str, what: Any) -> None:
        if as_json:
            for line in _records(kind, what):
                print_json(line)
        else:
            _say(console, kind, what)

    with progress_bar() as on_progress:
        written = write(
            task,
            data,
            config,
            folder=folder_of(config),
            case_files=cases,
            name=name,
            kinds=kinds,
            form=None if rubric is None else "rubric" if rubric else "verifier",
            seed=seed,
            record=record,
            note=note,
            replay=replay,
            on_event=on_event,
            on_progress=on_progress,
        )
    _finish(written, console, library, then, out, as_json, config)
    return OK if written.admitted else BAD


def _records(kind: str, what: Any) -> Iterator[dict[str, Any]]:
    """Progress as JSON-like objects; `type` is ``scheme`` or ``trial``."""
    if kind == "plan":
        yield from ({"type": "scheme", "rank": rank, **scheme} for rank, scheme in enumerate(what, start=1))
    else:
        yield {"type": "trial", **{key: value for key, value in vars(what).items() if key != "source"}}


def _say(console: Output, kind: str, what: Any) -> None:
    if kind == "plan":
        schemes: Sequence[Any] = what
        console.print(Text("Plan", style="bold"))
        for rank, scheme in enumerate(schemes, start=1):
            console.print(Text(visible(f"{rank:>3}  {scheme['kind']}: {scheme['idea']}")), soft_wrap=True)
    else:
        trial: Trial = what
        console.print(Text(visible(f"draft {trial.draft}, version {trial.version}: {SAID[trial.state]}"), style="dim"))


def _finish(
    written: Written,
    console: Output,
    library: Path | None,
    then: str,
    out: Path | None,
    as_json: bool,
    config: RlarConfig,
) -> None:
    if not as_json:
        _print(written, console)
    admitted = written.admitted
    if admitted:
        card, spec = admitted.examination.card, admitted.examination.spec
        if as_json:
            print_json({"type": "card", **card.as_dict()})
        else:
            for check in Rubric.of(spec).checks if written.form == "rubric" else ():
                print(visible(f"{check.weight:>3g}  {check.question}"))
            print("\n".join(map(visible, card.markdown().splitlines())))
        if out:
            try:
                out.write_text(admitted.source, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from None
        if library:
            events: dict[str, EventKind] = {"shadow": "shadow", "live": "live"}
            asked = Submission(
                digest=spec.digest,
                spec=spec_to_json(spec),
                source=admitted.subject.source or None,
                by=spec.origin,
                why=f"written for: {written.task}",
                exam=record_of(admitted.examination, config.life.canaries),
                event=events.get(then),
                replace=True,
            )
            submitted(library, asked, spec.name, as_json=as_json)
    else:
        complain(written.why)
    if as_json:
        print_json({"type": "summary", **written.as_dict()})


def _print(written: Written, console: Output) -> None:
    table = Table("draft", "version", "came to", "open cases", "wrong", "s per 1,000", "why", box=None)
    for trial in written.trials:
        speed = trial.seconds_per_1000
        cells = (
            str(trial.draft),
            str(trial.version),
            SAID[trial.state],
            str(trial.cases or ""),
            str(trial.wrong) if trial.cases else "",
            "" if speed is None else f"{speed:.1f}",
            trial.why[:WHY_CHARS],
        )
        table.add_row(*(Text(visible(cell), style=COLOURS.get(trial.state, "")) for cell in cells))
    console.print()
    console.table(table)
    agent = written.agent
    again = f" ({written.recalled} of them kept from before)" if written.recalled else ""
    said = (
        f"{written.cases} cases, {written.sealed} of them sealed. The LLM ({agent.model}) gave {agent.steps} answers"
        f"{again}, {agent.tokens:,} tokens, {agent.seconds:.0f} s. Transcript: {agent.transcript}"
    )
    if written.form == "rubric":
        said += f". As the judge it answered {written.judged_calls:,} times, {written.judged_tokens:,} tokens"
    console.print(Text(visible(said)), soft_wrap=True)
    console.print(Text(visible(f"{written.name}: {written.why}."), style="bold"), soft_wrap=True)
    console.print()
