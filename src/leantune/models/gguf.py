"""GGUF files: the header, read here, and what transformers leaves undone when it loads one.

The header reader exists because the ``gguf`` package needs seconds to walk a vocabulary that takes a tenth of one.
Weights of arbitrary GGUF files are dequantised by transformers; :mod:`leantune.models.embedded` does its own two types.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from leantune.core.errors import ModelError, describe

# ggml type -> (name, values of one block, bytes of one block); the format's own numbers.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
}
FLOAT_TYPES = {"F32", "F16", "BF16", "F64"}

# metadata value type -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


class TensorInfo(NamedTuple):
    """One tensor of the file: its shape in torch's order, its type's name, its bytes ``[start, start + size)``."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says of itself; no tensor is read.

    Attributes:
        path: the file.
        metadata: every key, vocabulary and merges included.
        tensors: name, shape, type and place of each tensor.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """``general.architecture``, e.g. ``llama``; the prefix of the model's own keys."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own keys: ``get("context_length")`` reads ``llama.context_length``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count_types(self) -> dict[str, int]:
        """Type -> number of tensors, most frequent first: ``{"Q4_1": 210, "F32": 61, "Q8_0": 1}``."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())


class _Cursor:
    """A place in the file that moves as values are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.place)
        self.place += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if self.place + length > len(self.data):
            raise ValueError("a string runs past the end of the file")
        text = self.data[self.place : self.place + length]
        self.place += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.unpack("IQ")
            if inner in _SCALARS:
                return list(self.unpack(f"{count}{_SCALARS[inner]}"))
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return self.unpack(_SCALARS[kind])[0]


def _parse(data: mmap.mmap, path: Path) -> GGUFFile:
    cursor = _Cursor(data)
    magic, version, tensor_count, key_count = cursor.unpack("4sIQQ")
    if magic != b"GGUF":
        raise ValueError("does not start with the letters GGUF")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version}, not one of {_VERSIONS}")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    entries = []
    for _ in range(tensor_count):
        name = cursor.string()
        (dimensions,) = cursor.unpack("I")
        shape = tuple(reversed(cursor.unpack(f"{dimensions}Q")))  # ggml stores the fastest-moving dimension first
        entries.append((name, shape, *cursor.unpack("IQ")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.place // alignment) * alignment
    tensors = tuple(_tensor_info(name, shape, kind, base + offset) for name, shape, kind, offset in entries)
    if any(tensor.start + tensor.size > len(data) for tensor in tensors):
        raise ValueError("a tensor runs past the end of the file: it is cut short")
    return GGUFFile(path, metadata, tensors)


def _tensor_info(name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
    if kind not in TENSOR_TYPES:
        raise ValueError(f"tensor '{name}' has the unknown type {kind}")
    label, block_values, block_bytes = TENSOR_TYPES[kind]
    values = 1
    for size in shape:
        values *= size
    return TensorInfo(name, shape, label, start, values // block_values * block_bytes)


def read(path: Path) -> GGUFFile:
    """Read the header of a GGUF file.

    Raises:
        ModelError: the file is missing, no GGUF file, cut short, or of a version or type unknown here.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data, path)
    except (OSError, ValueError, TypeError, ArithmeticError, struct.error, MemoryError, RecursionError) as error:
        raise ModelError(
            describe(str(path), f"unreadable ({error})", "a complete GGUF file", "fetch the file again")
        ) from error


def describe_quantisation(file: GGUFFile) -> str:
    """One sentence for results made with this file: ``dequantised from a GGUF file (210 Q4_1, 61 F32, 1 Q8_0)``."""
    types = file.count_types()
    if set(types) <= FLOAT_TYPES:
        return "read from a GGUF file that is not quantised"
    return "dequantised from a GGUF file (" + ", ".join(f"{count} {name}" for name, count in types.items()) + ")"


def mend_tokenizer(tokenizer: Any, file: GGUFFile) -> None:
    """Put back what transformers loses of a GGUF file's tokenizer.

    - the pre-tokenizer of the SmolLM family, which takes digits one by one before anything else: without it
      several blanks before a digit are cut in another way than in training;
    - the longest input, which transformers leaves at 10^30.
    """
    if file.metadata.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = smollm_pre_tokenizer()
    longest = file.get("context_length")
    if longest and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = int(longest)


def smollm_pre_tokenizer() -> Any:
    """What the SmolLM models were trained with: digits one by one, then the byte-level rule of GPT-2."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


@contextlib.contextmanager
def one_reader() -> Iterator[None]:
    """Inside the block a GGUF file is walked once, however often transformers opens it (three times a model)."""
    import gguf as package

    original = package.GGUFReader
    package.GGUFReader = functools.lru_cache(maxsize=1)(original)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        package.GGUFReader = original  # type: ignore[misc]


def forget_quantisation(model: Any) -> None:
    """Make a dequantised model an ordinary one: transformers still marks it as quantised and will not save it."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
