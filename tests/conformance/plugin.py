"""A pytest plug-in that makes PEFT's own test files run on one config class, and what starts it.

PEFT parametrises its tests by module-level lists of config classes. ``pytest.mark.parametrize`` keeps a reference
to such a list and expands it at collection; replacing the contents before collection therefore replaces the cases,
and PEFT's files stay as they were published.

Run as a script it tests one method in a fresh process: ``plugin.py STAGE METHOD REPORT``, with STAGE the folder
that ``run.py`` prepared, and writes what it saw to REPORT as JSON.
"""

from __future__ import annotations

import collections
import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import case
import pytest

MODULES = ("test_custom_models", "test_config", "test_decoder_models")

DECODERS = ("grouped_query_decoder", "fused_conv1d_decoder")
"""Folders of tiny models. Not named after their families: PEFT's tests skip by substrings of the name."""

DOWNLOADS = (
    # These fetch a checkpoint of peft-internal-testing from the Hub.
    "test_from_pretrained[",
    "test_from_pretrained_cache_dir[",
    "test_save_pretrained_with_runtime_config[",
    # This one walks the whole enum of types, whose members of ours need no mandatory options; it has no parameter.
    "test_from_peft_type",
    # A config with a peft_type of "test" cannot be read back by any method that is looked up by its type.
    "test_set_attributes[",
    # Needs a checkpoint; asked of stock LoRA alone.
    "test_save_pretrained_targeting_lora_to_embedding_layer[",
)

MERGES = ("merge", "merging", "test_forward_float16", "test_forward_bfloat16")
"""Parts of the names of PEFT's tests that merge; those of 16 bits do it in passing."""


class Conformance:
    """Puts one config class in the place of PEFT's, keeps its tests, and notes how each ended."""

    def __init__(self, tested: Any, owner: str) -> None:
        self.method = tested.name
        self.config = tested.config
        self.preset = tested.options
        self.own = case.of(owner)
        self.mergeable = tested.mergeable
        self.selected: list[str] = []
        self.outcomes: dict[str, str] = {}
        self.skips: collections.Counter[str] = collections.Counter()

    def options(self, **given: Any) -> dict[str, Any]:
        """The options of one config: what the method's name sets, what it always needs, and what the case gives."""
        return {**self.preset, **self.own.options, **given}

    def different(self, **given: Any) -> Any:
        """A config that is not the identity from the start."""
        return self.config(**self.options(**given), **self.own.not_identity)

    def pytest_configure(self) -> None:
        names = [f"tests.{name}" for name in MODULES]
        pytest.register_assert_rewrite("tests.testing_common", *names)
        custom, config, decoder = (importlib.import_module(name) for name in names)
        self._fill_custom(custom)
        self._fill_config(config)
        decoder.ALL_CONFIGS[:] = [
            (self.config, self.options(task_type="CAUSAL_LM", **each)) for each in self.own.language_model
        ]
        decoder.PEFT_DECODER_MODELS_TO_TEST[:] = list(DECODERS)

    def _fill_custom(self, module: types.ModuleType) -> None:
        rows = [
            (f"{each.title} {self.method}", each.model, self.config, self.options(**each.options))
            for each in (*case.GENERAL, *self.own.cases)
        ]
        module.TEST_CASES[:] = rows
        module.ALL_PEFT_CONFIG_CLASSES[:] = [self.config]

        active = {"same": ("lin0", "lin0"), "different": ("lin0", "lin1")}
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
            (
                f"{self.method} {title}",
                self.method,
                self.config,
                *(self.options(target_modules=[name]) | self.own.not_identity for name in names),
            )
            for title, names in active.items()
        ]
        first = self.different(target_modules=["lin0"])
        second = self.different(target_modules=["lin0"], **self.own.second)
        module.MIXED_ADAPTER_TEST_CASES[:] = [(f"{self.method} mixed", first, second)]
        self._fill_mixed(module.TestMixedAdapterBatches)
        common = module.TestPeftCustomModel
        replace_rows(common.test_adapter_name_makes_no_difference, "config0", [first])
        replace_rows(common.test_multiple_adapters_mixed_modules_to_save, "config_cls", [self.config])
        replace_rows(common.test_multiple_adapters_mixed_modules_to_save_order_switched, "config_cls", [self.config])

    def _fill_mixed(self, tests: Any) -> None:
        """The mixed-batch tests that name their configs inline."""

        def rows(title: str, *options: dict[str, Any]) -> list[tuple[Any, ...]]:
            return [(f"{self.method} {title}", *(self.different(**each) for each in options))]

        both = {"target_modules": ["lin0", "lin1"]}
        one, other = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
        saved = one | {"modules_to_save": ["lin1"]}
        recurrent = one | {"modules_to_save": ["gru"]}
        for test, new in (
            (tests.test_mixed_adapter_batches_different_target_layers, rows("different layers", one, other)),
            (tests.test_mixed_adapter_batches_partly_overlapping_target_layers, rows("overlapping layers", one, both)),
            (tests.test_mixed_adapter_batches_multiple_modules_to_save, rows("modules to save", saved, saved)),
            (tests.test_mixed_adapter_batches_unsupported_layer_raises, rows("unsupported", recurrent, recurrent)),
        ):
            replace_rows(test, "test_name, config0, config1", new)
        wrong = tests.test_mixed_adapter_batches_lora_wrong_adapter_name_raises
        replace_rows(wrong, "test_name, config", rows("wrong name", one))

    def _fill_config(self, module: types.ModuleType) -> None:
        mandatory = [(self.config, self.options())]
        for test in vars(module.TestPeftConfig).values():
            replace_rows(test, "config_class, mandatory_kwargs", mandatory, must=False)
        if not self.own.indexes_layers:
            replace_rows(module.TestPeftConfig.test_config_layers_to_transform_index_zero, None, [])
        replace_rows(module.TestPeftConfig.test_save_pretrained_with_target_modules, "config_class", [self.config])

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item in items:
            (kept if self._is_ours(item) else dropped).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)
        self.selected = [item.nodeid for item in kept]

    def _is_ours(self, item: pytest.Item) -> bool:
        parameters = getattr(item, "callspec", None)
        if parameters is None or any(name in item.name for name in DOWNLOADS):
            return False
        if not self.mergeable and any(part in item.name for part in MERGES):
            # What is no change of weights refuses all of these; its own tests assert how.
            return False
        given = parameters.params.get("config_kwargs", {})
        if any(given.get(option) and item.name.startswith(f"{test}[") for option, test in self.own.contradicted):
            return False
        return any(value is self.config or type(value) is self.config for value in parameters.params.values())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self.outcomes.get(report.nodeid)
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self.outcomes[report.nodeid] = "skipped"
            self.skips[str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)] += 1
        elif report.when == "call" and before is None:
            self.outcomes[report.nodeid] = "passed"


def replace_rows(test: Any, names: str | None, rows: list[Any], *, must: bool = True) -> None:
    """Replace the rows of the parametrisation called ``names`` (or of all, when None) on one test function."""
    found = False
    marks = getattr(test, "pytestmark", [])
    for index, mark in enumerate(marks):
        if mark.name != "parametrize" or (names is not None and mark.args[0] != names):
            continue
        found = True
        marks[index] = pytest.mark.parametrize(mark.args[0], rows, **mark.kwargs).mark
    if must and not found:
        raise LookupError(f"{test.__qualname__}: no parametrisation by {names!r}; PEFT's file has changed")


def stub_diffusers() -> None:
    """PEFT's tests import one name of diffusers at the top and use it in tests of image models alone."""
    module = types.ModuleType("diffusers")
    module.__spec__ = importlib.machinery.ModuleSpec("diffusers", loader=None)
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = module


def write_decoders(folder: Path) -> None:
    """Tiny language models with random weights, in the place of those PEFT fetches from the Hub."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    gpt2 = GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    for name, model in zip(DECODERS, (LlamaForCausalLM(llama), GPT2LMHeadModel(gpt2)), strict=True):
        model.save_pretrained(folder / name)


def main(stage: Path, method: str, report: Path) -> int:
    """Run PEFT's tests on one method; the current folder is ``stage``."""
    sys.path.insert(0, str(stage))
    stub_diffusers()
    from leantune import methods

    if not (stage / DECODERS[0]).exists():
        write_decoders(stage)
    tested = methods.get(method)
    # A preset is asked what the method whose config it shares is asked.
    sharing = [each for each in map(methods.get, methods.names()) if each.config is tested.config]
    plugin = Conformance(tested, min(sharing, key=lambda each: len(each.options)).name)
    files = [str(Path("tests") / f"{name}.py") for name in MODULES]
    arguments = ["-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(stage)]
    code = pytest.main([*arguments, *files], plugins=[plugin])
    report.write_text(
        json.dumps(
            {
                "exit_code": int(code),
                "selected": plugin.selected,
                "outcomes": plugin.outcomes,
                "skips": dict(plugin.skips.most_common()),
            }
        ),
        encoding="utf-8",
    )
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
