"""SpFT beyond the contract: which entries, what they cost, files that decide, what a merge writes, hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import leantune
import tiny
from hosts.packed_host import pack_linears
from leantune import SpFTConfig
from leantune.core.errors import AdapterError, ConfigError
from leantune.methods import _entries as entries
from leantune.methods import get
from leantune.methods.spft import SpFTLinear
from leantune.testing import Subject
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.subject import start

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _layers(model: Any) -> dict[str, SpFTLinear]:
    return {name: each for name, each in model.get_base_model().named_modules() if isinstance(each, SpFTLinear)}


def _chosen(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    return {name: layer._own(adapter).index for name, layer in _layers(model).items()}


def test_all_linear_layers_train_by_default_and_the_head_does_not() -> None:
    model = get_peft_model(tiny.model("llama"), SpFTConfig(task_type="CAUSAL_LM"))
    assert {name.rpartition(".")[2] for name in _layers(model)} == ALL
    for layer in _layers(model).values():
        wanted = max(1, round(0.01 * layer.out_features * layer.in_features))
        assert layer._own("default").weight.numel() == wanted


@pytest.mark.parametrize(
    ("options", "wanted"), [({"ratio": 0.1}, 48), ({"match_lora_rank": 2}, 88), ({"ratio": 1.0}, 480)]
)
def test_budget(options: dict[str, Any], wanted: int) -> None:
    assert SpFTConfig(**options).count(20, 24) == wanted


def test_layers_of_one_shape_choose_different_entries_and_a_seed_repeats_them() -> None:
    def chosen(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        return _chosen(get_peft_model(tiny.model("llama"), SpFTConfig(ratio=0.1, seed=seed)))

    first, again, other = chosen(0), chosen(0), chosen(1)
    q = [name for name in first if name.endswith("q_proj")]
    assert_differs(first[q[0]], first[q[1]], "entries of two blocks")
    for name, index in first.items():
        assert_same(again[name], index, name)
        assert_differs(other[name], index, f"{name} under another seed")


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 60), data=st.data())
def test_random_entries_are_distinct_ascending_and_as_many_as_asked(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    found = entries.random_entries(total, count, data.draw(st.integers(0, 9)))
    assert found.numel() == count
    assert bool((found[1:] > found[:-1]).all())
    assert not count or (int(found[0]) >= 0 and int(found[-1]) < total)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_set_is_equally_likely(count: int) -> None:
    """3,000 draws from 5: each position comes equally often, within 5 standard deviations of a binomial."""
    draws, total = 3000, 5
    seen = torch.zeros(total)
    for seed in range(draws):
        seen[entries.random_entries(total, count, seed)] += 1
    share = count / total
    assert float((seen - draws * share).abs().max()) < 5 * (draws * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_by_weight_takes_the_end_of_the_ranking(order: str, family: str) -> None:
    model = get_peft_model(tiny.model(family), SpFTConfig(ratio=0.1, selection="weight", order=order))
    for name, layer in _layers(model).items():
        size = layer.dense_weight().detach().abs().flatten()
        chosen = torch.zeros(size.numel(), dtype=torch.bool)
        chosen[layer._own("default").index.long()] = True
        inside, outside = size[chosen], size[~chosen]
        assert (inside.min() >= outside.max()) if order == "largest" else (inside.max() <= outside.min()), name


def test_gradients_and_optimizer_state_exist_for_the_chosen_entries_alone() -> None:
    model = get_peft_model(tiny.model("llama", torch.float32), SpFTConfig(ratio=0.05)).train()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    optimizer.step()
    total = sum(layer.out_features * layer.in_features for layer in _layers(model).values())
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    assert held == 2 * sum(each.numel() for each in trained.values())
    assert held < 0.11 * total
    assert all(each.grad is None for name, each in model.named_parameters() if name not in trained)


def test_a_merge_writes_the_chosen_entries_alone_and_undoes_them() -> None:
    model = get_peft_model(tiny.model("gpt2", torch.bfloat16), SpFTConfig(ratio=0.1))
    start(model)
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in _layers(model).items()}
    model.merge_adapter()
    for name, layer in _layers(model).items():
        new, old = layer.dense_weight().flatten(), before[name].t().flatten()
        changed = (new != old).nonzero()[:, 0]
        chosen = layer._own("default").index.long()
        assert set(changed.tolist()) <= set(chosen.tolist())
        assert changed.numel() > chosen.numel() / 2
        kept = getattr(layer, layer._overwritten[0][0])
        assert kept.numel() == chosen.numel(), "more was kept than was overwritten"
    model.unmerge_adapter()
    for name, layer in _layers(model).items():
        assert_same(layer.base_layer.weight.detach(), before[name], name)


def test_one_training_step_is_that_of_a_masked_weight() -> None:
    """Adam on the values is Adam on W under a mask, as the paper has it (no weight decay)."""
    base, twin = nn.Sequential(nn.Linear(6, 5)).double(), nn.Sequential(nn.Linear(6, 5)).double()
    twin.load_state_dict(base.state_dict())
    model = get_peft_model(base, SpFTConfig(target_modules=["0"], ratio=0.3))
    layer = next(iter(_layers(model).values()))
    mask = torch.zeros(30, dtype=torch.bool)
    mask[layer._own("default").index.long()] = True
    ours = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.1)
    theirs = torch.optim.Adam([twin[0].weight], lr=0.1)
    for step in range(3):
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for module, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            if module is twin:
                twin[0].weight.grad.flatten()[~mask] = 0
            optimizer.step()
    merged = model.merge_and_unload()[0].weight.detach()
    assert_close(merged, twin[0].weight.detach(), torch.float64, 8, 16, what="weight after three steps")


def test_the_file_wins_over_what_the_config_would_choose(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model("llama", torch.float32), SpFTConfig(ratio=0.1, seed=0))
    start(model)
    expected = model(input_ids=tiny.ids()).logits.detach()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    assert '"seed": 0' in text
    text = text.replace('"seed": 0', '"seed": 5').replace('"ratio": 0.1', '"ratio": 0.2')
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    loaded = PeftModel.from_pretrained(tiny.model("llama", torch.float32), tmp_path)
    assert_same(loaded(input_ids=tiny.ids()).logits.detach(), expected, "logits")


def test_the_file_holds_four_bytes_a_position_and_four_a_value(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model("llama", torch.float32), SpFTConfig(ratio=0.1))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(each.dtype) for each in tensors.values()} == {"torch.float32", "torch.int32"}
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert sum(each.numel() * each.element_size() for each in tensors.values()) == 8 * trained


@pytest.mark.parametrize("fault", ["twice", "beyond", "negative", "unordered"])
def test_positions_that_cannot_be_are_refused(tmp_path: Path, fault: str) -> None:
    model = get_peft_model(tiny.model("llama", torch.float32), SpFTConfig(ratio=0.1))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("index"))
    index = tensors[name]
    index[-1] = {"twice": index[-2], "beyond": 10**6, "negative": index[-1], "unordered": index[0] + 1}[fault]
    index[0] = -1 if fault == "negative" else index[0]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"index.*(ascending|each once|to \d+)"):
        leantune.load(tiny.model("llama", torch.float32), tmp_path)


def test_its_lora_form_is_refused_with_the_rank_and_what_to_do(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model("llama", torch.float32), SpFTConfig(ratio=0.1, task_type="CAUSAL_LM"))
    with pytest.raises(
        AdapterError, match=r"single entries of a \(24, 24\) weight, a change of rank up to 24;.*leantune merge"
    ):
        leantune.convert_to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "a share in"),
        ({"ratio": 0.1, "match_lora_rank": 2}, "one way to set the budget"),
        ({"match_lora_rank": 0}, "a rank from 1"),
        ({"selection": "randm"}, "random"),
        ({"order": "biggest", "ratio": 2}, "a share in"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpFTConfig(**options)


@pytest.mark.parametrize("selection", ["random", "weight"])
def test_the_contract_holds_by_csr_products_and_by_chunks(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract's toy layers take one way; the other one agrees on a whole model."""
    from leantune.kernels import sparse_linear as kernel

    found = []
    for most in (0.0, 1.0):
        monkeypatch.setattr(kernel, "MOST_ENTRIES", most)
        model = Subject(get("spft"), {"selection": selection}).wrap().train()
        logits = model(input_ids=tiny.ids() % 32).logits
        logits.square().sum().backward()
        grads = torch.cat([each.grad.flatten() for each in model.parameters() if each.requires_grad])
        found.append((logits.detach(), grads))
    assert_close(found[0][0], found[1][0], torch.float64, 64, 8, what="logits")
    assert_close(found[0][1], found[1][1], torch.float64, 64, 16, what="gradients")


def test_over_a_packed_base_it_is_the_same_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bits a weight: forward and merge are those of the dequantised weight with the values added."""
    base = pack_linears(tiny.model("llama", torch.float32), monkeypatch)
    plain = tiny.quiet(base, "llama")
    model = get_peft_model(base, SpFTConfig(ratio=0.1, selection="weight"))
    assert_same(tiny.quiet(model, "llama"), plain, "logits of a fresh adapter")
    start(model)
    for layer in _layers(model).values():
        x = torch.randn(2, 3, layer.in_features)
        exact = x.double() @ (layer.dense_weight().double() + layer.get_delta_weight("default").double()).T
        wrong = (x.double() @ layer.dense_weight().double().T,)
        assert_close(layer(x), exact.detach(), torch.float32, 4, 8, wrong=wrong, what="output over a packed weight")
    model(input_ids=tiny.ids()).logits.square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in model.parameters() if each.requires_grad)
