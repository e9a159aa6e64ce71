"""Which channels of each expert train: the budget of an experts module, its ranking, and what that is measured by.

Every expert of a module trains the same number of channels. An experts module has a budget of its own: a ``ratio`` is
a share of its targeted weights, ``match_lora_rank`` counts LoRA of that rank on each expert's matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leantune.core.errors import TargetError, describe, did_you_mean
from leantune.methods import _selection as selecting
from leantune.methods._calibration import ActivationSource, Calibration, GradientSource, Watch
from leantune.methods._expert import DOWN, ExpertLayer, Experts, is_experts, require_known_experts, routes

Channels = dict[str, Tensor]
"""Weight name -> chosen channels of each expert, int64 ``(E, s)``."""
Squares = Callable[[selecting.Measure, str], Tensor]
"""``(measure, weight name)`` -> sums of squares of each channel, float64 ``(E, I)``; as ``_selection.Squares``."""


@dataclass(frozen=True)
class TargetedExperts:
    """An experts module of which something trains: its path in the unadapted model, the module, and which weights."""

    path: str
    module: nn.Module
    names: tuple[str, ...]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """All experts modules of a model by their path in it unadapted."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, ExpertLayer):
            found[path] = module.base_layer
        elif is_experts(module) and not path.endswith(".base_layer"):
            found[path] = module
    return found


def default_expert_targets(model: nn.Module) -> set[str] | None:
    """The output side of every expert, as ``target_parameters``; None where there are no such experts."""
    return {f"{path.rpartition('.')[2]}.{DOWN}" for path in experts_of(model)} or None


def targeted_experts(model: nn.Module, config: Any) -> list[TargetedExperts]:
    """The experts modules that ``target_parameters`` names.

    Raises:
        TargetError: an entry names nothing, or experts that are not supported; all entries at once.
    """
    wanted = sorted(config.target_parameters or ())
    modules = experts_of(model)
    known = {f"{path}.{name}": path for path, module in modules.items() for name in Experts(module).names}
    hits: dict[str, list[str]] = {}
    missing = []
    for target in wanted:
        matched = [key for key in known if key == target or key.endswith(f".{target}")]
        missing += [] if matched else [target]
        for key in matched:
            if _is_in_reach(known[key], key, config):
                hits.setdefault(known[key], []).append(key.rpartition(".")[2])
    if missing:
        leaves = sorted({".".join(key.split(".")[-2:]) for key in known})
        there = "the model's expert parameters are " + ", ".join(leaves) if leaves else "the model has no such experts"
        got = f"{', '.join(missing)} named nothing"
        near = did_you_mean(missing[0], leaves) if leaves else "name modules in target_modules"
        raise TargetError(describe("target_parameters", got, there, near))
    for path in hits:
        require_known_experts(path, modules[path])
    order = {path: number for number, path in enumerate(modules)}
    return [
        TargetedExperts(path, modules[path], tuple(n for n in Experts(modules[path]).names if n in names))
        for path, names in sorted(hits.items(), key=lambda hit: order[hit[0]])
    ]


def _is_in_reach(path: str, key: str, config: Any) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str) and (re.fullmatch(excluded, path) or re.fullmatch(excluded, key)):
        return False
    if isinstance(excluded, set) and any(
        each == name or name.endswith(f".{each}") for each in excluded for name in (path, key)
    ):
        return False
    blocks = config.layers_to_transform
    if blocks is None:
        return True
    block = re.search(r"\.(\d+)\.", path)
    return block is not None and int(block[1]) in ([blocks] if isinstance(blocks, int) else blocks)


def channel_count(experts: Experts, names: tuple[str, ...], budget: selecting.Budget) -> int:
    """How many channels of each expert train; 0 where the budget names heads alone."""
    if budget.heads is not None or budget.channels is not None:
        return min(budget.channels or 0, experts.channels)
    matrices = {name: (experts.per_channel[name] * experts.channels, experts.width) for name in names}
    a_channel = sum(experts.per_channel[name] for name in names) * experts.width
    return max(1, min(int(budget.parameters(matrices) // a_channel), experts.channels))


def choose_channels(target: TargetedExperts, config: Any, squares: Squares) -> Channels:
    """The channels of each expert that train; empty where the budget gives none.

    Args:
        target: the experts.
        config: budget, selection, order, coupling and seed are read.
        squares: what a ranking is made from.
    """
    experts = Experts(target.module)
    sides = {"both": target.names}
    if config.coupling == "independent":
        sides = {"inward": (experts.up,), "outward": (DOWN,)}
    chosen: Channels = {}
    for side, names in sides.items():
        own = tuple(name for name in names if name in target.names)
        # Both sides of an independent coupling get the same number, as elsewhere.
        count = channel_count(experts, target.names, config.budget) if own else 0
        if count:
            chosen |= dict.fromkeys(own, _rank(target, experts, own, count, side, config, squares))
    return chosen


def _rank(
    target: TargetedExperts,
    experts: Experts,
    names: tuple[str, ...],
    count: int,
    side: str,
    config: Any,
    squares: Squares,
) -> Tensor:
    if config.selection == "random":
        drawn = [
            torch.randperm(
                experts.channels, generator=selecting.seeded(config.seed, target.path, "expert", expert, side)
            )[:count]
            for expert in range(experts.experts)
        ]
        return torch.stack(drawn).sort(-1).values
    measures: dict[str, tuple[selecting.Measure, ...]] = {"product": ("weight", "activation")}
    scores = torch.ones(experts.experts, experts.channels, dtype=torch.float64)
    for measure in measures.get(config.selection, (config.selection,)):
        # There is one activation between both sides.
        asked = (DOWN,) if measure == "activation" else names
        scores = scores * torch.stack([squares(measure, name) for name in asked]).sum(0).sqrt()
    ranked = scores.sort(dim=-1, descending=config.order == "largest", stable=True).indices
    return ranked[:, :count].sort(-1).values


def weight_squares(target: TargetedExperts) -> Squares:
    """Answers for a choice by weight, one expert's weight at a time."""
    experts = Experts(target.module)

    def squares(measure: selecting.Measure, name: str) -> Tensor:
        del measure
        rows = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in experts.rows(name)]
        return experts.by_channel(name, torch.stack(rows).square().cpu())

    return squares


def provisional(target: TargetedExperts) -> Squares:
    """Answers of zero, for a choice whose size is all that matters yet."""
    experts = Experts(target.module)

    def squares(measure: selecting.Measure, name: str) -> Tensor:
        del measure, name
        return torch.zeros(experts.experts, experts.channels, dtype=torch.float64)

    return squares


class ExpertActivation:
    """``sum_t a_c(t)^2`` over the tokens routed to each expert, ``(E, I)``; routing weights are not in it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.experts = Experts(module)
        self.shape = (self.experts.experts, self.experts.channels)

    def listen(self, add: Callable[[Tensor], None], kept: Callable[[nn.Module, Tensor], Tensor]) -> RemovableHandle:
        """See :class:`~leantune.methods._calibration.ActivationSource`."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, chosen = kept(module, args[0]), kept(module, args[1])
            total = torch.zeros(self.shape, dtype=torch.float64, device=output.device)
            for expert, token, _ in routes(chosen, self.experts.experts):
                a = self.experts.gate(self.experts.inner(expert, x[token], slice(None)))
                total[expert] = torch.linalg.vector_norm(a, dim=0, dtype=torch.float64).square()
            add(total)

        return self.module.register_forward_hook(hook)


class ExpertGradient:
    """``dL/dW`` of one weight of one expert, as its rows ``(rows, H)``; zero where no token reaches the expert."""

    def __init__(self, module: nn.Module, expert: int, name: str) -> None:
        self.module, self.expert, self.name = module, expert, name
        self.experts = Experts(module)
        self.shape = (self.experts.per_channel[name] * self.experts.channels, self.experts.width)

    def watch(self, total: Tensor, root: Tensor) -> RemovableHandle:
        """See :class:`~leantune.methods._calibration.GradientSource`."""

        def listener(grad: Tensor, x: Tensor, chosen: Tensor, weights: Tensor) -> None:
            token, slot = torch.where(chosen == self.expert)
            above = grad[token] * weights[token, slot, None].to(grad.dtype)
            own = x[token]
            with torch.enable_grad():
                z = self.experts.inner(self.expert, own, slice(None)).detach().requires_grad_()
                a = self.experts.gate(z)
            if self.name == DOWN:
                total.addmm_(a.detach().t().to(total.dtype), above.to(total.dtype))
                return
            down = self.experts.rows(DOWN)[self.expert]
            (inner,) = torch.autograd.grad(a, z, (above.to(down.dtype) @ down.t()).to(a.dtype))
            total.addmm_(inner.t().to(total.dtype), own.to(total.dtype))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            return Watch.apply(output, root, listener, *[each.detach() for each in args[:3]])

        return self.module.register_forward_hook(hook)


def measure(targets: list[TargetedExperts], selection: str, data: Calibration) -> Mapping[str, Squares]:
    """What a calibrated choice among experts is made from, by path: one pass, or one for each group of gradients."""
    activations: dict[tuple[str, str], ActivationSource] = {}
    gradients: dict[tuple[str, str, int, str], GradientSource] = {}
    found: dict[tuple[str, str], Tensor] = {}
    for target in targets:
        experts = Experts(target.module)
        if selection in ("activation", "product"):
            activations[("activation", target.path)] = ExpertActivation(target.module)
        else:
            for name in target.names:
                found[(target.path, name)] = torch.zeros(experts.experts, experts.channels, dtype=torch.float64)
                for expert in range(experts.experts):
                    key = ("gradient", target.path, expert, name)
                    gradients[key] = ExpertGradient(target.module, expert, name)
    views = {target.path: Experts(target.module) for target in targets}
    measured = data.activations(activations)
    for (_, path, expert, name), gradient in data.weight_gradients(gradients):
        norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)
        found[(path, name)][expert] = views[path].by_channel(name, norms.square()).cpu()
        # The generator frees it before it forms the next group.
        del gradient

    def answers(target: TargetedExperts) -> Squares:
        weights = weight_squares(target)

        def squares(asked: selecting.Measure, name: str) -> Tensor:
            if asked == "weight":
                return weights(asked, name)
            return measured[("activation", target.path)] if asked == "activation" else found[(target.path, name)]

        return squares

    return {target.path: answers(target) for target in targets}


def inject_experts(tuner: Any, config: Any, adapter_name: str) -> list[str]:
    """Put an adapter on all experts that its config targets, beside what it has on linear layers.

    Args:
        tuner: the S2FT model.
        config: the adapter's config; ``achieved_ratio`` is brought up to date.
        adapter_name: the new adapter.

    Returns:
        The paths of the targeted parameters.
    """
    waits = config.selection in selecting.CALIBRATED
    trained = total = 0
    injected = []
    for target in targeted_experts(tuner.model, config):
        experts = Experts(target.module)
        chosen = choose_channels(target, config, (provisional if waits else weight_squares)(target))
        total += sum(experts.rows(name).numel() for name in target.names)
        if not chosen:
            continue
        layer = tuner.model.get_submodule(target.path)
        if not isinstance(layer, ExpertLayer):
            layer = ExpertLayer(target.module, adapter_name)
            parent, _, leaf = target.path.rpartition(".")
            setattr(tuner.model.get_submodule(parent), leaf, layer)
        template = tuner._template(config, adapter_name)
        layer.update_layer(adapter_name, config, template=template, chosen=chosen, waits=waits)
        if adapter_name not in tuner.active_adapters:
            # An additional adapter is not trained until it is chosen.
            for own in layer.slices(adapter_name).values():
                own.requires_grad_(False)
        trained += sum(each.weight.numel() for each in layer.slices(adapter_name).values())
        injected += [f"{target.path}.{name}" for name in chosen]
    of_linears = tuner.trained_and_total
    if total:
        config.achieved_ratio = (of_linears[0] + trained) / (of_linears[1] + total)
    return injected


def start_experts(tuner: Any, adapters: list[str], config: Any, data: Calibration) -> None:
    """Choose the channels of adapters that wait for them, by what the batches show."""
    targets = targeted_experts(tuner.model, config)
    squares = measure(targets, config.selection, data)
    for target in targets:
        layer = tuner.model.get_submodule(target.path)
        for name, channels in choose_channels(target, config, squares[target.path]).items():
            for adapter in adapters:
                layer.slices(adapter)[name].place(channels)
