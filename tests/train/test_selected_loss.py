"""The loss at selected positions is the loss: against the formula, written out in loops, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from leantune.core.errors import ModelError
from leantune.train.loss import (
    Selection,
    count_targets,
    dense_losses,
    output_embedding,
    per_row,
    selected_logits,
    selected_losses,
    token_losses,
)

ROWS, LENGTH, VOCABULARY = 3, 7, 32


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Right-padded rows; loss in the middle of one, at the end of another, at a first token (which cannot count)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 5:] = 0
    labels = ids.clone()
    labels[0, :3] = -100
    labels[0, 5] = -100
    labels[1, :2] = -100
    labels[1, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def formula(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of the losses of each row, one position at a time."""
    sums = [logits.new_zeros(()) for _ in range(labels.shape[0])]
    counts = torch.zeros(labels.shape[0], dtype=torch.long)
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            token = int(labels[row, position + 1])
            if token != -100:
                score = logits[row, position]
                sums[row] = sums[row] + score.exp().sum().log() - score[token]
                counts[row] += 1
    return torch.stack(sums), counts


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert actual.keys() == wanted.keys()
    assert any(bool(each.abs().max() > 1e-6) for each in wanted.values()), "nothing to compare with"
    for name, each in wanted.items():
        torch.testing.assert_close(actual[name], each, rtol=tolerance, atol=tolerance)


def with_lora(model: nn.Module, **options: Any) -> PeftModel:
    # GPT-2's Conv1D keeps its weight transposed.
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=transposed,
        **options,
    )
    return get_peft_model(model, config).double()  # type: ignore[arg-type]


def test_selection_of_a_batch_worked_out_by_hand() -> None:
    labels = torch.tensor([[9, 8, -100, 7], [-100, -100, 6, -100], [-100, -100, -100, -100]])
    selection = Selection.of(labels)
    # Row 0: token 8 is predicted at position 0, token 7 at position 2; the 9 by nothing. Row 1: 6 at position 1.
    assert selection.index.tolist() == [0, 2, 5]
    assert selection.target.tolist() == [8, 7, 6]
    assert selection.row.tolist() == [0, 0, 1]
    assert int(count_targets(labels)) == 3


@pytest.mark.parametrize("adapter", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_loss_and_gradients_follow_the_formula(
    causal_model: Any, batch: dict[str, Tensor], adapter: bool, checkpointing: bool
) -> None:
    labels = batch.pop("labels")
    model = with_lora(causal_model) if adapter else causal_model
    model.train()
    dense_sums, dense_counts = formula(model(**batch).logits, labels)
    wanted = gradients(model, dense_sums.sum() / dense_counts.sum())
    if checkpointing:
        base = model.get_base_model() if adapter else model
        base.activation_checkpointing_enable()
    selection = Selection.of(labels)
    sums, counts = per_row(selected_losses(model, batch, selection), selection)
    assert counts.tolist() == dense_counts.tolist()
    torch.testing.assert_close(sums, dense_sums, rtol=1e-12, atol=1e-12)
    assert_same(gradients(model, sums.sum() / counts.sum()), wanted)


def test_loss_agrees_with_the_stock_loss(causal_model: Any, batch: dict[str, Tensor]) -> None:
    stock = causal_model(**batch).loss
    labels = batch.pop("labels")
    selection = Selection.of(labels)
    for compute in (selected_losses, dense_losses):
        # The stock loss goes through float32, whatever the model's type.
        torch.testing.assert_close(compute(causal_model, batch, selection).mean().float(), stock, rtol=1e-6, atol=0)


@torch.no_grad()
def test_formula_tells_a_wrong_shift_and_an_inverted_mask(causal_model: Any, batch: dict[str, Tensor]) -> None:
    labels = batch.pop("labels")
    sums, counts = formula(causal_model(**batch).logits, labels)
    right = sums.sum() / counts.sum()
    unshifted = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], dim=1)
    inverted = torch.where(labels == -100, batch["input_ids"], torch.full_like(labels, -100))
    for wrong in (unshifted, inverted):
        selection = Selection.of(wrong)
        assert abs(float(selected_losses(causal_model, batch, selection).mean() - right)) > 1e-3


def test_softcap_is_applied_to_the_selected_logits(batch: dict[str, Tensor], causal_model: Any) -> None:
    labels = batch.pop("labels")
    selection = Selection.of(labels)
    dense = causal_model(**batch).logits.flatten(0, 1)[selection.index]
    with selected_logits(causal_model, selection):
        selected = causal_model(**batch).logits
    assert selected.shape == (1, len(selection.index), VOCABULARY)
    torch.testing.assert_close(selected[0], dense, rtol=1e-12, atol=1e-12)
    cap = getattr(causal_model.config, "final_logit_softcapping", None)
    assert cap is None or float(selected.detach().abs().max()) < cap


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_an_adapted_or_saved_head_is_found(option: str, batch: dict[str, Tensor]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    ).double()
    targets = {"target_modules": ["q_proj"], option: ["lm_head"]}
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **targets)).double()
    labels = batch.pop("labels")
    selection = Selection.of(labels)
    sums, counts = formula(wrapped(**batch).logits, labels)
    losses = selected_losses(wrapped, batch, selection)
    torch.testing.assert_close(losses.sum(), sums.sum(), rtol=1e-12, atol=1e-12)
    grads = gradients(wrapped, losses.sum() / counts.sum())
    assert any("lm_head" in name for name in grads)


def test_hook_is_gone_afterwards_and_after_an_error(causal_model: Any, batch: dict[str, Tensor]) -> None:
    labels = batch.pop("labels")
    head = output_embedding(causal_model)
    selected_losses(causal_model, batch, Selection.of(labels))
    assert not head._forward_pre_hooks
    with pytest.raises(RuntimeError, match="planted"), selected_logits(causal_model, Selection.of(labels)):
        raise RuntimeError("planted")
    assert not head._forward_pre_hooks
    assert causal_model(**batch).logits.shape == (ROWS, LENGTH, VOCABULARY)


def test_a_batch_without_loss_gives_zero_and_zero_gradients(causal_model: Any, batch: dict[str, Tensor]) -> None:
    labels = torch.full_like(batch.pop("labels"), -100)
    losses = selected_losses(causal_model, batch, Selection.of(labels))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all(each.grad is None or not each.grad.any() for each in causal_model.parameters())


class _TwoHeads(nn.Module):
    """A model that this cannot work for: its head runs twice, or not over all positions, or is not named."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.body = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.fault == "unnamed" else self.head

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.body(input_ids)
        if self.fault == "last":
            hidden = hidden[:, -1:]
        if self.fault == "twice":
            self.head(hidden)
        return type("Output", (), {"logits": hidden if self.fault == "never" else self.head(hidden)})()


@pytest.mark.parametrize("fault", ["unnamed", "last", "twice", "never"])
def test_a_model_it_cannot_work_for_is_refused(fault: str, batch: dict[str, Tensor]) -> None:
    selection = Selection.of(batch["labels"])
    with pytest.raises(ModelError, match="logits: all"):
        selected_losses(_TwoHeads(fault), {"input_ids": batch["input_ids"]}, selection)


@pytest.fixture
def half_precision_logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, VOCABULARY, generator=generator) * 8, torch.randint(
        0, VOCABULARY, (64,), generator=generator
    )


def test_cross_entropy_is_taken_in_float32(half_precision_logits: tuple[Tensor, Tensor]) -> None:
    logits, target = half_precision_logits
    half = logits.bfloat16()
    losses = token_losses(half, target)
    assert losses.dtype == torch.float32
    exact = nn.functional.cross_entropy(half.double(), target, reduction="none")
    # A softmax in bfloat16 would be off by 2^-8 of values around 20.
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    rough = nn.functional.cross_entropy(half, target, reduction="none").double()
    assert float((rough - exact).abs().max()) > 1e-3
