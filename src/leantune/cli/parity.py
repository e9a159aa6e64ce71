"""How near an exported or merged model is to the trained one, as lines on a screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def print_parity(out: Console, parity: dict[str, Any]) -> None:
    """Print what was measured between the two models.

    Args:
        out: where to.
        parity: the fields of :class:`leantune.adapters.Parity`.
    """
    verdict = "[green]same answers[/]" if parity["ok"] else "[red]not the same[/]"
    out.print(f"parity                {verdict} on {parity['prompts']} prompts, {parity['positions']:,} positions")
    out.print(
        f"max logit difference  {parity['max_abs_logit_difference']:.3g} (allowed {parity['tolerance']:.3g}: rounding)"
    )
    out.print(f"mean KL               {parity['mean_kl']:.3g} nats")
    out.print(f"argmax agreement      {parity['argmax_agreement']:.2%}")
    if parity["greedy_agreement"] is not None:
        out.print(f"greedy agreement      {parity['greedy_agreement']:.2%} of texts of {parity['new_tokens']} tokens")
