r"""Multi-LoRA: k tasks share one frozen ``A`` a layer; each trains its own ``B_i``, all in one forward if wished.

    y = W x + (alpha / r) B_i A x        A (r, in) shared, frozen;  B_i (out, r), zero at start, trained by task i

The adapter's name is the task. :meth:`MultiLoraModel.set_row_tasks` tells the task of each row of a mixed batch;
``A x`` is computed once, and it alone is kept for the backward. Given ``A`` the tasks are independent of each other.

Source: "Parameter-efficient fine-tuning via partially decomposable loss analysis and sharing" (Multi-LoRA), algorithm
1; with ``train_shared`` the setting of its theory, definition 1.1, where the gradient of ``A`` is the sum over the
tasks (claim 4.2). Parameters: ``r in + k r out`` against ``k r (in + out)`` for k LoRAs.

Where we deviate, and why: algorithm 1 draws ``A`` from N(0, 1), the paper's experiments draw it as stock LoRA does.
The latter is our default; the former is ``sqrt(3 in)`` times as large, and ``alpha`` must be as many times smaller
for the same training. Two more starts are ours (``_shared_projection.py``), as is training all tasks in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn.functional as F
from peft import get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as QUERY_AND_VALUE
from torch import Tensor, nn

from leantune.core.errors import ConfigError, MethodError, describe, did_you_mean, raise_all
from leantune.kernels.grouped_linear import RowGroups, add_grouped, grouped_linear
from leantune.methods import _shared_projection as sharing
from leantune.methods._base import BASE_ROW, AdapterConfig
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._registry import Method, register
from leantune.methods._row_task import RowTasks
from leantune.methods._shared_adapter import SharingLayer, SharingModel, TaskFactor
from leantune.methods._shared_projection import ParameterCount


@dataclass
class MultiLoraConfig(AdapterConfig):
    """Options of Multi-LoRA. A task that joins others on a model takes the ``A`` that is there.

    Raises:
        ConfigError: a value out of range or an unknown choice; all problems at once.
    """

    r: int = field(default=8, metadata={"help": "Rank: rows of the shared A (at most a layer's inputs)."})
    alpha: float = field(
        default=16.0, metadata={"help": "The share is scaled by alpha / r. Without effect on the orthonormal starts."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) instead."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the share's input while training."})
    shared_init: str = field(
        default="kaiming",
        metadata={
            "help": "Start of the shared A: 'kaiming' (as LoRA), 'gaussian' (N(0, 1), as in the paper's algorithm; "
            "divide alpha by sqrt(3 x inputs)), 'orthonormal', or 'activation_pca' (from calibration rows)."
        },
    )
    train_shared: bool = field(
        default=False, metadata={"help": "Train A too, by the sum of the gradients of all tasks that use it."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of a random A."})
    shared_from: str | None = field(
        default=None,
        metadata={"help": "Adapter folder of another task to take A from, instead of a start of its own."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("multi_lora")
        name, problems = type(self).__name__, []
        if self.r < 1:
            problems.append(describe(f"{name}.r", repr(self.r), "a rank of at least 1", "try 8"))
        if not self.alpha > 0:
            problems.append(describe(f"{name}.alpha", repr(self.alpha), "a positive number", "try 16"))
        if not 0 <= self.dropout < 1:
            problems.append(describe(f"{name}.dropout", repr(self.dropout), "a share in [0, 1)", "try 0"))
        if self.shared_init not in sharing.STARTS:
            near = did_you_mean(self.shared_init, sharing.STARTS)
            wanted = "one of " + ", ".join(sharing.STARTS)
            problems.append(describe(f"{name}.shared_init", repr(self.shared_init), wanted, near))
        raise_all(problems, ConfigError)

    @property
    def scaling(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)``."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def waits_for_data(self) -> bool:
        """Whether a fresh A is computed from calibration rows."""
        return self.shared_init in sharing.FROM_DATA and self.shared_from is None

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, without the place that A came from: the file that this goes with has its own copy."""
        return {**super().to_dict(), "shared_from": None}


class MultiLoraLinear(SharingLayer):
    """A linear layer with one ``A`` and a ``B`` for each task; PEFT's "all-linear" goes by the "Linear" in the name."""

    other_param_names = ("scaling", "dropout", "dropout_key")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.dropout_key: dict[str, str] = {}
        self.row_tasks: RowTasks | None = None

    def update_layer(self, adapter_name: str, config: MultiLoraConfig, template: str | None, **kwargs: Any) -> None:
        """Create the task's zero ``B`` (noise when ``init_weights`` is False), and ``A`` where there is none yet."""
        del template
        self.take_shared(config, kwargs["path"], kwargs["given"])
        factor = TaskFactor(self.out_features, len(self.shared.weight))
        if not config.init_weights:
            nn.init.normal_(factor.weight, std=0.02)
        self.multi_lora_B[adapter_name] = factor
        self.scaling[adapter_name], self.dropout[adapter_name] = config.scaling, config.dropout
        self.dropout_key[adapter_name] = f"{config.seed} {kwargs['path']}"
        self.place(adapter_name, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As every adapter layer's; rows told by ``set_row_tasks`` take their own task's ``B``."""
        if self.row_tasks is not None and not self.disable_adapters:
            kwargs.setdefault("adapter_names", self.row_tasks)
        return super().forward(x, *args, **kwargs)

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s B A x``."""
        if self.training and self.dropout[adapter]:
            x = F.dropout(x, self.dropout[adapter])
        return add_grouped(result[None], x[None], *self._arguments((adapter,)), RowGroups((1,)))[0]

    def fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """One kernel for base and share where the base is a dense frozen matrix."""
        if not self.is_plain(x) or (self.training and self.dropout[adapter]):
            return None
        return self._kernel(x[None], (adapter,), RowGroups((1,)))[0]

    def _arguments(self, tasks: Sequence[str]) -> tuple[Tensor, list[Tensor], list[float]]:
        return self.shared.weight, [self.factor(task) for task in tasks], [self.scaling[task] for task in tasks]

    def _kernel(self, x: Tensor, tasks: Sequence[str], groups: RowGroups) -> Tensor:
        base = cast(nn.Linear, self.base_layer)
        weight = base.weight.t() if self.transposed else base.weight
        return grouped_linear(x, weight, base.bias, *self._arguments(tasks), groups)

    def _mixed_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        rows = names if isinstance(names, RowTasks) else RowTasks(names)
        tasks = tuple(name for name in dict.fromkeys(rows) if self.has(name))
        if not tasks:
            return self.base_layer(x, *args, **kwargs)
        if self.training:
            self.require_start(tasks)
            if self.quantization_backend is not None:
                self._widen(list(tasks))
        shares = {task: self.dropout[task] for task in tasks if self.training and self.dropout[task]}
        groups = rows.groups(tasks, x.device)
        if not shares and not args and not kwargs and self.is_plain(x):
            return self._kernel(x, tasks, groups)
        result = self.base_layer(x, *args, **kwargs)
        for task, share in shares.items():
            x = rows.dropped(x, task, share, self.dropout_key[task])
        return add_grouped(result, x, *self._arguments(tasks), groups)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """``s B A``, which is all of the weight."""
        B, A = self.lora_factors(adapter)
        return B @ A, None, None

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``(s B, A)``."""
        B = self.factor(adapter).detach()
        return B * self.scaling[adapter], self.shared.weight.detach().to(B.dtype)


class MultiLoraModel(SharingModel):
    """Injects the layers and tells them the tasks of a batch's rows."""

    prefix = prefix_of("multi_lora")
    tuner_layer_cls = MultiLoraLinear

    def set_row_tasks(self, tasks: Sequence[str] | None, step: int | None = None) -> None:
        """Tell each row's task, for every forward until the next call (a checkpointed layer is run again later).

        Args:
            tasks: the adapter of each row of the batch, ``"__base__"`` for none; None: the active adapters for all.
            step: with it, dropout depends on seed, layer, task and step alone, and not on what else is in the batch.

        Raises:
            MethodError: a task that is no adapter of this model.
        """
        unknown = sorted(set(tasks or ()) - {BASE_ROW, *self.peft_config})
        problems = [
            describe(f"row task '{name}'", "no adapter has that name", did_you_mean(name, self.peft_config), "add it")
            for name in unknown
        ]
        raise_all(problems, MethodError)
        rows = None if tasks is None else RowTasks(tasks, step)
        for layer in self.sharing_layers().values():
            cast(MultiLoraLinear, layer).row_tasks = rows

    def parameter_count(self, tasks: int | None = None) -> ParameterCount:
        """Entries of ``A`` and of the ``B``s, and what as many LoRAs of the same rank would have.

        Args:
            tasks: for how many tasks; default: those on the model.
        """
        layers = self.sharing_layers().values()
        factor = sum(next(iter(layer.multi_lora_B.parameters())).numel() for layer in layers)
        shared = sum(layer.shared.weight.numel() for layer in layers)
        return ParameterCount(shared, factor, tasks or len(self.peft_config))

    def default_targets(self) -> tuple[str, ...]:
        """Query and value, as in the paper's experiments, where the model's type is known."""
        kind = getattr(getattr(self.model, "config", None), "model_type", None)
        return tuple(QUERY_AND_VALUE.get(str(kind), ())) or super().default_targets()


def _trainable_parameters(config: MultiLoraConfig, out_features: int, in_features: int) -> int:
    rank = min(config.r, in_features)
    return rank * (out_features + (in_features if config.train_shared else 0))


def _apply(model: nn.Module, config: MultiLoraConfig) -> nn.Module:
    return get_peft_model(model, config)


register_with_peft("multi_lora", MultiLoraConfig, MultiLoraModel)
METHOD = register(
    Method(
        name="multi-lora",
        title="LoRAs of several tasks over one shared A",
        config=MultiLoraConfig,
        formula="W + (alpha / r) B_i A, A frozen",
        paper="Multi-LoRA (partially decomposable loss)",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        default_learning_rate=2e-3,
        needs_batches=lambda config: config.waits_for_data,
        has_tasks=True,
        toy_options={"r": 4, "alpha": 8.0},
    )
)
