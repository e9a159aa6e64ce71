"""The shape of the house, as rules over the syntax tree: who imports whom, sizes, names, safety, honest tests.

Each rule is a function from one file to its problems, and each has a planted file that it must catch, so that no rule
can pass by looking at nothing.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# room -> the rooms it may import (itself always). `leantune/testing.py` counts as the room "testing".
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "kernels": {"core"},
    "methods": {"core", "kernels"},
    "models": {"core"},
    "data": {"core"},
    "tasks": {"core"},
    "evaluate": {"core", "models", "data", "tasks"},
    "adapters": {"core", "kernels", "methods", "models", "data"},
    "train": {"core", "kernels", "methods", "models", "data", "tasks", "evaluate", "adapters"},
    "testing": {"core", "kernels", "methods", "models", "data", "tasks", "evaluate", "adapters", "train"},
    "cli": {"core", "kernels", "methods", "models", "data", "tasks", "evaluate", "adapters", "train"},
}
# What `pip install leantune` without extras brings: its dependencies, and what these cannot do without.
CORE_INSTALL = {
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "huggingface_hub",
    "tokenizers",
    "yaml",
    "tqdm",
    "typing_extensions",
}
NEEDS_EXTRAS = {"train", "cli"}

FILE_LINES = 500
METHOD_FILE_LINES = 250
FUNCTION_LINES = 60
# Method files that are longer: their ceiling, and why.
LONG_METHOD_FILES: dict[str, int] = {
    "s2ft.py": 400,  # two sides of a coupling, budgets in three currencies, and co-permutation
}

REGISTRATION_MODULES = ("peft.mapping", "peft.utils.peft_types")
REGISTRATION_NAMES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "register_peft_method",
    "_member_map_",
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
COMPARISONS = {"allclose", "equal", "isclose", "array_equal", "array_equiv"}
CLOCKS = {"time", "perf_counter", "perf_counter_ns", "monotonic", "process_time", "thread_time", "time_ns"}
# The method bodies that torch and transformers call by name; their class says what they do.
HOOKS = {"forward", "backward", "setup_context"}
UNFINISHED = ("TO" + "DO", "FIX" + "ME", "X" + "XX")


@dataclass(frozen=True)
class File:
    """One Python file: where it stands, relative to the root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        return Path(self.path).parts

    @property
    def in_package(self) -> bool:
        return self.parts[:2] == ("src", "leantune")

    @property
    def is_test(self) -> bool:
        return self.parts[0] == "tests"

    @property
    def room(self) -> str:
        """The folder below ``src/leantune``, the file's own name for a file right there, or ``""``."""
        return Path(self.parts[2]).stem if self.in_package and len(self.parts) > 2 else ""

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(self.tree)


Rule = Callable[[File], list[str]]


def _imports(file: File) -> Iterator[tuple[int, str]]:
    """Every imported module as (line, dotted name), inside functions too; ``from a import b`` gives ``a.b``."""
    for node in file.nodes():
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def rule_rooms(file: File) -> list[str]:
    """Lower rooms never import higher ones, and nobody imports the command line."""
    if not file.in_package or file.room in ("__init__", "_peft_hook", "__main__"):
        # These hand out public names and register methods, both on first use, and start the command line.
        return []
    if file.room not in ALLOWED:
        return [f"{file.path}: room '{file.room}' is not in the table of rooms"]
    problems = []
    for line, name in _imports(file):
        if name.startswith("."):
            problems.append(f"{file.path}:{line}: relative import; write it from 'leantune'")
        if name.split(".")[0] != "leantune" or name == "leantune.__version__":
            continue
        target = [*name.split("."), ""][1]
        if target != file.room and target not in ALLOWED[file.room]:
            problems.append(f"{file.path}:{line}: '{file.room}' imports '{name}'")
    return problems


def rule_core_is_light(file: File) -> list[str]:
    """core is torch and the standard library."""
    if file.room != "core":
        return []
    fine = sys.stdlib_module_names | {"torch", "leantune"}
    return [f"{file.path}:{line}: core imports '{name}'" for line, name in _imports(file) if _top(name) not in fine]


def rule_extras_are_optional(file: File) -> list[str]:
    """What an extra brings is imported inside functions, so that the core install can import every other room."""
    if not file.in_package or file.room in NEEDS_EXTRAS:
        return []
    top_level = File(file.path, "\n".join(ast.unparse(node) for node in _at_import(file.tree.body)))
    fine = sys.stdlib_module_names | CORE_INSTALL | {"leantune"}
    return [f"{file.path}: imports '{name}' at its top" for _, name in _imports(top_level) if _top(name) not in fine]


def _top(name: str) -> str:
    return name.split(".")[0]


def _at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The import statements that run when a module is imported: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _at_import([*node.body, *node.orelse])
        elif isinstance(node, (ast.With, ast.ClassDef)):
            yield from _at_import(node.body)


def rule_names(file: File) -> list[str]:
    """A file is called after what it holds."""
    vague = {"util", "utils", "helper", "helpers", "common", "misc"}
    return [f"{file.path}: '{part}' says nothing" for part in file.parts if Path(part).stem in vague]


def rule_lengths(file: File) -> list[str]:
    """Files and functions stay as long as one can read."""
    lines = file.text.count("\n")
    problems = [f"{file.path}: {lines} lines, ceiling {FILE_LINES}"] if lines > FILE_LINES else []
    if not file.in_package:
        return problems
    name = file.parts[-1]
    is_method = file.room == "methods" and not name.startswith("_")
    ceiling = LONG_METHOD_FILES.get(name, METHOD_FILE_LINES)
    if is_method and lines > ceiling:
        problems.append(f"{file.path}: {lines} lines, ceiling of a method file {ceiling}")
    for node in file.nodes():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            has_text = ast.get_docstring(node) is not None and len(node.body) > 1
            length = (node.end_lineno or 0) - (node.body[1].lineno if has_text else first.lineno) + 1
            if length > FUNCTION_LINES:
                problems.append(f"{file.path}:{node.lineno}: {node.name} has {length} lines, ceiling {FUNCTION_LINES}")
    return problems


def rule_registration(file: File) -> list[str]:
    """PEFT's registration internals are touched in one file, where the version guard is."""
    if not file.in_package or file.path.endswith("methods/_peft.py"):
        return []
    problems = [
        f"{file.path}:{line}: '{name}' belongs in methods/_peft.py"
        for line, name in _imports(file)
        if name.startswith(REGISTRATION_MODULES) or name.split(".")[-1] in REGISTRATION_NAMES
    ]
    for node in file.nodes():
        if isinstance(node, ast.Attribute) and node.attr in REGISTRATION_NAMES:
            problems.append(f"{file.path}:{node.lineno}: '{node.attr}' belongs in methods/_peft.py")
    return problems


def rule_no_pickle(file: File) -> list[str]:
    """Nothing from outside is unpickled and no outside code is run unasked."""
    if not file.in_package:
        return []
    problems = [f"{file.path}:{line}: imports '{name}'" for line, name in _imports(file) if _top(name) in PICKLES]
    for node in file.nodes():
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True":
            problems.append(f"{file.path}:{node.lineno}: torch.load without weights_only=True")
        if given.get("allow_pickle") == "True" or given.get("trust_remote_code") == "True":
            problems.append(f"{file.path}:{node.lineno}: {_called(node)} may run outside code")
    return problems


def rule_comparisons_are_asserted(file: File) -> list[str]:
    """A comparison whose result is dropped can not fail."""
    if not file.is_test:
        return []
    return [
        f"{file.path}:{node.lineno}: the result of {_called(node.value)} is dropped"
        for node in file.nodes()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) in COMPARISONS
    ]


def rule_docstrings(file: File) -> list[str]:
    """Every module, public class and public function says what it is for."""
    if not file.in_package:
        return []
    problems = [] if ast.get_docstring(file.tree) else [f"{file.path}: no docstring"]
    found: list[ast.stmt] = [node for node in file.tree.body if not getattr(node, "name", "_").startswith("_")]
    for node in list(found):
        if isinstance(node, ast.ClassDef):
            found += [inner for inner in node.body if not getattr(inner, "name", "_").startswith("_")]
    for node in found:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name in HOOKS:
            continue
        overload = any("overload" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in node.decorator_list)
        if ast.get_docstring(node) is None and not overload:
            problems.append(f"{file.path}:{node.lineno}: {node.name} has no docstring")
    return problems


def rule_finished(file: File) -> list[str]:
    """Nothing is left for later in a comment."""
    return [
        f"{file.path}:{number}: '{word}'"
        for number, line in enumerate(file.text.splitlines(), 1)
        for word in UNFINISHED
        if word in line
    ]


def rule_no_clock(file: File) -> list[str]:
    """No test measures time; times live in benchmarks/. (A runner that starts tests may say how long it took.)"""
    if not file.is_test or not file.parts[-1].startswith(("test_", "conftest")):
        return []
    problems = []
    for line, name in _imports(file):
        if name.startswith("timeit") or (name.startswith("time.") and name.split(".")[1] in CLOCKS):
            problems.append(f"{file.path}:{line}: imports '{name}'")
    for node in file.nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"time.{clock}" for clock in CLOCKS}:
            problems.append(f"{file.path}:{node.lineno}: reads a clock")
    return problems


# rule -> (path, text) of a file that it must object to.
PLANTED: dict[Rule, tuple[str, str]] = {
    rule_rooms: ("src/leantune/core/x.py", "def f():\n    from leantune.methods import get\n"),
    rule_core_is_light: ("src/leantune/core/x.py", "def f():\n    import numpy\n"),
    rule_extras_are_optional: ("src/leantune/evaluate/x.py", "try:\n    pass\nfinally:\n    pass\nimport sacrebleu\n"),
    rule_names: ("src/leantune/data/utils.py", ""),
    rule_lengths: ("src/leantune/data/x.py", "def f():\n" + "    f()\n" * 61),
    rule_registration: ("src/leantune/methods/x.py", "import peft\npeft.PEFT_TYPE_TO_TUNER_MAPPING['a'] = 1\n"),
    rule_no_pickle: ("src/leantune/train/x.py", "import torch\ntorch.load('x', weights_only=False)\n"),
    rule_comparisons_are_asserted: ("tests/x.py", "import torch\ntorch.allclose(a, b)\n"),
    rule_docstrings: ("src/leantune/data/x.py", '"""x"""\nclass A:\n    """x"""\n    def f(self):\n        pass\n'),
    rule_finished: ("src/leantune/data/x.py", f"# {UNFINISHED[0]}: later\n"),
    rule_no_clock: ("tests/test_x.py", "import time\ndef f():\n    start = time.perf_counter()\n"),
}
MORE_PLANTED: list[tuple[Rule, str, str]] = [
    (rule_rooms, "src/leantune/train/x.py", "import leantune.cli\n"),
    (rule_rooms, "src/leantune/adapters/x.py", "from leantune import train\n"),
    (rule_rooms, "src/leantune/adapters/x.py", "from leantune import fit\n"),
    (rule_rooms, "src/leantune/models/x.py", "import importlib\nimportlib.import_module('leantune.train')\n"),
    (rule_rooms, "src/leantune/models/x.py", "from ..train import fit\n"),
    (rule_rooms, "src/leantune/attic/x.py", ""),
    (rule_lengths, "src/leantune/data/x.py", "x = 1\n" * 501),
    (rule_lengths, "src/leantune/methods/x.py", "x = 1\n" * 251),
    (rule_registration, "src/leantune/methods/x.py", "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING\n"),
    (rule_no_pickle, "src/leantune/data/x.py", "def f():\n    import pickle\n"),
    (rule_no_pickle, "src/leantune/models/x.py", "AutoModel.from_pretrained(x, trust_remote_code=True)\n"),
    (rule_docstrings, "src/leantune/data/x.py", '"""x"""\ndef f():\n    pass\n'),
    (rule_docstrings, "src/leantune/data/x.py", "x = 1\n"),
    (rule_no_clock, "tests/test_x.py", "from time import monotonic\n"),
]
FINE: list[tuple[Rule, str, str]] = [
    (
        rule_rooms,
        "src/leantune/train/x.py",
        "from leantune import __version__\nfrom leantune.evaluate import evaluate\n",
    ),
    (rule_core_is_light, "src/leantune/core/x.py", "import json\nimport torch.nn\nfrom leantune.core import atomic\n"),
    (rule_extras_are_optional, "src/leantune/evaluate/x.py", "import torch\ndef f():\n    import sacrebleu\n"),
    (rule_no_pickle, "src/leantune/train/x.py", "torch.load('x', weights_only=True)\n"),
    (rule_comparisons_are_asserted, "tests/x.py", "assert torch.equal(a, b)\n"),
    (rule_no_clock, "tests/test_x.py", "import time\ntime.sleep(0)\n"),
]


def _files() -> list[File]:
    return [
        File(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for room in ("src", "tests", "benchmarks", "examples")
        for path in sorted((ROOT / room).rglob("*.py"))
    ]


@pytest.fixture(scope="module")
def files() -> list[File]:
    found = _files()
    assert len([file for file in found if file.in_package]) > 5
    return found


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rule_holds_everywhere(rule: Rule, files: list[File]) -> None:
    problems = [problem for file in files for problem in rule(file)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rule_catches_a_planted_fault(rule: Rule) -> None:
    assert rule(File(*PLANTED[rule]))


@pytest.mark.parametrize(("rule", "path", "text"), MORE_PLANTED)
def test_rule_catches_more(rule: Rule, path: str, text: str) -> None:
    assert rule(File(path, text))


@pytest.mark.parametrize(("rule", "path", "text"), FINE)
def test_rule_lets_honest_code_pass(rule: Rule, path: str, text: str) -> None:
    assert rule(File(path, text)) == []


def test_every_room_is_in_the_table() -> None:
    rooms = {path.name for path in (ROOT / "src/leantune").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(ALLOWED)
    assert all("cli" not in allowed for allowed in ALLOWED.values())


@pytest.mark.parametrize("module", ["leantune", "leantune.cli", "leantune.core", "leantune.core.errors"])
def test_light_import(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'peft', 'transformers', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
