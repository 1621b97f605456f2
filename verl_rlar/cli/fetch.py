# SPDX-License-Identifier: Apache-2.0
"""`rlar fetch`: brings the files of reward models onto this node, for a training that may not wait for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_rlar.cli.app import (
    BAD,
    OK,
    Json,
    Set,
    app,
    complain,
    configured,
    open_library,
    print_json,
    progress_bar,
    run,
    visible,
)
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError, HubError, ModelRefused, ToolUnavailable


@app.command("fetch", short_help="Download reward models.")
def fetch_command(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[OWNER/NAME[@COMMIT]]...", help="Reward models on the hub.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option("--in", metavar="FOLDER", help="A library, or a run: all its reward models with a say or shadow."),
    ] = None,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Download reward models, if the gate lets them pass, and print their folders.

    Run it on every node, with the same rlar.hub.cache_dir as in training. What is here is not downloaded again.
    Exit code: 0 all are here, 1 some are refused or cannot be had.

    \b
    Examples:
      rlar fetch OWNER/NAME@COMMIT
      rlar fetch --in checkpoints/qwen3-8b/rlar
      rlar fetch OWNER/NAME@COMMIT --json | jq -r .folder
    """
    run(lambda: _fetch(models or [], folder, as_json, configured(settings)))


def _fetch(models: list[str], folder: str | None, as_json: bool, config: RlarConfig) -> int:
    from verl_rlar.admission import fetch, vet
    from verl_rlar.hub import Hub
    from verl_rlar.snapshots import Snapshots

    def tell(model: str, at: Path | str) -> None:
        if as_json:
            print_json({"model": model, "folder": str(at)})
        else:
            print(visible(f"{model} {at}"))

    snapshots = Snapshots(config.hub)
    wanted = dict.fromkeys(models)
    failed = False
    if folder is not None:
        library = open_library(folder, config)
        served = [digest for digest, one in library.standings().items() if one.event in ("live", "shadow")]
        for spec in map(library.spec, served):
            if spec.kind == "reward_model" and not (spec.serving or {}).get("address"):
                try:
                    tell(spec.target, snapshots.locate(spec))
                except ToolUnavailable as error:
                    if spec.target.startswith("/"):
                        complain(str(error))
                        if as_json:
                            print_json({"model": spec.target, "error": str(error)})
                        failed = True
                    else:
                        wanted[spec.target] = None
        if not any(library.spec(digest).kind == "reward_model" for digest in served):
            complain(f"nothing to fetch: {library.path} has no reward model with a say or in the shadow")
    elif not wanted:
        raise ConfigError("nothing to fetch: give OWNER/NAME[@COMMIT], or --in FOLDER")
    with Hub(config.hub) as hub, progress_bar() as on_progress:
        for name in wanted:
            try:
                vetted = vet(name, hub)
                tell(vetted.target, fetch(vetted, hub, on_progress))
            except (ModelRefused, HubError) as error:
                complain(str(error))
                if as_json:
                    print_json({"model": name, "error": str(error)})
                failed = True
    return BAD if failed else OK
