"""Choices from calibration rows: against slow dense references, and what measuring leaves alone."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from leantune import S2FTConfig, initialize
from leantune.methods._calibration import Calibration, LayerActivation, LinearGradient
from leantune.testing.closeness import assert_close, assert_same

EXACT = 1e-10
"""Relative: sums of a few thousand float64 products, in another order."""


def batch_of(ids: Tensor, lengths: list[int] | None = None) -> dict[str, Tensor]:
    """A batch whose rows end after ``lengths`` tokens; what follows is padding with ids of its own."""
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths or []):
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def batches(seed: int = 3) -> list[dict[str, Tensor]]:
    return [batch_of(tiny.ids(3, 7, seed), [7, 4, 5]), batch_of(tiny.ids(2, 6, seed + 1), [3, 6])]


def labelled(seed: int = 3) -> list[dict[str, Tensor]]:
    """Batches for a classification head."""
    found = batches(seed)
    return [{**batch, "labels": torch.arange(len(batch["labels"])) % 3} for batch in found]


def shapes_of(base: nn.Module) -> dict[str, tuple[int, int]]:
    found = {}
    for path, module in tiny.linears(base).items():
        out, width = module.weight.shape if isinstance(module, nn.Linear) else module.weight.t().shape
        found[path] = (out, width)
    return found


def gradients_by_autograd(base: Any, given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The dense gradient of the mean loss over all labels, each ``(out, in)``, the slow way: all rows, one by one."""
    twin = copy.deepcopy(base)
    twin.requires_grad_(True)
    total, labels = 0.0, 0
    for batch in given:
        for row in range(len(batch["input_ids"])):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            count = 1 if one["labels"].dim() == 1 else int((one["labels"][:, 1:] != -100).sum())
            # transformers forms the loss in float32; the reference must not.
            logits = twin(**{name: value for name, value in one.items() if name != "labels"}).logits
            if one["labels"].dim() == 1:
                total = total + nn.functional.cross_entropy(logits, one["labels"], reduction="sum")
            else:
                target = one["labels"][:, 1:].flatten()
                total = total + nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), target, ignore_index=-100, reduction="sum"
                )
            labels += count
    (total / labels).backward()  # type: ignore[union-attr]
    found = {}
    for path, module in tiny.linears(twin).items():
        gradient = module.weight.grad
        found[path] = gradient if isinstance(module, nn.Linear) else gradient.t()
    return found


def exact_loss(given: list[dict[str, Tensor]]) -> Any:
    """The same loss in float64, as a ``loss`` for initialize."""
    labels = sum(int((b["labels"][:, 1:] != -100).sum()) if b["labels"].dim() > 1 else len(b["labels"]) for b in given)

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        wanted = batch["labels"]
        if wanted.dim() > 1:
            logits, wanted = logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum") / labels

    return loss


def measured(base: nn.Module, given: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    """Gradients by calibration."""
    data = Calibration(base, given, loss=exact_loss(given), **options)
    wanted = {path: LinearGradient(tiny.linears(base)[path], shape) for path, shape in shapes_of(base).items()}
    base.requires_grad_(False)
    with data.at_rest():
        return dict(data.weight_gradients(wanted))


def assert_relative(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.norm())
    assert scale > 0, what
    assert float((actual - expected).norm()) <= EXACT * scale, what


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradients_are_the_dense_ones(family: str) -> None:
    given = labelled() if family == "bert" else batches()
    base = tiny.model(family)
    expected = gradients_by_autograd(base, given)
    # All at once, and in a group of each layer.
    for found in (measured(base, given), measured(base, given, gradient_bytes=1)):
        assert set(found) == set(expected)
        for path, gradient in expected.items():
            assert_relative(found[path], gradient, path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_activations_are_those_of_real_tokens(family: str) -> None:
    """Row by row without padding gives the same sums as padded batches."""
    given = labelled() if family == "bert" else batches()
    base = tiny.model(family)
    expected = {path: torch.zeros(width, dtype=torch.float64) for path, (_, width) in shapes_of(base).items()}

    def listen(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            expected[path] += args[0].detach().square().flatten(0, -2).sum(0)

        return module.register_forward_pre_hook(hook)

    handles = [listen(path, module) for path, module in tiny.linears(base).items()]
    with torch.no_grad():
        for batch in given:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                base(input_ids=ids[None, : int(mask.sum())])
    for handle in handles:
        handle.remove()
    data = Calibration(base, given)
    wanted = {
        path: LayerActivation(tiny.linears(base)[path], "in", width) for path, (_, width) in shapes_of(base).items()
    }
    with data.at_rest():
        found = data.activations(wanted)
    assert data.tokens == 25
    for path, squares in expected.items():
        assert_relative(found[path], squares, path)


def dense_scores(base: nn.Module, selection: str, given: list[dict[str, Tensor]], layer: str) -> dict[str, Tensor]:
    """Scores of llama's groups and channels where all linear layers train, written out by hand."""
    linears = tiny.linears(base)
    weight = {name: linears[f"{layer}.{name}"].weight.detach() for name in LLAMA}
    gradient = gradients_by_autograd(base, given)
    inputs: dict[str, Tensor] = {}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        rows: list[Tensor] = []
        handle = linears[f"{layer}.{name}"].register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0][0])  # type: ignore[misc]
        )
        with torch.no_grad():
            for batch in given:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    base(input_ids=ids[None, : int(mask.sum())])
        handle.remove()
        inputs[name] = torch.cat(rows)

    def norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Two groups of 12 query entries and 4 key/value entries; 20 channels."""
        groups = [
            torch.stack([tensors[name][rows].square().sum() for name, rows in rows_of(group)]).sum()
            + tensors["self_attn.o_proj"][:, 12 * group : 12 * group + 12].square().sum()
            for group in range(2)
        ]
        channels = sum(tensors[name].square().sum(1) for name in ("mlp.gate_proj", "mlp.up_proj"))
        channels = channels + tensors["mlp.down_proj"].square().sum(0)
        return {"attention": torch.stack(groups).sqrt(), "ffn": channels.sqrt()}

    def rows_of(group: int) -> Iterator[tuple[str, slice]]:
        yield "self_attn.q_proj", slice(12 * group, 12 * group + 12)
        yield "self_attn.k_proj", slice(4 * group, 4 * group + 4)
        yield "self_attn.v_proj", slice(4 * group, 4 * group + 4)

    activation = {
        "attention": inputs["self_attn.o_proj"].view(-1, 2, 12).square().sum((0, 2)).sqrt(),
        "ffn": inputs["mlp.down_proj"].square().sum(0).sqrt(),
    }
    if selection == "activation":
        return activation
    if selection == "gradient":
        return norms({name: gradient[f"{layer}.{name}"] for name in LLAMA})
    return {kind: value * activation[kind] for kind, value in norms(weight).items()}


LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def chosen(model: Any, adapter: str = "default") -> dict[str, list[int]]:
    """Path -> chosen entries."""
    suffix = f".s2ft_slice.{adapter}.index"
    return {
        name.removeprefix("base_model.model.").removesuffix(suffix): value.tolist()
        for name, value in model.named_buffers()
        if name.endswith(suffix)
    }


def started(base: nn.Module, given: list[dict[str, Tensor]], **options: Any) -> Any:
    model = get_peft_model(base, S2FTConfig(**options))
    initialize(model, given, loss=exact_loss(given))
    return model


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_choices_are_the_naive_ranking(selection: str, order: str) -> None:
    given = batches()
    options: dict[str, Any] = {"heads": 2, "channels": 6, "target_modules": list(LLAMA)}
    found = chosen(started(tiny.model("llama"), given, selection=selection, order=order, **options))
    for block in (0, 1):
        layer = f"model.layers.{block}"
        scores = dense_scores(tiny.model("llama"), selection, given, layer)
        ranked = {kind: value.sort(descending=order == "largest").indices for kind, value in scores.items()}
        group, channels = int(ranked["attention"][0]), sorted(ranked["ffn"][:6].tolist())
        assert found[f"{layer}.self_attn.o_proj"] == list(range(12 * group, 12 * group + 12))
        assert found[f"{layer}.self_attn.v_proj"] == list(range(4 * group, 4 * group + 4))
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            assert found[f"{layer}.{name}"] == channels


@pytest.mark.parametrize("coupling", ["shared", "independent"])
@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_the_largest_and_the_smallest_share_nothing(selection: str, coupling: str) -> None:
    options: dict[str, Any] = {"heads": 3, "channels": 10, "selection": selection, "coupling": coupling}
    ends = [
        chosen(started(tiny.model("llama"), batches(), order=order, **options)) for order in ("largest", "smallest")
    ]
    assert ends[0].keys() == ends[1].keys()
    for path, entries in ends[0].items():
        # Half of the units each: together they are all of them.
        assert sorted(entries + ends[1][path]) == list(range(24 if path.endswith("o_proj") else 20))


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_an_outstanding_unit_is_found(selection: str) -> None:
    """Channel 13 and query head 4 of one block are made loud; the gradient of what reads them is then large too."""
    base = tiny.model("llama")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[13] *= 300
        # A head cannot be made loud alone where heads share values: its columns of o_proj are made so, for the product.
        base.model.layers[1].self_attn.v_proj.weight[4:8] *= 300
    found = chosen(started(copy.deepcopy(base), batches(), selection=selection, heads=1, channels=1))
    assert found["model.layers.1.mlp.down_proj"] == [13]
    # One of the three query heads of the second group.
    assert found["model.layers.1.self_attn.o_proj"][0] // 4 in (3, 4, 5)
    quiet = chosen(started(base, batches(), selection=selection, heads=3, channels=19, order="smallest"))
    assert 13 not in quiet["model.layers.1.mlp.down_proj"]
    assert {entry // 4 for entry in quiet["model.layers.1.self_attn.o_proj"]} == {0, 1, 2}


def test_gradients_do_not_depend_on_the_batches() -> None:
    rows = [
        (ids, int(mask.sum())) for b in batches() for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    ragged = [batch_of(ids[None, :length]) for ids, length in rows]
    padded = [nn.functional.pad(ids, (0, 9 - len(ids))) for ids, _ in rows]
    whole = [batch_of(torch.stack(padded), [length for _, length in rows])]
    found = [measured(tiny.model("llama"), given) for given in (batches(), ragged, whole)]
    for path, gradient in found[0].items():
        for other in found[1:]:
            assert_relative(other[path], gradient, path)


def test_the_models_own_loss_is_weighted_by_labels() -> None:
    """Without a loss given: transformers' mean loss, which is formed in float32, times the labels of each batch."""
    base = tiny.model("llama")
    expected = gradients_by_autograd(base, batches())
    base.requires_grad_(False)
    data = Calibration(base, batches())
    wanted = {path: LinearGradient(tiny.linears(base)[path], shape) for path, shape in shapes_of(base).items()}
    with data.at_rest():
        for path, gradient in data.weight_gradients(wanted):
            assert_close(gradient, expected[path], torch.float32, 16, 16, what=path)


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at one time in float64 tensors of the shape of a weight that appear under it."""

    def __init__(self, shapes: set[tuple[int, ...]], model: nn.Module) -> None:
        super().__init__()
        self.shapes, self.live, self.most = shapes, 0, 0
        # Weights and views of them are no gradients.
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def _free(self, size: int, key: int) -> None:
        self.live -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tuple(tensor.shape) in self.shapes:
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.known:
                    key, size = storage.data_ptr(), storage.nbytes()
                    self.known.add(key)
                    self.live += size
                    self.most = max(self.most, self.live)
                    weakref.finalize(tensor, self._free, size, key)
        return result


@pytest.mark.parametrize("depth", [2, 5])
def test_gradient_memory_does_not_grow_with_depth(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the gradients of one group are alive at a time, however many layers there are."""
    monkeypatch.setattr(tiny, "_DECODER", {**tiny._DECODER, "num_hidden_layers": depth})
    base = tiny.model("llama")
    base.requires_grad_(False)
    # Shapes that no activation of 3 x 7 tokens has.
    wanted = {
        path: LinearGradient(m, shapes_of(base)[path]) for path, m in tiny.linears(base).items() if "mlp." in path
    }
    one = 24 * 20 * 8
    for budget, layers in ((1, 1), (2 * one, 2), (3 * one, 3)):
        data = Calibration(base, batches(), loss=exact_loss(batches()), gradient_bytes=budget)
        with LiveBytes({(24, 20), (20, 24)}, base) as memory, data.at_rest():
            for _, gradient in data.weight_gradients(wanted):
                assert gradient.norm() > 0
                del gradient
        assert memory.most == layers * one
        assert data.passes == -(-3 * depth // layers)


def test_the_counter_of_live_bytes_sees_a_gradient_that_is_kept() -> None:
    base = tiny.model("llama")
    base.requires_grad_(False)
    wanted = {
        path: LinearGradient(m, shapes_of(base)[path]) for path, m in tiny.linears(base).items() if "mlp." in path
    }
    data = Calibration(base, batches(), loss=exact_loss(batches()), gradient_bytes=1)
    with LiveBytes({(24, 20), (20, 24)}, base) as memory, data.at_rest():
        kept = [gradient for _, gradient in data.weight_gradients(wanted)]
    assert memory.most == len(kept) * 24 * 20 * 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_stays_on_and_changes_nothing(reentrant: bool) -> None:
    expected = measured(tiny.model("llama"), batches())
    base = tiny.model("llama")
    enable = "activation_checkpointing_enable"
    getattr(base, enable if hasattr(base, enable) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    base.model.layers[1].mlp.register_forward_pre_hook(count)
    found = measured(base, batches())
    assert runs == 2 * len(batches())
    for path, gradient in expected.items():
        assert_relative(found[path], gradient, path)
    assert "forward" not in vars(base.model.layers[1])
    assert base.config.use_cache


def test_dropout_is_off() -> None:
    loud = tiny.model("bert")
    for module in loud.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    loud.train()
    given = labelled()
    found, expected = measured(loud, given), measured(tiny.model("bert"), given)
    assert loud.training
    for path, gradient in expected.items():
        assert_same(found[path], gradient, path)


def test_a_bfloat16_base_is_summed_in_float32() -> None:
    """Sixty equal batches: a sum kept in bfloat16 would stop growing long before."""
    base = tiny.model("llama", torch.bfloat16)
    base.requires_grad_(False)
    one = batch_of(tiny.ids(2, 6))
    wanted = {path: LinearGradient(tiny.linears(base)[path], shape) for path, shape in shapes_of(base).items()}
    found = []
    for times in (1, 60):
        data = Calibration(base, [one] * times, loss=lambda model, batch: model(**batch).loss)
        with data.at_rest():
            found.append(dict(data.weight_gradients(wanted)))
    for path, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert_close(found[1][path], 60 * gradient.double(), torch.float32, 4, 60, what=path)
