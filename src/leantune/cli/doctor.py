"""`leantune doctor`: what is here, what is missing, and the line that mends it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from leantune.cli.command import console, one_command
from leantune.cli.diagnosis import CHECKS, Check, Finding, Registration, examine

_STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "missing": "bold red"}


def command(words: list[str]) -> Any:
    """The command `leantune doctor`."""
    del words
    return one_command(doctor)


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Do not import PEFT, the one slow check.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, devices, cache, Hub, disk: wanted and found.

    Being offline is no fault. The exit code is 0 when training would work, and 1 when something is missing that it
    needs.
    """
    checks: dict[str, Check] = dict(CHECKS)
    if not quick:
        checks["methods"] = Registration()
    found = []
    out, heading = console(), None
    for finding in examine(checks):
        found.append(finding)
        if not as_json:
            heading = _show(out, finding, heading)
    missing = [finding for finding in found if finding.status == "missing"]
    if as_json:
        typer.echo(json.dumps({"ok": not missing, "findings": [each.to_dict() for each in found]}, indent=2))
    else:
        _conclude(out, found, missing)
    raise typer.Exit(1 if missing else 0)


def _show(out: Console, finding: Finding, heading: str | None) -> str:
    if finding.group != heading:
        out.print(("\n" if heading else "") + f"[bold]{finding.group.replace('[', chr(92) + '[')}[/]")
    line = Text.assemble(
        (f"  {finding.status:<9}", _STYLES[finding.status]), (f"{finding.name:<18} ", "cyan"), finding.text
    )
    if finding.fix and finding.status != "ok":
        line.append(f"\n{'':<11}{'':<18} -> {finding.fix}", "bold" if finding.status != "note" else "dim")
    out.print(line, soft_wrap=True)
    return finding.group


def _conclude(out: Console, found: list[Finding], missing: list[Finding]) -> None:
    if missing:
        fixes = list(dict.fromkeys(finding.fix for finding in missing if finding.fix))
        out.print("\n[bold red]Training will not work:[/] " + ", ".join(each.name for each in missing), soft_wrap=True)
        for fix in fixes:
            out.print(Text(f"  {fix}"), soft_wrap=True)
        return
    warnings = sum(finding.status == "warning" for finding in found)
    more = f" ({warnings} warning{'s' if warnings > 1 else ''} above)" if warnings else ""
    out.print(f"\n[bold green]Training would work.[/]{more}")
