"""A dry run as lines on a screen: what would train, on what, for how long, and what would be left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

_WIDTH = 11
_MUCH_PADDING = 0.1


def print_preview(out: Console, found: dict[str, Any]) -> None:
    """Print what a dry run found.

    Args:
        out: where to.
        found: what :func:`leantune.train.preview.dry_run` returned.
    """
    base, method = found["base"], found["method"]
    _line(out, "base", base["name"] + (f" ({base['note']})" if base["note"] else f", from {base['source']}"))
    options = ", ".join(f"{name}={_short(value)}" for name, value in found["config"]["method_options"].items())
    _line(out, "method", f"{method['name']}: {method['title']}" + (f" ({options})" if options else ""))
    _print_parameters(out, found)
    if "tasks" in found:
        _print_tasks(out, found)
    else:
        _print_data(out, "data", found["data"], found["config"])
    if found["eval_data"] and "tasks" not in found:
        _print_data(out, "eval data", found["eval_data"], found["config"])
    _print_steps(out, found)
    _print_rate(out, found["learning_rate"])
    sizes = found["bytes"]
    _line(
        out,
        "memory",
        f"{_size(sizes['trained'])} trained + {_size(sizes['gradients'])} gradients + {_size(sizes['optimizer'])} "
        f"optimizer, beside the base and the activations; on {found['device']}",
    )
    for place, entry in enumerate(found["writes"]):
        size = f", {_size(entry['bytes'])}" if "bytes" in entry else ""
        _line(out, "writes" if place == 0 else "", f"{entry['path']}  ({entry['what']}{size})")
    out.print("\nDry run: nothing was trained and nothing was written.", style="bold", soft_wrap=True)


def _line(out: Console, title: str, text: str) -> None:
    out.print(Text.assemble((f"{title:<{_WIDTH}}", "cyan"), text), soft_wrap=True)


def _print_parameters(out: Console, found: dict[str, Any]) -> None:
    numbers = found["parameters"]
    trained, total = numbers["trained"], numbers["total"]
    at_once = f", at most {numbers['at_once']:,} in a step" if numbers["at_once"] < trained else ""
    _line(out, "trains", f"{trained:,} of {total:,} parameters ({trained / total:.2%}){at_once}")
    names = [f"{group['name']} x{group['count']}" for group in numbers["groups"]]
    width = max((len(name) for name in names), default=0)
    for name, group in zip(names, numbers["groups"], strict=True):
        shape = "(" + ", ".join(map(str, group["shape"])) + ")"
        _line(out, "", f"{name:<{width}}  {shape:<14}  {group['each']:>11,} each  {group['dtype']}")


def _print_data(out: Console, title: str, data: dict[str, Any], config: dict[str, Any]) -> None:
    if data["rows"] is None:
        _line(out, title, f"{data['path']}, read while training")
        return
    text = f"{data['rows']:,} rows of {data['path']}, {data['total_tokens']:,} tokens"
    if config["task"] == "causal-lm" and data["total_tokens"]:
        text += f", {data['loss_tokens']:,} carry loss ({data['loss_tokens'] / data['total_tokens']:.1%})"
    _line(out, title, text)
    _line(out, "", data["truncation"] or f"no row is longer than {config['max_length']:,} tokens")
    if data["label_names"]:
        _line(out, "", f"{len(data['label_names'])} classes: {', '.join(map(str, data['label_names']))}")


def _print_tasks(out: Console, found: dict[str, Any]) -> None:
    from leantune.train.task_report import task_lines

    for place, line in enumerate(task_lines(found["tasks"], found["task_parameters"])):
        _line(out, "" if place else "tasks", line)
    _line(out, "", found["data"]["truncation"] or f"no row is longer than {found['config']['max_length']:,} tokens")


def _print_steps(out: Console, found: dict[str, Any]) -> None:
    steps, config = found["steps"], found["config"]
    size = f"{config['batch_size']} {'packs' if config['packing'] else 'rows'}"
    if config["gradient_accumulation"] > 1:
        size += f" x {config['gradient_accumulation']} passes"
    batches = "" if steps["batches_an_epoch"] is None else f"; {steps['batches_an_epoch']:,} batches an epoch"
    # A stream is as long as its steps.
    epochs = "" if config["streaming"] else f", {steps['epochs']:.4g} epochs{batches}"
    _line(out, "steps", f"{steps['steps']:,} of {size}{epochs}")
    share = f"{steps['padding_share']:.1%} of {steps['computed_positions']:,} computed positions are padding"
    if not steps["counted_all_of_first_epoch"]:
        share += f" (in the first {steps['counted_batches']:,} batches)"
    elif steps["epochs"] > 1:
        share += " (in the first epoch)"
    if steps["padding_share"] > _MUCH_PADDING and not config["group_by_length"] and not config["packing"]:
        way = "packing" if config["streaming"] else "group-by-length"
        share += f"; --{'gradient-accumulation of smaller batches' if config['tasks'] else way} lowers it"
    _line(out, "padding", share)


def _print_rate(out: Console, rate: dict[str, Any]) -> None:
    if "tasks" in rate:
        for place, (name, task) in enumerate(rate["tasks"].items()):
            text = f"{name}: {task['peak']:g}, {task['schedule']}, {task['warmup_steps']:,} warm-up steps"
            _line(out, "" if place else "lr", f"{text}; takes part in {task['steps']:,} steps")
        return
    own = " (the method's own default)" if rate["is_default"] else ""
    warmup = f"{rate['warmup_steps']:,} warm-up steps"
    _line(out, "lr", f"{rate['peak']:g}{own}, {rate['schedule']}, {warmup}, {rate['optimizer']}")
    points = ", ".join(f"step {point['step']:,}: {point['rate']:.3g}" for point in rate["points"])
    if points:
        _line(out, "", points)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
