"""S2FT over a base whose weights are packed: eight bits a number, with scales that move into a state on first use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tiny
from leantune import S2FTConfig
from leantune.methods import _base
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.subject import (
    gradients,
    no_grad_logits,
    objective,
    own_layers,
    start,
    trained,
)


class PackedWeight(nn.Parameter):
    """Int8 rows; the scales stand on the parameter until the layer is used, as in bitsandbytes."""

    scales: Tensor | None


def pack(weight: Tensor) -> PackedWeight:
    scales = weight.abs().amax(1, keepdim=True) / 127
    packed = PackedWeight((weight / scales).round().to(torch.int8), requires_grad=False)
    packed.scales = scales
    return packed


class PackedLinear(nn.Linear):
    """A linear layer that dequantises in its forward."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = pack(plain.weight.detach())
        self.state = SimpleNamespace(scales=None)

    def dense(self) -> Tensor:
        if self.state.scales is None:
            self.state.scales, self.weight.scales = self.weight.scales, None
        return self.weight.float() * self.state.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense())


class Backend:
    """What PEFT's quantisation backends offer to a layer."""

    supports_merge = True
    backend_name, layer_type = "packed", "linear"

    def get_base_weight(self, base_layer: PackedLinear) -> Tensor:
        return base_layer.dense()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        base_layer = peft_layer.get_base_layer()
        base_layer.weight = pack(weight_data)
        base_layer.state.scales = None


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(layer: nn.Module, **options: Any) -> Backend | None:
        return Backend() if isinstance(layer, PackedLinear) else None

    monkeypatch.setattr(_base, "resolve_quantization_backend", resolve)


def packed() -> Any:
    model = tiny.model("llama", torch.float32)
    for path, layer in tiny.linears(model).items():
        parent, _, leaf = path.rpartition(".")
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), leaf, PackedLinear(layer))
    return model.eval()


def wrap(base: nn.Module, **options: Any) -> Any:
    names = sorted(path for path, layer in base.named_modules() if isinstance(layer, PackedLinear))
    options = {"heads": 1, "channels": 3, "target_modules": names, **options}
    return get_peft_model(base, S2FTConfig(**options)).eval()  # type: ignore[arg-type]


def dense_twin(model: Any) -> Any:
    """The dequantised base in float64 with the same slices beside it."""
    twin = tiny.model("llama")
    for path, layer in own_layers(model).items():
        twin.get_submodule(path).weight.data.copy_(layer.dense_weight())
    wrapped = get_peft_model(twin, model.peft_config["default"]).eval()
    with torch.no_grad():
        for name, parameter in trained(model, "default").items():
            wrapped.get_parameter(name).copy_(parameter)
    return wrapped


def test_the_start_is_the_base() -> None:
    plain = no_grad_logits(packed(), tiny.ids())
    model = wrap(packed())
    assert_same(no_grad_logits(model, tiny.ids()), plain, "logits before the first step")
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}


def test_forward_and_gradients_are_those_over_the_dequantised_base() -> None:
    plain = no_grad_logits(packed(), tiny.ids()).double()
    # The entries go by the weights, which are the same numbers in both.
    model = wrap(packed(), selection="weight")
    start(model)
    twin = dense_twin(model)
    exact = no_grad_logits(twin, tiny.ids())
    assert_close(no_grad_logits(model, tiny.ids()), exact, torch.float32, 4, 16, wrong=(plain,), what="logits")
    for each in (model, twin):
        objective(each.train()(input_ids=tiny.ids()).logits.double()).backward()
    expected = gradients(twin)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], torch.float32, 32, 32, what=name)


def test_merging_requantises_and_unmerging_restores_every_bit() -> None:
    model = wrap(packed())
    start(model)
    model.add_adapter("other", S2FTConfig(heads=1, channels=2, seed=3))
    start(model, "other", seed=2)
    tuned = no_grad_logits(model, tiny.ids())
    with model.disable_adapter():
        plain = no_grad_logits(model, tiny.ids())
    before = {path: layer.get_base_layer().weight.clone() for path, layer in own_layers(model).items()}
    for names in (["default"], ["default", "other"]):
        model.merge_adapter(adapter_names=names)
        merged = no_grad_logits(model, tiny.ids())
        assert_differs(merged, plain, "merged logits")
        assert model.get_base_model().model.layers[0].mlp.down_proj.get_base_layer().weight.dtype == torch.int8
        for layer in own_layers(model).values():
            if layer.merged:
                layer.unmerge()
        assert_same(no_grad_logits(model, tiny.ids()), tuned, f"logits after unmerging {names}")
        for path, layer in own_layers(model).items():
            assert_same(layer.get_base_layer().weight.data, before[path].data, path)
    with model.disable_adapter():
        assert_same(no_grad_logits(model, tiny.ids()), plain, "the base")


def test_a_merged_adapter_is_near_the_unmerged_one() -> None:
    model = wrap(packed())
    start(model)
    with model.disable_adapter():
        plain = no_grad_logits(model, tiny.ids())
    tuned = no_grad_logits(model, tiny.ids())
    model.merge_adapter()
    merged = no_grad_logits(model, tiny.ids())
    # Eight bits a number: nearer by far to the tuned model than the base is.
    assert (merged - tuned).norm() < 0.2 * (plain - tuned).norm()


def test_mixed_batches() -> None:
    model = wrap(packed())
    start(model)
    tuned = no_grad_logits(model, tiny.ids())
    with model.disable_adapter():
        plain = no_grad_logits(model, tiny.ids())
    mixed = no_grad_logits(model, tiny.ids(), adapter_names=["default", "__base__", "default"])
    assert_close(mixed[0], tuned[0].double(), torch.float32, 4, 16, wrong=(plain[0],), what="a row of the adapter")
    assert_close(mixed[1], plain[1].double(), torch.float32, 4, 16, wrong=(tuned[1],), what="a row of the base")


def test_unloading_gives_the_packed_base_back() -> None:
    base = packed()
    plain = no_grad_logits(base, tiny.ids())
    model = wrap(base)
    start(model)
    bare = model.unload()
    assert isinstance(bare.model.layers[0].mlp.down_proj, PackedLinear)
    assert_same(no_grad_logits(bare, tiny.ids()), plain, "logits")


def test_permuting_packed_weights_is_refused_before_anything_moves() -> None:
    base = packed()
    plain = no_grad_logits(base, tiny.ids())
    with pytest.raises(Exception, match="quantised weight") as caught:
        wrap(base, permute=True)
    assert "permute=False" in str(caught.value)
    assert_same(no_grad_logits(base, tiny.ids()), plain, "logits of the base after the refusal")
