"""What a model answers to prompts: logits at every position, and greedy continuations.

This file runs twice: imported here for the trained model, and as a script in a process of its own for the exported one.
There it must work with stock transformers and PEFT alone, so it imports nothing of leantune, and the process bars it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def logits_of(model: Any, ids: Any) -> Any:
    """Logits of one prompt as a float32 tensor: ``(positions, vocabulary)``, or ``(labels,)`` for a classifier.

    A prompt is a list of token ids, or the numbers of an image, ``(channels, height, width)``.
    """
    import torch

    if not isinstance(ids, list):
        first = next(model.parameters())
        with torch.inference_mode():
            numbers = torch.as_tensor(ids, device=first.device).to(first.dtype)
            return model(pixel_values=numbers[None]).logits[0].float().cpu()
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.inference_mode():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].float().cpu()


def greedy(model: Any, ids: list[int], new_tokens: int, stop: list[int]) -> tuple[list[int], list[float]]:
    """Greedy continuation with a cache, and at each step by how much the best token led the second.

    Own loop instead of ``generate``: the generation config of a checkpoint (sampling, penalties) must not speak here.
    """
    import torch

    device = next(model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    chosen: list[int] = []
    leads: list[float] = []
    cache = None
    with torch.inference_mode():
        while len(chosen) < new_tokens:
            mask = torch.ones((1, len(ids) + len(chosen)), dtype=torch.long, device=device)
            output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = torch.topk(output.logits[0, -1].float(), 2)
            chosen.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
            if chosen[-1] in stop:
                break
            tokens = best.indices[:1].view(1, 1).to(device)
    return chosen, leads


def _bar(name: str) -> None:
    class Barred:
        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
            del path, target
            if fullname == name or fullname.startswith(f"{name}."):
                raise ImportError(f"{name} is barred here: an export must work without it")

    sys.meta_path.insert(0, Barred())


def _steady(model: Any) -> None:
    """As leantune does: on a CPU bitsandbytes' layers would otherwise round in evaluation, and in evaluation alone."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        elif type(module).__qualname__ == "Linear8bitLt" and not hasattr(module, "base_layer") and _is_on_cpu(module):
            module.train()


def _is_on_cpu(module: Any) -> bool:
    return bool(module.weight.device.type == "cpu")


def _run(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    sys.path.extend(entry for entry in job["path"] if entry not in sys.path)
    _bar("leantune")
    import numpy
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    loader = getattr(transformers, job["auto_class"])
    options = {"dtype": getattr(torch, job["dtype"]), **job["options"]}
    model = loader.from_pretrained(job["model"], **options).eval()
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"]).eval()
    _steady(model)
    out = Path(job["out"])
    answers = []
    for number, ids in enumerate(job["prompts"]):
        if ids is None:
            ids = numpy.load(out / f"image-{number}.npy")
        numpy.save(out / f"{number}.npy", logits_of(model, ids).numpy())
        if job["new_tokens"]:
            answers.append(greedy(model, ids, job["new_tokens"], job["stop"])[0])
    if "leantune" in sys.modules:
        raise RuntimeError("leantune was imported: this process proves nothing")
    # Written last: its presence says that everything before it is complete.
    (out / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    _run(sys.argv[1])
