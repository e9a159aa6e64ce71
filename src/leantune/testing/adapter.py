"""Checks of several adapters on one base, whole modules beside them, and copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from leantune.methods._base import BASE_ROW
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import (
    Subject,
    Wrapped,
    dense_twin,
    no_grad_logits,
    objective,
    only_when,
    points,
    start,
    tokens,
    trained,
)


def _two(subject: Subject, **more: Any) -> Wrapped:
    """A model with the adapters "default" and "other", both started, "default" active."""
    model = subject.wrap()
    subject.add(model, "other", **more)
    start(model, "other", seed=2)
    return model.eval()


def _alone(model: Wrapped, adapter: str, ids: Tensor) -> Tensor:
    active = model.active_adapter
    model.set_adapter(adapter)
    result = no_grad_logits(model, ids)
    model.set_adapter(active)
    return result


def several_adapters_switch(subject: Subject) -> None:
    """Adding an adapter leaves the active one alone; switching gives each one's own function; the base stays within."""
    only_when(subject.method.is_adapter, "the method has no adapters to switch")
    base = subject.base()
    plain = no_grad_logits(base, tokens())
    model = subject.wrap(base)
    first = no_grad_logits(model, tokens())
    subject.add(model, "other")
    start(model, "other", seed=2)
    assert_same(no_grad_logits(model, tokens()), first, "logits after adding another adapter")
    _assert_trains(model, "default")
    model.set_adapter("other")
    _assert_trains(model, "other")
    second = no_grad_logits(model, tokens())
    assert_differs(second, first, "logits of the other adapter")
    assert_differs(second, plain, "logits of the other adapter")
    with model.disable_adapter():
        assert_same(no_grad_logits(model, tokens()), plain, "logits with all adapters off")
    model.set_adapter("default")
    assert_same(no_grad_logits(model, tokens()), first, "logits after switching back")


def _assert_trains(model: Wrapped, adapter: str) -> None:
    for name, parameter in model.named_parameters():
        own = adapter in name.split(".")
        if own != parameter.requires_grad:
            raise AssertionError(f"{name}: requires_grad is {parameter.requires_grad} while '{adapter}' is active")


def all_linear_twice(subject: Subject) -> None:
    """A second adapter on "all-linear" finds the same layers as the first, although these are wrapped by then."""
    only_when(subject.method.is_adapter, "the method has no target modules")
    model = subject.wrap(target_modules="all-linear")
    subject.add(model, "other", target_modules="all-linear")
    found = {
        adapter: {path.replace(adapter, "*") for path in trained(model, adapter)} for adapter in ("default", "other")
    }
    if found["default"] != found["other"]:
        raise AssertionError(f"all-linear: {sorted(found['default'] ^ found['other'])} of one adapter alone")


def two_active_adapters_sum(subject: Subject) -> None:
    """Two active adapters change the weights by the sum of their deltas, unmerged and merged."""
    only_when(subject.method.is_adapter and subject.method.mergeable, "the method's changes do not add up")
    model = _two(subject)
    wrong = (_alone(model, "default", tokens()), _alone(model, "other", tokens()))
    exact = no_grad_logits(dense_twin(subject.base(), model, ["default", "other"]), tokens())
    model.base_model.set_adapter(["default", "other"])
    assert_close(no_grad_logits(model, tokens()), exact, torch.float64, 64, 8, wrong=wrong, what="two active adapters")
    model.merge_adapter(adapter_names=["default", "other"])
    assert_close(no_grad_logits(model, tokens()), exact, torch.float64, 64, 8, wrong=wrong, what="both merged")


def mixed_batch(subject: Subject) -> None:
    """In a batch whose rows name their adapters, each row is what it is alone; ``__base__`` names none."""
    only_when(subject.method.is_adapter, "the method has no adapters to mix")
    ids = tokens(rows=6)
    names = ["other", BASE_ROW, "default", "default", BASE_ROW, "other"]
    model = _two(subject)
    alone = {name: _alone(model, name, ids) for name in ("default", "other")}
    with model.disable_adapter():
        alone[BASE_ROW] = no_grad_logits(model, ids)
    mixed = no_grad_logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        wrong = [value[row] for other, value in alone.items() if other != name]
        assert_close(mixed[row], alone[name][row], torch.float64, 64, 8, wrong=wrong, what=f"row {row}, {name}")
    assert_same(no_grad_logits(model, ids), alone["default"], "logits of the next batch, without names")
    for bad in (["default"], ["default"] * 5 + ["nobody"]):
        try:
            no_grad_logits(model, ids, adapter_names=bad)
        except ValueError:
            continue
        raise AssertionError(f"adapter_names={bad} for 6 rows went through")


def delete_adapter(subject: Subject) -> None:
    """A deleted adapter leaves nothing, the other works on, and its name is free for a fresh one."""
    only_when(subject.method.is_adapter, "the method has no adapter to delete")
    model = _two(subject)
    kept = no_grad_logits(model, tokens())
    model.delete_adapter("other")
    left = [name for name in model.state_dict() if "other" in name.split(".")]
    if left:
        raise AssertionError(f"left behind by delete_adapter: {left}")
    assert_same(no_grad_logits(model, tokens()), kept, "logits of the remaining adapter")
    subject.add(model, "other")
    if subject.method.identity_at_init:
        model.set_adapter("other")
        assert_same(no_grad_logits(model, tokens()), no_grad_logits(subject.base(), tokens()), "a fresh adapter")


def reference_copy(subject: Subject) -> None:
    """A reference made as TRL makes it (same config object, parameters named ``.default.`` copied) is a true copy."""
    only_when(subject.method.is_adapter, "the method has no adapter to copy")
    model = subject.wrap()
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    assert_same(_alone(model, "ref", tokens()), no_grad_logits(model, tokens()), "logits of the reference")


def modules_to_save(subject: Subject) -> None:
    """A module named there trains whole beside the adapter; the base's own stays, and shows with the adapter off."""
    only_when(subject.method.is_adapter, "the method trains every module anyway")
    plain: Any = subject.base()
    expected = no_grad_logits(plain, tokens())
    model = subject.wrap(modules_to_save=["lm_head"])
    names = [name for name in trained(model) if "lm_head" in name]
    if not names:
        raise AssertionError("lm_head does not train")
    objective(model(input_ids=tokens()).logits).backward()
    for name in names:
        if model.get_parameter(name).grad is None:
            raise AssertionError(f"{name}: no gradient")
    with model.disable_adapter():
        assert_same(no_grad_logits(model, tokens()), expected, "logits with the adapter off")
    head = model.get_base_model().lm_head
    assert_same(head.original_module.weight, plain.lm_head.weight, "the base's lm_head")
    assert_differs(head.modules_to_save["default"].weight, plain.lm_head.weight, "the trained lm_head")
    merged = no_grad_logits(model, tokens())
    if subject.method.mergeable:
        whole = model.merge_and_unload()
        assert_close(no_grad_logits(whole, tokens()), merged, torch.float64, 64, 8, wrong=(expected,), what="merged")


def deep_copy(subject: Subject) -> None:
    """A deep copy computes the same and shares no parameter or buffer with its original."""
    model = subject.wrap_perceptron()
    twin = copy.deepcopy(model)
    assert_same_state(dict(twin.state_dict()), dict(model.state_dict()), "state of the copy")
    expected = model(points()).detach()
    assert_same(twin(points()).detach(), expected, "output of the copy")
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    assert_same(model(points()).detach(), expected, "output of the original after the copy was erased")


CHECKS = [
    several_adapters_switch,
    all_linear_twice,
    two_active_adapters_sum,
    mixed_batch,
    delete_adapter,
    reference_copy,
    modules_to_save,
    deep_copy,
]
