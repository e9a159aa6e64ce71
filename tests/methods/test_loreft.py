"""LoReFT beyond the contract: which positions are edited, R orthonormal always, generation, what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

import leantune
import tiny
from leantune import LoReFTConfig
from leantune.adapters import merging
from leantune.core import prompt
from leantune.core.errors import AdapterError, ConfigError, MethodError, TargetError
from leantune.evaluate.likelihood import likelihood
from leantune.methods._hidden_edit import LoReFTBlock, LoReFTLinear, orthonormal_rows
from leantune.methods._position import Positions, parse
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import start
from leantune.train.loss import Selection, dense_losses, selected_losses

DECODERS = ("llama", "qwen3", "gemma", "gpt2", "neox", "opt", "phi3", "mistral")


def _model(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A started adapter on every block, in evaluation mode; the task is left open."""
    options = {"r": 2, "positions": "f2+l1", **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(tiny.model(family, dtype), LoReFTConfig(**options))
    start(model)
    return model.eval()


def _blocks(model: Any) -> dict[str, LoReFTLinear]:
    return {name: each for name, each in model.get_base_model().named_modules() if isinstance(each, LoReFTLinear)}


def _seen(model: Any, call: Callable[[], Any]) -> list[Tensor]:
    """For every block the positions, bool ``(rows, length)``, at which it gave out something else than it computed."""
    inside: dict[str, Tensor] = {}
    outside: dict[str, Tensor] = {}
    handles = []
    for name, layer in _blocks(model).items():

        def computed(module: Any, args: Any, output: Any, name: str = name) -> None:
            inside[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        def given(module: Any, args: Any, output: Any, name: str = name) -> None:
            outside[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        handles += [layer.base_layer.register_forward_hook(computed, prepend=True)]
        handles += [layer.register_forward_hook(given)]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return [(outside[name] != inside[name]).any(-1) for name in inside]


def _masks(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def _assert_edits(model: Any, expected: Tensor, call: Callable[[], Any]) -> None:
    found = _seen(model, call)
    assert len(found) == tiny.LAYERS
    for each in found:
        assert_same(each, expected, "edited positions")


def test_the_default_is_every_block_and_the_paper_s_share() -> None:
    model = get_peft_model(tiny.model("llama"), LoReFTConfig(task_type="CAUSAL_LM"))
    assert list(_blocks(model)) == [f"model.layers.{number}" for number in range(tiny.LAYERS)]
    assert all(isinstance(each, LoReFTBlock) for each in _blocks(model).values())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert trained == tiny.LAYERS * 8 * (2 * tiny.HIDDEN + 1)
    # LLaMA-7B: 32 blocks of width 4096; 0.03% in table 1 of S2FT.
    assert round(100 * 32 * 8 * (2 * 4096 + 1) / 6_738_415_616, 2) == 0.03


@pytest.mark.parametrize("family", [*DECODERS, "bert", "roberta", "vit", "t5"])
def test_blocks_of_every_family_are_found(family: str) -> None:
    base = tiny.model(family)
    plain = tiny.quiet(base, family)
    model = get_peft_model(base, LoReFTConfig(r=2))
    assert len(_blocks(model)) == tiny.LAYERS
    assert not any("decoder.block" in name for name in _blocks(model))
    assert_same(tiny.quiet(model, family), plain, "logits of a fresh adapter")
    start(model)
    assert_differs(tiny.quiet(model, family), plain, "logits of a trained one")
    assert_same(tiny.quiet(model.unload(), family), plain, "logits after unload")


def test_some_blocks_by_number() -> None:
    assert list(_blocks(_model(layers_to_transform=[1]))) == ["model.layers.1"]
    assert list(_blocks(_model(layers_to_transform=0))) == ["model.layers.0"]
    with pytest.raises(TargetError, match=r"layers_to_transform=\[7\]; numbers among the 2 blocks"):
        _model(layers_to_transform=[7])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("f2+l1", ("xx...x.", "xx....x")),
        ("f2", ("xx.....", "xx.....")),
        ("l2", ("....xx.", ".....xx")),
        ("f9+l9", ("xxxxxx.", "xxxxxxx")),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_positions_count_real_tokens_whichever_side_is_padded(
    positions: str, expected: tuple[str, str], left: bool
) -> None:
    model = _model(positions=positions)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 0 if left else -1] = 0
    if left:
        expected = ("." + expected[0][:-1], expected[1])
    _assert_edits(model, _masks(*expected), lambda: model(input_ids=tiny.ids(2), attention_mask=mask))


@pytest.mark.parametrize("way", ["labels", "told", "whole model"])
def test_labels_tell_where_the_prompt_ends(way: str) -> None:
    """Rows: a prompt of 5, one of 4 behind padding, loss from the first token on, no loss at all."""
    model = _model()
    ids, mask = tiny.ids(4), torch.ones(4, 7, dtype=torch.long)
    mask[1, 0] = 0
    labels = ids.clone()
    labels[0, :5], labels[1, :5], labels[3] = -100, -100, -100
    expected = _masks("xx..x..", ".xx.x..", "xx....x", "xx....x")

    def call() -> None:
        if way == "labels":
            model(input_ids=ids, attention_mask=mask, labels=labels)
            return
        with prompt.told_by(labels):
            (model if way == "told" else model.get_base_model())(input_ids=ids, attention_mask=mask)

    _assert_edits(model, expected, call)


def test_labels_of_a_head_are_no_prompt() -> None:
    model = _model("bert")
    labels = torch.tensor([0, 1, 2])
    _assert_edits(model, _masks(*["xx....x"] * 3), lambda: model(input_ids=tiny.ids(), labels=labels))


def test_a_prompt_shorter_than_first_and_last_is_edited_once() -> None:
    """A position that is both is edited once, as a last one; with weights of their own that can be told."""
    model = _model(positions="f3+l3", share_weights=False)
    positions = next(iter(_blocks(model).values())).positions
    assert isinstance(positions, Positions)
    with torch.no_grad():
        model(input_ids=tiny.ids(1, 4))
    first, last = positions.find(3, 3, torch.zeros(1, 4, 1))
    assert_same(first, _masks("x..."))
    assert_same(last, _masks(".xxx"))


def test_first_and_last_positions_can_have_weights_of_their_own() -> None:
    model = _model(share_weights=False)
    shared = _model()
    count = {each: sum(value.numel() for value in each.parameters() if value.requires_grad) for each in (model, shared)}
    assert count[model] == 2 * count[shared]
    layer = next(iter(_blocks(model).values()))
    h = torch.randn(3, 7, tiny.HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        model(input_ids=tiny.ids())
        got = layer.add_share("default", h, h)
        exact = h.clone()
        for where, edit in (([0, 1], layer.lore_ft_edit["default"]), ([6], layer.lore_ft_last["default"])):
            R, W, b = edit.rotation(), edit.source, edit.offset
            exact[:, where] = h[:, where] + (h[:, where] @ W.T + b - h[:, where] @ R.T) @ R
    assert_close(got, exact, torch.float64, 4, 8, wrong=(h,), what="h + R^T (W h + b - R h)")


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 5), width=st.integers(5, 9), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_r_has_orthonormal_rows_and_the_row_space_of_what_trains(
    rank: int, width: int, scale: float, seed: int
) -> None:
    free = scale * torch.randn(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    R = orthonormal_rows(free)
    torch.testing.assert_close(R @ R.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(free @ R.T @ R, free, rtol=1e-9, atol=1e-9 * scale)
    # Positive diagonal: no sign can jump under an optimizer, and orthonormal rows are their own R.
    assert bool(((free @ R.T).diagonal() > 0).all())
    torch.testing.assert_close(orthonormal_rows(R), R, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r_stays_orthonormal_through_training_and_comes_back_from_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(tiny.model("llama", dtype), LoReFTConfig(r=4, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("llama", dtype), tmp_path)
    for name, layer in _blocks(model).items():
        edit = layer.lore_ft_edit["default"]
        R = edit.rotation().detach()
        assert R.dtype == torch.float32
        assert float((R @ R.T - torch.eye(4)).abs().max()) < 1e-5
        assert_differs(edit.free.detach(), R, "the free matrix, which left the orthonormal ones")
        assert_same(_blocks(loaded)[name].lore_ft_edit["default"].rotation().detach(), R, "R from the file")


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_the_forward_with_the_prompt_s_positions_edited(family: str) -> None:
    """Token by token through the cache, rows padded on the left, against one forward that is told the prompts' ends."""
    model = _model(family)
    ids, mask = tiny.ids(2), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole, full = out.sequences, torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    labels = whole.clone()
    labels[:, :7] = -100
    places = (full.cumsum(1) - 1).clamp(min=0)
    extra = {} if family in ("opt",) else {"position_ids": places}
    with torch.no_grad(), prompt.told_by(labels):
        exact = model(input_ids=whole, attention_mask=full, **extra).logits[:, 6:-1]
        with model.disable_adapter():
            plain = model(input_ids=whole, attention_mask=full, **extra).logits[:, 6:-1]
    with torch.no_grad():
        everywhere = model(input_ids=whole, attention_mask=full, **extra).logits[:, 6:-1]
    got = torch.stack(out.logits, 1)
    wrong = (plain.double(), everywhere.double())
    assert_close(got, exact.double(), torch.float32, 16, 32, wrong=wrong, what="logits of generated tokens")


def test_decode_steps_are_left_alone() -> None:
    model = _model()
    first = model(input_ids=tiny.ids(), use_cache=True)
    found = _seen(model, lambda: model(input_ids=tiny.ids(3, 1), past_key_values=first.past_key_values))
    assert not torch.cat(found).any()


@pytest.mark.parametrize(("option", "value"), [("use_cache", False), ("prefill_chunk_size", 2)])
@pytest.mark.parametrize("whole", [False, True])
def test_generation_that_cannot_tell_prompt_from_answer_is_refused(option: str, value: Any, whole: bool) -> None:
    model = _model(task_type="CAUSAL_LM")
    options: dict[str, Any] = {"generation_config": GenerationConfig(**{option: value})} if whole else {option: value}
    with pytest.raises(MethodError, match="a cache that the whole prompt is read into at once"):
        model.generate(input_ids=tiny.ids(), max_new_tokens=2, **options)


def test_beams_and_rows_with_their_own_adapters() -> None:
    model = _model()
    model.add_adapter("other", LoReFTConfig(r=3, positions="l3"))
    start(model, "other", seed=9)
    model.eval()
    ids = tiny.ids(4)
    names = ["other", "default", "__base__", "other"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(input_ids=ids).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=ids).logits
    for row, name in enumerate(names):
        wrong = [value[row] for other, value in alone.items() if other != name]
        assert_close(mixed[row], alone[name][row], torch.float64, 64, 8, wrong=wrong, what=name)
    generate = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    both = model.generate(input_ids=ids, adapter_names=names, **generate)
    model.set_adapter("other")
    assert_same(both[0], model.generate(input_ids=ids, **generate)[0], "a row by beam search")


@pytest.mark.parametrize("earlier", [False, True])
def test_hidden_states_that_a_user_asks_for_are_the_edited_ones(earlier: bool) -> None:
    base = tiny.model("llama")
    if earlier:
        # transformers installs its hooks on the first such call.
        base(input_ids=tiny.ids(), output_hidden_states=True)
    model = get_peft_model(base, LoReFTConfig(r=2, positions="f1"))
    start(model)
    given: list[Tensor] = []
    first = next(iter(_blocks(model).values()))
    first.register_forward_hook(lambda module, args, output: given.append(output.detach()))
    with torch.no_grad():
        states = model(input_ids=tiny.ids(), output_hidden_states=True).hidden_states
    assert_same(states[1], given[0], "hidden states after the first block")


def test_a_block_answers_as_before_and_unloading_leaves_no_hook() -> None:
    base = tiny.model("gemma")
    model = _model("gemma")
    block = next(iter(_blocks(model).values()))
    assert block.self_attn is block.base_layer.self_attn
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        block.nothing_of_the_kind()
    bare = model.unload()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in bare.modules())
    assert {name for name, _ in bare.named_modules()} == {name for name, _ in base.named_modules()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_edits_by_its_own_weights_at_its_own_positions(copied: Callable[[Any], Any]) -> None:
    model = _model()
    twin = copied(model)
    expected = tiny.quiet(model, "llama")
    assert_same(tiny.quiet(twin, "llama"), expected, "logits of the copy")
    with torch.no_grad():
        for each in model.parameters():
            each.zero_() if each.requires_grad else None
    assert_same(tiny.quiet(twin, "llama"), expected, "logits of the copy after the original changed")
    # The copy's batch is its own.
    _assert_edits(twin, _masks("xx.x"), lambda: twin(input_ids=tiny.ids(1, 4)))


def test_the_likelihood_of_answers_edits_their_prompts_alone() -> None:
    model = _model(dtype=torch.float32)
    rows = [{"input_ids": tiny.ids(1).tolist()[0], "labels": [-100] * 4 + tiny.ids(1).tolist()[0][4:]}]
    from leantune.data.collator import Collator

    found = likelihood(model, rows, Collator(0))
    batch = Collator(0)(rows)
    with torch.no_grad():
        exact = model(**batch).loss
        labels = batch.pop("labels")
        logits = model(**batch).logits
    everywhere = torch.nn.functional.cross_entropy(logits[0, 3:6], labels[0, 4:7])
    assert abs(found.loss - exact.item()) < 1e-5
    assert abs(found.loss - everywhere.item()) > 1e-4


@pytest.mark.parametrize("compute", [selected_losses, dense_losses])
def test_the_losses_of_a_run_edit_the_prompts_alone(compute: Callable[..., Tensor]) -> None:
    model = _model(dtype=torch.float32)
    labels = tiny.ids(2)
    labels[:, :4] = -100
    exact = model(input_ids=tiny.ids(2), labels=labels).loss.item()
    losses = compute(model, {"input_ids": tiny.ids(2)}, Selection.of(labels))
    assert abs(losses.mean().item() - exact) < 1e-5
    with torch.no_grad():
        logits = model(input_ids=tiny.ids(2)).logits[:, 3:-1].flatten(0, 1)
    assert abs(torch.nn.functional.cross_entropy(logits, labels[:, 4:].flatten()).item() - exact) > 1e-4


def test_packed_rows_and_other_masks_are_refused() -> None:
    model = _model()
    ids = tiny.ids(1, 6)
    with pytest.raises(MethodError, match=r"packed into one.*drop packing"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(MethodError, match="4-D mask"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(MethodError, match="hidden states of shape"):
        next(iter(_blocks(model).values()))._edited("default", torch.zeros(2, 3, tiny.HIDDEN), None)
    # Positions as generation gives them to rows padded on the left are no packs.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    model(input_ids=ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3]]))


def test_a_decoder_beside_an_encoder_is_refused() -> None:
    with pytest.raises(TargetError, match="reads no prompt"):
        get_peft_model(tiny.model("t5"), LoReFTConfig(target_modules=["decoder.block.0"]))


def test_merging_and_the_lora_form_are_refused_in_one_sentence(tmp_path: Path) -> None:
    model = _model(dtype=torch.float32, task_type="CAUSAL_LM")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sentence = (
        "adapter 'default': an edit of hidden states at some positions is no change of weights; "
        "a change of weights; keep the adapter beside the base"
    )
    for call in (
        model.merge_adapter,
        model.merge_and_unload,
        next(iter(_blocks(model).values())).merge,
        lambda: merging.merge(model, tmp_path / "merged"),
        lambda: leantune.convert_to_lora(model, tmp_path / "lora"),
    ):
        with pytest.raises(AdapterError) as refused:
            call()
        assert sentence in str(refused.value)
    assert not list(tmp_path.iterdir())
    assert_same_state(dict(model.state_dict()), before, "state")


@pytest.mark.parametrize("text", ["", "7", "f7l7", "l7+f7", "f0", "f7+", "+l7", "all", "f-1"])
def test_positions_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="f7\\+l7"):
        LoReFTConfig(positions=text)


def test_the_authors_notation() -> None:
    assert [parse(text) for text in ("f7+l7", "f3", "l12", "f0+l2")] == [(7, 7), (3, 0), (0, 12), (0, 2)]
    with pytest.raises(ConfigError, match="a rank from 1"):
        LoReFTConfig(r=0)


def test_without_a_start_of_zero_it_is_the_authors() -> None:
    base = tiny.model("llama")
    plain = tiny.quiet(base, "llama")
    model = get_peft_model(base, LoReFTConfig(init_weights=False))
    assert_differs(tiny.quiet(model, "llama"), plain, "logits")
