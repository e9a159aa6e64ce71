r"""One forward of a model in which every weight matrix is cut out, so that only what lies between them is left.

S2FT, section 3.1, speaks of activations and the weights around them. Here each layer with a weight matrix is, for
one forward, a source of random numbers in the shape of its output; what it reads is written down. The autograd graph
then has those outputs as leaves and joins them with the next layers' inputs alone: nonlinearities, norms, residual
sums, attention. No weight matrix is read or multiplied (a model on the meta device will do), and a norm or a position
is given random parameters, so a freshly started one with zeros hides nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from leantune.core.errors import TargetError, describe
from leantune.methods._example import Example

_LARGE = 1 << 20
_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}

_RELUS = {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}

Activation = tuple[str, ...]
"""An activation is known by the layers that read it."""


def channel_dim(layer: nn.Module) -> int:
    """Which dimension of a layer's input and output holds its entries, from the end."""
    return next((dim for kind, dim in _CONVOLUTIONS.items() if isinstance(layer, kind)), -1)


def is_convolution(layer: nn.Module) -> bool:
    """Whether entries are channels of a convolution."""
    return channel_dim(layer) != -1


def flat(tensor: Tensor, dim: int) -> Tensor:
    """``(positions, entries)``."""
    return tensor.movedim(dim, -1).reshape(-1, tensor.shape[dim])


@dataclass
class CutGraph:
    """What the forward wrote down.

    Attributes:
        leaves: path -> the random outputs, one for each call of the layer.
        reads: path -> its inputs, one for each call.
        of_read: path -> the graph nodes of those inputs.
        results: the model's own outputs.
        dims: path -> :func:`channel_dim`.
    """

    leaves: dict[str, list[Tensor]] = field(default_factory=dict)
    reads: dict[str, list[Tensor]] = field(default_factory=dict)
    of_read: dict[str, list[Any]] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)
    dims: dict[str, int] = field(default_factory=dict)

    def coupled(self) -> dict[Activation, list[str]]:
        """Activation -> the layers it depends on, where both degrees are one (equations 1 and 2).

        A layer is kept when the activation is all that it contributes to; an activation, when that holds for every
        layer that contributes to it. A residual stream has many readers, so nothing around it is coupled.
        """
        masks: dict[Any, int] = {}
        bits = {id(leaf): 1 << number for number, leaf in enumerate(chain.from_iterable(self.leaves.values()))}
        readers: dict[Any, list[str]] = {}
        for path, nodes in self.of_read.items():
            for node in nodes:
                readers.setdefault(node, []).append(path)
        contributes: dict[Activation, int] = {}
        for node, paths in readers.items():
            known = contributes.get(tuple(dict.fromkeys(paths)), 0)
            contributes[tuple(dict.fromkeys(paths))] = known | _sources(node, bits, masks)
        to_result = 0
        for result in self.results:
            to_result |= _sources(result.grad_fn, bits, masks)
        own = {path: sum(bits[id(leaf)] for leaf in leaves) for path, leaves in self.leaves.items()}
        found = {}
        for activation, mask in contributes.items():
            elsewhere = to_result
            for other, used in contributes.items():
                elsewhere |= used if other != activation else 0
            producers = [path for path, bit in own.items() if bit & mask]
            if producers and not any(own[path] & elsewhere for path in producers):
                found[activation] = producers
        return found


def _sources(node: Any, bits: Mapping[int, int], masks: dict[Any, int]) -> int:
    """The leaves that a node of the autograd graph depends on, as a bit mask."""
    if node is None:
        return 0
    pending = [node]
    while pending:
        here = pending[-1]
        if here in masks:
            pending.pop()
            continue
        before = [each for each, _ in here.next_functions if each is not None]
        missing = [each for each in before if each not in masks]
        if missing:
            pending += missing
            continue
        mask = bits.get(id(here.variable), 0) if hasattr(here, "variable") else 0
        for each in before:
            mask |= masks[each]
        masks[pending.pop()] = mask
    return masks[node]


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        # Scales of norms, variances, biases: near one, and none like another.
        return 1 + 0.25 * torch.rand(shape, generator=generator)
    if shape.numel() > _LARGE:
        return torch.randn(shape[-1], generator=generator).expand(shape)
    return torch.randn(shape, generator=generator)


def _stand_ins(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Float32 tensors on the CPU for every parameter and buffer; those of cut layers take no memory."""
    generator = torch.Generator().manual_seed(20240718)
    inside = tuple(f"{path}." for path in layers)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(inside):
            found[name] = torch.zeros(()).expand(parameter.shape)
        else:
            found[name] = _random(parameter.shape, generator)
    for name, buffer in model.named_buffers():
        if name.startswith(inside):
            continue
        floating = buffer.is_floating_point()
        if not buffer.is_meta:
            found[name] = buffer.detach().to("cpu", torch.float32 if floating else buffer.dtype, copy=True)
        elif floating:
            found[name] = _random(torch.Size([buffer.numel()]), generator).view(buffer.shape)
        else:
            found[name] = torch.arange(buffer.numel()).view(buffer.shape).to(buffer.dtype)
    return found


class _Leaky(TorchFunctionMode):
    """Lets what a ReLU would hold back through by half: it depends on the same entries, but on all of them always."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return F.leaky_relu(args[0], 0.5) if func in _RELUS else func(*args, **(kwargs or {}))


class _Recorder:
    """Takes the place of each layer's forward."""

    def __init__(self, graph: CutGraph, given: Mapping[str, list[Tensor]] | None) -> None:
        self.graph, self.given = graph, given
        self.generator = torch.Generator().manual_seed(20240719)

    def forward(self, path: str, layer: nn.Module, out: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A random output of the layer at ``path``, or the one that was given."""
        del args, kwargs
        dim = self.graph.dims[path]
        calls = self.graph.leaves.setdefault(path, [])
        if self.given is not None:
            leaf = self.given[path][len(calls)]
        else:
            leaf = torch.randn(self._shape(layer, out, x, dim), generator=self.generator)
        leaf.requires_grad_()
        calls.append(leaf)
        self.graph.of_read.setdefault(path, []).append(x.grad_fn)
        # Copies: what follows may write in place.
        self.graph.reads.setdefault(path, []).append(x.clone())
        return leaf.clone()

    def _shape(self, layer: nn.Module, out: int, x: Tensor, dim: int) -> tuple[int, ...]:
        if dim == -1:
            return (*x.shape[:-1], out)
        with torch.no_grad():
            return tuple(type(layer).forward(layer, x.detach()).shape)


@contextmanager
def _cut(
    model: nn.Module, layers: Mapping[str, nn.Module], recorder: _Recorder, outs: Mapping[str, int]
) -> Iterator[None]:
    """Replace the layers' forwards, and everything that a run could disturb; put all back."""
    modes = {module: module.training for module in model.modules()}
    before = {path: model.get_submodule(path).__dict__.get("forward") for path in layers}
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    try:
        for module in modes:
            module.training = False
        if attention not in (None, "eager", "sdpa"):
            config._attn_implementation = "eager"  # type: ignore[union-attr]
        for path, layer in layers.items():
            model.get_submodule(path).__dict__["forward"] = partial(recorder.forward, path, layer, outs[path])
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        for path, own in before.items():
            module = model.get_submodule(path)
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
        if attention not in (None, "eager", "sdpa"):
            config._attn_implementation = attention  # type: ignore[union-attr]
        for module, mode in modes.items():
            module.training = mode


def cut_graph(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    outs: Mapping[str, int],
    example: Example,
    given: Mapping[str, list[Tensor]] | None = None,
) -> CutGraph:
    """Run the model with its layers cut out.

    Args:
        model: left as it is: weights, buffers, modes, hooks and the random state.
        layers: path -> layer with a weight matrix.
        outs: path -> entries of its output.
        example: inputs.
        given: outputs of the layers, instead of random ones.

    Raises:
        TargetError: the model does not run on the example.
    """
    graph = CutGraph(dims={path: channel_dim(layer) for path, layer in layers.items()})
    try:
        with _cut(model, layers, _Recorder(graph, given), outs), _Leaky():
            result = functional_call(model, _stand_ins(model, layers), example.args, example.kwargs)
    except Exception as error:
        raise TargetError(
            describe(
                f"the trace of {type(model).__name__}",
                f"a forward on made-up inputs failed: {type(error).__name__}: {error}",
                "a model that runs on its dummy_inputs",
                "set model.dummy_inputs = {argument: tensor}, or name target_modules of a known family",
            )
        ) from error
    graph.results = _tensors(result)
    return graph


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    items = result.values() if isinstance(result, Mapping) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]
