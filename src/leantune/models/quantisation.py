"""Base models in 4 or 8 bits: by which library, in which format, and what that costs in bytes.

The frozen weights of the blocks are packed; embeddings, norms, heads and everything that trains stay as they are.

========  ============  ======================================  ============================================
bits      library       format                                  on a CPU
========  ============  ======================================  ============================================
4         bitsandbytes  ``nf4``: 64 numbers a scale, the        forward and backward
                        scales themselves in 8 bits
8         bitsandbytes  ``int8``: a scale a row                 forward and backward, activations unrounded
8         torchao       ``int8``: a scale a row                 forward and backward, activations unrounded
4         torchao       none: its int4 needs CUDA kernels       refused
========  ============  ======================================  ============================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core import packed_weight
from leantune.core.errors import DependencyError, ModelError, describe, did_you_mean

QUANTISATIONS = ("none", "4bit", "8bit")
BACKENDS = ("auto", "bitsandbytes", "torchao")
_FORMATS = {("4bit", "bitsandbytes"): "nf4", ("8bit", "bitsandbytes"): "int8", ("8bit", "torchao"): "int8"}
# Relative to the size of the numbers: nf4 is at 0.09, scales from the wrong places are above 0.2.
_LARGEST_ERROR = 0.12
# Heads by the names that transformers gives them. They are new, trained or both, and never packed.
_HEADS = ("lm_head", "embed_out", "cls", "score", "classifier", "classification_head", "pooler", "pre_classifier")
_HEADS_OF_MASKED = ("vocab_transform", "vocab_layer_norm", "vocab_projector", "generator_lm_head")


@dataclass(frozen=True)
class Quantisation:
    """How a base was quantised when it was loaded, and what it weighs.

    Attributes:
        bits: of a packed number.
        backend: the library.
        format: its name for the format.
        version: of the library; another one may round otherwise, which the content hash would show.
        modules: linear layers that are packed.
        packed_bytes: what they weigh, scales and biases included.
        other_bytes: the rest of the base: embeddings, norms, heads.
        dense_bytes: what the packed layers would weigh in the base's dtype.
    """

    bits: int
    backend: str
    format: str
    version: str
    modules: int
    packed_bytes: int
    other_bytes: int
    dense_bytes: int

    @property
    def name(self) -> str:
        """``"4bit"`` or ``"8bit"``, as the option is called."""
        return f"{self.bits}bit"

    @property
    def base_bytes(self) -> int:
        """What the whole base weighs."""
        return self.packed_bytes + self.other_bytes

    def describe(self) -> str:
        """One phrase for cards and screens."""
        return (
            f"quantised to {self.bits} bits when it was loaded ({self.backend} {self.version}, {self.format}; "
            f"{self.modules} linear layers, {self.base_bytes / 1e6:,.1f} MB in place of "
            f"{(self.dense_bytes + self.other_bytes) / 1e6:,.1f} MB)"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "base_bytes": self.base_bytes}


def resolve(quantization: str, backend: str = "auto") -> str:
    """The library that quantises: the one named, or the first that is installed and has the format.

    Args:
        quantization: ``none``, ``4bit`` or ``8bit``.
        backend: ``auto``, ``bitsandbytes`` or ``torchao``.

    Returns:
        ``"bitsandbytes"`` or ``"torchao"``; ``"auto"`` where nothing is quantised.

    Raises:
        ModelError: an unknown word, or a library that has no such format.
        DependencyError: the library is not installed.
    """
    for where, got, known in (
        ("quantization", quantization, QUANTISATIONS),
        ("quantization_backend", backend, BACKENDS),
    ):
        if got not in known:
            raise ModelError(describe(where, f"'{got}'", f"one of {', '.join(known)}", did_you_mean(got, known)))
    if quantization == "none":
        return "auto"
    able = [library for bits, library in _FORMATS if bits == quantization]
    if backend == "auto":
        backend = next((library for library in able if find_spec(library) is not None), able[0])
    if backend not in able:
        got = f"{backend} with {quantization}: its int4 weights need CUDA kernels of their own (mslk) and no gradient"
        raise ModelError(
            describe("quantization_backend", got, f"{' or '.join(able)} for {quantization}", "leave the backend out")
        )
    if find_spec(backend) is None:
        wanted, do = (
            f"it holds a {quantization} base",
            f"pip install 'leantune[quant]' (or {backend}), or load unquantised",
        )
        raise DependencyError(describe(backend, "not installed", wanted, do))
    return backend


def hub_config(quantization: str, backend: str, task: str, dtype: torch.dtype | str) -> Any:
    """What ``from_pretrained(quantization_config=...)`` takes.

    Args:
        quantization: ``4bit`` or ``8bit``.
        backend: as :func:`resolve` gave it.
        task: heads of other tasks than the language model's own are named, for they must not be packed.
        dtype: in which products with a packed weight are formed.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    # For a language model transformers itself leaves out the head, under whatever name, and what is tied to it.
    left_out = None if task == "causal-lm" else [rf"(.*\.)?{name}" for name in (*_HEADS, *_HEADS_OF_MASKED)]
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=left_out)
    if quantization == "8bit":
        # No threshold: it splits off outlying activations, which only matters where activations are rounded.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=left_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_out,
    )


def measure(model: nn.Module) -> Quantisation | None:
    """What a loaded model says of itself; None where no layer is packed."""
    packed: list[Any] = [module for module in model.modules() if packed_weight.is_packed(module)]
    if not packed:
        return None
    config: Any = model.config.quantization_config  # type: ignore[union-attr]
    backend = "torchao" if "torchao" in str(config.quant_method).lower() else "bitsandbytes"
    is_four = backend == "bitsandbytes" and config.load_in_4bit
    inside = {id(module) for module in packed}
    width = next((each.element_size() for each in model.parameters() if each.is_floating_point()), 4)
    rest = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for module in model.modules()
        if id(module) not in inside
        for tensor in [*module._parameters.values(), *module._buffers.values()]
        if tensor is not None
    }
    biases = sum(module.bias.numel() for module in packed if isinstance(module.bias, Tensor))
    weights = sum(int(module.in_features) * int(module.out_features) for module in packed)
    return Quantisation(
        bits=4 if is_four else 8,
        backend=backend,
        format=str(config.bnb_4bit_quant_type) if is_four else "int8",
        version=version(backend),
        modules=len(packed),
        packed_bytes=sum(packed_weight.packed_bytes(module) for module in packed),
        other_bytes=sum(rest.values()),
        dense_bytes=(weights + biases) * width,
    )


def check_kernels(model: nn.Module, name: str) -> None:
    """Refuse a base whose 4-bit layers the library would compute wrongly here, which it does without an error.

    bitsandbytes 0.50.2 on a CPU reads the scales of a layer with 16, 32, 48, 96, ... inputs (an even part of 64 over)
    from the wrong places. Nothing is taken from that list: each width of the model is tried on random numbers.

    Raises:
        ModelError: naming the layers.
    """
    by_width: dict[int, list[str]] = {}
    module: Any
    for path, module in model.named_modules():
        if packed_weight.is_packed(module) and hasattr(module.weight, "quant_state") and not module.weight.is_cuda:
            by_width.setdefault(int(module.in_features), []).append(path)
    wrong = {width: paths for width, paths in by_width.items() if not _keeps_numbers(width)}
    if wrong:
        width, paths = min(wrong.items())
        got = f"{sum(map(len, wrong.values()))} layers such as {paths[0]} ({width} inputs)"
        wanted = f"widths that bitsandbytes {version('bitsandbytes')} unpacks rightly on a CPU: multiples of 64"
        raise ModelError(describe(name, got, wanted, "take quantization='8bit', or a GPU"))


def _keeps_numbers(width: int) -> bool:
    """Whether numbers packed in rows of this width come back: nf4 costs normal numbers 9% of their size."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    numbers = torch.randn((64, width), generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(numbers, blocksize=64, compress_statistics=True, quant_type="nf4")
    return bool((dequantize_4bit(packed, state) - numbers).norm() < _LARGEST_ERROR * numbers.norm())


def weight_reader(model: nn.Module) -> Callable[[nn.Module], Tensor]:
    """A function from a linear layer of ``model`` to its weight ``(out, in)`` as plain numbers, a copy or a view."""
    from peft.utils import get_quantization_kwargs, resolve_quantization_backend

    options = get_quantization_kwargs(model)

    def read(layer: Any) -> Tensor:
        backend = resolve_quantization_backend(layer, **options)
        weight: Tensor = layer.weight if backend is None else backend.get_base_weight(layer)
        return weight.detach()

    return read


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, tied ones once; a packed weight counts the numbers that it stands for."""
    packed = {
        id(module.weight): int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
        for module in model.modules()
        if packed_weight.is_packed(module)
    }
    return sum(packed.get(id(each), each.numel()) for each in model.parameters())
