"""Adapters that wait for a choice from data: beside others, copied, saved, permuted, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import tiny
from leantune import S2FTConfig, initialize
from leantune.core.errors import MethodError
from leantune.methods._calibration import Calibration, LayerActivation, LinearGradient
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.model import scatter_weights
from methods.test_calibration import batches, chosen, started


def test_other_adapters_do_not_take_part() -> None:
    """What is measured is the base, whatever another adapter makes of it."""
    options: dict[str, Any] = {"selection": "activation", "heads": 2, "channels": 5}
    expected = chosen(started(tiny.model("llama"), batches(), **options))
    model = get_peft_model(tiny.model("llama"), S2FTConfig(heads=6, channels=20))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.add_adapter("late", S2FTConfig(**options))
    initialize(model, batches())
    assert chosen(model, "late") == expected
    assert_differs(model(**batches()[0]).logits, tiny.model("llama")(**batches()[0]).logits)


def test_adapters_with_choices_of_their_own() -> None:
    model = get_peft_model(tiny.model("llama"), S2FTConfig(selection="activation", heads=2, channels=5))
    model.add_adapter("other", S2FTConfig(selection="activation", order="smallest", heads=2, channels=5))
    told = initialize(model, batches())
    assert told == {"adapters": ["default", "other"], "batches": 2, "rows": 5, "tokens": 25, "passes": 2}
    for path, entries in chosen(model).items():
        assert not set(entries) & set(chosen(model, "other")[path])


@pytest.mark.parametrize("early", [False, True])
def test_a_reference_adapter_has_the_same_choice(early: bool) -> None:
    """TRL adds its reference with the same config object, before or after the start."""
    model = get_peft_model(tiny.model("llama"), S2FTConfig(selection="gradient", heads=2, channels=5))
    if early:
        model.add_adapter("ref", model.peft_config["default"])
        initialize(model, batches())
    else:
        initialize(model, batches())
        model.add_adapter("ref", model.peft_config["default"])
        model.set_adapter("ref")
        model.train()(**batches()[0])
    assert chosen(model, "ref") == chosen(model)
    assert chosen(model) != chosen(get_peft_model(tiny.model("llama"), S2FTConfig(heads=2, channels=5)))


def test_a_saved_adapter_needs_no_start(tmp_path: Any) -> None:
    model = started(tiny.model("llama", torch.float32), batches(), selection="product", heads=2, channels=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("llama", torch.float32), tmp_path, is_trainable=True)
    assert chosen(loaded) == chosen(model)
    assert loaded.peft_config["default"].selection == "product"
    loaded.train()(**batches()[0]).loss.backward()
    with pytest.raises(MethodError, match="no adapter of this model waits"):
        initialize(loaded, batches())


def test_permuted_bases() -> None:
    """The base is reordered once the choice is known; the choice is the one made without reordering."""
    options: dict[str, Any] = {"selection": "activation", "heads": 3, "channels": 5}
    expected = chosen(started(tiny.model("llama"), batches(), coupling="independent", **options))
    base = tiny.model("llama")
    plain = base(**batches()[0]).logits.detach()
    model = get_peft_model(base, S2FTConfig(permute=True, coupling="independent", **options))
    assert_same(model.eval()(**batches()[0]).logits.detach(), plain, "logits before the start")
    initialize(model, batches())
    entries = chosen(model)
    assert sorted(entries["model.layers.0.mlp.down_proj"]) == expected["model.layers.0.mlp.down_proj"]
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert layer.s2ft_slice["default"].run == slice(0, 5)
    assert_close(model(**batches()[0]).logits.detach(), plain, torch.float64, 64, 8, what="logits after the start")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "no rows"),
        ([torch.zeros(2, 3)], "a batch of type Tensor"),
        ([{"input_ids": tiny.ids(2, 5)}], "batches without labels"),
    ],
)
def test_wrong_batches_are_refused(given: list[Any], text: str) -> None:
    model = get_peft_model(tiny.model("llama"), S2FTConfig(selection="gradient"))
    with pytest.raises(MethodError, match=text):
        initialize(model, given)


def test_a_model_that_waits_for_nothing_is_refused() -> None:
    with pytest.raises(MethodError, match="no adapter of this model waits"):
        initialize(get_peft_model(tiny.model("llama"), S2FTConfig()), batches())
    with pytest.raises(MethodError, match="no adapter of this model waits"):
        initialize(tiny.model("llama"), batches())


def test_numbers_that_are_not_finite_are_refused() -> None:
    base = tiny.model("llama")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    model = get_peft_model(base, S2FTConfig(selection="activation"))
    with pytest.raises(MethodError, match="measures that are not finite"):
        initialize(model, batches())


def test_a_module_that_is_never_reached_is_named() -> None:
    base = scatter_weights(nn.ModuleDict({"used": nn.Linear(3, 4), "idle": nn.Linear(3, 4)}), 0, torch.float64)
    data = Calibration(
        base, [{"x": torch.ones(2, 3)}], loss=lambda model, batch: model["used"](batch["x"].double()).sum()
    )
    with data.at_rest(), pytest.raises(MethodError, match="module idle: no calibration batch reaches it"):
        data.activations({"idle": LayerActivation(base["idle"], "in", 3)})
    with data.at_rest(), pytest.raises(MethodError, match="module idle: no calibration batch reaches it"):
        dict(data.weight_gradients({"idle": LinearGradient(base["idle"], (4, 3))}))


def test_what_another_process_reached_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that no row of this process goes to: to refuse it here would leave the others waiting for its sum."""
    base = scatter_weights(nn.ModuleDict({"used": nn.Linear(3, 4), "idle": nn.Linear(3, 4)}), 0, torch.float64)
    data = Calibration(
        base, [{"x": torch.ones(2, 3)}], loss=lambda model, batch: model["used"](batch["x"].double()).sum()
    )
    # The other process adds 1 to every sum.
    monkeypatch.setattr("leantune.methods._calibration._over_processes", lambda total: total + 1)
    with data.at_rest():
        sums = data.activations({"idle": LayerActivation(base["idle"], "in", 3)})
        gradients = dict(data.weight_gradients({"idle": LinearGradient(base["idle"], (4, 3))}))
    assert_same(sums["idle"], torch.ones(3, dtype=torch.float64), "activations")
    assert_same(gradients["idle"], torch.ones(4, 3, dtype=torch.float64), "gradient")


def test_a_merged_adapter_is_in_the_way() -> None:
    model = get_peft_model(tiny.model("llama"), S2FTConfig())
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("late", S2FTConfig(selection="activation"))
    model.merge_adapter(adapter_names=["default"])
    with pytest.raises(MethodError, match="an adapter is merged"):
        initialize(model, batches())
