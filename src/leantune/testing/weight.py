"""Checks of merging and its undoing, and of which numbers training may touch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantune.methods import TrainingPlan
from leantune.methods._initialization import initialize
from leantune.methods._region import read_region, write_region
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import (
    STEP_SIZE,
    Subject,
    Wrapped,
    calibration_batches,
    calibration_loss,
    layers_of,
    logits,
    no_grad_logits,
    only_when,
    own_layers,
    start,
    tokens,
    trained,
)

ROUNDS = 1000


def _snapshot(model: Wrapped, names: set[str] | None = None) -> dict[str, Tensor]:
    return {
        name: value.detach().clone() for name, value in model.state_dict().items() if names is None or name in names
    }


def _tensors(model: Wrapped) -> dict[str, Tensor]:
    """Every parameter and buffer, by itself: a state dict may show a trained and a frozen one as a whole."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in found.items()}


def _base_weights(model: Wrapped) -> dict[str, Tensor]:
    """The base weight and bias of every adapted layer."""
    found = {}
    for path, layer in layers_of(model).items():
        for name, value in layer.get_base_layer().named_parameters():
            found[f"{path}.{name}"] = value.detach().clone()
    return found


def merged_equals_unmerged(subject: Subject) -> None:
    """With the delta written into the weights the model is the same; nothing but weights changes for it."""
    only_when(subject.method.mergeable, "the method cannot be written into the weights")
    base = subject.base()
    plain = no_grad_logits(base, tokens())
    model = subject.wrap(base)
    exact = no_grad_logits(model, tokens())
    model.merge_adapter()
    merged = no_grad_logits(model, tokens())
    assert_close(merged, exact, torch.float64, 64, 8, wrong=(plain,), what="logits, merged")
    model.unmerge_adapter()

    whole = model.merge_and_unload()
    expected = {name: value.shape for name, value in subject.base().named_parameters()}
    if {name: value.shape for name, value in whole.named_parameters()} != expected:
        raise AssertionError("merge_and_unload: the parameters are not those of the base")
    if layers_of(whole):
        raise AssertionError("merge_and_unload: adapter layers are left")
    assert_close(no_grad_logits(whole, tokens()), exact, torch.float64, 64, 8, wrong=(plain,), what="merge_and_unload")


def merge_refuses_what_is_broken(subject: Subject) -> None:
    """A safe merge of an adapter with a number that is not finite raises and changes no weight."""
    only_when(subject.method.mergeable, "the method cannot be written into the weights")
    model = subject.wrap()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.view(-1)[0] = float("nan")
    before = _base_weights(model)
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError:
        assert_same_state(_base_weights(model), before, "base weights")
    else:
        raise AssertionError("a safe merge of NaN went through")


def unmerge_restores_the_base(subject: Subject) -> None:
    """Unmerging puts back every bit of the base, in each dtype, for one adapter and for two merged together."""
    only_when(subject.method.mergeable, "the method cannot be written into the weights")
    only_when(bool(own_layers(subject.wrap())), "stock layers undo a merge by subtraction, which is not exact")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = subject.wrap(subject.base(dtype))
        subject.add(model, "other")
        start(model, "other", seed=2)
        before = _base_weights(model)
        for names in (["default"], ["other", "default"]):
            model.merge_adapter(adapter_names=names)
            after = _base_weights(model)
            assert_differs(_joined(after), _joined(before), f"base weights merged with {names}")
            model.unmerge_adapter()
            assert_same_state(_base_weights(model), before, f"base weights in {dtype} after {names}")


def _joined(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def unmerge_does_not_drift(subject: Subject) -> None:
    """A thousand rounds of merging and unmerging in bfloat16 leave every bit of the base as it was."""
    only_when(subject.method.mergeable, "the method cannot be written into the weights")
    only_when(bool(own_layers(subject.wrap_perceptron())), "stock layers undo a merge by subtraction, which drifts")
    model = subject.wrap_perceptron(torch.bfloat16)
    before, delta = _base_weights(model), _snapshot(model, set(trained(model)))
    layers = own_layers(model).values()
    for _ in range(ROUNDS):
        for layer in layers:
            layer.merge()
        for layer in layers:
            layer.unmerge()
    assert_same_state(_base_weights(model), before, f"base weights after {ROUNDS} rounds")
    assert_same_state(_snapshot(model, set(trained(model))), delta, "trained parameters")


def unload_restores_the_base(subject: Subject) -> None:
    """Unloading leaves the base model: its modules, its names, its bits; also while the adapter is merged."""
    only_when(subject.method.is_adapter, "the method has nothing to unload")
    expected = _snapshot(subject.base(torch.bfloat16))
    types = {name: type(module) for name, module in subject.base(torch.bfloat16).named_modules()}
    for merged in (False, True):
        model = subject.wrap(subject.base(torch.bfloat16))
        no_grad_logits(model, tokens())
        if merged:
            if not (own_layers(model) and subject.method.mergeable):
                # Stock layers leave the merged weights behind.
                continue
            model.merge_adapter()
        bare = model.unload()
        assert_same_state(_snapshot(bare), expected, f"base after unload, merged={merged}")
        if {name: type(module) for name, module in bare.named_modules()} != types:
            raise AssertionError("unload: the modules are not those of the base")


def _train(subject: Subject, model: Wrapped, steps: int = 4) -> tuple[torch.optim.Optimizer, list[float]]:
    plan = subject.method.plan(model)
    if not isinstance(plan, TrainingPlan):
        raise AssertionError(f"plan: {type(plan).__name__}, wanted a TrainingPlan")
    rate = 3 * subject.method.default_learning_rate
    groups = list(trained(model).values()) if plan.parameter_groups is None else plan.parameter_groups(model, rate, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.1)
    ids, losses = tokens(), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(model.train(), ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        if plan.after_optimizer_step is not None:
            plan.after_optimizer_step(step)
        losses.append(loss.item())
    return optimizer, losses


def training_touches_what_trains_alone(subject: Subject) -> None:
    """Steps with weight decay lower the loss, change every trained parameter, and no bit of anything else."""
    base = subject.base(torch.float32)
    own = {id(parameter) for parameter in base.parameters()} if subject.method.is_adapter else set()
    model = subject.wrap(base, started=False)
    names = {name for name, parameter in trained(model).items() if id(parameter) not in own}
    before = _tensors(model)
    _, losses = _train(subject, model)
    after = _tensors(model)
    for name, value in before.items():
        if name in names:
            assert_differs(after[name], value, f"{name}, trained")
        else:
            assert_same(after[name], value, f"{name}, frozen")
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss did not fall: {losses}")


def merging_touches_the_region_alone(subject: Subject) -> None:
    """After training and merging, every weight outside the region that the layers name has its old bits."""
    only_when(subject.method.mergeable, "the method cannot be written into the weights")
    only_when(bool(own_layers(subject.wrap())), "no layer of this method names a region")
    model = subject.wrap(subject.base(torch.float32), started=False)
    before = _base_weights(model)
    _train(subject, model)
    model.merge_adapter()
    after = _base_weights(model)
    for path, layer in own_layers(model).items():
        _, dim, index = layer.delta_region("default")
        old, new = before[f"{path}.weight"], after[f"{path}.weight"]
        old, new = (old.t(), new.t()) if layer.transposed else (old, new)
        assert_differs(new, old, f"{path}.weight")
        if index is not None:
            # Blanked in both, the region shows nothing; what is left is what must not have changed.
            blank = torch.zeros_like(read_region(old, dim, index))
            new, old = (write_region(each.clone(), dim, index, blank) for each in (new, old))
            assert_same(new, old, f"{path}, outside the region")


def optimizer_state_holds_what_trains(subject: Subject) -> None:
    """The optimizer keeps moments for the trained parameters, of their size, and for nothing else."""
    model = subject.wrap(subject.base(torch.float32))
    optimizer, _ = _train(subject, model, steps=1)
    held = {id(parameter) for parameter in optimizer.state}
    wanted = {id(parameter) for parameter in trained(model).values()}
    if held != wanted:
        raise AssertionError(
            f"optimizer holds {len(held)} parameters, {len(wanted)} train, {len(held & wanted)} are both"
        )
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.dim() > 0 and value.shape != parameter.shape:
                raise AssertionError(f"optimizer state {name}: {tuple(value.shape)} for {tuple(parameter.shape)}")


def trained_count_is_the_stated_one(subject: Subject) -> None:
    """``Method.trainable_parameters`` tells how many parameters train on one linear layer."""
    for out_features, in_features in ((24, 16), (16, 24)):
        model: Wrapped = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
        config = subject.config(target_modules=["0"]) if subject.method.is_adapter else subject.config()
        stated = subject.method.trainable_parameters(copy.deepcopy(config), out_features, in_features)
        model = subject.method.apply(model, config)
        if subject.method.needs_batches(config):
            initialize(model, calibration_batches(model), step_size=STEP_SIZE, loss=calibration_loss)
        real = sum(parameter.numel() for parameter in trained(model).values())
        if stated != real:
            raise AssertionError(f"({out_features}, {in_features}): {stated} parameters stated, {real} train")


CHECKS = [
    merged_equals_unmerged,
    merge_refuses_what_is_broken,
    unmerge_restores_the_base,
    unmerge_does_not_drift,
    unload_restores_the_base,
    training_touches_what_trains_alone,
    merging_touches_the_region_alone,
    optimizer_state_holds_what_trains,
    trained_count_is_the_stated_one,
]
