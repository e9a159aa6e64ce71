"""Bytes of a base in 32, 8 and 4 bits, as loaded.

python benchmarks/bench_quantisation.py [--json benchmarks/results/bench_quantisation.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from machine import machine_facts

RESULT = Path(__file__).resolve().parent / "results" / "bench_quantisation.json"


def main() -> None:
    """Load the embedded model three times and write what it weighs."""
    from leantune.models import load_base

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    dense = load_base("smollm2-135m")
    rows: dict[str, object] = {
        "none": {"base_bytes": sum(each.numel() * each.element_size() for each in dense.model.parameters())}
    }
    for bits in ("8bit", "4bit"):
        quantised = load_base("smollm2-135m", quantization=bits).quantisation
        rows[bits] = None if quantised is None else quantised.to_dict()
    state = {"machine": machine_facts(threads=1), "base": dense.note, "rows": rows}
    arguments.json.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
