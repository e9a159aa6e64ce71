r"""AdamW whose moments of a weight matrix live in a subspace of its gradient (GaLore).

For a weight ``W (m, n)`` with gradient ``G``, every ``gap`` steps from the singular vectors of ``G = U S V^T``::

    m >= n   P = V_r^T (r, n)    R = G P^T (m, r)    back(N) = N P
    m <  n   P = U_r   (m, r)    R = P^T G (r, n)    back(N) = P N

    M <- b1 M + (1 - b1) R                  V <- b2 V + (1 - b2) R^2
    N  = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
    W <- (1 - eta wd) W - eta scale back(N)

Moments go on as they are when ``P`` changes, as in the paper. Source: Zhao et al., arXiv 2403.03507, algorithm 2.

Everything that the optimizer remembers is a tensor (the projection too), so that a checkpoint needs no pickle and a
resume is exact; projection and moments are at least float32 whatever the weight is. It steps when the trainer steps it:
after all passes of an accumulation, with clipped gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as distributed
from torch import Tensor

ProjectionType = Literal["std", "reverse_std", "right", "left"]


def is_right(shape: tuple[int, int], kind: ProjectionType) -> bool:
    """Whether the projection acts on the columns of a matrix; ``std``: on the smaller side."""
    rows, columns = shape
    return {"std": rows >= columns, "reverse_std": rows < columns, "right": True, "left": False}[kind]


def projection_of(gradient: Tensor, rank: int, right: bool) -> Tensor:
    """``V_r^T (r, n)`` or ``U_r (m, r)`` of a gradient, the same bits in every process.

    Args:
        gradient: ``(m, n)``, float32 or wider.
        rank: ``r``; at most ``min(m, n)`` are there.
        right: which of the two.
    """
    left_vectors, _, right_vectors = torch.linalg.svd(gradient, full_matrices=False)
    found = (right_vectors[:rank] if right else left_vectors[:, :rank]).contiguous()
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # The gradients are the same, but a GPU's SVD need not be.
        distributed.broadcast(found, 0)
    return found


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW; in groups with a ``rank``, with moments in a subspace.

    Args:
        params: parameter groups; one with ``rank`` also has ``update_proj_gap``, ``scale`` and ``proj_type``, and
            matrices alone.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: of the whole weight, decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        rank = group.get("rank")
        right = rank is not None and is_right((gradient.shape[0], gradient.shape[1]), group["proj_type"])
        if rank is not None:
            if int(state["step"]) % group["update_proj_gap"] == 0:
                state["projection"] = projection_of(gradient, rank, right)
            projection = state["projection"]
            gradient = gradient @ projection.t() if right else projection.t() @ gradient
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        taken, (beta1, beta2) = int(state["step"]), group["betas"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**taken)).sqrt_().add_(group["eps"])
        update = first.div(root).div_(1 - beta1**taken)
        if rank is not None:
            update = (update @ projection if right else projection @ update).mul_(group["scale"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would bring what is remembered to the dtype of a 16-bit weight."""
        wide = {number: dict(state) for number, state in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        flat = [parameter for group in self.param_groups for parameter in group["params"]]
        order = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(order, flat, strict=True):
            for name, value in wide.get(number, {}).items():
                device = "cpu" if name == "step" else parameter.device
                self.state[parameter][name] = value.to(device).clone()
