"""To the Hub and back: :func:`push` uploads what `publication` built, :func:`pull` fetches and verifies it."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leantune import methods
from leantune.adapters import conversion as converting
from leantune.adapters import factor_file, record, skeleton, verification
from leantune.adapters import folder as adapter_folder
from leantune.adapters.publication import NATIVE, RUN_RECORD, changed_files
from leantune.core.atomic import new_folder, write_json
from leantune.core.errors import AdapterError, HubError, LeantuneError, describe, raise_all
from leantune.methods._factor_file import RECOMPUTED

PULLED = ["*.json", "*.safetensors", "*.md", "*.jinja", "*.txt", "*.model"]
# Files of an older push that a new one replaces.
_OURS = ["native/*", "*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_DISK = (errno.ENOSPC, errno.EACCES, errno.EROFS)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Progress = Callable[[str], None]


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no ``owner/name``.

    Raises:
        HubError: it is not.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise HubError(describe(f"'{repo_id}'", "no Hub id", "owner/name", "name your account or organisation too"))


def check_target(repo_id: str, *, revision: str | None = None, create_pr: bool = False) -> dict[str, Any]:
    """Ask the Hub, before anything is built, whether a push may go there.

    Returns:
        ``user`` whose token it is, and ``exists``: whether the repository is there already.

    Raises:
        HubError: offline, no valid token, or the repository holds what leantune did not push.
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    api = HfApi()
    with told(repo_id, "push"):
        user = api.whoami()["name"]
        exists = api.repo_exists(repo_id)
        if not exists and create_pr:
            raise HubError(describe(repo_id, "not on the Hub", "a repository to open a pull request in", "push first"))
        if exists and not create_pr:
            files = set(api.list_repo_files(repo_id)) - {".gitattributes", "README.md"}
            if files and not {record.RECORD_NAME, f"{NATIVE}/{verification.CONFIG_NAME}"} <= files:
                got = f"holds files that leantune did not push ({', '.join(sorted(files)[:3])}, ...)"
                do = "choose another name, or --create-pr to propose the change there"
                raise HubError(describe(repo_id, got, "a new repository, or one of an earlier push", do))
    return {"user": user, "exists": exists, "revision": revision}


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload adapter with leantune",
) -> str:
    """Upload a prepared folder in one commit.

    Args:
        folder: as :func:`leantune.adapters.publication.prepare` left it.
        repo_id: ``owner/name``.
        private: a new repository is private.
        revision: branch to push to; made when it is not there.
        create_pr: open a pull request instead.
        message: of the commit.

    Returns:
        The address of the commit or the pull request.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with told(repo_id, "push"):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            delete_patterns=_OURS,
        )
    return str(commit.pr_url or commit.commit_url)


def pull(
    repo_id: str,
    out_dir: str | Path,
    *,
    revision: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fetch an adapter, verify it, and leave a run folder.

    The native adapter becomes ``adapter/``, the plain LoRA ``lora/``, the run's record ``run.json``. Any other adapter
    repository is taken as it is.

    Args:
        repo_id: ``owner/name``.
        out_dir: the run folder to write.
        revision: branch, tag or commit.
        base: the base model here, where the record names one that is not.
        overwrite: replace a non-empty ``out_dir``.
        progress: told what happens, in words.

    Returns:
        ``folder``, ``method``, ``base``, ``verified`` (what was checked, in words) and ``bytes``.

    Raises:
        HubError: it is not there, or cannot be reached.
        AdapterError: what came is torn, changed, or no adapter; nothing is written.
    """
    from huggingface_hub import snapshot_download

    check_repo_id(repo_id)
    target, say = Path(out_dir), progress or (lambda _: None)
    converting.refuse_occupied(target, overwrite)
    say(f"fetching {repo_id}")
    with told(repo_id, "pull", revision):
        fetched = Path(snapshot_download(repo_id, revision=revision, allow_patterns=PULLED))
    if not (fetched / verification.CONFIG_NAME).is_file():
        raise AdapterError(describe(repo_id, f"no {verification.CONFIG_NAME}", "an adapter", "check the Hub id"))
    raise_all(changed_files(fetched), AdapterError)
    with new_folder(target) as temporary:
        adapter = _lay_out(fetched, temporary)
        config = verification.read_config(adapter)
        known = record.read(adapter)
        name = base or (known.get("base") or {}).get("name") or config.base_model_name_or_path
        if base is not None:
            record.write(adapter, {**known, "base": {**(known.get("base") or {}), "name": base}})
        verified = _verify(adapter, name, say)
        summary = _run_record(temporary, adapter, target, name, repo_id)
        if summary is not None:
            write_json(temporary / RUN_RECORD, summary)
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    method = known.get("method") or str(getattr(config.peft_type, "value", config.peft_type)).lower()
    return {"folder": str(target), "method": method, "base": name, "verified": verified, "bytes": size}


def _lay_out(fetched: Path, folder: Path) -> Path:
    """Copy what was fetched into the form of a run folder; returns its adapter folder."""
    adapter = folder / "adapter"
    adapter.mkdir()
    has_native = (fetched / NATIVE / verification.CONFIG_NAME).is_file()
    weights = (verification.CONFIG_NAME, verification.WEIGHTS_NAME, record.RECORD_NAME)
    for name in weights:
        _copy(fetched / NATIVE / name if has_native else fetched / name, adapter / name)
    native = fetched / NATIVE if has_native else fetched
    for outside in factor_file.files_of(native, verification.read_config(native)):
        _copy(outside, adapter / outside.name)
    if has_native:
        (folder / "lora").mkdir()
        for name in weights:
            _copy(fetched / name, folder / "lora" / name)
        _copy(fetched / NATIVE / RUN_RECORD, folder / RUN_RECORD)
    converting.copy_tokenizer(None, fetched, adapter)
    _copy(fetched / "README.md", adapter / "README.md")
    return adapter


def _copy(source: Path, target: Path) -> None:
    # The cache holds links; a run folder holds files.
    if source.is_file():
        shutil.copyfile(source, target)


def _verify(adapter: Path, base: str | None, say: Progress) -> str:
    """Every doubt that can be cleared without the base's weights; says which."""
    tensors = verification.read_tensors(adapter)
    raise_all(verification.not_finite(tensors), AdapterError)
    if base is None:
        return "tensors are finite; it names no base"
    config = verification.read_config(adapter)
    if getattr(config, "factors", None) == RECOMPUTED:
        return "tensors are finite; its factors are recomputed, and checked, when it is loaded"
    try:
        bones = skeleton.build(config, base)
    except LeantuneError as error:
        say(f"not compared with its base: {error}")
        return "tensors are finite; its base is not here"
    adapter_folder.attach(bones, adapter, plain_layout=True)
    return "every tensor is there, finite, and fits the base"


def _run_record(folder: Path, adapter: Path, target: Path, base: str | None, repo_id: str) -> dict[str, Any] | None:
    """The record by which this is a run folder; of a repository without one, what its adapter tells."""
    path = folder / RUN_RECORD
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = dict(summary.get("config") or {})
    if not config:
        known = record.read(adapter)
        found = verification.read_config(adapter)
        method = known.get("method") or adapter_folder.method_name(found)
        task = str(getattr(found.task_type, "value", found.task_type) or "CAUSAL_LM")
        if base is None or method not in methods.names() or task != "CAUSAL_LM":
            return None
        config = {"data": "unknown", "method": method, "task": "causal-lm"}
        dtype = (known.get("base") or {}).get("dtype")
        config |= {"dtype": dtype} if dtype else {}
        summary = {"status": "pulled", "base": known.get("base") or {"name": base}}
    config |= {"model": base, "out": target.as_posix()}
    return {**summary, "config": config, "pulled_from": repo_id}


@contextmanager
def told(repo_id: str, verb: str, revision: str | None = None) -> Iterator[None]:
    """The Hub's errors, each as one line that says what to do.

    Args:
        repo_id: what it is about.
        verb: ``"push"`` or ``"pull"``.
        revision: what was asked for.
    """
    from huggingface_hub import errors

    try:
        yield
    except LeantuneError:
        raise
    except errors.OfflineModeIsEnabled as error:
        got = "offline mode is set (HF_HUB_OFFLINE)"
        raise HubError(describe(repo_id, got, f"the network, to {verb}", "unset HF_HUB_OFFLINE")) from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(describe(repo_id, "no token here", f"one, to {verb}", "hf auth login")) from error
    except errors.GatedRepoError as error:
        do = "ask for access on its page, then `hf auth login`"
        raise HubError(describe(repo_id, "gated on the Hub", "an account that has access", do)) from error
    except errors.RevisionNotFoundError as error:
        do = "give a branch, tag or commit that exists"
        raise HubError(describe(repo_id, f"no revision '{revision}'", "a revision on the Hub", do)) from error
    except errors.RepositoryNotFoundError as error:
        do = "check the spelling; a private one needs `hf auth login`"
        raise HubError(describe(repo_id, "not on the Hub, or not yours to see", "a repository", do)) from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, verb, error)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        # No network, a proxy, a timeout: each client library has its own class.
        lines = str(error).strip().splitlines()
        got = f"the Hub cannot be reached ({lines[0] if lines else type(error).__name__})"
        raise HubError(describe(repo_id, got, "a connection", "connect and try again")) from error


def _refusal(repo_id: str, verb: str, error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return describe(repo_id, "the Hub does not accept the token", f"a valid one, to {verb}", "hf auth login")
    if status == 403:
        wanted = f"one that may {'write there' if verb == 'push' else 'read it'}"
        return describe(repo_id, "the token has no right to it", wanted, "hf auth login with another token")
    lines = str(error).strip().splitlines()
    return describe(repo_id, f"the Hub refused ({lines[0] if lines else status})", f"a {verb}", "see its answer")
