"""A Hub in a folder: the calls of huggingface_hub that leantune makes, answered from files."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import errors


def http_error(kind: type[Exception], status: int) -> Exception:
    """An error as the client raises it for a status."""
    request = httpx2.Request("POST", "https://hub.invalid/api")
    return kind(f"{status} from the Hub", response=httpx2.Response(status, request=request))


class FolderHub:
    """Repositories as folders: ``<root>/<owner>/<name>@<revision>``.

    Attributes:
        root: where they lie.
        user: whose token it is.
        failing: call -> the exception it raises instead.
        calls: what was called, with its keywords.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.user = "someone"
        self.private: set[str] = set()
        self.failing: dict[str, Exception] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for the real one."""
        for name in ("whoami", "repo_exists", "list_repo_files", "create_repo", "create_branch", "upload_folder"):
            method = getattr(self, name)
            monkeypatch.setattr(
                f"huggingface_hub.HfApi.{name}",
                lambda api, *words, _name=name, _method=method, **given: self._call(_name, _method, *words, **given),
            )
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download",
            lambda *words, **given: self._call("snapshot_download", self.snapshot_download, *words, **given),
        )

    def _call(self, name: str, method: Any, *words: Any, **given: Any) -> Any:
        self.calls.append((name, given))
        if name in self.failing:
            raise self.failing[name]
        return method(*words, **given)

    def repository(self, repo_id: str, revision: str | None = None) -> Path:
        return self.root / f"{repo_id}@{revision or 'main'}"

    def whoami(self) -> dict[str, Any]:
        return {"name": self.user}

    def repo_exists(self, repo_id: str) -> bool:
        return self.repository(repo_id).is_dir()

    def list_repo_files(self, repo_id: str) -> list[str]:
        folder = self.repository(repo_id)
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
        self.repository(repo_id).mkdir(parents=True, exist_ok=exist_ok)
        if private:
            self.private.add(repo_id)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        self.repository(repo_id, branch).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        revision: str | None,
        create_pr: bool,
        commit_message: str,
        delete_patterns: list[str],
    ) -> Any:
        target = self.repository(repo_id, "pr" if create_pr else revision)
        for name in self.list_repo_files(repo_id) if target == self.repository(repo_id) else []:
            if any(fnmatch(name, pattern) for pattern in delete_patterns):
                (target / name).unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        address = f"https://hub.invalid/{repo_id}"
        return SimpleNamespace(
            commit_url=f"{address}/commit/1", pr_url=f"{address}/discussions/1" if create_pr else None
        )

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        folder = self.repository(repo_id, revision)
        if not self.repository(repo_id).is_dir():
            raise http_error(errors.RepositoryNotFoundError, 404)
        if not folder.is_dir():
            raise http_error(errors.RevisionNotFoundError, 404)
        cache = self.root / "cache" / f"{len(self.calls)}"
        for name in (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, cache / name)
        return str(cache)
