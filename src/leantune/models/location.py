"""From the name a user gave to the place where the model is: embedded, folder, GGUF file, or Hub."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from leantune.core.errors import ModelError, describe, did_you_mean
from leantune.models import embedded
from leantune.models.embedded import EMBEDDED_NAME, MODELS, Progress, say

Source = Literal["hub", "folder", "gguf", "embedded"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TIMEOUT = 10.0  # seconds for the one question to the Hub before anything is loaded


@dataclass(frozen=True)
class Location:
    """Where a base model is, and how ``from_pretrained`` is called on it.

    Attributes:
        name: as the user gave it.
        source: the kind of place.
        target: first argument of ``from_pretrained``: a folder, or a Hub id.
        options: its keyword arguments (``gguf_file``, ``revision``, ``local_files_only``).
        path: the folder or the GGUF file; None on the Hub.
        revision: commit on the Hub, where it is known.
        cached: nothing has to be downloaded.
    """

    name: str
    source: Source
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    revision: str | None = None
    cached: bool = True


def locate(name: str | os.PathLike[str], *, revision: str | None = None, progress: Progress = say) -> Location:
    """Find a base model and check, before any weight is read, that it can be used.

    Args:
        name: ``smollm2-135m``, ``minilm-l6``, a folder, a ``.gguf`` file, or a Hub id. A folder that has the name of
            an embedded model is reached as ``./smollm2-135m``.
        revision: branch, tag or commit; on the Hub only.
        progress: called with one line of text when an embedded model has to be fetched.

    Raises:
        ModelError: there is nothing of that name, or what is there cannot be used.
    """
    text = os.fspath(name)
    if text in MODELS:
        folder = embedded.ensure(progress, MODELS[text])
        return Location(text, "embedded", str(folder), path=folder)
    path = Path(text).expanduser()
    if path.is_dir():
        check_folder(path)
        return Location(text, "folder", str(path), path=path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                describe(text, f"a {path.suffix or 'nameless'} file", "a folder, a .gguf file or a Hub id", "give one")
            )
        return Location(text, "gguf", str(path.parent), {"gguf_file": path.name}, path)
    if _looks_local(text) or _near_embedded(text) or not _HUB_ID.fullmatch(text):
        raise ModelError(_not_found(text, path))
    return _locate_on_hub(text, revision)


def _looks_local(text: str) -> bool:
    return text.startswith((".", "~", "/")) or text.lower().endswith(".gguf") or "\\" in text or text.count("/") > 1


def _near_embedded(text: str) -> bool:
    # A bare name this close to an embedded one is a slip of the finger, not a Hub id worth a minute of asking.
    return "/" not in text and bool(difflib.get_close_matches(text.lower(), list(MODELS), cutoff=0.75))


def _not_found(text: str, path: Path) -> str:
    known = set(MODELS)
    if path.parent.is_dir():
        prefix = text[: len(text) - len(path.name)]
        models = (entry for entry in path.parent.iterdir() if _is_model(entry))
        known |= {prefix + entry.name for entry in models}
    wanted = f"'{EMBEDDED_NAME}', a folder, a .gguf file or a Hub id (owner/name)"
    return describe(f"model '{text}'", "not found", wanted, did_you_mean(text, known))


def _is_model(entry: Path) -> bool:
    return entry.suffix == ".gguf" or (entry / "config.json").is_file()


def check_folder(folder: Path) -> None:
    """Check that a folder holds a transformers model in safetensors, and a tokenizer.

    Raises:
        ModelError: config, weights or tokenizer are missing, the weights are pickled, or it is an adapter.
    """
    wanted = "a transformers model folder"
    # Also where a whole model lies beside the adapter: transformers would load the adapter on top, unasked.
    if (folder / "adapter_config.json").is_file():
        do = "give the base model here and load the adapter onto it"
        raise ModelError(describe(str(folder), "an adapter, not a base model", wanted, do))
    if not (folder / "config.json").is_file():
        do = "give the folder that save_pretrained wrote"
        if (folder / "adapter").is_dir():
            do = "this is a run folder: merge the run, or give its base model"
        raise ModelError(describe(str(folder), "no config.json", wanted, do))
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        raise ModelError(_no_safetensors(str(folder), pickled))
    if (folder / "preprocessor_config.json").is_file():
        return
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        raise ModelError(
            describe(str(folder), "no tokenizer", "tokenizer.json beside the weights", "save the tokenizer there too")
        )


def _no_safetensors(where: str, pickled: list[str]) -> str:
    wanted = "safetensors (a pickle can run any code when it is opened, so none is)"
    if pickled:
        return describe(
            where, f"only pickled weights ({pickled[0]})", wanted, "save it with save_pretrained, or take another copy"
        )
    return describe(where, "no weights", "model.safetensors", "fetch the model again")


def _locate_on_hub(text: str, revision: str | None) -> Location:
    """Ask the Hub one question; where it cannot be reached, take what is cached."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cached = isinstance(try_to_load_from_cache(text, "config.json", revision=revision), str)
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    where = f"model '{text}'"
    try:
        info = HfApi().model_info(text, revision=revision, timeout=_HUB_TIMEOUT)
    except GatedRepoError as error:
        do = "ask for access on its page, then `hf auth login`"
        raise ModelError(describe(where, "gated on the Hub", "an account that has access", do)) from error
    except RevisionNotFoundError as error:
        do = "give a branch, tag or commit that exists"
        raise ModelError(describe(where, f"no revision '{revision}'", "a revision on the Hub", do)) from error
    except RepositoryNotFoundError as error:
        wanted = f"an id on the Hub, a folder, a .gguf file or '{EMBEDDED_NAME}'"
        do = "check the spelling; a private model needs `hf auth login`"
        raise ModelError(describe(where, "not here, and not on the Hub", wanted, do)) from error
    except Exception as error:  # no network, a proxy, offline mode, a timeout: each client library has its own class
        if cached:
            return Location(text, "hub", text, {**options, "local_files_only": True}, revision=revision)
        do = f"connect, or give a local folder, or use '{EMBEDDED_NAME}'"
        got = f"the Hub cannot be reached ({first_line(error)}), and the model is not in its cache"
        raise ModelError(describe(where, got, "a connection, once", do)) from error
    files = [sibling.rfilename for sibling in info.siblings or []]
    if files and not any(name.endswith(".safetensors") for name in files):
        pickled = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth")))
        raise ModelError(_no_safetensors(where, pickled))
    # The commit, not the branch: config, weights and tokenizer then come from one state of the repository.
    exact = info.sha or revision
    whole = isinstance(try_to_load_from_cache(text, "config.json", revision=exact), str)
    return Location(text, "hub", text, {"revision": exact} if exact else {}, revision=exact, cached=whole)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; other packages write essays."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
