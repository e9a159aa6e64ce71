"""Two processes train the same as one: DDP and FSDP2 over gloo, started by accelerate as users start them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import WORDS, make_llama, make_tokenizer, write_jsonl
from leantune.core.errors import RunError
from leantune.train import RunConfig, distributed, fit
from leantune.train.record import read_metrics

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
KINDS = {"ddp": "ddp_cpu.yaml", "fsdp2": "fsdp2_cpu.yaml"}
STEPS = 4
# Options of a case, and by what its batches grow when one process takes the rows of two.
CASES: dict[str, dict[str, Any]] = {
    "float64": {"save_steps": 2},
    "float32": {"dtype": "float32", "optimizer": "sgd", "lr": 1.0},
    "accumulated": {"gradient_accumulation": 2, "group_by_length": True, "logits": "all"},
    "lora": {"method": "lora", "method_options": {"r": 2, "target_modules": ["q_proj", "down_proj"]}},
    "full": {"method": "full", "method_options": {}},
    # A start from rows that the processes share out; SGD's step depends on the size of the gradient too.
    "lora-sb": {"method": "lora-sb", "method_options": {"r": 4}, "warmup_ratio": 0.0, "lr": 0.01},
    "lora-sb, sgd": {"method": "lora-sb", "method_options": {"r": 4}, "optimizer": "sgd", "lr": 1.0},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16", "optimizer": "sgd", "lr": 1.0},
    "head": {"task": "classification", "data": "films.jsonl", "eval_data": "few.jsonl"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows with very unequal numbers of loss tokens, and rows to evaluate on: an odd number of batches."""
    folder = tmp_path_factory.mktemp("distributed")
    make_llama().double().save_pretrained(folder / "llama")
    make_tokenizer().save_pretrained(folder / "llama")
    rows = [
        {
            "prompt": "Facts : " + WORDS[3 + n % 9] + " Answer :",
            "completion": " the" + " big cat" * (n % 2 * (1 + n % 5)),
        }
        # As many as fill the batches of an epoch: accelerate fills the last one up with rows that were seen.
        for n in range(24)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "other.jsonl", rows[:5])
    films = [
        {"text": "the film is " + ("good", "bad")[n % 2] + " and big" * (n % 3), "label": ("yes", "no")[n % 2]}
        for n in range(24)
    ]
    write_jsonl(folder / "films.jsonl", films)
    write_jsonl(folder / "few.jsonl", films[:5])
    return folder


def settings(place: Path, out: str, processes: int, **options: Any) -> dict[str, Any]:
    """Settings under which two processes see the batches of one."""
    return {
        "model": str(place / "llama"),
        "out": str(place / out),
        "method_options": {"heads": 1, "channels": 6},
        "dtype": "float64",
        "batch_size": 4 // processes,
        "max_steps": STEPS,
        "lr": 0.05,
        "clip": 0.5,
        "save_steps": 0,
        "seed": 3,
        "device": "cpu",
        **options,
        "data": str(place / options.get("data", "rows.jsonl")),
        "eval_data": str(place / options.get("eval_data", "other.jsonl")),
    }


@pytest.fixture(scope="module")
def one(place: Path) -> dict[str, Any]:
    """Every case in this process alone."""
    torch.set_num_threads(1)
    return {
        name: fit(RunConfig(**settings(place, f"one/{name}", 1, **case)), progress=False)
        for name, case in CASES.items()
    }


def launch(config: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with one of the shipped files."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / config), *words]
    # The launcher's own workers and nothing of an outer one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)


@pytest.fixture(scope="module", params=KINDS)
def two(request: pytest.FixtureRequest, place: Path) -> SimpleNamespace:
    """Every case in two processes, one of them also interrupted and gone on with, and one by the command line."""
    kind = request.param
    folder = place / kind
    folder.mkdir()
    cases = {name: {"config": settings(place, f"{kind}/{name}", 2, **case)} for name, case in CASES.items()}
    stopped = {"config": settings(place, f"{kind}/stopped", 2, **CASES["float64"])}
    cases["stopped"] = {**stopped, "interrupt": {"step": 3, "rank": 1}}
    cases["resumed"] = {**stopped, "resume": True}
    (folder / "cases.json").write_text(json.dumps(cases))
    given = settings(place, f"{kind}/command", 2)
    options = given.pop("method_options")
    words = [word for key, value in {**given, **options}.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    done = launch(KINDS[kind], worker, str(folder / "cases.json"), "train", *words)
    assert done.returncode == 0, done.stderr[-6000:]
    return SimpleNamespace(kind=kind, folder=folder, output=done)


def facts(two: SimpleNamespace, name: str) -> list[dict[str, Any]]:
    """What the two processes saw."""
    return [json.loads((two.folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def weights(folder: Path) -> dict[str, Tensor]:
    """The result of a run: of an adapter, or of the whole model."""
    [path] = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(path)


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any entry; every name, shape and dtype must be the same."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype), name
    return max(float((actual[name].double() - value.double()).abs().max()) for name, value in expected.items())


# Sums in another order. In float64 a rounding of 1e-16 of a gradient of size 1, which AdamW may blow up by lr / eps
# = 5e6 where the gradient itself is as small. In float32, by SGD: four steps of gradients below 0.5 (the clip) at
# rate 1, each a sum of some 500 products, sqrt(500) eps = 2.6e-6 at worst; forward and backward in bfloat16 round at
# 2^-9 whatever the order, row by row alike, and their sums are float32.
BOUNDS = {"float32": 2e-5, "bfloat16": 4e-3}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_same_as_one(name: str, two: SimpleNamespace, one: dict[str, Any], place: Path) -> None:
    expected, actual = weights(place / "one" / name), weights(two.folder / name)
    bound = BOUNDS.get(name, 1e-10)
    off = distance(actual, expected)
    print(f"{two.kind} {name}: parameters off by {off:.1e}")
    assert off <= bound
    # Training went somewhere, much further than the bound.
    steps = [read_metrics(folder / "metrics.jsonl") for folder in (place / "one" / name, two.folder / name)]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in steps]
    assert len(losses[0]) == len(losses[1]) == STEPS
    assert abs(losses[0][-1] - losses[0][0]) > 100 * bound
    # The Trainer sums what it logs in float32.
    assert losses[1] == pytest.approx(losses[0], abs=bound, rel=2 * torch.finfo(torch.float32).eps)
    for before, after in zip(*steps, strict=True):
        for key in ("step", "tokens", "loss_tokens", "learning_rate", "eval_tokens", "eval_accuracy"):
            assert after.get(key) == before.get(key), key
        assert after.keys() == before.keys()
        for key in {"grad_norm", "eval_loss"} & before.keys():
            # transformers' own loss, of the case with all logits, is formed in float32.
            near = pytest.approx(before[key], abs=10 * bound, rel=2 * torch.finfo(torch.float32).eps)
            assert after[key] == near, key
    records = [json.loads((folder / "run.json").read_text()) for folder in (place / "one" / name, two.folder / name)]
    assert [record["processes"] for record in records] == [1, 2]
    for key in ("trainable_parameters", "total_parameters", "rows_seen", "tokens_seen", "loss_tokens_seen", "steps"):
        assert records[0][key] == records[1][key], key


def test_the_processes_saw_the_same_run(two: SimpleNamespace) -> None:
    for name in CASES:
        first, second = facts(two, name)
        assert first == second
        assert first["processes"] == 2
        assert ("DTensor" in first["kinds"]) == (two.kind == "fsdp2")


def test_one_ctrl_c_stops_both_after_the_same_step_and_resume_goes_on_to_the_same_bits(two: SimpleNamespace) -> None:
    for seen in facts(two, "stopped"):
        assert (seen["status"], seen["signal"], seen["steps"]) == ("interrupted", "SIGINT", 3)
    for seen in facts(two, "resumed"):
        assert (seen["status"], seen["steps"]) == ("complete", STEPS)
    assert distance(weights(two.folder / "stopped"), weights(two.folder / "float64")) == 0
    lines = [
        [
            {key: line.get(key) for key in ("step", "loss", "tokens", "grad_norm", "eval_loss")}
            for line in read_metrics(path)
        ]
        for path in (two.folder / "stopped" / "metrics.jsonl", two.folder / "float64" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def test_checkpoints_are_whole_and_hold_the_adapter_alone(two: SimpleNamespace) -> None:
    folder = two.folder / "float64" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    last = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    assert distance(last, weights(two.folder / "float64")) == 0
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (folder / "checkpoint-4").iterdir()}
    if two.kind == "fsdp2":
        states = torch.load(folder / "checkpoint-4" / "pytorch_model_fsdp.bin", weights_only=True)
        assert all("s2ft_slice" in name for name in states)


def test_the_command_line_in_two_processes_speaks_and_writes_once(
    two: SimpleNamespace, one: dict[str, Any], place: Path
) -> None:
    said, told = two.output.stdout, two.output.stderr
    assert said.count("Next:") == 1
    together = "training on 1 threads in each of 2 processes"
    for line in ("base ", together, f"step {STEPS}/{STEPS}", "evaluation:", "complete:"):
        assert told.count(line) == 1, (line, told)
    assert distance(weights(two.folder / "command"), weights(place / "one" / "float64")) <= 1e-10
    names = {path.name for path in (two.folder / "command").iterdir()}
    assert names == {"adapter", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "run.json"}


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "leantune", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("leantune ")


# Parts, in this process


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == 2
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[path.stem.split("_")[0]]
    assert loaded.distributed_type == DistributedType(kind)
    if kind == "FSDP":
        assert loaded.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert loaded.deepspeed_config["zero_stage"] == int(path.stem[-1])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_launcher_knows_every_field_of_the_shipped_files(path: Path) -> None:
    """accelerate takes any field and ignores those that it does not know."""
    import yaml
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    inner = {**loaded.pop("fsdp_config", {}), **loaded.pop("deepspeed_config", {})}
    assert set(inner) <= known
    assert set(loaded) - known <= {"compute_environment", "distributed_type", "use_cpu"}


def test_a_lost_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.lost_processes() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert distributed.lost_processes() is None
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "ddp_cpu.yaml" in str(distributed.lost_processes())
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert distributed.lost_processes() is None


def test_fsdp1_on_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RunError, match="set fsdp_version: 2"):
        distributed.shard_on_cpu(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU))


def test_zero3_parts_are_gathered_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is not installed here: a stand-in for its context, which fills the parameters it is given."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.requires_grad_(False)
    opened: list[int] = []
    for name, parameter in model.named_parameters():
        parameter.ds_id = name  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)

    class Gathered:
        def __init__(self, parameters: list[Any]) -> None:
            self.parameters = parameters
            opened.append(len(parameters))

        def __enter__(self) -> None:
            for each in self.parameters:
                each.data = wanted[each.ds_id]

        def __exit__(self, *error: Any) -> None:
            for each in self.parameters:
                each.data = torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered)))
    found = distributed.gathered(model)
    assert found is not None
    assert found.keys() == {"1.weight"}
    assert torch.equal(found["1.weight"], wanted["1.weight"])
    whole = distributed.gathered(model, everything=True)
    assert whole is not None
    assert distance(whole, wanted) == 0
    assert opened == [1, 1, 1]
    assert all(math.prod(each.shape) == 0 for each in model.parameters())


def test_a_model_in_one_piece_is_not_gathered() -> None:
    assert distributed.gathered(nn.Linear(2, 2)) is None
