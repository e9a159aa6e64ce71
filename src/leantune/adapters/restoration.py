"""Saved tensors put back into a model that carries their adapter already: bit for bit, or not at all."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

from leantune.adapters import verification
from leantune.core.atomic import naming
from leantune.core.errors import AdapterError, describe, raise_all
from leantune.methods._initialization import start_from_file

_NUMBER = re.compile(r"os error (\d+)")
# What torch's own writer says when the system refuses: its errors have no class and no number.
_WRITER = ("inline_container", "PytorchStreamWriter", "Parent directory", "cannot be opened", "iostream error")


def restore(model: PeftModel, folder: str | Path, *, adapter_name: str = "default") -> None:
    """Give an adapter the values it had when it was saved, to go on training with them.

    Tensors of the base that PEFT saves beside some adapters are left out: the base is frozen.

    Args:
        model: the model with the adapter; its parameters stay the same objects where their shapes allow.
        folder: a checkpoint or adapter folder, flat.
        adapter_name: the name of the adapter on the model.

    Raises:
        AdapterError: a tensor is missing, surplus, not finite, of another shape or dtype, or did not arrive.
    """
    path = Path(folder)
    found = verification.read_tensors(path)
    with start_from_file():
        expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    base = {key for key in model.state_dict() if key not in expected}
    tensors = {key: tensor for key, tensor in found.items() if key not in base}
    problems = verification.not_finite(tensors)
    problems += verification.key_problems(expected, tensors, model, adapter_name, path)
    for key, tensor in tensors.items():
        if key in expected and expected[key].dtype != tensor.dtype:
            where = f"{path / verification.WEIGHTS_NAME}: {key}"
            problems.append(describe(where, f"{tensor.dtype}", f"{expected[key].dtype}", "go on in the same dtype"))
    raise_all(problems, AdapterError)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    raise_all(verification.wrong_indices(model, adapter_name, path), AdapterError)
    arrived = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    lost = [key for key, tensor in tensors.items() if not torch.equal(arrived[key].to(tensor.device), tensor)]
    where = str(path / verification.WEIGHTS_NAME)
    raise_all(
        [describe(where, f"{key} did not arrive", "the same values", "report this") for key in lost], AdapterError
    )


@contextmanager
def native_errors(path: Path) -> Iterator[None]:
    """Turn what the writers of safetensors, torch and tokenizers raise when the disk fails into the OSError it is.

    Args:
        path: what is being written, for the error.
    """
    try:
        with naming(path):
            yield
    except SafetensorError as error:
        number = _NUMBER.search(str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _WRITER):
            raise
        raise OSError(errno.EIO, f"the file could not be written ({error})", str(path)) from error
    except Exception as error:
        # The tokenizers library raises nothing more special.
        number = _NUMBER.search(str(error)) if type(error) is Exception else None
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error
