"""GGUF: our header reader, our dequantiser, and transformers' loader, on a tiny file written here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf import quants as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from leantune.core.errors import ModelError
from leantune.models import content_hash, dequantise, gguf, load_base, load_tokenizer
from leantune.models.quiet import quiet

Q4, Q8, F32 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to a query or key weight."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: Any, tokens: list[str], *, quantised: bool = True, pre: str = "smollm") -> Path:
    """A Llama as llama.cpp would write it: Q8_0 embeddings, Q4_1 matrices, float32 norms."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    first, second = tokens[-2:]
    writer.add_token_list([*tokens, first + second])
    writer.add_token_types([3 if text.startswith("<") and len(text) > 1 else 1 for text in [*tokens, first + second]])
    writer.add_token_merges([f"{first} {second}"])
    for name, index in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 3)):
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        for mine, theirs in dequantise._INNER.items():
            name = name.replace(f"layers.{theirs}", mine).replace(f".{theirs}.", f".{mine}.")
        name = name.replace("model.embed_tokens", "token_embd").replace("model.layers.", "blk.")
        name = name.replace("model.norm", "output_norm")
        if "attn_q" in name or "attn_k" in name:
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            values = interleave(values, heads)
        kind = F32 if values.ndim == 1 or not quantised else Q8 if "embd" in name else Q4
        data = values if kind == F32 else reference.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path, build: dict[str, Callable[..., Any]]) -> Path:
    """A quantised tiny Llama."""
    return write_gguf(tmp_path / "tiny.gguf", resized(build["llama"]()), tokens_of(build))


def tokens_of(build: dict[str, Callable[..., Any]]) -> list[str]:
    tokenizer = build["tokenizer"]()
    return [tokenizer.convert_ids_to_tokens(index) for index in range(len(tokenizer))]


def resized(model: Any) -> Any:
    model.resize_token_embeddings(261, mean_resizing=False)  # one merged token more
    return model


def test_the_header_agrees_with_the_gguf_package(tiny: Path) -> None:
    ours, theirs = gguf.read(tiny), GGUFReader(tiny)
    assert set(ours.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, value in ours.metadata.items():
        field = theirs.get_field(key)
        assert field is not None
        assert value == field.contents(), key
    assert len(ours.tensors) == len(theirs.tensors)
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.type, mine.start, mine.size) == (
            other.name,
            other.tensor_type.name,
            other.data_offset,
            other.n_bytes,
        )
    assert ours.get("context_length") == 128
    assert ours.get("no_such_key", 7) == 7
    assert gguf.describe_quantisation(ours) == "dequantised from a GGUF file (14 Q4_1, 5 F32, 1 Q8_0)"


def test_the_type_table_agrees_with_the_gguf_package() -> None:
    from gguf import GGML_QUANT_SIZES

    for number, (name, values, size) in gguf.TENSOR_TYPES.items():
        assert (name, (values, size)) == (
            GGMLQuantizationType(number).name,
            GGML_QUANT_SIZES[GGMLQuantizationType(number)],
        )


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from([(Q4, "Q4_1"), (Q8, "Q8_0")]), st.integers(1, 3), st.integers(1, 3))
def test_every_bit_pattern_dequantises_as_the_gguf_package_does(
    data: st.DataObject, kind: tuple[GGMLQuantizationType, str], rows: int, blocks: int
) -> None:
    size = {"Q4_1": 20, "Q8_0": 34}[kind[1]] * rows * blocks
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinities
        expected = reference.dequantize(raw.reshape(rows, -1), kind[0])
    found = dequantise.dequantise(torch.from_numpy(raw.copy()), kind[1], (rows, 32 * blocks))
    assert torch.equal(found.nan_to_num(nan=3e38), torch.from_numpy(expected).nan_to_num(nan=3e38))


def test_another_type_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="Q5_K"):
        dequantise.dequantise(torch.zeros(176, dtype=torch.uint8), "Q5_K", (1, 256))


def test_our_folder_is_what_transformers_reads(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    dequantise.write_folder(gguf.read(tiny), folder)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    with quiet(stderr=True):
        theirs = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32)
        their_tokenizer = AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    prompt = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        assert torch.allclose(ours(prompt).logits, theirs(prompt).logits, atol=1e-6)
    our_tokenizer = AutoTokenizer.from_pretrained(folder)
    gguf.mend_tokenizer(their_tokenizer, gguf.read(tiny))
    for text in ("Facts: name[Aromi]", " 3   50€ <s>cafés</s>", "\n\n12 ÿþ"):
        assert our_tokenizer(text).input_ids == their_tokenizer(text).input_ids
        assert our_tokenizer.decode(our_tokenizer(text).input_ids) == text
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length"):
        assert getattr(our_tokenizer, name) == getattr(their_tokenizer, name), name


def test_load_base_reads_a_gguf_file_and_saves_it_as_an_ordinary_model(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    base = load_base(tiny, progress=said.append)
    assert base.source == "gguf"
    assert base.note == "dequantised from a GGUF file (14 Q4_1, 5 F32, 1 Q8_0)"
    assert len(said) == 1
    assert base.tokenizer.model_max_length == 128
    assert base.tokenizer.chat_template == TEMPLATE
    assert not hasattr(base.model.config, "quantization_config")
    base.model.save_pretrained(tmp_path / "plain")
    base.tokenizer.save_pretrained(tmp_path / "plain")
    plain = load_base(tmp_path / "plain")
    assert plain.content_hash == base.content_hash
    assert load_tokenizer(tiny)("1 2").input_ids == plain.tokenizer("1 2").input_ids


def test_a_float_gguf_has_the_hash_of_the_model_it_was_made_from(
    tmp_path: Path, build: dict[str, Callable[..., Any]]
) -> None:
    model = resized(build["llama"]())
    path = write_gguf(tmp_path / "float.gguf", model, tokens_of(build), quantised=False)
    base = load_base(path, progress=lambda text: None)
    assert base.content_hash == content_hash(model)
    assert base.note == "read from a GGUF file that is not quantised"


def test_a_gguf_file_takes_a_classification_head(tiny: Path) -> None:
    base = load_base(tiny, task="classification", num_labels=3, progress=lambda text: None)
    assert base.new_parameters == ("score.weight",)
    assert base.model.score.weight.shape == (3, 64)


@pytest.mark.parametrize("keep", [0, 3, 20, 400, -1])
def test_a_cut_file_is_refused(tiny: Path, keep: int) -> None:
    tiny.write_bytes(tiny.read_bytes()[:keep])
    with pytest.raises(ModelError, match="a complete GGUF file"):
        gguf.read(tiny)


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "zip.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match="the letters GGUF"):
        gguf.read(path)
    path.write_bytes(b"GGUF" + (99).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ModelError, match="version 99"):
        gguf.read(path)
    with pytest.raises(ModelError, match="a complete GGUF file"):
        load_base(path, progress=lambda text: None)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_readable_error(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "any.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + tail)
    with contextlib.suppress(ModelError):  # any other error fails
        gguf.read(path)
