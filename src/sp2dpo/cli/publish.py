"""The command that makes a run public: publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sp2dpo.cli.terminal import AsJson, RunDirPath, app, give, say
from sp2dpo.errors import InputError, MissingExtra


@app.command(epilog="sp2dpo publish runs/quickstart -o quickstart-dataset --license cc-by-4.0")
def publish(
    run_dir: RunDirPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="the folder to make")],
    trainer: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="trl|axolotl|llama-factory|openrlhf|ms-swift",
            help="in place of the dataset folder, the files that this trainer reads",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="upload it to the Hugging Face hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="create that repository as a private one")] = False,
    license: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="licence of the dataset; without it: not stated")
    ] = None,
    without_texts: Annotated[
        bool, typer.Option("--without-texts", help="ids and numbers only, for sources that must not be copied")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """A dataset folder for the hub, or the files of another trainer."""
    if private and push_to_hub is None:
        raise InputError("--private goes with --push-to-hub")
    if trainer is not None:
        if push_to_hub or license or without_texts:
            raise InputError("--for makes files for a trainer on this machine; leave out the options of the dataset")
        give(_export(run_dir, output, trainer), as_json)
        return
    give(_dataset(run_dir, output, push_to_hub, private, license, not without_texts), as_json)


def _export(run_dir: Path, output: Path, trainer: str) -> dict[str, Any]:
    from sp2dpo.publish.trainers import TRAINERS, export

    made = export(run_dir, output, trainer)
    say(f"publish   β for {TRAINERS[trainer].title}: {TRAINERS[trainer].beta}")
    return {"folder": str(made.path), "pairs": made.pairs, "left_out": made.left_out}


def _dataset(
    run_dir: Path, output: Path, repo: str | None, private: bool, license: str | None, texts: bool
) -> dict[str, Any]:
    try:
        from sp2dpo.publish.dataset import publish_dataset
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo publish (no module '{error.name}')", "report") from error
    from sp2dpo.publish.hub import check_target, push

    if repo is not None:
        check_target(repo)
    made = publish_dataset(run_dir, output, license=license, texts=texts, repo=repo)
    for note in made.notes:
        say(f"publish   note: {note}")
    told: dict[str, Any] = {"folder": str(made.path), "pairs": made.pairs, "files": made.files}
    if repo is not None:
        say(f"publish   to {repo}")
        told["url"] = push(
            output, repo, private=private, message=f"β of {made.pairs:,} pairs, λ {made.lambda_hash[:12]}"
        )
    return told
