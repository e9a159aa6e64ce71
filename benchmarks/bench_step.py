"""Time and memory of a training step: S2FT against stock PEFT LoRA of equal trained parameters and full fine-tuning.

    python benchmarks/bench_step.py [--rounds 5] [--batch 4] [--length 128] [--json benchmarks/results/bench_step.json]

Every row is a fresh process on one thread, with gradient checkpointing off and on, in one run; the steps of all rows
are interleaved (A B C A B C ...), so that a machine that slows down slows all of them. All use the model's own loss,
every token carrying loss, a plain loop and AdamW over what trains: what differs is the method alone.

Columns: CPU seconds of a step (median of the rounds), its ratio to PEFT LoRA without checkpointing, peak resident bytes
above the loaded model, their ratio, and bytes that autograd keeps for the backward (parameters left out).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine_facts, status_bytes

ROOT = Path(__file__).resolve().parent.parent
# Equal trained parameters: 2,436,480 (S2FT) against 2,442,240 (LoRA).
ROWS: dict[str, dict[str, Any]] = {
    "s2ft": {"target_modules": ["o_proj", "down_proj"], "heads": 1, "channels": 77},
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "full": {},
}
PEER = "lora"


class Worker:
    """One method in its own process, stepping when told to."""

    def __init__(self, method: str, checkpointing: bool, batch: int, length: int, dtype: str = "float32") -> None:
        import torch

        from leantune.methods import get
        from leantune.models import load_base

        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = load_base("smollm2-135m", dtype=dtype).model
        kind = get(method)
        model = kind.apply(model, kind.config(**ROWS[method]))
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            if method == "full":
                model.disable_input_require_grads()
        self.model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.ids = torch.randint(0, 49_000, (batch, length))
        # Weights are mapped lazily from the file: read them all before the model's own memory is measured.
        for parameter in model.parameters():
            parameter.detach().sum()
        self.base_bytes = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return contextlib.nullcontext()

    def loss(self) -> Any:
        """The loss of one forward pass."""
        with self.autocast():
            return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def step(self) -> dict[str, float]:
        """One optimizer step; CPU seconds and the loss."""
        began = time.process_time()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"cpu_s": time.process_time() - began, "loss": loss.item()}

    def memory(self) -> dict[str, float]:
        """Peak bytes above the loaded model so far, and what autograd keeps in one forward."""
        import torch

        peak = status_bytes("VmHWM") - self.base_bytes
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return {"peak_bytes": peak, "saved_bytes": sum(kept.values()), "trained_parameters": self.trained}

    def serve(self) -> None:
        """Answer ``step`` and ``memory`` on standard input, one JSON line each."""
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(getattr(self, line.strip())()), flush=True)


class Remote:
    """A worker seen from the outside."""

    def __init__(
        self, name: dict[str, Any], words: list[str], arguments: argparse.Namespace, script: str = __file__
    ) -> None:
        self.name = name
        words = ["--worker", *words, str(arguments.batch), str(arguments.length)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._read()
        self.steps: list[dict[str, float]] = []

    def _read(self) -> str:
        assert self.process.stdout is not None, "the worker's output is not a pipe"
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self.name} ended early")
        return line

    def ask(self, what: str) -> dict[str, float]:
        """Its answer to ``step`` or ``memory``."""
        assert self.process.stdin is not None, "the worker's input is not a pipe"
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())  # type: ignore[no-any-return]


def row_of(remote: Remote) -> dict[str, Any]:
    """What a worker measured; it ends."""
    seconds = [step["cpu_s"] for step in remote.steps]
    row = (
        remote.name
        | remote.ask("memory")
        | {"step_s": statistics.median(seconds), "step_s_min": min(seconds), "step_s_max": max(seconds)}
        | {"losses": [step["loss"] for step in remote.steps]}
    )
    remote.process.terminate()
    return row


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, interleaved."""
    remotes = [
        Remote({"method": method, "checkpointing": on}, [method, str(int(on))], arguments)
        for on in (False, True)
        for method in ROWS
    ]
    for round_number in range(arguments.rounds + 1):
        for remote in remotes:
            answer = remote.ask("step")
            # The first round warms up: allocator, optimizer state.
            if round_number:
                remote.steps.append(answer)
        print(f"round {round_number} of {arguments.rounds}", file=sys.stderr, flush=True)
    rows = [row_of(remote) for remote in remotes]
    peers = next(remote.steps for remote in remotes if remote.name == {"method": PEER, "checkpointing": False})
    peer_row = next(row for row in rows if row["method"] == PEER and not row["checkpointing"])
    for row, remote in zip(rows, remotes, strict=True):
        ratios = [own["cpu_s"] / peer["cpu_s"] for own, peer in zip(remote.steps, peers, strict=True)]
        row["step_over_peft_lora"] = statistics.median(ratios)
        row["peak_over_peft_lora"] = row["peak_bytes"] / peer_row["peak_bytes"]
    return rows


def main() -> None:
    """Run the benchmark, or be one of its workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "bench_step.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        method, checkpointing, batch, length = arguments.worker
        Worker(method, bool(int(checkpointing)), int(batch), int(length)).serve()
        return
    rows = measure(arguments)
    state = {
        "machine": machine_facts(threads=1),
        "model": "SmolLM2-135M, float32",
        "batch": arguments.batch,
        "length": arguments.length,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(state, indent=1) + "\n")
    for row in sorted(rows, key=lambda each: (each["checkpointing"], each["step_s"])):
        print(
            f"{row['method']:6} checkpointing {'on ' if row['checkpointing'] else 'off'}  "
            f"{row['step_s']:6.2f} s ({row['step_over_peft_lora']:.2f} x)  "
            f"peak {row['peak_bytes'] / 2**20:6.0f} MiB ({row['peak_over_peft_lora']:.2f} x)  "
            f"saved {row['saved_bytes'] / 2**20:6.0f} MiB  trained {row['trained_parameters']:,}"
        )


if __name__ == "__main__":
    main()
