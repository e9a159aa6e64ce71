"""How ``examples/data/e2e_nlg`` was drawn from the E2E NLG Challenge data set.

    python examples/data/make_e2e_sample.py FOLDER [--out examples/data/e2e_nlg]

``FOLDER`` holds ``train.parquet``, ``validation.parquet`` and ``test.parquet`` with the columns
``meaning_representation`` and ``human_reference`` (the public data set's own names). The draw is seeded and
uses nothing but the file order, so running it again writes the same bytes. Needs ``pyarrow``.

- test: the first 200 distinct inputs in file order, every reference of each, one row a reference.
- validation: 100 distinct inputs drawn at random, every reference of each, in file order.
- train: 2,000 rows drawn at random without replacement, after dropping every row whose facts, as a set, stand
  in the full validation or test set.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

SEED = 20170
TRAIN_ROWS = 2000
VALIDATION_INPUTS = 100
TEST_INPUTS = 200

Pair = tuple[str, str]


def read_pairs(path: Path) -> list[Pair]:
    """``(facts, sentence)`` of every row, in file order; line breaks become one space, outer blanks go."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path, columns=["meaning_representation", "human_reference"])
    facts, sentences = (table[name].to_pylist() for name in table.column_names)
    return [(fact, re.sub(r"\s*[\r\n]+\s*", " ", text.strip())) for fact, text in zip(facts, sentences, strict=True)]


def fact_set(facts: str) -> frozenset[str]:
    """The facts without their order: ``name[Aromi], food[Thai]`` equals ``food[Thai], name[Aromi]``."""
    return frozenset(fact.strip() for fact in re.findall(r"[^,\[\]]+\[[^\]]*\]", facts))


def draw(train: list[Pair], validation: list[Pair], test: list[Pair]) -> dict[str, list[Pair]]:
    """The three samples, by file name."""
    generator = random.Random(SEED)
    test_inputs = set(list(dict.fromkeys(facts for facts, _ in test))[:TEST_INPUTS])
    validation_inputs = set(generator.sample(list(dict.fromkeys(facts for facts, _ in validation)), VALIDATION_INPUTS))
    held_out = {fact_set(facts) for facts, _ in validation + test}
    candidates = [pair for pair in train if fact_set(pair[0]) not in held_out]
    return {
        "train": generator.sample(candidates, TRAIN_ROWS),
        "validation": [pair for pair in validation if pair[0] in validation_inputs],
        "test": [pair for pair in test if pair[0] in test_inputs],
    }


def row(facts: str, sentence: str) -> str:
    """One line of the jsonl file."""
    return json.dumps({"prompt": f"Facts: {facts}\nSentence:", "completion": f" {sentence}"}, ensure_ascii=False)


def main() -> None:
    """Read the three parquet files, write the three jsonl files, print the counts."""
    parser = argparse.ArgumentParser(description="Draw the E2E NLG sample of the demo.")
    parser.add_argument("folder", type=Path, help="folder with train.parquet, validation.parquet, test.parquet")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "e2e_nlg")
    arguments = parser.parse_args()
    samples = draw(*(read_pairs(arguments.folder / f"{split}.parquet") for split in ("train", "validation", "test")))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in samples.items():
        text = "".join(row(*pair) + "\n" for pair in pairs)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(pairs)} rows, {len({facts for facts, _ in pairs})} distinct inputs")


if __name__ == "__main__":
    main()
