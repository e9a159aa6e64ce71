"""The contract offered to outsiders: a sound method of somebody else passes, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from leantune.core.errors import MethodError
from leantune.methods import Method, _registry, register
from leantune.methods._base import AdapterConfig, AdapterLayer, AdapterModel
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.testing import CHECKS, NotApplicable, Subject, check_method, subject

METHOD = "toyrank"


@dataclass
class ToyConfig(AdapterConfig):
    """``W + (alpha / r) B A`` with ``A`` drawn once and frozen."""

    r: int = field(default=3, metadata={"help": "Rank."})
    alpha: float = field(default=6.0, metadata={"help": "Scaling times rank."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(METHOD)


class _Frozen(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


class ToyLinear(AdapterLayer):
    """One trained and one frozen factor an adapter."""

    adapter_layer_names = ("toyrank_b", "toyrank_a")
    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.toyrank_b, self.toyrank_a = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: Any, template: str | None, **kwargs: Any) -> None:
        drawn = torch.randn(config.r, self.in_features) / self.in_features**0.5
        if template is not None and template in self.toyrank_a:
            drawn = self.toyrank_a[template].value.clone()
        self.toyrank_a[adapter_name] = _Frozen(drawn.to(self.trained_dtype()))
        self.toyrank_b[adapter_name] = nn.Linear(config.r, self.out_features, bias=False)
        nn.init.normal_(self.toyrank_b[adapter_name].weight, std=0.0 if config.init_weights else 0.1)
        self.scaling[adapter_name] = config.alpha / config.r
        self.place(adapter_name, inference_mode=config.inference_mode)

    def place(self, adapter_name: str, inference_mode: bool) -> None:
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for container in (self.toyrank_b, self.toyrank_a):
            container[adapter_name].to(self.trained_dtype())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.toyrank_b[adapter].weight, self.toyrank_a[adapter].value  # type: ignore[return-value]

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        B, A = self.factors(adapter)
        return result + (x.to(A.dtype) @ A.t() @ B.t() * self.scaling[adapter]).to(result.dtype)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        B, A = self.factors(adapter)
        return (B @ A * self.scaling[adapter]).detach(), None, None

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        B, A = self.factors(adapter)
        return (B * self.scaling[adapter]).detach(), A


class ToyModel(AdapterModel):
    """Injects the layers."""

    prefix, tuner_layer_cls = prefix_of(METHOD), ToyLinear


def _trainable(config: ToyConfig, out_features: int, in_features: int) -> int:
    return config.r * out_features


register_with_peft(METHOD, ToyConfig, ToyModel)
TOY = Method(
    name=METHOD,
    title="Toy",
    config=ToyConfig,
    formula="W + (alpha / r) B A, A frozen",
    paper="-",
    trainable_parameters=_trainable,
    apply=get_peft_model,  # type: ignore[arg-type]
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registered for the time of one test: the rest of the suite runs over the methods that are there."""
    register(TOY)
    yield
    del _registry._METHODS[METHOD]


def test_a_sound_method_passes_every_check() -> None:
    results = check_method(ToyConfig, families=["gpt2"], r=2)
    assert len(results) == len(CHECKS)
    others = {title: result for title, result in results.items() if result != "passed"}
    # Let off nothing but the start from data that it does not have.
    assert set(others.values()) == {"does not apply: the method's start needs no data"}
    assert len(others) == 3


def test_a_preset_is_a_method_of_its_own_over_the_same_config() -> None:
    preset = TOY.preset("toy-eight", {"r": 8}, title="Toy of rank 8", mergeable=False)
    register(preset)
    try:
        assert preset.make_config().r == 8
        assert preset.make_config(r=2).r == 2, "the user's own option wins"
        assert _registry.of_config(ToyConfig(r=8)).name == "toy-eight"
        assert _registry.of_config(ToyConfig(r=2)).name == METHOD
        assert (preset.formula, preset.mergeable, TOY.mergeable) == (TOY.formula, False, True)
        narrower = preset.preset("toy-eight-in", {"target_modules": ["lin0"]})
        assert narrower.make_config().r == 8
        register(narrower)
        # A list of names is a set in the config.
        assert _registry.of_config(ToyConfig(r=8, target_modules=["lin0"])).name == "toy-eight-in"
    finally:
        for name in ("toy-eight", "toy-eight-in"):
            _registry._METHODS.pop(name, None)


def test_all_failures_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from leantune import testing

    monkeypatch.setattr(testing, "CHECKS", CHECKS[:6])
    monkeypatch.setattr(ToyLinear, "add_share", lambda self, adapter, x, result: result * 2)
    with pytest.raises(AssertionError) as caught:
        check_method(ToyConfig)
    text = str(caught.value)
    assert text.startswith("method 'toyrank': ")
    for line in ("llama: identity_at_init", "gpt2: identity_at_init", "llama: forward_is_the_dense_reference"):
        assert line in text
    assert "forward.py:" in text


def test_a_check_that_does_not_apply_names_the_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    from leantune import testing
    from leantune.testing.weight import merged_equals_unmerged

    monkeypatch.setattr(testing, "CHECKS", [merged_equals_unmerged])
    results = check_method("full", families=["llama"])
    assert results == {"llama: merged_equals_unmerged": "does not apply: the method cannot be written into the weights"}


def test_an_unknown_config_is_told_to_register() -> None:
    @dataclass
    class Nobody(AdapterConfig):
        pass

    with pytest.raises(MethodError, match=r"Nobody: belongs to no registered method; .*call register"):
        subject(Nobody)


def test_every_check_has_a_name_and_a_text() -> None:
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS) >= 30
    assert all(check.__doc__ for check in CHECKS)


# Planted faults: what is replaced, by what, and the check that must find it.

Share = Callable[[ToyLinear, str, Tensor, Tensor], Tensor]


def _share(change: Callable[[ToyLinear, str, Tensor], Tensor]) -> Share:
    """``add_share`` whose share is ``change(layer, adapter, x)``."""
    return lambda layer, adapter, x, result: result + change(layer, adapter, x).to(result.dtype)


def _product(layer: ToyLinear, adapter: str, x: Tensor) -> Tensor:
    B, A = layer.factors(adapter)
    return x.to(A.dtype) @ A.t() @ B.t()


class _Forgetful(torch.autograd.Function):
    """Keeps what its backward needs on the layer, where the next forward overwrites it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, A: Tensor, layer: ToyLinear) -> Tensor:
        ctx.layer, layer.kept = layer, (x, B, A)  # type: ignore[assignment]
        return x.to(A.dtype) @ A.t() @ B.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, B, A = ctx.layer.kept
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        through = (x.to(A.dtype) @ A.t()).reshape(-1, A.shape[0])
        return (grads[0] @ B @ A).to(x.dtype), rows.t() @ through, None, None


def _on_layer(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(ToyLinear, name, value)


def _forgets_on_save(patch: pytest.MonkeyPatch) -> None:
    def init(self: _Frozen, value: Tensor) -> None:
        nn.Module.__init__(self)
        self.register_buffer("value", value, persistent=False)

    patch.setattr(_Frozen, "__init__", init)


def _subtracts(layer: ToyLinear) -> None:
    weight = layer.get_base_weight()
    with torch.no_grad():
        for name in layer.merged_adapters:
            delta = layer.delta_region(name)[0]
            weight.sub_((delta.t() if layer.transposed else delta).to(weight.dtype))
    layer._overwritten.clear()
    layer.merged_adapters.clear()


def _restores_oldest_last_forgotten(layer: ToyLinear) -> None:
    slot, _, _ = layer._overwritten[-1]
    with torch.no_grad():
        layer.get_base_weight().copy_(getattr(layer, slot))
    for kept, _, _ in layer._overwritten:
        delattr(layer, kept)
    layer._overwritten.clear()
    layer.merged_adapters.clear()


def _trains_the_base(patch: pytest.MonkeyPatch) -> None:
    place = ToyLinear.place

    def careless(self: ToyLinear, adapter_name: str, inference_mode: bool) -> None:
        place(self, adapter_name, inference_mode)
        self.get_base_layer().weight.requires_grad_(True)  # type: ignore[union-attr]

    patch.setattr(ToyLinear, "place", careless)
    patch.setattr(AdapterModel, "_mark_only_adapters_as_trainable", lambda self, model: None)


def _ignores_the_template(patch: pytest.MonkeyPatch) -> None:
    update = ToyLinear.update_layer
    patch.setattr(
        ToyLinear,
        "update_layer",
        lambda self, name, config, template, **kwargs: update(self, name, config, None, **kwargs),
    )


def _mixes_up_base_rows(layer: ToyLinear, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
    result = layer.base_layer(x, *args, **kwargs)
    return layer.add_share("default", x, result)


def _ignores_disabling(layer: ToyLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result = layer.base_layer(x)
    return layer.add_share(layer.active_adapters[0], x, result)


def _writes_the_base(layer: ToyLinear, adapter: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        layer.get_base_weight().add_(1e-6)
    return _product(layer, adapter, x) * layer.scaling[adapter]


def _sums_nothing_but_the_first(layer: ToyLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return result
    return layer.add_share(layer.active_adapters[0], x, result)


def _scaled(layer: ToyLinear, adapter: str, x: Tensor) -> Tensor:
    return _product(layer, adapter, x) * layer.scaling[adapter]


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "sign": (_on_layer("add_share", _share(lambda *a: -_scaled(*a))), "forward_is_the_dense_reference"),
    "forgotten scaling": (_on_layer("add_share", _share(_product)), "forward_is_the_dense_reference"),
    "half the share": (_on_layer("add_share", _share(lambda *a: _scaled(*a) / 2)), "merged_equals_unmerged"),
    "merge without scaling": (
        _on_layer(
            "delta_region",
            lambda self, adapter: ((self.factors(adapter)[0] @ self.factors(adapter)[1]).detach(), None, None),
        ),
        "merged_equals_unmerged",
    ),
    "factors without scaling": (
        _on_layer("lora_factors", lambda self, adapter: self.factors(adapter)),
        "lora_form_equals_the_delta",
    ),
    "not the base at the start": (
        _on_layer("add_share", _share(lambda layer, adapter, x: _scaled(layer, adapter, x) + 1e-3)),
        "identity_at_init",
    ),
    "input gradient lost": (
        _on_layer("add_share", _share(lambda layer, adapter, x: _scaled(layer, adapter, x.detach()))),
        "gradients_match_finite_differences",
    ),
    "trained gradient lost": (
        _on_layer("add_share", _share(lambda layer, adapter, x: _scaled(layer, adapter, x).detach())),
        "only_the_adapter_has_gradients",
    ),
    "the second forward overwrites the first": (
        _on_layer(
            "add_share",
            _share(
                lambda layer, adapter, x: _Forgetful.apply(x, *layer.factors(adapter), layer) * layer.scaling[adapter]
            ),
        ),
        "two_forwards_before_one_backward",
    ),
    "disabling does nothing": (_on_layer("forward", _ignores_disabling), "reference_forward_in_between"),
    "frozen factor not saved": (_forgets_on_save, "save_and_load"),
    "unmerge by subtraction": (_on_layer("unmerge", _subtracts), "unmerge_does_not_drift"),
    "unmerge of the newest alone": (_on_layer("unmerge", _restores_oldest_last_forgotten), "unmerge_restores_the_base"),
    "a merge that checks nothing": (
        _on_layer("_merge_one", lambda self, name, safe, real=AdapterLayer._merge_one: real(self, name, False)),
        "merge_refuses_what_is_broken",
    ),
    "float32 over float64": (_on_layer("trained_dtype", lambda self: torch.float32), "trained_dtype"),
    "base trains": (_trains_the_base, "only_the_adapter_has_gradients"),
    "base trains, seen by its bits": (_trains_the_base, "training_touches_what_trains_alone"),
    "base written by a forward": (
        _on_layer("add_share", _share(_writes_the_base)),
        "training_touches_what_trains_alone",
    ),
    "reference drawn anew": (_ignores_the_template, "reference_copy"),
    "base rows of a mixed batch adapted": (_on_layer("_mixed_forward", _mixes_up_base_rows), "mixed_batch"),
    "only the first of two active": (_on_layer("forward", _sums_nothing_but_the_first), "two_active_adapters_sum"),
    "something left by delete": (_on_layer("adapter_layer_names", ("toyrank_b",)), "delete_adapter"),
    "output in another dtype": (
        _on_layer("add_share", lambda self, adapter, x, result: result + _scaled(self, adapter, x)),
        "low_precision",
    ),
}


def _check(name: str) -> Callable[[Subject], None]:
    return next(check for check in CHECKS if check.__name__ == name)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, name = FAULTS[fault]
    tested = subject(ToyConfig)
    _check(name)(tested)
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        _check(name)(tested)
    assert not isinstance(caught.value, NotApplicable)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (
            {"trainable_parameters": lambda config, out, width: config.r * (out + width)},
            "trained_count_is_the_stated_one",
        ),
        ({"plan": lambda model: None}, "training_touches_what_trains_alone"),
    ],
)
def test_a_wrong_fact_is_found(change: dict[str, Any], name: str) -> None:
    with pytest.raises(AssertionError):
        _check(name)(Subject(replace(TOY, **change)))


def test_an_option_without_help_is_found() -> None:
    @dataclass
    class Silent(ToyConfig):
        more: int = 0

    with pytest.raises(AssertionError, match=r"Silent\.more: no metadata\['help'\]"):
        _check("options_explain_themselves")(Subject(replace(TOY, config=Silent)))
