"""What a person sees of a run: a live bar in a terminal, one line every few steps elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from leantune.train.batching import batch_line
from leantune.train.meter import Meter, peak_memory
from leantune.train.task_report import TaskLosses, evaluation_lines, task_lines


class Report(TrainerCallback):
    """Shows step, loss, tokens a second, remaining time and peak memory.

    Args:
        meter: the counts of the trainer.
        log_steps: steps between lines where there is no terminal.
        console: where to; None shows nothing.
    """

    def __init__(self, meter: Meter, log_steps: int, console: Console | None) -> None:
        self.meter = meter
        self.log_steps = log_steps
        self.console = console
        self._bar: Progress | None = None
        self._losses: list[float] = []
        self._first_step = 0
        self._tasks = TaskLosses()

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def announce(self, summary: dict[str, Any], load_time_s: float) -> None:
        """What is about to be trained on what."""
        base, data = summary["base"], summary["data"]
        trained, total = summary["trainable_parameters"], summary["total_parameters"]
        at_once = summary["trained_at_once"]
        self.say(f"base    {base['name']}" + (f" ({base['note']})" if base["note"] else ""))
        self.say(
            f"method  {summary['method']['name']}: trains {trained:,} of {total:,} parameters ({trained / total:.2%})"
            + (f", at most {at_once:,} in a step" if at_once < trained else "")
        )
        if summary.get("tasks"):
            for place, line in enumerate(task_lines(summary["tasks"], summary["task_parameters"])):
                self.say(f"{'tasks' if place == 0 else '':<8}{line}")
        elif data["rows"] is None:
            self.say(f"data    {data['path']}")
        else:
            self.say(
                f"data    {data['rows']:,} rows, {data['loss_tokens']:,} of {data['total_tokens']:,} tokens carry loss"
                if summary["config"]["task"] == "causal-lm"
                else f"data    {data['rows']:,} rows, {data['total_tokens']:,} tokens"
            )
        for note in (data.get("source") or {}).get("notes", []):
            self.say(f"        {note}")
        held = summary["eval_data"]
        if held and held.get("eval_share"):
            share = f"a share of {held['eval_share']:g} by a hash of what they ask"
            self.say(f"        {held['rows']:,} rows more are held out for evaluation ({share})")
        if data["truncation"]:
            self.say(f"        {data['truncation']}")
        self.say(batch_line(summary["batching"], data["rows"]))
        together = summary.get("processes", 1)
        where = f"{summary['environment']['threads']} threads" + (f" in each of {together} processes" * (together > 1))
        self.say(f"loaded in {load_time_s:.1f} s; training on {where}")

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Training begins: the bar appears."""
        self._first_step = state.global_step
        if self.console is not None and self.console.is_terminal and state.is_world_process_zero:
            self._bar = Progress(
                BarColumn(bar_width=24),
                TextColumn("step {task.completed}/{task.total}"),
                TextColumn("{task.description}"),
                console=self.console,
                auto_refresh=False,
            )
            self._bar.start()
            self._bar.add_task("first step...", total=state.max_steps, completed=state.global_step)
            self._bar.refresh()

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        """A step or an evaluation was logged."""
        if logs is None or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            parts = [f"{name.removeprefix('eval_')} {value:.4g}" for name, value in logs.items() if _is_score(name)]
            self.say(f"step {state.global_step}  evaluation: " + "  ".join(parts))
            for line in evaluation_lines(logs):
                self.say(line)
        if "loss" not in logs:
            return
        self._losses.append(float(logs["loss"]))
        self._tasks.add(logs)
        if self._bar is not None:
            recent = self._losses[-self.log_steps :]
            text = self._text(state, args.device, sum(recent) / len(recent)) + _round(logs)
            text += self._tasks.text(self.log_steps)
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, description=text, refresh=True)
        elif state.global_step in (self._first_step + 1, state.max_steps) or state.global_step % self.log_steps == 0:
            width = len(str(state.max_steps))
            loss = sum(self._losses) / len(self._losses)
            text = self._text(state, args.device, loss) + _round(logs) + self._tasks.text()
            self._tasks.forget()
            self.say(f"step {state.global_step:>{width}}/{state.max_steps}  {text}")
            # The first step has a line of its own, and is not counted again in the next one.
            self._losses = []

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Training is over."""
        self.stop()

    def stop(self) -> None:
        """Take the bar away; also called when training ends by an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, state: TrainerState, device: torch.device, loss: float) -> str:
        seconds = self.meter.seconds
        done = max(state.global_step - self._first_step, 1)
        remaining = self.meter.session_seconds / done * (state.max_steps - state.global_step)
        memory = peak_memory(device)
        size = f"  {memory / 2**30:.2f} GiB" if memory is not None else ""
        return f"loss {loss:.4f}  {self.meter.tokens / seconds:,.0f} tokens/s  ETA {clock(remaining)}{size}"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _round(logs: dict[str, Any]) -> str:
    """The round of a method that trains in rounds, and the blocks that it trains."""
    if "round" not in logs:
        return ""
    names = [str(block).rpartition(".")[2] for block in logs["blocks"]]
    return f"  round {logs['round']}: blocks {', '.join(names)}"


def _is_score(name: str) -> bool:
    return name in ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_mean_absolute_error")
