"""From a name to a place: folders, files, near misses, and the Hub on good and bad days."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from leantune.core.errors import ModelError
from leantune.models import load_base
from leantune.models.location import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """``hub(answer)``: what the Hub says to every question; an exception is raised. The Hub's cache is empty."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def answer(reply: Any) -> None:
        def model_info(self: Any, name: str, **arguments: Any) -> Any:
            if isinstance(reply, BaseException):
                raise reply
            return reply

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    return answer


def repository(*files: str) -> SimpleNamespace:
    return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in files])


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("404",)
    return error


def test_a_folder_and_a_gguf_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama")
    assert locate(folder).source == locate(str(folder)).source == "folder"
    (tmp_path / "model.GGUF").write_bytes(b"")
    found = locate(tmp_path / "model.GGUF")
    assert (found.source, found.target, found.options) == ("gguf", str(tmp_path), {"gguf_file": "model.GGUF"})


def test_a_home_folder_is_expanded(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert locate("~/llama").path == folder


@pytest.mark.parametrize("name", ["smolm2-135m", "smollm2-135", "SmolLM2-135M", "smollm2_135m"])
def test_a_slip_on_the_embedded_name_asks_no_hub(name: str, hub: Callable[..., None]) -> None:
    hub(AssertionError("the Hub was asked"))
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        locate(name)


def test_a_slip_on_a_path_suggests_its_neighbour(saved: Callable[..., Path]) -> None:
    folder = saved("llama", name="restaurant")
    with pytest.raises(ModelError, match=r"did you mean '.*restaurant'"):
        locate(folder.with_name("restaurnat"))


def test_what_is_no_model_is_not_suggested(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelError) as caught:
        locate(tmp_path / "nothin")
    assert "nothing" not in str(caught.value)


@pytest.mark.parametrize("name", ["./x", "a/b/c", "/nowhere/at/all", "model.gguf", "C:\\models\\x", "two words"])
def test_a_path_is_never_looked_for_on_the_hub(name: str, hub: Callable[..., None]) -> None:
    hub(AssertionError("the Hub was asked"))
    with pytest.raises(ModelError, match="not found"):
        locate(name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"a \.safetensors file"):
        locate(tmp_path / "model.safetensors")


def test_the_hub_pins_the_commit(hub: Callable[..., None]) -> None:
    hub(repository("config.json", "model.safetensors"))
    found = locate("owner/name", revision="main")
    assert (found.source, found.target, found.revision) == ("hub", "owner/name", COMMIT)
    assert found.options == {"revision": COMMIT}
    assert not found.cached


def test_pickles_on_the_hub_are_refused_before_any_download(hub: Callable[..., None]) -> None:
    hub(repository("config.json", "pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        locate("owner/name")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (hub_error(RepositoryNotFoundError), "not here, and not on the Hub"),
        (hub_error(GatedRepoError), "gated on the Hub.*hf auth login"),
        (hub_error(RevisionNotFoundError), "no revision 'v9'"),
        (ConnectionError("no route to host\nand an essay"), r"cannot be reached \(no route to host\).*connect, or"),
        (RuntimeError(), r"cannot be reached \(RuntimeError\)"),
    ],
)
def test_bad_days_of_the_hub_are_readable(hub: Callable[..., None], error: Exception, text: str) -> None:
    hub(error)
    with pytest.raises(ModelError, match=text) as caught:
        locate("owner/name", revision="v9")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_cached_model_loads_without_the_hub(
    saved: Callable[..., Path], hub: Callable[..., None], tmp_path: Path
) -> None:
    folder = saved("llama")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    hub(ConnectionError("unplugged"))
    base = load_base("owner/name")
    assert (base.source, base.hub_id) == ("hub", "owner/name")
    assert base.content_hash == load_base(folder).content_hash
