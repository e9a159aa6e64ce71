"""The embedded model's GGUF file as a transformers folder, in seconds.

Transformers reads the same file to the same numbers (a test compares every tensor), but walks its vocabulary four
times and needs most of a minute; this file knows one architecture (Llama) and the types of one file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leantune.models.gguf import GGUFFile, TensorInfo, smollm_pre_tokenizer

_BLOCK = 32  # values that share one scale, in both types

_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def dequantise(raw: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 values of one tensor.

    Args:
        raw: its bytes, uint8, one dimension.
        kind: ``F32``; ``Q8_0`` (a float16 scale, then 32 signed bytes: ``d q``); or ``Q4_1`` (a float16 scale, a
            float16 minimum, then 32 nibbles, the low ones first: ``d q + m``).
        shape: of the result.

    Raises:
        ValueError: another type.
    """
    if kind == "F32":
        return raw.view(torch.float32).clone().reshape(shape)
    if kind == "Q8_0":
        blocks = raw.reshape(-1, 2 + _BLOCK)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        return (scale * blocks[:, 2:].contiguous().view(torch.int8).float()).reshape(shape)
    if kind == "Q4_1":
        blocks = raw.reshape(-1, 4 + _BLOCK // 2)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        minimum = blocks[:, 2:4].contiguous().view(torch.float16).float()
        nibbles = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1).float()
        return (scale * nibbles + minimum).reshape(shape)
    raise ValueError(f"GGUF type {kind} is not read here")


def _split_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of a query or key weight: transformers rotates halves, llama.cpp pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _hf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_INNER[part]}.{kind}"


def weights(file: GGUFFile) -> dict[str, Tensor]:
    """Every tensor of a Llama GGUF file in float32, under transformers' names."""
    heads, key_heads = int(file.get("attention.head_count")), int(file.get("attention.head_count_kv"))
    with file.path.open("rb") as stream:

        def load(tensor: TensorInfo) -> Tensor:
            stream.seek(tensor.start)
            raw = torch.frombuffer(bytearray(stream.read(tensor.size)), dtype=torch.uint8)
            values = dequantise(raw, tensor.type, tensor.shape)
            if ".attn_q." in tensor.name:
                return _split_halves(values, heads)
            return _split_halves(values, key_heads) if ".attn_k." in tensor.name else values

        return {_hf_name(tensor.name): load(tensor) for tensor in file.tensors}


def configuration(file: GGUFFile) -> Any:
    """The ``LlamaConfig`` of a Llama GGUF file."""
    from transformers import LlamaConfig

    token = {name: file.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    config = LlamaConfig(
        vocab_size=file.get("vocab_size"),
        hidden_size=file.get("embedding_length"),
        intermediate_size=file.get("feed_forward_length"),
        num_hidden_layers=file.get("block_count"),
        num_attention_heads=file.get("attention.head_count"),
        num_key_value_heads=file.get("attention.head_count_kv"),
        max_position_embeddings=file.get("context_length"),
        # The file keeps float32; 7 digits bring back the 1e-05 it was made from.
        rms_norm_eps=float(f"{file.get('attention.layer_norm_rms_epsilon'):.7g}"),
        rope_parameters={"rope_type": "default", "rope_theta": file.get("rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in file.tensors),
        bos_token_id=token["bos"],
        eos_token_id=token["eos"],
        pad_token_id=token["padding"],
        dtype=torch.float32,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def tokenizer(file: GGUFFile) -> Any:
    """The byte-level BPE tokenizer of a SmolLM GGUF file, with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    values = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    tokens: list[str] = values["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in values["merges"]]
    backend = Tokenizer(BPE(vocab={text: index for index, text in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = smollm_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    control = 3  # the format's number for a token that never stands for text
    kinds = zip(tokens, values["token_type"], strict=True)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, k in kinds if k == control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[values["bos_token_id"]],
        eos_token=tokens[values["eos_token_id"]],
        pad_token=tokens[values["padding_token_id"]],
        unk_token=tokens[values["unknown_token_id"]],
        chat_template=file.metadata["tokenizer.chat_template"],
        model_max_length=file.get("context_length"),
        clean_up_tokenization_spaces=False,
    )


def write_folder(file: GGUFFile, folder: Path) -> None:
    """Write config, float32 safetensors, generation config, tokenizer and chat template into ``folder``."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config = configuration(file)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer(file).save_pretrained(folder)
    save_file(weights(file), folder / "model.safetensors", metadata={"format": "pt"})
