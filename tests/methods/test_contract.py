"""Every registered method against every check of the contract; nothing here knows a method but its variants."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from leantune import methods
from leantune.testing import CHECKS, FAMILIES, Check, NotApplicable, Subject, subject
from leantune.testing.closeness import assert_same
from leantune.testing.file import load_in_a_fresh_process, run_fresh_process, write_fresh_case
from leantune.testing.subject import own_layers, points

# 2026-11-23: stock LoRA says that it sets fan_in_fan_out for Conv1D by itself.
# 2026-11-25: here the loops are plain ones, which XGBLoRA says are no rounds.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:XGBLoRA trains without rounds:UserWarning"),
]

# Options beside a method's toy ones, under which the whole contract must hold too.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "s2ft": {
        "all-linear": {"target_modules": "all-linear"},
        "independent": {
            "heads": None,
            "channels": None,
            "ratio": 0.3,
            "target_modules": "all-linear",
            "coupling": "independent",
            "selection": "weight",
        },
        "activation": {"selection": "activation", "order": "smallest"},
        "product": {"selection": "product", "coupling": "independent", "target_modules": "all-linear"},
        "gradient": {"selection": "gradient", "target_modules": "all-linear"},
    },
    "lora": {"all-linear": {"target_modules": "all-linear", "use_rslora": True}},
    "lora-xs": {
        "ranks": {"r": "auto", "rank_budget": 3, "split": "core", "alpha": 6.0, "target_modules": "all-linear"},
    },
    "lora-sb": {
        "sketched": {"r": "auto", "rank_budget": 2, "sketch": 5, "split": "left", "target_modules": "all-linear"},
    },
    "xgblora": {"gradient": {"start": "gradient", "blocks_per_round": 0, "r": 3, "target_modules": "all-linear"}},
    "multi-lora": {
        "orthonormal": {"shared_init": "orthonormal", "target_modules": "all-linear", "use_rslora": True},
        "activation": {"shared_init": "activation_pca", "r": 3},
    },
}

# Another method's code, or PEFT's own, under other options: one family is enough, and together they cover both.
ONE_FAMILY = {
    "cola": "gpt2",
    "dora": "gpt2",
    "lora-ga": "llama",
    "pissa": "gpt2",
    "relora": "llama",
    "rslora": "llama",
    "vera": "llama",
}


def _subjects() -> list[Any]:
    found = []
    for name in methods.names():
        families = [ONE_FAMILY[name]] if name in ONE_FAMILY else FAMILIES
        for title, options in {"toy": {}, **VARIANTS.get(name, {})}.items():
            found += [
                pytest.param(subject(name, family, **options), id=f"{name}-{title}-{family}") for family in families
            ]
    return found


@pytest.mark.parametrize("check", [each for each in CHECKS if inspect.unwrap(each) is not load_in_a_fresh_process])
@pytest.mark.parametrize("tested", _subjects())
def test_contract(tested: Subject, check: Check) -> None:
    try:
        check(tested)
    except NotApplicable as fact:
        if _keeps_every_promise(tested):
            pytest.fail(f"{tested.method.name} is let off without a reason: {fact}")
        pytest.skip(str(fact))


def _keeps_every_promise(tested: Subject) -> bool:
    """Whether no stated fact lets this method off any check."""
    method = tested.method
    facts = (method.is_adapter, method.mergeable, method.identity_at_init, method.lora_form)
    facts = (*facts, method.needs_batches(tested.config()))
    return all(facts) and bool(own_layers(tested.wrap_perceptron()))


def test_all_load_in_one_fresh_process(tmp_path: Path) -> None:
    folders = []
    for number, parameter in enumerate(_subjects()):
        folder = tmp_path / f"{number}-{parameter.id}"
        folder.mkdir()
        write_fresh_case(parameter.values[0], folder)
        folders.append(folder)
    assert len(folders) > len(methods.names())
    run_fresh_process(folders)


@pytest.mark.parametrize("tested", _subjects())
def test_pickle(tested: Subject) -> None:
    if "pickle" in tested.method.gaps:
        pytest.skip(tested.method.gaps["pickle"])
    model = tested.wrap_perceptron()
    twin = pickle.loads(pickle.dumps(model))
    assert_same(twin(points()).detach(), model(points()).detach(), "output of the unpickled model")


def test_some_method_keeps_every_promise() -> None:
    assert any(_keeps_every_promise(parameter.values[0]) for parameter in _subjects())


def test_a_registered_method_is_never_missed() -> None:
    assert {parameter.values[0].method.name for parameter in _subjects()} == set(methods.names())
    assert all(subject(name).base(torch.float32) is not None for name in methods.names())
