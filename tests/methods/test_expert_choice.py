"""Which channels of each expert are chosen from data: against scores by autograd on the 3-D weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leantune
import tiny
from leantune import initialize
from leantune.core.errors import MethodError
from leantune.methods._expert import Experts
from leantune.testing.closeness import assert_same, assert_same_state
from leantune.testing.subject import start
from methods.test_expert import BOTH, DOWN_ALONE, _quiet_rope, expert_layers, logits, rows_of, wrapped

__all__ = ["_quiet_rope"]


def batches() -> list[dict[str, Tensor]]:
    found = []
    for rows, length, seed in ((3, 7, 3), (2, 5, 4)):
        ids = tiny.ids(rows, length, seed)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def dense_scores(family: str, selection: str) -> dict[str, Tensor]:
    """Scores ``(E, I)`` of each experts module with both sides coupled, by autograd on the 3-D weights."""
    base = tiny.model(family)
    base.requires_grad_(True)
    inner: dict[str, dict[int, list[Tensor]]] = {}
    sum((loss_of(base, batch) for batch in batches()), torch.zeros((), dtype=torch.float64)).backward()
    scores = {}
    for path, module in base.named_modules():
        if not hasattr(module, "is_transposed"):
            continue
        view = Experts(module)
        inner[path] = {}
        squares = torch.zeros(view.experts, view.channels, dtype=torch.float64)
        for expert in range(view.experts):
            for channel in range(view.channels):
                rows = rows_of(module, view.up, [channel], view.channels)
                for name, at in ((view.up, rows), ("down_proj", [channel])):
                    weight = getattr(module, name) if selection != "gradient" else getattr(module, name).grad
                    for row in at:
                        turned = (name == "down_proj") == module.is_transposed
                        line = weight[expert, row] if turned else weight[expert, :, row]
                        squares[expert, channel] += line.detach().square().sum()
        scores[path] = squares.sqrt()
    if selection in ("weight", "gradient"):
        return scores
    activation = {path: torch.zeros_like(each) for path, each in scores.items()}
    handles = [base.get_submodule(path).register_forward_hook(_noting(activation[path], batch_mask)) for path in scores]
    with torch.no_grad():
        for batch in batches():
            batch_mask[:] = [batch["attention_mask"].flatten()]
            base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    activation = {path: each.sqrt() for path, each in activation.items()}
    return activation if selection == "activation" else {path: each * activation[path] for path, each in scores.items()}


batch_mask: list[Tensor] = []


def _noting(total: Tensor, mask: list[Tensor]) -> Any:
    """Adds up ``a^2`` token by token."""

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, chosen = args[0], args[1]
        view = Experts(module)
        for token in range(len(x)):
            if not mask[0][token]:
                continue
            for expert in chosen[token].tolist():
                weight = module.gate_up_proj[expert]
                weight = weight if not module.is_transposed else weight.t()
                z = weight @ x[token]
                if module.has_bias:
                    z = z + module.gate_up_proj_bias[expert]
                total[expert] += module._apply_gate(z[None])[0].square()
        assert view.experts == len(total)

    return hook


@pytest.mark.parametrize("selection", ["weight", "activation", "product", "gradient"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_choices_are_the_naive_ranking(family: str, selection: str) -> None:
    scores = dense_scores(family, selection)
    for order in ("largest", "smallest"):
        options = {**BOTH, "selection": selection, "order": order, "channels": 6}
        model = wrapped(family, begun=False, **options)
        if selection != "weight":
            with pytest.raises(MethodError, match=r"call leantune\.initialize"):
                model.train()(input_ids=tiny.ids())
            told = initialize(model, batches(), loss=loss_of)
            assert told["rows"] == 5
        for path, layer in expert_layers(model).items():
            ranked = scores[path].sort(-1, descending=order == "largest").indices[:, :6].sort(-1).values
            for own in layer.slices("default").values():
                assert_same(own.index, ranked, f"{path}, {order}")
        model.train()(input_ids=tiny.ids())


def test_gradients_of_experts_come_in_groups_too() -> None:
    """One expert's weight at a time, with the same choice, and a share of the budget that is recorded as before."""
    found = []
    for size in (1, 2**30):
        model = wrapped(begun=False, selection="gradient", channels=4, **DOWN_ALONE)
        ratio = model.peft_config["default"].achieved_ratio
        told = initialize(model, batches(), loss=loss_of, gradient_bytes=size)
        assert told["passes"] == (8 if size == 1 else 1)
        assert model.peft_config["default"].achieved_ratio == ratio == 4 / 16
        found.append({path: layer.slices("default")["down_proj"].index for path, layer in expert_layers(model).items()})
    assert_same_state(found[1], found[0], "channels")


def test_a_saved_choice_needs_no_start(tmp_path: Path) -> None:
    model = wrapped(dtype=torch.float32, begun=False, selection="activation")
    with pytest.raises(MethodError, match=r"call leantune\.initialize"):
        model.save_pretrained(tmp_path)
    with pytest.raises(MethodError, match=r"call leantune\.initialize"):
        model.merge_adapter()
    initialize(model, batches())
    start(model)
    model.save_pretrained(tmp_path)
    loaded = leantune.load(tiny.model("mixtral", torch.float32), tmp_path, trainable=True, verify_base=False)
    assert_same(logits(loaded.eval()), logits(model), "logits")
    loaded.train()(input_ids=tiny.ids()).logits.sum().backward()
