"""Every call that saves or resumes a run fails once, in every way: nothing is lost, the next gives the same bits.

A fixed sample of the calls; LEANTUNE_FAULTS=300 takes more of them, LEANTUNE_FAULTS=all (`make faults`) takes all.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from leantune.cli import main
from leantune.core import atomic
from leantune.core.errors import LeantuneError, RunError
from leantune.train import Run, RunConfig, fit, resume
from leantune.train.checkpoint import checkpoints, unseal
from train.fault import BROKEN, FULL, KILL, KINDS, SHORT, SILENT, FaultyFiles
from train.resume_fixture import Killed, act_at, assert_same_run, kill, tensors_of

pytestmark = pytest.mark.usefixtures("quick")

PARTS = 12
WANTED = os.environ.get("LEANTUNE_FAULTS", "12")
# Names that only something unfinished has.
UNFINISHED = (".tmp-", ".previous", ".writing", ".removed", ".torn")


@dataclass(frozen=True)
class Stage:
    """What is to fail: a run into a new folder, one over an older result, or the resumption of one."""

    name: str
    before: Path
    settings: dict[str, Any]
    whole: Path
    points: list[tuple[int, str]]
    calls: list[tuple[str, str]]

    def go(self, folder: Path) -> Run:
        """Do it, in a folder that holds what was there before."""
        if self.name != "resume":
            return fit(RunConfig(**{**self.settings, "out": folder, "overwrite": True}), progress=False)
        return resume(folder, progress=False)


def plain_card(model: PeftModel, folder: str) -> None:
    """PEFT's model card without its template, which takes longer to compile than all the rest of saving."""
    with open(Path(folder) / "README.md", "w", encoding="utf-8") as file:
        file.write("---\nlibrary_name: peft\n---\n")


@pytest.fixture(autouse=True)
def short_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", plain_card)


@pytest.fixture(scope="module")
def settings(llama_folder: Path, rows_file: Path) -> dict[str, Any]:
    """Three steps with a checkpoint after each."""
    options = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.2}
    basic = {"limit": 8, "batch_size": 2, "max_steps": 3, "save_steps": 1, "keep_checkpoints": 1, "device": "cpu"}
    return {**basic, "model": str(llama_folder), "data": rows_file, "method": "lora", "method_options": options}


@pytest.fixture(scope="module")
def stages(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Both stages, with the calls that each makes when nothing fails."""
    home = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", plain_card)
        patch.setattr("leantune.train.run.draw_loss", lambda _, path, title: atomic.write_bytes(path, b"picture"))
        # A stranger's leftover, and an older result, which must stay until a new one is there.
        fit(RunConfig(**{**settings, "out": home / "old", "max_steps": 1, "seed": 5}), progress=False)
        fit(RunConfig(**{**settings, "out": home / "whole"}), progress=False)
        shutil.copytree(home / "old", home / "half")
        with pytest.MonkeyPatch.context() as inner:
            act_at(3, inner, kill)
            with pytest.raises(Killed):
                fit(RunConfig(**{**settings, "out": home / "half", "overwrite": True}), progress=False)
        made = {}
        for name, before in (("fresh", home / "new"), ("save", home / "old"), ("resume", home / "half")):
            folder = home / f"count-{name}"
            prepare(before, folder)
            stage = Stage(name, before, settings, home / "whole", [], [])
            with FaultyFiles(folder) as layer:
                stage.go(folder)
            assert_same_run(folder, home / "whole")
            stage.calls.extend(layer.calls)
            stage.points.extend((number, kind) for number, (call, _) in enumerate(layer.calls) for kind in KINDS[call])
            made[name] = stage
    return made


def sample(points: list[tuple[int, str]], part: int) -> list[tuple[int, str]]:
    """The points of a part: all of them in turn, or a fixed sample spread over the whole stage."""
    count = len(points) if WANTED == "all" else int(WANTED)
    return [points[place * len(points) // count] for place in range(count)][part::PARTS]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", ["fresh", "save", "resume"])
def test_nothing_is_lost_whatever_call_fails(stages: dict[str, Stage], tmp_path: Path, name: str, part: int) -> None:
    stage = stages[name]
    points = sample(stage.points, part)
    assert points
    for at, kind in points:
        folder = tmp_path / f"{at}-{kind}"
        prepare(stage.before, folder)
        try:
            strike(stage, folder, at, kind)
            look(stage, folder)
            go_on(stage, folder)
        except Exception as error:
            raise AssertionError(f"{name}: call {at} {stage.calls[at]} failing by {kind}: {error}") from error
        shutil.rmtree(folder)


def prepare(before: Path, folder: Path) -> None:
    """The folder as it is before the stage; nothing, for a new one."""
    if before.exists():
        shutil.copytree(before, folder)


def strike(stage: Stage, folder: Path, at: int, kind: str) -> None:
    """Let one call fail; the run ends by one clear line, by the kill, or well."""
    with FaultyFiles(folder, at, kind) as layer:
        try:
            stage.go(folder)
        except Killed:
            assert kind == KILL
        except LeantuneError as error:
            assert kind != KILL
            text = str(error)
            assert "\n" not in text, f"one line, not: {text}"
            assert text.count("; ") >= 2, text
            assert str(folder) in text, text
        else:
            assert kind != KILL, "a kill cannot be survived"
    assert layer.fired, "the call was never reached"


def look(stage: Stage, folder: Path) -> None:
    """Whatever claims to be complete is complete, and there is a result: the older one or the new one."""
    if stage.before.exists():
        assert Run.open(folder).result == folder / "adapter", "the older result"
    if (folder / "adapter").exists() or (folder / ".adapter.previous").exists():
        assert Run.open(folder).result == folder / "adapter"
        found = tensors_of(folder)
        known = [tensors_of(each) for each in (stage.before, stage.whole) if each.exists()]
        assert any(all(tensor.equal(found[name]) for name, tensor in each.items()) for each in known), "nobody's result"
    for path in checkpoints(folder / "checkpoints"):
        assert unseal(path)[1] is None, path


def go_on(stage: Stage, folder: Path) -> None:
    """The next attempt gives the same bits, and clears away what the failed one left."""
    settings = RunConfig(**{**stage.settings, "out": folder, "overwrite": True})
    try:
        fit(settings, progress=False, resume=True)
    except RunError as error:
        text = str(error)
        if "complete: 3 steps" in text:
            # What failed was of no consequence, and nobody has written here since.
            assert_same_run(folder, stage.whole)
            return
        # It failed before the first checkpoint.
        signs = (
            "no checkpoint to go on from",
            "in the checkpoint",
            "complete: 1 steps",
            "not there",
            "not a run folder",
        )
        assert any(sign in text for sign in signs), text
        fit(settings, progress=False)
    assert_same_run(folder, stage.whole)
    left = [path for path in folder.rglob("*") if any(sign in path.name for sign in UNFINISHED)]
    assert [path for path in left if not path.name.endswith(".torn")] == []


def test_the_sweep_reaches_every_kind_of_call(stages: dict[str, Stage]) -> None:
    """What is counted is what a run does: a layer that saw nothing would find nothing."""
    saved, resumed = ({call for call, _ in stages[name].calls} for name in ("save", "resume"))
    assert saved >= set(KINDS) - {"rename", "remove"}
    assert resumed >= {"open to read", "read", "native read", "native write", "write", "replace", "mkdir", "unlink"}
    names = {path for _, path in stages["save"].calls}
    for name in ("run.json", "metrics.jsonl", "loss.png", "config.yaml", "checkpoints", "adapter"):
        assert any(name in path for path in names), name
    print(*(f"{stage.name}: {len(stage.calls)} calls, {len(stage.points)} points" for stage in stages.values()))


def test_the_layer_does_what_it_says(tmp_path: Path) -> None:
    def write(at: int, kind: str) -> tuple[str, bytes]:
        path = tmp_path / f"{at}{kind}"
        outcome = "wrote"
        with FaultyFiles(tmp_path, at, kind):
            try:
                with open(path, "wb") as file:
                    file.write(b"12345678")
            except OSError as error:
                outcome = errno.errorcode[error.errno or 0]
            except Killed:
                outcome = "killed"
                with pytest.raises(Killed):
                    path.unlink()
        return outcome, path.read_bytes() if path.exists() else b"-"

    assert write(0, FULL) == ("ENOSPC", b"-")
    assert write(0, KILL) == ("killed", b"-")
    assert write(1, BROKEN) == ("EIO", b"")
    assert write(1, SHORT) == ("ENOSPC", b"1234")
    assert write(1, KILL) == ("killed", b"1234")
    assert write(9, FULL) == ("wrote", b"12345678")


@pytest.mark.parametrize(
    ("call", "file", "kind", "text"),
    [
        ("native write", "optimizer.pt", SILENT, "not whole"),
        ("native write", "optimizer.pt", SHORT, "could not be written"),
        ("write", "metrics.jsonl", FULL, "No space left on device"),
        ("mkdir", "adapter", FULL, "No space left on device"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    stages: dict[str, Stage],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    call: str,
    file: str,
    kind: str,
    text: str,
) -> None:
    stage = stages["save"]
    folder = Path(shutil.copytree(stage.before, tmp_path / "run"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RunConfig(**{**stage.settings, "out": folder, "overwrite": True}).to_yaml(), encoding="utf-8")
    places = [place for place, (name, path) in enumerate(stage.calls) if name == call and file in path]
    # The folder itself is made first, the checkpoint and the line that fail are the last ones.
    at = places[0 if call == "mkdir" else -1]
    with FaultyFiles(folder, at, kind) as layer, pytest.raises(SystemExit) as ended:
        main(["train", str(recipe)])
    assert layer.fired
    assert ended.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert text in errors[0]
    assert f"leantune train --resume {folder}" in errors[0], "what to do next"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(folder)])
    assert ended.value.code == 0
    assert_same_run(folder, stage.whole)
