"""`leantune doctor`: every check on machines that are not this one, and that no check takes the others down."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import torch

from leantune.cli import diagnosis, doctor
from leantune.cli.diagnosis import Finding, examine

Command = Callable[..., tuple[int, str, str]]
HERE = ["torch>=1.0", 'typer>=0.1; extra == "train"', 'sacrebleu>=1; extra == "eval"', 'scipy>=1; extra == "eval"']


class About:
    """The metadata of an installed leantune."""

    def __getitem__(self, name: str) -> str:
        return {"Requires-Python": ">=3.11"}[name]

    def get_all(self, name: str) -> list[str]:
        assert name == "Provides-Extra"
        return ["train", "eval"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are found, by name; change it to change the machine."""
    versions = {"torch": "2.0", "typer": "0.2", "sacrebleu": "2.0", "scipy": "1.5"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(diagnosis, "version", version)
    monkeypatch.setattr(diagnosis, "requires", lambda name: HERE)
    monkeypatch.setattr(diagnosis, "metadata", lambda name: About())
    return versions


def of(check: diagnosis.Check) -> dict[str, Finding]:
    return {finding.name: finding for finding in check()}


def test_packages_that_fit(installed: dict[str, str]) -> None:
    assert {name: each.status for name, each in of(diagnosis.check_packages).items()} == dict.fromkeys(installed, "ok")


def test_a_missing_package_of_training_stops_it_and_one_of_evaluation_does_not(installed: dict[str, str]) -> None:
    del installed["typer"], installed["scipy"]
    found = of(diagnosis.check_packages)
    assert (found["typer"].status, found["typer"].fix) == ("missing", "pip install 'leantune[train]'")
    assert (found["scipy"].status, found["scipy"].fix) == ("note", "pip install 'leantune[eval]'")
    assert found["sacrebleu"].status == "ok"


def test_an_extra_that_is_absent_is_one_line(installed: dict[str, str]) -> None:
    del installed["sacrebleu"], installed["scipy"]
    found = of(diagnosis.check_packages)
    assert list(found) == ["torch", "typer", "eval"]
    assert (found["eval"].status, found["eval"].text) == ("note", "not installed: sacrebleu, scipy")


def test_an_old_package_is_told_with_the_line_that_renews_it(installed: dict[str, str]) -> None:
    installed["torch"] = "0.4"
    found = of(diagnosis.check_packages)["torch"]
    assert (found.status, found.text, found.fix) == ("missing", "0.4 (wanted >=1.0)", "pip install -U 'torch>=1.0'")


def test_the_requirements_are_those_of_the_installed_metadata() -> None:
    names = {finding.name for finding in diagnosis.check_packages()}
    lines = [line for line in requires("leantune") or [] if 'extra == "train"' in line or "extra" not in line]
    assert len(lines) > 10
    assert {diagnosis.Requirement(line).name for line in lines} <= names


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.platform, "python_version", lambda: "3.9.1")
    found = of(diagnosis.check_python)["Python"]
    assert found.status == "missing"
    assert "3.9.1" in found.text
    monkeypatch.setattr(diagnosis.platform, "python_version", lambda: "3.13.0rc1")
    assert of(diagnosis.check_python)["Python"].status == "ok"


def test_a_cpu_torch_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnosis, "_has_nvidia", lambda: False)
    assert "CUDA" not in of(diagnosis.check_devices)
    monkeypatch.setattr(diagnosis, "_has_nvidia", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = of(diagnosis.check_devices)["CUDA"]
    assert (found.status, "built for CPU alone" in found.text) == ("warning", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert of(diagnosis.check_devices)["CUDA"].fix == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "driver" in of(diagnosis.check_devices)["CUDA"].text


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "Toy GPU", 8 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert of(diagnosis.check_devices)["cuda:0"].text == "Toy GPU, 8.0 GiB, compute 9.0, bf16"


def test_what_the_cpu_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_usable_cpus", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True, "amx_tile": True})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = of(diagnosis.check_devices)
    assert "4 of" in found["CPU"].text
    assert "AVX2, AMX, AMX-BF16" in found["CPU"].text
    assert found["CPU bf16"].status == "ok"
    assert found["threads"].fix == "unset OMP_NUM_THREADS"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert of(diagnosis.check_devices)["CPU bf16"].status == "note"


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    [found] = diagnosis.check_devices()
    assert (found.status, "cannot be imported" in found.text) == ("missing", True)


def test_the_embedded_model_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leantune.models import embedded

    monkeypatch.setenv("LEANTUNE_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.delenv("LEANTUNE_EMBEDDED_WHEEL", raising=False)
    found = of(diagnosis.check_models)
    assert found["cache"].status == "ok"
    assert "fetches 93 MB" in found["smollm2-135m"].text
    monkeypatch.setenv("LEANTUNE_EMBEDDED_WHEEL", str(tmp_path / "none.whl"))
    assert of(diagnosis.check_models)["smollm2-135m"].status == "warning"
    folder = embedded.converted_folder()
    folder.mkdir(parents=True)
    for name in embedded.SMOLLM2.files:
        (folder / name).write_bytes(b"x" * 10**6)
    assert of(diagnosis.check_models)["smollm2-135m"].text == "ready, 4 MB"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert of(diagnosis.check_models)["cache"].fix == "set LEANTUNE_CACHE to a folder of yours"


def test_a_full_disk_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = available = 10**6
        total = 8 * 2**30

    import psutil

    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda place: Full)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Full)
    assert of(diagnosis.check_models)["disk here"].status == "warning"
    assert of(diagnosis.check_memory)["memory"].status == "warning"


def test_offline_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(diagnosis, "_reach", lambda *words: pytest.fail("asked the network"))
    [found] = diagnosis.check_hub()
    assert (found.status, found.fix) == ("warning", "unset HF_HUB_OFFLINE")


def test_a_hub_that_does_not_answer_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    answers = iter(["no route", None])
    monkeypatch.setattr(diagnosis, "_reach", lambda *words: next(answers))
    found = of(diagnosis.check_hub)
    assert (found["Hub"].status, "no route" in found["Hub"].text) == ("note", True)
    found = of(diagnosis.check_hub)
    assert found["Hub"].status == found["token"].status == "ok"
    assert all("secret" not in each.text for each in found.values())


@pytest.fixture
def server() -> Iterator[tuple[str, threading.Event]]:
    """A server that answers 404 once the event is set, and is silent before."""
    speak = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer:
                    speak.wait(5)
                    peer.recv(1000)
                    peer.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", speak
    speak.set()
    listener.close()


def test_reaching_a_server(server: tuple[str, threading.Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    url, speak = server
    assert diagnosis._reach(url, 0.2)
    speak.set()
    assert diagnosis._reach(url, 5.0) is None
    assert "refused" in (diagnosis._reach("http://127.0.0.1:9", 5.0) or "")


def test_peft_is_asked_whether_it_knows_our_methods(capsys: pytest.CaptureFixture[str]) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(diagnosis._REGISTRATION, {})
    assert json.loads(printed.getvalue()) == []


@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        ("print('[]')", "ok", "knows the methods"),
        ("print('chatter'); print('[\"s2ft\"]')", "missing", "does not know s2ft"),
        ("raise ImportError('torn package')", "missing", "torn package"),
        ("import time; time.sleep(60)", "warning", "took more than"),
    ],
)
def test_the_process_that_imports_peft(script: str, status: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_REGISTRATION", script)
    monkeypatch.setattr(diagnosis, "IMPORT_TIMEOUT", 0.3 if "sleep" in script else 30.0)
    [found] = diagnosis.Registration()()
    assert found.status == status
    assert text in found.text


def test_a_check_that_fails_takes_no_other_down() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("b", "first", "ok", "")
        raise ZeroDivisionError("oops")

    def sound() -> Iterator[Finding]:
        yield Finding("c", "last", "ok", "")

    found = list(examine({"b": broken, "c": sound}))
    assert [each.name for each in found] == ["first", "check", "last"]
    assert (found[1].status, "ZeroDivisionError: oops" in found[1].text) == ("warning", True)


def checks(*findings: Finding) -> dict[str, diagnosis.Check]:
    return {"group": lambda: iter(findings)}


def test_the_exit_code_says_whether_training_would_work(leantune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Finding("packages of [train]", "typer", "missing", "not installed", "pip install 'leantune[train]'")
    odd = Finding("hub", "Hub", "warning", "offline", "unset HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor, "CHECKS", checks(odd))
    code, out, _ = leantune("doctor", "--quick")
    assert code == 0
    assert "-> unset HF_HUB_OFFLINE" in out
    assert "Training would work. (1 warning above)" in out
    monkeypatch.setattr(doctor, "CHECKS", checks(odd, bad))
    code, out, _ = leantune("doctor", "--quick")
    assert code == 1
    assert "packages of [train]" in out
    assert out.rstrip().endswith("pip install 'leantune[train]'")
    code, out, _ = leantune("doctor", "--quick", "--json")
    report: dict[str, Any] = json.loads(out)
    assert (code, report["ok"], len(report["findings"])) == (1, False, 2)
    assert report["findings"][1] == bad.to_dict()


def test_this_machine_can_train(leantune: Command) -> None:
    code, out, _ = leantune("doctor", "--quick", "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True), report
    assert {"python", "packages", "devices", "models", "hub"} <= {each["group"] for each in report["findings"]}
    assert [each for each in report["findings"] if each["name"] == "check"] == []
