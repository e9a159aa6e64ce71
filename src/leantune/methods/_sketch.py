r"""A weight's gradient as two thin sketches, filled while backward reaches the layer: no matrix of its size.

With ``G = sum_t dy_t x_t^T (out, in)`` over all tokens, and fixed Gaussian ``Omega (in, k)``, ``Psi (2 k + 1, out)``::

    Y = G Omega = sum dY^T (X Omega)   (out, k)         Z = Psi G = sum (dY Psi^T)^T X   (2 k + 1, in)
    G ~ Q (Psi Q)^+ Z,   Q an orthonormal basis of Y

which is near the best approximation of rank ``k`` where the spectrum of ``G`` falls (Tropp et al. 2017, algorithm 4).
What is approximated is the raw sum. Both sketches are linear in it, so they add up over batches and processes; the
sign of the sum, which AdamW's step needs, is not, and is taken of the reconstruction. An entry whose gradient is
mostly in what the sketch left out may then have the wrong sign, so that the step's subspaces are less exact than
the gradient's: the start compares both on one layer, whose exact gradient it keeps beside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leantune.core.linalg import gaussian, two_sided_reconstruction
from leantune.methods._calibration import LinearGradient
from leantune.methods._selection import seeded


class RandomMatrices:
    """The Gaussian matrices that all layers of the same width share."""

    def __init__(self, seed: int, like: Tensor) -> None:
        self.seed, self.like = seed, like
        self._made: dict[tuple[str, int, int], Tensor] = {}

    def of(self, side: str, rows: int, columns: int) -> Tensor:
        """The matrix of that side ("omega" or "psi") and shape."""
        key = (side, rows, columns)
        if key not in self._made:
            self._made[key] = gaussian(rows, columns, seeded("sketch", self.seed, *key), self.like)
        return self._made[key]


class LinearSketch(LinearGradient):
    """A :class:`~leantune.methods._calibration.GradientSource` whose total holds ``Y`` and ``Z``, side by side.

    Args:
        module: a linear layer.
        weight: its ``(out, in)``.
        width: ``k``, at most the smaller side.
        matrices: where ``Omega`` and ``Psi`` come from.
    """

    def __init__(self, module: nn.Module, weight: tuple[int, int], width: int, matrices: RandomMatrices) -> None:
        out, columns = weight
        self.weight, self.width = weight, min(width, *weight)
        self.omega = matrices.of("omega", columns, self.width)
        self.psi = matrices.of("psi", 2 * self.width + 1, out)
        super().__init__(module, (1, out * self.width + columns * len(self.psi)))

    def add(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        """Add one backward's share to both sketches."""
        Y, Z = self._parts(total)
        Y.addmm_(grad.t(), x @ self.omega)
        Z.addmm_((grad @ self.psi.t()).t(), x)

    def reconstruct(self, total: Tensor) -> Tensor:
        """``Q (Psi Q)^+ Z`` ``(out, in)``, dense."""
        Q, X = two_sided_reconstruction(*self._parts(total), self.psi)
        return torch.mm(Q, X)

    def _parts(self, total: Tensor) -> tuple[Tensor, Tensor]:
        Y, Z = total[0].split([self.weight[0] * self.width, self.weight[1] * len(self.psi)])
        return Y.view(self.weight[0], self.width), Z.view(len(self.psi), self.weight[1])
