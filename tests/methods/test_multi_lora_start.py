"""The four starts of the shared A: how they are drawn, what a step under them does, and what data decides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from leantune import MultiLoraConfig, initialize
from leantune.core.errors import MethodError
from leantune.methods import _shared_projection as sharing
from leantune.methods._calibration import Calibration
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.model import Perceptron, language_model, perceptron
from leantune.testing.subject import own_layers, points

WIDTH, RANK = 400, 6


def drawn(start: str, scaling: float = 1.0, seed: int = 0, path: str = "layer") -> Tensor:
    return sharing.draw(start, RANK, WIDTH, scaling, seed, path)


def layer_of(**options: Any) -> tuple[Any, Any]:
    """The perceptron with an adapter on its first layer, 6 to 10, and that layer."""
    model = get_peft_model(perceptron(), MultiLoraConfig(target_modules=["lin0"], **options))
    return model, own_layers(model)["lin0"]


def test_kaiming_is_what_stock_lora_draws_from() -> None:
    A = drawn("kaiming")
    bound = 1 / math.sqrt(WIDTH)
    assert A.abs().max() <= bound
    # Uniform: the largest of 2400 entries is near the bound, the variance bound^2 / 3 up to its own deviation.
    assert A.abs().max() > 0.99 * bound
    assert A.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
    stock = nn.init.kaiming_uniform_(torch.empty(RANK, WIDTH), a=math.sqrt(5))
    assert stock.abs().max() <= bound
    assert stock.std().item() == pytest.approx(A.std().item(), rel=0.1)


def test_gaussian_is_sqrt_of_three_widths_as_large() -> None:
    A = drawn("gaussian")
    # 2400 entries: five standard deviations of their mean and of their variance.
    assert abs(A.mean().item()) < 5 / math.sqrt(A.numel())
    assert abs(A.var().item() - 1) < 5 * math.sqrt(2 / A.numel())
    assert (A.std() / drawn("kaiming").std()).item() == pytest.approx(math.sqrt(3 * WIDTH), rel=0.1)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.125])
def test_orthonormal_rows_have_the_length_that_undoes_the_scaling(scaling: float) -> None:
    A = drawn("orthonormal", scaling)
    assert_close(scaling**2 * A @ A.t(), torch.eye(RANK, dtype=torch.float64), torch.float64, 8, RANK, what="s^2 A A^T")


@pytest.mark.parametrize("start", ["kaiming", "gaussian", "orthonormal"])
def test_a_draw_depends_on_seed_and_path_alone(start: str) -> None:
    torch.manual_seed(1)
    first, state = drawn(start), torch.get_rng_state()
    torch.manual_seed(2)
    assert_same(drawn(start), first, "another random state")
    assert_differs(drawn(start, seed=1), first, "another seed")
    assert_differs(drawn(start, path="other"), first, "another layer")
    torch.manual_seed(1)
    assert_same(torch.get_rng_state(), state, "the global random state")


def test_other_targets_and_dtypes_do_not_change_a_layers_a() -> None:
    both = get_peft_model(perceptron(), MultiLoraConfig(target_modules=["lin0", "lin1"]))
    narrow = get_peft_model(perceptron(torch.float32), MultiLoraConfig(target_modules=["lin1"]))
    wide, narrow_a = (own_layers(model)["lin1"].shared.weight for model in (both, narrow))
    assert (wide.dtype, narrow_a.dtype) == (torch.float64, torch.float32)
    assert_same(wide.float(), narrow_a, "A of lin1")


def test_rank_is_at_most_the_inputs() -> None:
    _, layer = layer_of(r=64, shared_init="orthonormal")
    A = layer.shared.weight
    assert A.shape == (6, 6)
    scaling = layer.scaling["default"]
    assert_close(scaling**2 * A @ A.t(), torch.eye(6, dtype=torch.float64), torch.float64, 8, 6, what="s^2 A A^T")


def weight_gradient(model: Any, layer: Any, x: Tensor) -> Tensor:
    """``dL/dW`` of the adapted layer at this point, by a model without adapters."""
    plain = Perceptron().double()
    plain.load_state_dict(perceptron().state_dict())
    with torch.no_grad():
        plain.lin0.weight.add_(layer.get_delta_weight("default"))
    plain(x).square().sum().backward()
    assert plain.lin0.weight.grad is not None
    return plain.lin0.weight.grad


@pytest.mark.parametrize("alpha", [3.0, 24.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_on_b_is_the_full_gradient_projected(alpha: float, steps: int) -> None:
    """Under the orthonormal start, plain gradient descent moves the weight by ``-lr G P``, whatever alpha."""
    model, layer = layer_of(r=3, alpha=alpha, shared_init="orthonormal")
    A, B, rate, x = layer.shared.weight, layer.factor("default"), 1e-2, points()
    projector = torch.linalg.pinv(A) @ A
    expected = torch.zeros(10, 6, dtype=torch.float64)
    for _ in range(steps):
        full = weight_gradient(model, layer, x)
        expected -= rate * full @ projector
        model.zero_grad()
        model(x).square().sum().backward()
        with torch.no_grad():
            B.sub_(rate * B.grad)
    change = layer.get_delta_weight("default")
    assert_close(change, expected, torch.float64, 64, 8, wrong=[-rate * full], what="change of the weight")


def test_it_is_the_preconditioned_step_of_any_a_with_these_rows() -> None:
    """LoRA-FA: ``dB (s^2 A A^T)^-1`` for an A of any scale; the orthonormal one of the same row space needs none."""
    x, rate, changes = points(), 1e-2, {}
    rows = torch.empty(0)
    for start in ("kaiming", "orthonormal"):
        model, layer = layer_of(r=3, alpha=9.0, shared_init=start)
        scaling = layer.scaling["default"]
        if start == "orthonormal":
            layer.shared.weight.copy_(torch.linalg.qr(rows.t()).Q.t() / scaling)
        rows = layer.shared.weight.clone()
        model(x).square().sum().backward()
        gradient = layer.factor("default").grad
        gram = scaling**2 * rows @ rows.t()
        preconditioned = torch.linalg.solve(gram, gradient.t()).t()
        if start == "orthonormal":
            assert_close(preconditioned, gradient.clone(), torch.float64, 64, 8, what="the preconditioner")
        else:
            assert (preconditioned - gradient).norm() > 0.1 * gradient.norm()
        changes[start] = -rate * scaling * preconditioned @ rows
    assert_close(changes["orthonormal"], changes["kaiming"], torch.float64, 64, 8, what="change of the weight")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_alpha_must_follow_the_scale_of_a(optimizer: Any) -> None:
    """``A c`` with ``alpha / c`` is the same training; so N(0, 1) wants alpha smaller by ``sqrt(3 in)``."""
    factor = math.sqrt(3 * 6)
    found = {}
    for name, scale, alpha in (("small", 1.0, 8.0), ("followed", factor, 8.0 / factor), ("not followed", factor, 8.0)):
        model, layer = layer_of(r=3, alpha=alpha)
        layer.shared.weight.mul_(scale)
        steps = optimizer([layer.factor("default")], lr=1e-3)
        for _ in range(4):
            steps.zero_grad()
            model(points()).square().sum().backward()
            steps.step()
        found[name] = layer.get_delta_weight("default")
    assert_close(
        found["followed"], found["small"], torch.float64, 64, 8, wrong=[found["not followed"]], what="the change"
    )


def batches(task: int, rows: int = 3) -> list[dict[str, Tensor]]:
    """Rows of one task, the last ones padded."""
    generator = torch.Generator().manual_seed(task)
    ids = torch.randint(3, 32, (rows, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


def waiting(**options: Any) -> Any:
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "shared_init": "activation_pca", **options}
    return get_peft_model(language_model("llama"), MultiLoraConfig(**options))


def inputs_of(path: str, all_batches: list[dict[str, Tensor]]) -> Tensor:
    """All inputs of one layer of the base, padding left out, ``(n, in)``."""
    base: Any = language_model("llama")
    seen: list[Tensor] = []
    base.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    for batch in all_batches:
        base(**batch)
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, all_batches, strict=True)])


def test_activation_pca_is_that_of_all_tasks_together() -> None:
    pooled = batches(0) + batches(1)
    model = waiting()
    model.add_adapter("other", model.peft_config["default"])
    told = initialize(model, pooled)
    assert (told["adapters"], told["rows"], told["passes"]) == (["default", "other"], 6, 1)
    for path, layer in own_layers(model).items():
        x, A, scaling = inputs_of(path, pooled), layer.shared.weight, layer.scaling["default"]
        exact = torch.linalg.svd(x, full_matrices=False).Vh[:4]
        got = scaling * A
        assert_close(got.t() @ got, exact.t() @ exact, torch.float64, 256, 8, what=f"{path}: projector")
        one_task = torch.linalg.svd(inputs_of(path, batches(0)), full_matrices=False).Vh[:4]
        assert (got.t() @ got - one_task.t() @ one_task).norm() > 1e-3, "one task alone would give the same"
        # No other projection of this rank loses less.
        lost = (x - x @ got.t() @ got).square().sum()
        for seed in range(3):
            other = sharing.draw("orthonormal", 4, x.shape[1], 1.0, seed, path)
            assert lost < (x - x @ other.t() @ other).square().sum()


def test_tasks_with_configs_of_their_own_start_together() -> None:
    model = waiting()
    model.add_adapter("other", MultiLoraConfig(r=4, target_modules=["q_proj"], shared_init="activation_pca"))
    told = initialize(model, batches(0))
    assert (told["adapters"], told["passes"]) == (["default", "other"], 1)
    assert not any(layer.waits_for_data("other") for layer in own_layers(model).values())


def test_moments_come_in_groups_under_a_budget() -> None:
    """A moment of q_proj (16 inputs) has 2 kB in float64, one of down_proj (20) 3.2 kB: two passes for 8 kB."""
    expected, model = waiting(), waiting()
    initialize(expected, batches(0))
    data = Calibration(model, batches(0), gradient_bytes=8000)
    with data.at_rest():
        model.base_model.start_from_data(["default"], data)
    assert data.passes == 2
    for path, layer in own_layers(model).items():
        assert_same(layer.shared.weight, own_layers(expected)[path].shared.weight, path)


def test_wide_layers_get_the_same_directions_without_all_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    # Singular values that fall by a tenth each time, as activations' do.
    x = torch.randn(300, 120, generator=generator, dtype=torch.float64) * 0.9 ** torch.arange(120)
    moment = x.t() @ x
    exact = sharing.principal_directions(moment, 5)
    monkeypatch.setattr(sharing, "EXACT_WIDTH", 50)
    assert_close(sharing.principal_directions(moment, 5), exact, torch.float64, 256, 8, what="directions")
    assert_close(exact @ exact.t(), torch.eye(5, dtype=torch.float64), torch.float64, 64, 8, what="Q Q^T")


def test_fewer_tokens_than_directions_still_give_an_orthonormal_a() -> None:
    model = waiting(r=8)
    initialize(model, [{"input_ids": torch.tensor([[3, 4]])}])
    for path, layer in own_layers(model).items():
        A, scaling = layer.shared.weight, layer.scaling["default"]
        assert_close(scaling**2 * A @ A.t(), torch.eye(8, dtype=torch.float64), torch.float64, 64, 8, what=path)


def test_a_task_that_joins_needs_no_data_of_its_own() -> None:
    model = waiting()
    initialize(model, batches(0))
    before = {path: layer.shared.weight.clone() for path, layer in own_layers(model).items()}
    model.add_adapter("late", MultiLoraConfig(r=4, target_modules=["q_proj"], shared_init="activation_pca"))
    with pytest.raises(MethodError, match="no adapter of this model waits"):
        initialize(model, batches(1))
    for path, layer in own_layers(model).items():
        assert_same(layer.shared.weight, before[path], path)


def test_a_mixed_batch_is_refused_before_the_start() -> None:
    model = waiting().train()
    model.set_row_tasks(["default"] * 3)
    with pytest.raises(MethodError, match=r"leantune\.initialize"):
        model(**batches(0)[0])
    initialize(model, batches(0))
    model(**batches(0)[0])
