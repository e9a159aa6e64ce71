"""`leantune push`: a run's adapter on the Hub, as plain LoRA that opens everywhere and as it was trained."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from leantune.cli.command import TaskOfRun, console, one_command, say
from leantune.cli.parity import print_parity
from leantune.core.errors import HubError, describe


def command(words: list[str]) -> Any:
    """The command `leantune push`."""
    del words
    return one_command(push)


def push(
    run: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build the folder, list it, upload nothing.")] = False,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="path", help="Leave the built folder here, too.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="owner/name", help="Hub id of the base; taken when its weights are the same.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="License of the adapter, e.g. apache-2.0.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="id", help="Hub id of the data; repeat for more.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="text", help="Compare on this; repeat for more.")] = None,
    adapter: TaskOfRun = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before uploading.")] = False,
) -> None:
    """At the root of the repository a plain LoRA, proven here to give the same answers, which PEFT and LoRA servers
    open without leantune; in native/ the adapter as it was trained; tokenizer, chat template and a model card with
    metadata and the run's evaluation. No path of this machine is in it.

    The card names the base by a Hub id only where the run loaded it from there, or --base shows the weights to be the
    same. Before the upload the files are listed, and it asks.
    """
    from leantune.adapters import hub, publication
    from leantune.adapters.conversion import refuse_occupied
    from leantune.adapters.folder import of_task

    hub.check_repo_id(repo_id)
    if keep is not None:
        refuse_occupied(keep, False)
    target = None if dry_run else hub.check_target(repo_id, revision=revision, create_pr=create_pr)
    card = {**_card(run, adapter), "license": license, "datasets": dataset}
    screen = console()
    with tempfile.TemporaryDirectory(prefix="leantune-push-") as scratch:
        folder = keep or Path(scratch) / "folder"
        built = publication.prepare(
            of_task(run, adapter), repo_id, folder, card=card, base_id=base, prompts=prompt or None, progress=say
        )
        _show(screen, built)
        if target is None:
            screen.print("\nDry run: nothing was uploaded.", style="bold")
            return
        _confirm(repo_id, target, private, create_pr, yes)
        address = hub.push(folder, repo_id, private=private, revision=revision, create_pr=create_pr)
    screen.print(f"Pushed to [bold]{address}[/]", soft_wrap=True)


def _card(run: Path, task: str | None) -> dict[str, Any]:
    """What the card of a run's adapter says of its training; nothing for an adapter without a run."""
    from leantune.core.errors import LeantuneError
    from leantune.train import Run
    from leantune.train.card import card

    try:
        return card(Run.open(run, task).summary)
    except (LeantuneError, KeyError, TypeError):
        # An adapter folder, or a run that was killed before its record was whole.
        return {}


def _show(screen: Console, built: dict[str, Any]) -> None:
    print_parity(screen, built["parity"])
    base = built["base"]
    where = "named by its Hub id" if base.get("source") == "hub" else "not a model of the Hub; the card says why"
    screen.print(Text(f"base                  {base['name']} ({where})"), soft_wrap=True)
    screen.print("files")
    width = max(len(path) for path in built["files"])
    for path, size in built["files"].items():
        screen.print(Text(f"  {path:<{width}}  {size:>13,} bytes"), soft_wrap=True)
    screen.print(f"  {'together':<{width}}  {sum(built['files'].values()):>13,} bytes")


def _confirm(repo_id: str, target: dict[str, Any], private: bool, create_pr: bool, yes: bool) -> None:
    if create_pr:
        what = f"open a pull request in {repo_id} as {target['user']}"
    elif target["exists"]:
        what = f"replace the adapter in {repo_id} as {target['user']}: everyone who sees it sees these files"
    else:
        kind = "a private repository" if private else "a PUBLIC repository that everyone can read"
        what = f"make {repo_id}, {kind}, as {target['user']}"
    if yes:
        return
    if not sys.stdin.isatty():
        raise HubError(describe("push", f"about to {what}", "your word for it", "add --yes"))
    if not typer.confirm(f"About to {what}. Go on?"):
        raise typer.Exit(1)
