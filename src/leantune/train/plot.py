"""The loss curve as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from leantune.core.atomic import write_bytes

SMOOTHING = 0.9


def draw_loss(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of every step, its smoothed course, and the evaluations; of several tasks each one's course.

    Args:
        metrics: the lines of metrics.jsonl.
        path: the PNG file to write.
        title: over the curve.
    """
    # The object interface draws without a window and leaves a user's pyplot alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None]
    tasks = list(dict.fromkeys(name for line in metrics for name in line if name.startswith("loss/")))
    evaluations = [(line["step"], line["eval_loss"]) for line in metrics if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in tasks:
        x, y = zip(*[(line["step"], line[name]) for line in metrics if line.get(name) is not None], strict=True)
        axes.plot(x, smooth(list(y)), linewidth=1.8, label=f"{name.removeprefix('loss/')}, smoothed")
    if steps and not tasks:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color="#9bb7d4", linewidth=0.8, label="each step")
        axes.plot(x, smooth(list(y)), color="#1f4e8c", linewidth=1.8, label="smoothed")
    if evaluations and not tasks:
        x, y = zip(*evaluations, strict=True)
        axes.plot(x, y, "o-", color="#c4511b", markersize=5, linewidth=1.2, label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss of each task" if tasks else "loss (nats per token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    if steps or evaluations:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())


def smooth(values: list[float], keep: float = SMOOTHING) -> list[float]:
    """Exponential moving average without the pull of its start: ``s_t = (keep s_{t-1} + (1 - keep) v_t)``, unbiased."""
    course, average, weight = [], 0.0, 0.0
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        course.append(average / weight)
    return course
