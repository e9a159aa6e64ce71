"""Checks of what an adapted model computes, and of its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from leantune.methods._region import read_region, write_region
from leantune.testing import model as tiny
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import (
    Subject,
    Wrapped,
    dense_twin,
    gradients,
    layers_of,
    logits,
    no_grad_logits,
    objective,
    only_when,
    own_layers,
    points,
    tokens,
    trained,
)


def identity_at_init(subject: Subject) -> None:
    """Before the first step the adapted model is the base, bit for bit."""
    only_when(subject.method.identity_at_init, "the method does not start from the base's function")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        base = subject.base(dtype)
        expected = no_grad_logits(base, tokens())
        assert_same(no_grad_logits(subject.wrap(base, started=False), tokens()), expected, f"logits in {dtype}")


def only_the_adapter_has_gradients(subject: Subject) -> None:
    """A backward leaves a gradient on every trained parameter, and on no parameter of the base."""
    only_when(subject.method.is_adapter, "the method trains the base itself")
    base = subject.base()
    own = {id(parameter) for parameter in base.parameters()}
    model = subject.wrap(base).train()
    objective(logits(model, tokens())).backward()
    for name, parameter in model.named_parameters():
        if id(parameter) in own and (parameter.grad is not None or parameter.requires_grad):
            raise AssertionError(f"{name}: a base parameter that trains or has a gradient")
    for name, gradient in gradients(model).items():
        if not gradient.any():
            raise AssertionError(f"{name}: its gradient is zero everywhere")


def gradients_match_finite_differences(subject: Subject) -> None:
    """Gradients of input and trained parameters are those of finite differences, in float64."""
    model = subject.wrap_perceptron().train()
    x = points(3).requires_grad_()
    # gradcheck perturbs its inputs in place, so naming the parameters is enough to have them checked too.
    gradcheck(lambda *given: model(given[0]), (x, *trained(model).values()), raise_exception=True)


def forward_is_the_dense_reference(subject: Subject) -> None:
    """The cheap branch gives what the base with the dense delta in its weights gives: output and input gradient."""
    only_when(subject.method.mergeable, "the method is no change of weights")
    model, base = subject.wrap(), subject.base()
    plain = no_grad_logits(base, tokens())
    twin = dense_twin(subject.base(), model, ["default"])
    exact = no_grad_logits(twin, tokens())
    assert_close(no_grad_logits(model, tokens()), exact, torch.float64, 64, 8, wrong=(plain,), what="logits")

    for path, layer in layers_of(model).items():
        x = torch.randn(2, 4, _width(layer), dtype=torch.float64, requires_grad=True)
        y = layer(x)
        (got,) = torch.autograd.grad(objective(y), x)
        reference = x.detach().clone().requires_grad_()
        y_exact = twin.get_submodule(path)(reference)
        (exact_gradient,) = torch.autograd.grad(objective(y_exact), reference)
        assert_close(y, y_exact.detach(), torch.float64, 16, 2, what=f"{path}, output")
        assert_close(got, exact_gradient, torch.float64, 16, 2, what=f"{path}, gradient of the input")


def _width(layer: Any) -> int:
    width = layer.in_features
    if not isinstance(width, int):
        raise AssertionError(f"{type(layer).__name__}: in_features is {width!r}")
    return width


def region_is_the_dense_delta(subject: Subject) -> None:
    """``delta_region`` and ``get_delta_weight`` describe the same change, and it is zero outside the region."""
    only_when(subject.method.mergeable, "the method is no change of weights")
    layers = own_layers(subject.wrap())
    only_when(bool(layers), "no layer of this method has delta_region")
    for path, layer in layers.items():
        delta, dim, index = layer.delta_region("default")
        dense = layer.get_delta_weight("default")
        dense = dense.t() if layer.transposed else dense
        if dense.shape != (layer.out_features, layer.in_features):
            raise AssertionError(f"{path}: delta of shape {tuple(dense.shape)}")
        if index is None:
            assert_same(dense, delta, path)
            continue
        assert_same(read_region(dense, dim, index), delta, f"{path}, inside the region")
        if write_region(dense.clone(), dim, index, torch.zeros_like(delta)).any():
            raise AssertionError(f"{path}: the delta is not zero outside its region")
        if len(set(index.tolist())) != index.numel():
            raise AssertionError(f"{path}: an entry stands twice in the region")


def two_forwards_before_one_backward(subject: Subject) -> None:
    """Two forwards, then one backward: the gradient is the sum of each one's own."""
    model = subject.wrap().train()
    first, second = tokens(seed=11), tokens(seed=12)
    parts = []
    for ids in (first, second):
        objective(logits(model, ids)).backward()
        parts.append(gradients(model))
    (objective(logits(model, first)) + objective(logits(model, second))).backward()
    for name, together in gradients(model).items():
        exact = parts[0][name] + parts[1][name]
        assert_close(together, exact, torch.float64, 64, 8, wrong=(parts[0][name], parts[1][name]), what=name)


def reference_forward_in_between(subject: Subject) -> None:
    """A policy forward, a reference forward with the adapter off, then backward: gradients as without the reference."""
    only_when(subject.method.is_adapter, "the method has no adapter to turn off")
    base = subject.base()
    plain = no_grad_logits(base, tokens())
    model = subject.wrap(base).train()
    objective(logits(model, tokens())).backward()
    expected = gradients(model)

    output = logits(model, tokens())
    with torch.no_grad(), model.disable_adapter():
        reference = logits(model, tokens())
    assert_same(reference, plain, "logits with the adapter off")
    assert_differs(output.detach(), reference, "logits with the adapter on")
    objective(output).backward()
    assert_same_state(gradients(model), expected, "gradients")


def gradient_checkpointing(subject: Subject) -> None:
    """Recomputing activations gives the same gradients, with either kind of checkpointing.

    Not the same bits: the residual stream's gradients are summed in another order.
    """
    plain = subject.wrap().train()
    objective(logits(plain, tokens())).backward()
    expected = gradients(plain)
    for reentrant in (False, True):
        model = subject.wrap().train()
        _enable_checkpointing(model, reentrant)
        if reentrant:
            # A re-entrant segment has a backward only when one of its inputs has.
            model.enable_input_require_grads()
        calls = _count_forwards(model)
        objective(logits(model, tokens(), use_cache=False)).backward()
        for name, gradient in gradients(model).items():
            assert_close(gradient, expected[name], torch.float64, 64, 8, what=f"{name}, use_reentrant={reentrant}")
        if max(calls.values()) < 2:
            raise AssertionError("checkpointing was asked for, but no layer ran a second time")


def _enable_checkpointing(model: Wrapped, reentrant: bool) -> None:
    # transformers renamed it in 5.23.
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    enable = getattr(model, new) if hasattr(model, new) else getattr(model, old)
    enable({"use_reentrant": reentrant})


def _count_forwards(model: Wrapped) -> dict[str, int]:
    calls: dict[str, int] = {}

    def counter(name: str) -> None:
        calls[name] = 0

        def count(module: nn.Module, args: object) -> None:
            del module, args
            calls[name] += 1

        model.get_submodule(name).register_forward_pre_hook(count)

    for name, module in model.named_modules():
        if not any(module.children()):
            counter(name)
    return calls


def checkpointed_layer(subject: Subject) -> None:
    """The same on the perceptron, through ``torch.utils.checkpoint`` itself, gradient of the input included."""
    model = subject.wrap_perceptron().train()
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        x = points().requires_grad_()
        objective(run(x)).backward()
        if x.grad is None:
            raise AssertionError("the input got no gradient")
        found.append({"input": x.grad, **gradients(model)})
    assert_same_state(found[1], found[0], "gradients")


def low_precision(subject: Subject) -> None:
    """Over a bfloat16 or float16 base, output and gradients are the exact ones up to the roundings of the base's dtype.

    Depth: three linear layers and two nonlinearities, of which each rounds once, and a share that is added: 8; the
    backward doubles it.
    """
    for dtype in (torch.bfloat16, torch.float16):
        model = subject.wrap_perceptron(dtype).train()
        twin = subject.wrap_perceptron().train()
        twin.load_state_dict(model.state_dict())
        x = points(dtype=dtype)
        output, exact = model(x), twin(x.double())
        if output.dtype != dtype:
            raise AssertionError(f"output is {output.dtype} over a base of {dtype}")
        plain = tiny.perceptron(dtype).double()(x.double()).detach()
        assert_close(output, exact.detach(), dtype, 1, 8, wrong=(plain,), what=f"output in {dtype}")
        objective(output.double()).backward()
        objective(exact).backward()
        expected = gradients(twin)
        for name, gradient in gradients(model).items():
            assert_close(gradient, expected[name], dtype, 1, 16, what=f"{name}, gradient in {dtype}")


def trained_dtype(subject: Subject) -> None:
    """What trains is float32 over a base of 16 bits (small updates vanish below that), float64 over float64."""
    only_when(subject.method.is_adapter, "the method trains the base's own parameters")
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        for name, parameter in trained(subject.wrap_perceptron(dtype)).items():
            if parameter.dtype != wanted:
                raise AssertionError(f"{name}: {parameter.dtype} over a base of {dtype}, wanted {wanted}")


def empty_batch(subject: Subject) -> None:
    """A batch of no rows goes through, forward and backward, and leaves zero gradients."""
    model = subject.wrap_perceptron().train()
    output = model(points(0))
    if output.shape != (0, 3):
        raise AssertionError(f"output of an empty batch has shape {tuple(output.shape)}, wanted (0, 3)")
    output.sum().backward()
    for name, gradient in gradients(model).items():
        if gradient.any():
            raise AssertionError(f"{name}: an empty batch gave a gradient")


CHECKS = [
    identity_at_init,
    only_the_adapter_has_gradients,
    gradients_match_finite_differences,
    forward_is_the_dense_reference,
    region_is_the_dense_delta,
    two_forwards_before_one_backward,
    reference_forward_in_between,
    gradient_checkpointing,
    checkpointed_layer,
    low_precision,
    trained_dtype,
    empty_batch,
]
