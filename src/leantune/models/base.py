"""``load_base``: the one door to a base model, whatever it comes from and whatever the task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from leantune.core import packed_weight
from leantune.core.errors import ModelError, describe, did_you_mean, require
from leantune.models import gguf, quantisation
from leantune.models.content import content_hash
from leantune.models.embedded import MODELS, Progress, say
from leantune.models.location import Location, Source, first_line, locate
from leantune.models.quantisation import Quantisation
from leantune.models.quiet import quiet

# Task -> class of transformers that reads a model for it.
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
}
TASKS = tuple(AUTO_CLASSES)
# What puts a head of a given width on the model, a fresh one where the file has none that fits.
_CLASSES_TASKS = ("classification", "image-classification")
_HEAD_TASKS = (*_CLASSES_TASKS, "regression")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# A head that is not in the file is drawn from this seed: loading a base twice gives the same model and hash.
HEAD_SEED = 0


@dataclass
class BaseModel:
    """A base model, ready for a method.

    Attributes:
        model: the transformers model, in evaluation mode, on the CPU (a quantised one on the accelerator if there is
            one).
        tokenizer: with a padding token; None for image classification.
        name: as the user gave it.
        source: where it was found.
        hub_id: id on the Hub, where it came from there; None otherwise (the embedded model is a dequantised copy,
            so it has none).
        note: a sentence that every result on this model has to carry; None for ordinary weights.
        content_hash: of the weights as loaded; see :func:`leantune.models.content_hash`.
        revision: commit on the Hub, where known.
        pad_note: says which token pads, where the tokenizer brought none.
        new_parameters: names that were not in the file (a fresh classification head), sorted.
        image_processor: turns an image into numbers; image classification alone.
        quantisation: how the weights are packed; None where they are not.
    """

    model: Any
    tokenizer: Any
    name: str
    source: Source
    hub_id: str | None
    note: str | None
    content_hash: str
    revision: str | None = None
    pad_note: str | None = None
    new_parameters: tuple[str, ...] = ()
    image_processor: Any = None
    quantisation: Quantisation | None = None

    @property
    def encoder(self) -> Any:
        """What turns a row into the model's inputs, and is saved beside it: the tokenizer or the image processor."""
        return self.tokenizer if self.tokenizer is not None else self.image_processor


def load_base(
    name: str | os.PathLike[str],
    *,
    task: str = "causal-lm",
    num_labels: int | None = None,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: str = "none",
    quantization_backend: str = "auto",
    device: str = "auto",
    progress: Progress = say,
) -> BaseModel:
    """Load a base model and its tokenizer. Weights are read from safetensors or GGUF, never from a pickle.

    Args:
        name: ``smollm2-135m``, ``minilm-l6``, a transformers folder, a ``.gguf`` file, or a Hub id.
        task: ``causal-lm``; ``masked-lm`` for an encoder; ``classification`` or ``regression`` put a sequence head on
            it, fresh (from a fixed seed) where the file has none that fits; ``image-classification`` does so with an
            image model and reads its image processor.
        num_labels: classes of a classification; None takes the file's own head. Regression has 1.
        dtype: ``float32``, ``bfloat16``, ``float16``, ``float64``, a torch dtype, or ``auto`` for the file's own.
        trust_remote_code: run code that the model's repository brings along. Off: such a model is refused.
        revision: branch, tag or commit on the Hub.
        quantization: ``4bit`` or ``8bit`` packs the frozen weights while they are read; ``none`` leaves them.
        quantization_backend: ``bitsandbytes``, ``torchao``, or ``auto``: see :mod:`leantune.models.quantisation`.
        device: where packed weights go: ``cpu``, or ``auto`` for the accelerator if there is one.
        progress: called with one line of text when something takes long.

    Raises:
        ModelError: the model cannot be found, read or used for the task.
        DependencyError: a GGUF file needs the ``gguf`` package, a quantised base that of its backend.
    """
    _check_task(task, num_labels)
    torch_dtype = _parse_dtype(dtype)
    backend = quantisation.resolve(quantization, quantization_backend)
    location = locate(name, revision=revision, progress=progress)
    packing: dict[str, Any] = {}
    if quantization != "none":
        _check_packable(location, torch_dtype, quantization)
        packing["quantization_config"] = quantisation.hub_config(quantization, backend, task, torch_dtype)
        packing["device_map"] = {"": "cpu"} if device == "cpu" or not torch.cuda.is_available() else None
    tokenizer = image_processor = pad_note = None
    with reading(location, progress):
        if task == "image-classification":
            image_processor = read_image_processor(location, trust_remote_code)
        else:
            tokenizer, pad_note = read_tokenizer(location, trust_remote_code)
        config = read_config(location, trust_remote_code)
        _set_head(config, location, task, num_labels)
        model, new = _load_model(location, config, task, torch_dtype, trust_remote_code, packing)
    model.eval()
    packed_weight.steady(model)
    if tokenizer is not None:
        _set_padding(model, tokenizer)
    packed = quantisation.measure(model)
    quantisation.check_kernels(model, location.name)
    notes = [note_of(location), packed and packed.describe()]
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=location.name,
        source=location.source,
        hub_id=location.target if location.source == "hub" else None,
        note=", ".join(note for note in notes if note) or None,
        content_hash=content_hash(model),
        revision=location.revision,
        pad_note=pad_note,
        new_parameters=new,
        image_processor=image_processor,
        quantisation=packed,
    )


def load_tokenizer(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The tokenizer of a base model, with a padding token, as :func:`load_base` gives it.

    Raises:
        ModelError: the model or its tokenizer cannot be found or read.
    """
    location = locate(name, revision=revision)
    with reading(location, say):
        return read_tokenizer(location, trust_remote_code)[0]


def note_of(location: Location) -> str | None:
    """The sentence that results on this model have to carry, or None."""
    if location.source == "embedded":
        return MODELS[location.name].note
    if location.source == "gguf" and location.path is not None:
        return gguf.describe_quantisation(gguf.read(location.path))
    return None


@contextlib.contextmanager
def reading(location: Location, progress: Progress) -> Iterator[None]:
    """Whatever a source needs around its loading: a GGUF file its package, one walk, and a word of patience."""
    if location.source != "gguf" or location.path is None:
        yield
        return
    require("gguf", "train")
    gguf.read(location.path)  # a torn file is named here, before anything slow
    progress(f"{location.name}: dequantising (this can take a minute)")
    with gguf.one_reader():
        yield


def _check_task(task: str, num_labels: int | None) -> None:
    if task not in TASKS:
        raise ModelError(describe("task", f"'{task}'", f"one of {', '.join(TASKS)}", did_you_mean(task, TASKS)))
    if task not in _CLASSES_TASKS and num_labels not in (None, 1):
        got = f"num_labels={num_labels} with task '{task}'"
        raise ModelError(describe("num_labels", got, "labels only for classification", "leave it out"))
    if num_labels is not None and num_labels < 1:
        raise ModelError(describe("num_labels", str(num_labels), "a number of classes above 0", "mend it"))


def _check_packable(location: Location, dtype: torch.dtype | str, quantization: str) -> None:
    if location.source == "gguf":
        got = f"a GGUF file with quantization '{quantization}'"
        do = "save it as a folder first (load_base(...).model.save_pretrained), and its tokenizer beside it"
        raise ModelError(describe(location.name, got, "a transformers folder or a Hub id", do))
    if dtype == torch.float64 or isinstance(dtype, str):
        got = f"{str(dtype).removeprefix('torch.')} with quantization '{quantization}'"
        raise ModelError(describe("dtype", got, "float32, bfloat16 or float16, to compute in", "name one of them"))


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
        dtype = str(dtype)
    elif dtype == "auto":
        return dtype
    elif dtype in DTYPES:
        return DTYPES[dtype]
    known = [*DTYPES, "auto"]
    raise ModelError(describe("dtype", f"'{dtype}'", f"one of {', '.join(known)}", did_you_mean(dtype, known)))


def read_tokenizer(location: Location, trust_remote_code: bool) -> tuple[Any, str | None]:
    """The tokenizer, and a sentence about its padding where that had to be chosen.

    Raises:
        ModelError: it cannot be read, or has no token that could pad.
    """
    from transformers import AutoTokenizer

    try:
        with quiet(bars=not location.cached, stderr=location.source == "gguf"):
            tokenizer = AutoTokenizer.from_pretrained(
                location.target, trust_remote_code=trust_remote_code, **location.options
            )
    except Exception as error:
        raise _readable(error, location, "its tokenizer") from error
    if location.source == "gguf" and location.path is not None:
        gguf.mend_tokenizer(tokenizer, gguf.read(location.path))
    if tokenizer.pad_token_id is not None:
        return tokenizer, None
    # A token of the vocabulary, never a new one: a new one would resize, and so change, the embeddings.
    if tokenizer.eos_token is not None:
        tokenizer.pad_token, kind = tokenizer.eos_token, "end-of-text"
    elif tokenizer.unk_token is not None:
        tokenizer.pad_token, kind = tokenizer.unk_token, "unknown-word"
    else:
        do = "set pad_token in its tokenizer_config.json to a token of its vocabulary"
        got = "a tokenizer without a padding, end-of-text or unknown-word token"
        raise ModelError(describe(location.name, got, "a token that can pad", do))
    return tokenizer, f"the tokenizer has no padding token; its {kind} token '{tokenizer.pad_token}' pads"


def read_image_processor(location: Location, trust_remote_code: bool) -> Any:
    """The image processor, by Pillow: torchvision's rounds otherwise, and need not be installed.

    Raises:
        ModelError: the model has none, or it cannot be read.
    """
    require("PIL", "train")
    from transformers import AutoImageProcessor

    try:
        with quiet(bars=not location.cached):
            return AutoImageProcessor.from_pretrained(
                location.target, backend="pil", trust_remote_code=trust_remote_code, **location.options
            )
    except Exception as error:
        raise _readable(error, location, "its image processor") from error


def read_config(location: Location, trust_remote_code: bool) -> Any:
    """The transformers config.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        with quiet(bars=not location.cached, stderr=location.source == "gguf"):
            config = AutoConfig.from_pretrained(
                location.target, trust_remote_code=trust_remote_code, **location.options
            )
    except Exception as error:
        raise _readable(error, location, "its config") from error
    return config


def _set_head(config: Any, location: Location, task: str, num_labels: int | None) -> None:
    """Give the config a head of the right width; nothing for a language model."""
    if task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif task in _CLASSES_TASKS and num_labels is not None:
        # Setting the number anew replaces the file's names of labels, so an equal number keeps them.
        if config.num_labels != num_labels:
            config.num_labels = num_labels
        config.problem_type = "single_label_classification"
    elif task in _CLASSES_TASKS and not any(
        name.endswith(("ForSequenceClassification", "ForImageClassification")) for name in config.architectures or []
    ):
        do = "say how many classes there are: num_labels"
        raise ModelError(describe(location.name, "no classification head in the file", "a number of classes", do))


def _load_model(
    location: Location,
    config: Any,
    task: str,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    packing: dict[str, Any],
) -> tuple[Any, tuple[str, ...]]:
    """The model, and the names of the parameters that were not in the file."""
    import transformers

    kind: Any = getattr(transformers, AUTO_CLASSES[task])
    safe = {} if location.source == "gguf" else {"use_safetensors": True}
    try:
        with quiet(bars=not location.cached, stderr=location.source == "gguf"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(HEAD_SEED)
            model, report = kind.from_pretrained(
                location.target,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=task in _HEAD_TASKS,
                **safe,
                **packing,
                **location.options,
            )
    except Exception as error:
        raise _readable(error, location, f"it as a model for {task}") from error
    if location.source == "gguf":
        gguf.forget_quantisation(model)
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]}
    new = tuple(sorted(set(report["missing_keys"]) | mismatched))
    _check_complete(model, new, location, task)
    return model, new


def _check_complete(model: Any, new: tuple[str, ...], location: Location, task: str) -> None:
    """Refuse a file that lacks weights of the model proper: transformers would fill them with random numbers."""
    body = f"{model.base_model_prefix}."
    # BERT's pooler belongs to the sequence head, though it lives in the body.
    lacking = [key for key in new if task not in _HEAD_TASKS or (key.startswith(body) and ".pooler." not in key)]
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        got = f"{len(lacking)} weights are not in the file ({shown})"
        do = "fetch the model again, or load it for the task it was made for"
        raise ModelError(describe(location.name, got, f"every weight of {type(model).__name__}", do))


def _set_padding(model: Any, tokenizer: Any) -> None:
    # Sequence heads look for the last token that does not pad, and generation asks on every call.
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id


def _readable(error: Exception, location: Location, what: str) -> ModelError:
    """An error of transformers, safetensors or the Hub in the house form."""
    text = str(error)
    if "trust_remote_code" in text:
        got = "it brings its own code, which is not run unasked"
        return ModelError(
            describe(location.name, got, "a model that transformers knows", "trust_remote_code=True, if you trust it")
        )
    got = f"cannot read {what} ({type(error).__name__}: {first_line(error)})"
    do = "check that the model is complete and that transformers supports it"
    return ModelError(describe(location.name, got, "a transformers model in safetensors or GGUF", do))
