"""What PEFT's tests are run on: for each method, the toy models and options that take the place of PEFT's own lists.

Every registered adapter method gets the general cases; ``OWN`` adds what one method alone can be asked. A method
is tested without an entry here, as long as its config understands ``target_modules``, ``modules_to_save`` and
``init_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of PEFT's ``TEST_CASES``: a toy model of its test file, and the options of the config."""

    title: str
    model: str
    options: Options


@dataclass(frozen=True)
class Own:
    """What is particular to one method.

    Attributes:
        cases: rows beside the general ones.
        options: options without which the method makes no sense on layers of 10 inputs and 2 outputs.
        not_identity: the options by which the adapter changes the output from the start.
        second: options by which a second adapter of a mixed batch differs from the first.
        language_model: options for PEFT's decoder tests, each on every model of ``plugin.DECODERS``.
        indexes_layers: the config has ``layers_to_transform`` and ``layers_pattern``.
        contradicted: pairs of an option and a test that asserts what the option says it gives up.
    """

    cases: tuple[Case, ...] = ()
    options: Options = field(default_factory=dict)
    not_identity: Options = field(default_factory=lambda: {"init_weights": False})
    second: Options = field(default_factory=dict)
    language_model: tuple[Options, ...] = ({"target_modules": None},)
    indexes_layers: bool = True
    contradicted: tuple[tuple[str, str], ...] = ()


GENERAL = (
    Case("MLP, one name", "MLP", {"target_modules": "lin0"}),
    Case("MLP, first layer", "MLP", {"target_modules": ["lin0"]}),
    Case("MLP, last layer", "MLP", {"target_modules": ["lin1"]}),
    Case("MLP, both layers", "MLP", {"target_modules": ["lin0", "lin1"]}),
    Case("MLP, pattern", "MLP", {"target_modules": r"lin\d"}),
    Case("MLP, one excluded", "MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    Case("MLP, a module to save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    Case("MLP with norms", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
    Case("MLP with norms, one saved", "MLP_LayerNorm", {"target_modules": ["lin0"], "modules_to_save": ["layernorm1"]}),
    Case("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    Case("Conv1D and linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    Case("Conv1D, a module to save", "EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
)
"""Linear layers and transformers' Conv1D: what a language model is made of. Convolutions and embeddings are not."""

OWN: Mapping[str, Own] = {
    "lora": Own(
        not_identity={"init_lora_weights": False},
        second={"r": 16},
        cases=(Case("MLP, scaled", "MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),),
    ),
    "s2ft": Own(
        # The default share is one channel of such a layer, and behind a ReLU a few channels may all be dead.
        options={"ratio": 0.5},
        second={"seed": 1},
        cases=(
            Case("MLP, by weight", "MLP", {"target_modules": ["lin0", "lin1"], "selection": "weight"}),
            Case(
                "MLP, smallest, apart",
                "MLP",
                {
                    "target_modules": ["lin0", "lin1"],
                    "selection": "weight",
                    "order": "smallest",
                    "coupling": "independent",
                },
            ),
            Case("MLP, all channels", "MLP", {"target_modules": ["lin0", "lin1"], "ratio": 1.0}),
            Case("MLP, counted", "MLP", {"target_modules": ["lin0", "lin1"], "ratio": None, "channels": 4}),
            Case("MLP, as LoRA", "MLP", {"target_modules": ["lin0"], "ratio": None, "match_lora_rank": 2}),
            Case("MLP, permuted", "MLP", {"target_modules": ["lin0", "lin1"], "permute": True}),
            Case("Conv1D, by weight", "EmbConv1D", {"target_modules": ["conv1d"], "selection": "weight"}),
        ),
        language_model=(
            {"target_modules": None, "ratio": 0.02},
            {"target_modules": None, "ratio": 0.1, "selection": "weight", "coupling": "independent"},
            {"target_modules": None, "ratio": 0.05, "permute": True},
        ),
        # The base stands reordered in memory until unload; this test reads its weights before.
        contradicted=(("permute", "test_get_base_model_state_dict"),),
    ),
    "lora-xs": Own(
        # The last layer of the toy models has two outputs, and a rank it does not have is warned of.
        options={"r": 2},
        second={"seed": 1},
        cases=(
            Case("MLP, orthonormal", "MLP", {"target_modules": ["lin0", "lin1"], "split": "core"}),
            Case("MLP, scaled", "MLP", {"target_modules": ["lin0"], "alpha": 4.0, "dropout": 0.1}),
            Case("MLP, preconditioned", "MLP", {"target_modules": ["lin0", "lin1"], "precondition": True}),
            Case("MLP, ranks", "MLP", {"target_modules": ["lin0", "lin1"], "r": "auto", "rank_budget": 2}),
            Case("Conv1D, mirrored", "EmbConv1D", {"target_modules": ["conv1d"], "split": "right"}),
        ),
        language_model=(
            {"target_modules": None, "r": 8},
            {"target_modules": None, "r": "auto", "rank_budget": 4, "split": "core"},
        ),
    ),
    "xgblora": Own(
        second={"seed": 1},
        cases=(
            Case("MLP, wider boosters", "MLP", {"target_modules": ["lin0", "lin1"], "r": 3, "alpha": 4.0}),
            Case("MLP, shrunk", "MLP", {"target_modules": ["lin0"], "shrinkage": 0.5, "fold": True}),
            Case("Conv1D, wider boosters", "EmbConv1D", {"target_modules": ["conv1d"], "r": 2}),
        ),
    ),
    "spft": Own(
        # The default share is one entry of such a layer, which a ReLU may well leave dead.
        options={"ratio": 0.5},
        second={"seed": 1},
        cases=(
            Case("MLP, by weight", "MLP", {"target_modules": ["lin0", "lin1"], "selection": "weight"}),
            Case(
                "MLP, smallest", "MLP", {"target_modules": ["lin0", "lin1"], "selection": "weight", "order": "smallest"}
            ),
            Case("MLP, all entries", "MLP", {"target_modules": ["lin0", "lin1"], "ratio": 1.0}),
            Case("MLP, as LoRA", "MLP", {"target_modules": ["lin0"], "ratio": None, "match_lora_rank": 2}),
            Case("Conv1D, by weight", "EmbConv1D", {"target_modules": ["conv1d"], "selection": "weight"}),
        ),
        language_model=(
            {"target_modules": None, "ratio": 0.02},
            {"target_modules": None, "ratio": 0.1, "selection": "weight"},
        ),
    ),
    "series-adapter": Own(
        # A tanh behind PEFT's wide embeddings saturates, and what is below it has no gradient to speak of.
        options={"bottleneck_size": 4, "non_linearity": "silu"},
        second={"bottleneck_size": 3},
        cases=(
            Case("MLP, with biases", "MLP", {"target_modules": ["lin0", "lin1"], "with_bias": True}),
            Case("MLP, relu, scaled", "MLP", {"target_modules": ["lin0"], "non_linearity": "relu", "scaling": 2.0}),
            Case("MLP, parallel", "MLP", {"target_modules": ["lin0", "lin1"], "placement": "parallel"}),
            Case("Conv1D, parallel", "EmbConv1D", {"target_modules": ["conv1d", "lin0"], "placement": "parallel"}),
        ),
        language_model=({"target_modules": None}, {"target_modules": None, "placement": "parallel"}),
        # The second layer starts from zero, and three steps of PEFT's SGD hardly move the first one behind one output.
        contradicted=(("bottleneck_size", "test_only_params_are_updated"),),
    ),
    "loreft": Own(
        second={"r": 3},
        cases=(
            Case("MLP, rank one", "MLP", {"target_modules": ["lin0", "lin1"], "r": 1}),
            Case("Conv1D, rank two", "EmbConv1D", {"target_modules": ["conv1d"], "r": 2}),
        ),
        language_model=(
            {"target_modules": None},
            {"target_modules": None, "positions": "f1+l2", "share_weights": False},
            {"target_modules": "all-linear", "positions": "l3"},
        ),
        contradicted=(
            # PEFT selects no blocks among what it expands "all-linear" to.
            ("target_modules", "test_training_decoders_layer_indexing"),
            # Of the toy's hidden states of width one R is a sign, which cannot train.
            ("target_modules", "test_only_params_are_updated"),
        ),
    ),
    "multi-lora": Own(
        # Both tasks take the A of the first, so what may differ is their scale.
        second={"alpha": 4.0},
        cases=(
            Case("MLP, gaussian", "MLP", {"target_modules": ["lin0", "lin1"], "shared_init": "gaussian"}),
            Case("MLP, orthonormal", "MLP", {"target_modules": ["lin0", "lin1"], "shared_init": "orthonormal"}),
            Case("MLP, scaled", "MLP", {"target_modules": ["lin0"], "alpha": 4.0, "dropout": 0.1}),
            Case("MLP, stabilised", "MLP", {"target_modules": ["lin0"], "use_rslora": True, "r": 2}),
            Case("MLP, trained A", "MLP", {"target_modules": ["lin0", "lin1"], "train_shared": True}),
            Case("Conv1D, orthonormal", "EmbConv1D", {"target_modules": ["conv1d"], "shared_init": "orthonormal"}),
        ),
        language_model=({"target_modules": None}, {"target_modules": None, "shared_init": "orthonormal", "r": 4}),
    ),
}


def of(method: str) -> Own:
    """What is particular to the method, or nothing."""
    return OWN.get(method, Own())
