"""The order of imports, and what importing Leantune costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


_LOAD = "peft.PeftConfig.from_pretrained({folder!r})"


def test_methods_are_registered_in_whichever_order_the_imports_come(adapter_folder: Path) -> None:
    load = _LOAD.format(folder=str(adapter_folder))
    # Together: each process takes seconds to import torch.
    running = {
        "leantune first": run(f"import leantune, peft; print(type({load}).__name__)"),
        # A method's file in its author's hands: the first import is that of a base class.
        "a base class first": run(f"import leantune.methods._base, peft; print(type({load}).__name__)"),
        "peft first": run(
            "import peft\n"
            f"try: {load}\n"
            "except KeyError as error: print('unknown', error)\n"
            f"import leantune; print(type({load}).__name__)"
        ),
    }
    said = {}
    for order, process in running.items():
        out, error = process.communicate()
        assert process.returncode == 0, f"{order}\n{error}"
        said[order] = out.split("\n")
    assert said["leantune first"] == said["a base class first"] == ["S2FTConfig", ""]
    # Stock PEFT alone does not know the method; the model card and leantune.load tell what to import.
    assert said["peft first"] == ["unknown 'S2FT'", "S2FTConfig", ""]


_HOOK = """
import sys, types
sys.path.insert(0, sys.argv[1])
before = list(sys.meta_path)
import leantune
calls = []
methods = types.ModuleType("leantune.methods")
methods.names = lambda: calls.append("peft" in sys.modules and hasattr(sys.modules["peft"], "get_peft_model"))
sys.modules["leantune.methods"] = methods
import peft
import peft.inner
import importlib.resources
print(calls, sys.meta_path == before, type(peft.__loader__).__name__, type(peft.__spec__.loader).__name__)
print(importlib.reload(peft) is peft, importlib.resources.files("peft").name, calls)
"""


def test_the_hook_registers_once_and_leaves_peft_as_it_is(tmp_path: Path) -> None:
    """With a stand-in for PEFT, which takes seconds to import."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("def get_peft_model(): pass\n", encoding="utf-8")
    (tmp_path / "peft" / "inner.py").write_text("", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", _HOOK, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[True] True SourceFileLoader SourceFileLoader", "True peft [True]"], (
        done.stderr
    )


def test_importing_leantune_alone_is_light() -> None:
    heavy = "[m for m in ('torch', 'peft', 'transformers', 'numpy') if m in sys.modules]"
    out, error = run(f"import sys, leantune; print({heavy})").communicate()
    assert out.strip() == "[]", error
