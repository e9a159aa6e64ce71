"""Leantune in one sitting: train a sliver of a model, compare it with its base, reload it, export it, merge it.

    python examples/00_tour.py             # some minutes on two cores
    python examples/00_tour.py --steps 2   # only to see it run

The model is SmolLM2-135M-Instruct, dequantised from a 4-bit copy; the data turns facts about a restaurant into a
sentence (E2E NLG). Any Hub id, folder or GGUF file, and any file of yours, can take their places.
"""

import argparse
from pathlib import Path

import leantune
from leantune.adapters import export_run
from leantune.data import read_rows
from leantune.evaluate import evaluate, generate, paired_difference

DATA = Path(__file__).resolve().parent / "data" / "e2e_nlg"


def tour(model: str, out: Path, steps: int, rows: int) -> None:
    """The whole path, from a file of rows to a LoRA folder that any server loads."""
    # 1. Train: one head and 64 feed-forward channels of each block (S2FT).
    config = leantune.RunConfig(
        model=model,
        data=DATA / "train.jsonl",
        out=out / "run",
        overwrite=True,
        method="s2ft",
        method_options={"heads": 1, "channels": 64},
        max_steps=steps,
        max_length=256,
        group_by_length=True,
        lr=8e-3,
    )
    run = leantune.fit(config)

    # 2. Compare: the same inputs before and after, with intervals. The base is the model with its adapter off.
    test = read_rows(DATA / "validation.jsonl", limit=rows)
    tuned = evaluate(run.model, run.tokenizer, test, metrics=["loss", "bleu"])
    with run.model.disable_adapter():
        base = evaluate(run.model, run.tokenizer, test, metrics=["loss", "bleu"])
    for name, difference in paired_difference(base, tuned).items():
        print(f"{name}: {base.metrics[name].value:.2f} -> {tuned.metrics[name].value:.2f} ({difference.value:+.2f})")

    # 3. Reload: the adapter is a PEFT adapter; `leantune.load` names every problem of the folder at once.
    fresh = leantune.load(leantune.load_base(model), run.result)
    print(generate(fresh, run.tokenizer, [test[0].prompt or ""], max_new_tokens=32)[0])

    # 4. Export: plain LoRA for PEFT, vLLM and others, written only after both models gave the same answers.
    cost = export_run(out / "run", out / "lora", overwrite=True)["conversion"]
    print(f"as LoRA: rank {cost['rank']}, largest weight error {cost['max_abs_error']:.1g}")

    # 5. Merge, and undo it bit for bit.
    fresh.merge_adapter()
    fresh.unmerge_adapter()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a Hub id, a folder, a GGUF file, or smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/tour"), help="folder to write into")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of 8 rows")
    parser.add_argument("--rows", type=int, default=200, help="validation rows to compare on")
    arguments = parser.parse_args()
    tour(arguments.model, arguments.out, arguments.steps, arguments.rows)
