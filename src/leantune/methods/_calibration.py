r"""Measurements of the base model over calibration batches, entry by entry, with memory that depth does not raise.

For a linear layer ``y = x W^T`` with ``x (n, in)``, ``y (n, out)``, ``n`` the tokens of all batches, padding left out::

    activation, axis "in"     sum_t x[t, j]^2                 (in,)
    activation, axis "out"    sum_t y[t, i]^2                 (out,)
    gradient                  G = dL/dW = sum_batches dY^T X  (out, in)

``L`` is the loss over all batches, so ``G`` is the gradient of the whole and not a mean of gradients of batches: it
does not depend on how rows are put into batches. Its exact value needs the sum before any norm. So the layers are
taken in groups whose gradients fit into ``gradient_bytes``, with one pass over the batches for each group; only those
gradients ever exist, and the backward pass of a group stops at its lowest layer.

Sources: S2FT (NeurIPS 2024), section 3.2 and appendix D (selection from 1% of the data; gradients calculated and
discarded layer by layer). The paper does not say which norm of which sum it takes; the above is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as distributed
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from leantune.core.errors import MethodError, describe
from leantune.methods._first_step import DEFAULT_OPTIMIZER, Step

GRADIENT_BYTES = 2**30
# As a float16 itself it must be finite.
_MOST_ENLARGED = 2.0**15
Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
Key = TypeVar("Key", bound=Hashable)


class ActivationSource(Protocol):
    """A place in the model where an activation can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sums: of what ``add`` is called with."""

    def listen(self, add: Callable[[Tensor], None], kept: Callable[[nn.Module, Tensor], Tensor]) -> RemovableHandle:
        """Call ``add`` with the squares, summed over tokens, of each forward; ``kept(module, x)`` are x's tokens."""


class GradientSource(Protocol):
    """A weight matrix whose gradient can be formed without asking autograd for it."""

    shape: tuple[int, int]

    def watch(self, total: Tensor, root: Tensor) -> RemovableHandle:
        """Add the gradient of each backward to ``total``; ``root`` makes outputs ask for gradients."""


class Watch(torch.autograd.Function):
    """The identity on an output; its backward hands the output's gradient and ``kept`` to a listener."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor, listener: Callable[..., None], *kept: Tensor) -> Tensor:
        # The root's part is to ask for a gradient. Kept tensors are saved here and not held by the listener, so that
        # checkpointing recomputes them.
        del root
        ctx.save_for_backward(*kept)
        ctx.listener = listener
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: under checkpointing a second time is an error.
        kept = ctx.saved_tensors
        ctx.listener(grad, *kept)
        below = grad if ctx.needs_input_grad[0] else None
        return (below, grad.new_zeros(()), None, *[None] * len(kept))


class LayerActivation:
    """Input ("in") or output ("out") of a module, its last dimension ``width`` long."""

    def __init__(self, module: nn.Module, axis: str, width: int) -> None:
        self.module, self.axis, self.shape = module, axis, (width,)

    def listen(self, add: Callable[[Tensor], None], kept: Callable[[nn.Module, Tensor], Tensor]) -> RemovableHandle:
        """See :class:`ActivationSource`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values = kept(module, args[0] if self.axis == "in" else output)
            add(torch.linalg.vector_norm(values, dim=0, dtype=torch.float64).square())

        return self.module.register_forward_hook(hook)


class LinearGradient:
    """``dL/dW (out, in)`` of a linear layer, whatever holds its weight (packed ones too)."""

    def __init__(self, module: nn.Module, shape: tuple[int, int]) -> None:
        self.module, self.shape = module, shape

    def watch(self, total: Tensor, root: Tensor) -> RemovableHandle:
        """See :class:`GradientSource`."""

        def listener(grad: Tensor, x: Tensor) -> None:
            rows = grad.reshape(-1, grad.shape[-1]).to(total.dtype)
            self.add(total, rows, x.reshape(-1, x.shape[-1]).to(total.dtype))

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del module
            return Watch.apply(output, root, listener, args[0].detach())

        return self.module.register_forward_hook(hook)

    def add(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        """Add one backward's share, from ``grad (n, out)`` and ``x (n, in)``."""
        total.addmm_(grad.t(), x)


class Calibration:
    """Runs a model over batches and measures it; see the module's text for what exactly.

    Args:
        model: the model, adapters on it or not; it is measured as the base alone.
        batches: see :func:`leantune.initialize`, as are ``step_size`` and ``loss``.
        step_size: for methods whose start is an optimizer step.
        optimizer: whose step that is.
        loss: what gradients are taken of.
        gradient_bytes: most bytes of gradients at one time (one layer's are held in any case).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        step_size: float | None = None,
        optimizer: str | Step = DEFAULT_OPTIMIZER,
        loss: Loss | None = None,
        gradient_bytes: int = GRADIENT_BYTES,
    ) -> None:
        self.model = model
        self.batches = _checked(batches)
        self.step_size = step_size
        self.optimizer = optimizer
        # What a start has to tell of itself, for who called for it.
        self.told: dict[str, Any] = {}
        self.gradient_bytes = gradient_bytes
        self.passes = 0
        parameter = next(model.parameters())
        self.device = parameter.device
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        # A mean over many tokens has gradients below float16's smallest number: they are formed this much larger.
        tokens = max(self.tokens, 1) if parameter.dtype == torch.float16 else 1
        self._enlarged = min(2.0 ** round(math.log2(tokens)), _MOST_ENLARGED)
        self._loss = loss
        self._batch: Batch = {}

    @property
    def rows(self) -> int:
        """Rows of all batches."""
        return sum(_rows(batch) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Tokens of all batches without padding; rows where there are no tokens."""
        return sum(_tokens(batch) for batch in self.batches)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, the model is the base alone in evaluation mode, checkpointed as it was; then it is as before."""
        with ExitStack() as stack:
            devices = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            inside: set[nn.Module] = set()
            for module in self.model.modules():
                stack.callback(setattr, module, "training", module.training)
                if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                    # Not by PEFT's switch, which also turns gradients on for adapters that had none.
                    stack.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                    module._disable_adapters = True
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    # The outermost alone, as in training.
                    if module not in inside:
                        _checkpoint_in_evaluation(module, stack)
                    inside.update(module.modules())
                config = getattr(module, "config", None)
                if config is not None and getattr(config, "use_cache", None):
                    # Recomputing a layer would write to its cache twice.
                    stack.callback(setattr, config, "use_cache", True)
                    config.use_cache = False
            self.model.eval()
            yield

    def activations(self, wanted: Mapping[Key, ActivationSource]) -> dict[Key, Tensor]:
        """The sum of squares over all tokens of each source, float64 on the CPU, by one forward over the batches.

        Raises:
            MethodError: a source was never reached, or gave a number that is not finite.
        """
        totals: dict[Key, Tensor] = {}

        def adder(key: Key) -> Callable[[Tensor], None]:
            def add(squares: Tensor) -> None:
                totals[key] = totals[key] + squares if key in totals else squares

            return add

        with ExitStack() as stack, torch.no_grad():
            for key, source in wanted.items():
                stack.callback(source.listen(adder(key), self._kept).remove)
            for batch in self._pass() if wanted else ():
                if self._loss is None:
                    self.model(**batch)
                else:
                    self._loss(self.model, batch)
        _require_reached({key: key in totals for key in wanted}, self.device)
        for key, source in wanted.items():
            own = totals.get(key)
            # Another process may have reached what this one has not.
            total = torch.zeros(source.shape, dtype=torch.float64, device=self.device) if own is None else own
            totals[key] = _over_processes(total).cpu()
            _require_finite(key, totals[key])
        return totals

    def weight_gradients(self, wanted: Mapping[Key, GradientSource]) -> Iterator[tuple[Key, Tensor]]:
        """Each weight's gradient over all batches, one after the other; let go of one before taking the next.

        Yields:
            The key and ``dL/dW`` in float32 (float64 over a float64 base), exact up to rounding.

        Raises:
            MethodError: the batches carry no labels, the loss does not depend on the weights, or is not finite.
        """
        for group in self._groups(wanted):
            totals = {key: torch.zeros(wanted[key].shape, dtype=self.dtype, device=self.device) for key in group}
            self._backward({key: (wanted[key], totals[key]) for key in group})
            for key in group:
                total = _over_processes(totals.pop(key).div_(self._enlarged))
                _require_finite(key, total)
                yield key, total
                del total

    def _groups(self, wanted: Mapping[Key, GradientSource]) -> list[list[Key]]:
        groups: list[list[Key]] = []
        room = 0
        for key, source in wanted.items():
            size = source.shape[0] * source.shape[1] * self.dtype.itemsize
            if size > room:
                groups.append([])
                room = self.gradient_bytes
            groups[-1].append(key)
            room -= size
        return groups

    def _backward(self, watched: Mapping[Key, tuple[GradientSource, Tensor]]) -> None:
        """Add up the gradients of one group of weights over all batches."""
        root = torch.zeros((), device=self.device, requires_grad=True)
        with ExitStack() as stack, torch.enable_grad():
            for source, total in watched.values():
                stack.callback(source.watch(total, root).remove)
            for batch in self._pass():
                share = self._share(batch)
                if share.requires_grad:
                    # For the root alone: no parameter's own gradient is touched.
                    torch.autograd.grad(share.to(self.dtype) * self._enlarged, root, allow_unused=True)
        # Where nobody has ever written, nothing was reached.
        _require_reached({key: total._version > 0 for key, (_, total) in watched.items()}, self.device)

    def _pass(self) -> Iterator[Batch]:
        self.passes += 1
        for batch in self.batches:
            self._batch = {
                name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()
            }
            yield self._batch

    def _share(self, batch: Batch) -> Tensor:
        """The batch's share of the loss over all batches."""
        if self._loss is not None:
            return self._loss(self.model, batch)
        if "labels" not in batch:
            raise MethodError(describe("initialize", "batches without labels", "labels for the loss", "add labels"))
        return self.model(**batch).loss * (self._labels(batch) / self._all_labels)

    @cached_property
    def _all_labels(self) -> float:
        own = torch.tensor(float(sum(self._labels(batch) for batch in self.batches)), device=self.device)
        return max(_over_processes(own).item(), 1.0)

    def _labels(self, batch: Batch) -> int:
        """How many labels the model's own loss is the mean of."""
        labels = batch["labels"]
        if labels.dim() < 2 or labels.is_floating_point():
            return len(labels)
        base: Any = _base_of(self.model)
        aligned = getattr(base, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification")
        aligned = aligned or getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        return int(((labels if aligned else labels[:, 1:]) != -100).sum())

    def _kept(self, module: nn.Module, x: Tensor) -> Tensor:
        """The tokens of ``x (..., width)`` that are no padding, ``(n, width)``."""
        flat = x.detach().reshape(-1, x.shape[-1])
        mask = _mask_of(module, self.model, self._batch)
        return flat if mask is None or mask.numel() != len(flat) else flat[mask.reshape(-1)]


def _mask_of(module: nn.Module, model: nn.Module, batch: Batch) -> Tensor | None:
    base: Any = _base_of(model)
    mask = batch.get("attention_mask")
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        encoder = base.get_encoder()
        if not any(module is each for each in encoder.modules()):
            labels = batch.get("labels")
            mask = batch.get("decoder_attention_mask", None if labels is None else labels != -100)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _checkpoint_in_evaluation(layer: Any, stack: ExitStack) -> None:
    """transformers checkpoints in training mode alone, which would bring dropout back."""
    before = vars(layer).get("forward")
    forward = layer.forward
    layer.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    if before is None:
        stack.callback(delattr, layer, "forward")
    else:
        stack.callback(setattr, layer, "forward", before)


def _base_of(model: nn.Module) -> nn.Module:
    unwrapped = getattr(model, "get_base_model", None)
    base: nn.Module = model if unwrapped is None else unwrapped()
    return base


def _checked(batches: Iterable[Batch]) -> list[Batch]:
    found = list(batches)
    wrong = next((batch for batch in found if not isinstance(batch, Mapping)), None)
    if wrong is not None:
        got = f"a batch of type {type(wrong).__name__}"
        raise MethodError(describe("initialize", got, "a mapping of names to tensors", "give collated batches"))
    if not found or not sum(_rows(batch) for batch in found):
        raise MethodError(describe("initialize", "no rows", "batches to calibrate on", "give at least one batch"))
    return found


def _rows(batch: Batch) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0), 0)


def _tokens(batch: Batch) -> int:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.bool().sum())
    return ids.numel() if isinstance(ids, Tensor) else _rows(batch)


def _over_processes(total: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(total)
    return total


def _require_reached(reached: Mapping[Any, bool], device: torch.device) -> None:
    # Of all processes together: one that raised alone would leave the others waiting for its sums.
    counts = _over_processes(torch.tensor([float(each) for each in reached.values()], device=device))
    for key, count in zip(reached, counts.tolist(), strict=True):
        if count:
            continue
        name = key[1] if isinstance(key, tuple) else key
        raise MethodError(
            describe(
                f"module {name}",
                "no calibration batch reaches it (or the loss does not depend on it)",
                "batches that go through every targeted module",
                "leave the module out of target_modules, or give other batches",
            )
        )


def _require_finite(key: object, value: Tensor) -> None:
    # By its norm: a test of each entry would take as much memory as the gradient itself.
    if not bool(torch.isfinite(torch.linalg.vector_norm(value, dtype=torch.float64))):
        name = key[1] if isinstance(key, tuple) else key
        raise MethodError(
            describe(f"module {name}", "measures that are not finite", "finite numbers", "use a wider dtype")
        )
