"""Rows of a pack train as alone: logits and gradients in float64, family by family; what cannot is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import tiny
from leantune.core.errors import ModelError
from leantune.data import Collator, PackCollator
from leantune.testing.closeness import assert_close
from leantune.testing.model import exact_norms, scatter_weights
from leantune.train.isolation import packed_inputs, packing_form
from leantune.train.loss import Selection, count_targets, dense_losses, per_row, selected_losses

WINDOW = 3
MORE: dict[str, Callable[[], Any]] = {
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**tiny._DECODER, head_dim=6, sliding_window=WINDOW)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=24,
            word_embed_proj_dim=24,
            ffn_dim=20,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=32,
            dropout=0.0,
            tie_word_embeddings=False,
            **tiny._TOKENS,
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=32,
            **tiny._TOKENS,
        )
    ),
}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "mistral", "gpt2", *MORE]
# opt makes its mask without looking at positions.
FORMS = {"opt": "mask"}
CAPACITY = 12
# Roundings that follow each other: two layers of attention and feed-forward, norms, head, loss.
DEPTH = 200


def make(family: str, attention: str = "sdpa") -> Any:
    if family in MORE:
        model = MORE[family]()
        scatter_weights(model, 0, torch.float64)
        exact_norms(model)
    else:
        model = tiny.model(family)
    model.set_attn_implementation(attention)
    return model.eval()


def rows() -> list[dict[str, Any]]:
    """Longer and shorter than the window, one of a single token; every token but the first carries loss."""
    made = []
    for number, length in enumerate((5, 6, 1, 7, 4)):
        ids = tiny.ids(1, length, seed=number)[0].tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return made


def packs() -> list[dict[str, Any]]:
    made = rows()
    # The second pack is shorter: it is padded.
    return [{"documents": [made[0], made[1], made[2]]}, {"documents": [made[3], made[4]]}]


def gradients(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def packed_run(model: Any, form: dict[str, Any], compute: Any = selected_losses) -> tuple[Tensor, Tensor]:
    """Sums of the losses of each row, and the gradient of the mean per token."""
    batch = PackCollator(0, **form)(packs())
    inputs, documents = packed_inputs(batch)
    selection = Selection.of(inputs.pop("labels"), documents)
    losses = compute(model, inputs, selection)
    sums, counts = per_row(losses, selection)
    assert counts.tolist() == [4, 5, 0, 6, 3]
    assert int(count_targets(batch["labels"])) == 18
    return sums.detach(), gradients(model, losses.sum() / 18)


def single_run(model: Any) -> tuple[Tensor, Tensor]:
    """The same from each row alone: the truth."""
    sums, total = [], torch.zeros((), dtype=torch.float64)
    for row in rows():
        batch = Collator(0)([row])
        losses = dense_losses(model, batch, Selection.of(batch.pop("labels")))
        sums.append(losses.sum().detach())
        total = total + losses.sum()
    return torch.stack(sums), gradients(model, total / 18)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_pack_train_as_alone(family: str) -> None:
    model = make(family)
    form = packing_form(model, CAPACITY)
    assert form["form"] == FORMS.get(family, "positions")
    sums, gradient = single_run(model)
    open_sums, open_gradient = packed_run(model, form, compute=_one_long_row)
    packed_sums, packed_gradient = packed_run(model, form)
    assert_close(packed_sums, sums, torch.float64, k=8, depth=DEPTH, wrong=[open_sums], what="losses")
    assert_close(packed_gradient, gradient, torch.float64, k=8, depth=DEPTH, wrong=[open_gradient], what="gradient")


def _one_long_row(model: Any, inputs: dict[str, Any], selection: Selection) -> Tensor:
    """The planted fault: rows of a pack see each other."""
    return selected_losses(model, {"input_ids": inputs["input_ids"], "use_cache": False}, selection)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "opt"])
def test_eager_attention_too(family: str) -> None:
    model = make(family, "eager")
    form = packing_form(model, CAPACITY)
    sums, gradient = single_run(model)
    for compute in (selected_losses, dense_losses):
        packed_sums, packed_gradient = packed_run(model, form, compute)
        assert_close(packed_sums, sums, torch.float64, k=8, depth=DEPTH, what="losses")
        assert_close(packed_gradient, gradient, torch.float64, k=8, depth=DEPTH, what="gradient")


def test_the_stock_loss_of_a_packed_batch_is_the_same() -> None:
    model = make("llama")
    batch = PackCollator(0, **packing_form(model, CAPACITY))(packs())
    inputs, documents = packed_inputs(batch)
    stock = model(**inputs).loss
    selection = Selection.of(inputs.pop("labels"), documents)
    # The stock loss goes through float32, whatever the model's type.
    torch.testing.assert_close(selected_losses(model, inputs, selection).mean().float(), stock, rtol=1e-6, atol=0)


# What FlashAttention would be given: the borders, read by an attention of the test's own that has its name's word.


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """Row by row between the borders, without a mask; ``(1, heads, length, width)``."""
    borders = options["cu_seq_lens_q"].tolist()
    assert attention_mask is None
    assert options["max_length_q"] == max(b - a for a, b in itertools.pairwise(borders))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for first, last in itertools.pairwise(borders):
        part = [each[:, :, first:last] for each in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, scale=scaling)
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def test_borders_for_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = make("llama")
    sums, gradient = single_run(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_by_hand", varlen_attention)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_by_hand")

    def alone(model: Any, row: list[int], device: Any) -> Tensor:
        batch = PackCollator(0, form="varlen")([{"documents": [{"input_ids": row, "labels": row}]}])
        inputs, _ = packed_inputs(batch)
        inputs.pop("labels")
        with torch.no_grad():
            return model(**inputs).logits[0].float()

    monkeypatch.setattr("leantune.train.isolation._alone", alone)
    form = packing_form(model, CAPACITY)
    assert form["form"] == "varlen"
    packed_sums, packed_gradient = packed_run(model, form)
    assert_close(packed_sums, sums, torch.float64, k=8, depth=DEPTH, what="losses")
    assert_close(packed_gradient, gradient, torch.float64, k=8, depth=DEPTH, what="gradient")


# What is refused


def test_the_probe_sees_a_row_that_sees_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    # Positions alone no longer do; the mask does.
    assert packing_form(model, CAPACITY)["form"] == "mask"
    sums, _ = single_run(model)
    packed_sums, _ = packed_run(model, {"form": "mask"})
    assert_close(packed_sums, sums, torch.float64, k=8, depth=DEPTH, what="losses")
    windowed = make("mistral-window")
    with pytest.raises(ModelError, match=r"sees another one, and a mask .* sliding window of 3 tokens"):
        packing_form(windowed, CAPACITY)


def test_a_model_with_a_recurrent_state_is_refused() -> None:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        lru_width=24,
        block_types=["recurrent", "attention"],
        **tiny._TOKENS,
    )
    with pytest.raises(ModelError, match=r"packing with RecurrentGemmaForCausalLM: .*drop packing"):
        packing_form(RecurrentGemmaForCausalLM(config).eval(), CAPACITY)


def test_a_model_without_positions_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=24, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="its forward takes no position_ids"):
        packing_form(model, CAPACITY)


def test_a_model_that_ignores_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    # Rows apart, but counted on from the row before: the mask is right and the positions are wrong.
    table = model.transformer.wpe
    monkeypatch.setattr(table, "forward", lambda ids: table.weight[torch.arange(ids.shape[-1])][None])
    with pytest.raises(ModelError, match="gets other logits than alone"):
        packing_form(model, CAPACITY)


def test_the_probe_leaves_the_model_and_the_random_state_alone() -> None:
    model = make("gpt2").train()
    model.requires_grad_(False)
    state = torch.get_rng_state()
    packing_form(model, CAPACITY)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.get_input_embeddings()._forward_hooks
    assert all(each.grad is None for each in model.parameters())
