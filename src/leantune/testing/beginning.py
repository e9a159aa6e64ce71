"""Checks of a start that is computed from data: refused before it, without a trace beside it, the same each time."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leantune.core.errors import MethodError
from leantune.methods._initialization import initialize
from leantune.testing.closeness import assert_same, assert_same_state
from leantune.testing.subject import (
    STEP_SIZE,
    Subject,
    Wrapped,
    calibration_batches,
    calibration_loss,
    logits,
    no_grad_logits,
    only_when,
    tokens,
    trained,
)


def _waiting(subject: Subject) -> Wrapped:
    only_when(subject.method.needs_batches(subject.config()), "the method's start needs no data")
    model = subject.method.apply(subject.base(), subject.config(task_type="CAUSAL_LM"))
    return model.eval()


def _started(model: Wrapped) -> Wrapped:
    initialize(model, calibration_batches(model), step_size=STEP_SIZE, loss=calibration_loss)
    return model


def _refused(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except MethodError as error:
        if "leantune.initialize" not in str(error):
            raise AssertionError(f"{what}: refused without naming leantune.initialize: {error}") from error
    else:
        raise AssertionError(f"{what}: went through before the start was computed")


def refuses_before_its_start(subject: Subject) -> None:
    """An adapter that waits for data is neither trained nor saved nor merged, and afterwards it is; once is enough."""
    model = _waiting(subject)
    with tempfile.TemporaryDirectory() as folder:
        _refused(lambda: logits(model.train(), tokens()), "training")
        _refused(lambda: model.save_pretrained(folder), "save_pretrained")
        _refused(model.merge_adapter, "merge_adapter")
        _refused(lambda: copy.deepcopy(model).merge_and_unload(), "merge_and_unload")
        _refused(lambda: logits(copy.deepcopy(model).train(), tokens()), "training a copy")
        _started(model)
        logits(model.train(), tokens()).sum().backward()
        model.save_pretrained(folder)
    try:
        _started(model)
    except MethodError:
        return
    raise AssertionError("a second start went through although no adapter waits")


def start_leaves_no_trace(subject: Subject) -> None:
    """Beside the start nothing changes: weights, gradients, modes, random state, what trains, the function."""
    model = _waiting(subject)
    plain = no_grad_logits(subject.base(), tokens())
    model.train()
    model.get_base_model().get_submodule(next(iter(_leaves(model)))).eval()
    names = {id(value): name for name, value in model.named_parameters()}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    trains = {name: value.requires_grad for name, value in model.named_parameters()}
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    _started(model)
    assert_same(torch.get_rng_state(), random_state, "random state")
    if {name: module.training for name, module in model.named_modules()} != modes:
        raise AssertionError("the start changed which modules are in training mode")
    if {name: value.requires_grad for name, value in model.named_parameters()} != trains:
        raise AssertionError("the start changed what trains")
    for name, value in model.named_parameters():
        if value.grad is not None:
            raise AssertionError(f"{name}: the start left a gradient")
        if "base_layer" in name or names.get(id(value)) is None:
            assert_same(value.detach(), before[name], name)
    if subject.method.identity_at_init:
        assert_same(no_grad_logits(model.eval(), tokens()), plain, "logits after the start")


def _leaves(model: Wrapped) -> dict[str, Any]:
    return {name: each for name, each in model.get_base_model().named_modules() if name and not any(each.children())}


def start_is_the_same_each_time(subject: Subject) -> None:
    """The same batches give the same start, bit for bit, whatever the random state."""
    states: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        model = _waiting(subject)
        torch.manual_seed(seed)
        _started(model)
        states.append({name: value for name, value in model.state_dict().items() if "default" in name.split(".")})
        if not trained(model):
            raise AssertionError("nothing trains after the start")
    assert_same_state(states[1], states[0], "state after the start")


CHECKS = [refuses_before_its_start, start_leaves_no_trace, start_is_the_same_each_time]
