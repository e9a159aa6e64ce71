"""What a ranking needs to know: asked first, measured together, then answered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leantune.kernels.partial_linear import Axis
from leantune.methods._calibration import ActivationSource, Calibration, GradientSource, LayerActivation, LinearGradient
from leantune.methods._permutation import BasePermutation
from leantune.methods._selection import Measure, Squares

Question = tuple[Measure, str, Axis]


class Questions:
    """Takes the place of :data:`~leantune.methods._selection.Squares`: notes what is asked, and answers zero.

    How many units a choice takes does not depend on the answers, so a choice made with it has the final size.

    Args:
        shapes: module path -> ``(out, in)``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.shapes = shapes
        self.asked: dict[Question, None] = {}

    def __call__(self, measure: Measure, path: str, axis: Axis) -> Tensor:
        self.asked[(measure, path, axis)] = None
        return torch.zeros(self.shapes[path][axis == "in"], dtype=torch.float64)

    def ask(
        self, data: Calibration, layers: Mapping[str, nn.Module], order: BasePermutation, weights: Squares
    ) -> Squares:
        """Measure all that was asked: one pass for activations, one for each group of gradients.

        Args:
            data: runs the model over the batches.
            layers: module path -> base layer.
            order: in which rows and columns of the base stand now; answers are in the checkpoint's order.
            weights: answers for the measure "weight".
        """
        answers: dict[Question, Tensor] = {}
        activations: dict[Question, ActivationSource] = {
            ("activation", path, axis): LayerActivation(layers[path], axis, self.shapes[path][axis == "in"])
            for measure, path, axis in self.asked
            if measure == "activation"
        }
        answers.update(data.activations(activations))
        gradients: dict[str, GradientSource] = {
            path: LinearGradient(layers[path], self.shapes[path])
            for measure, path, _ in self.asked
            if measure == "gradient"
        }
        for path, gradient in data.weight_gradients(gradients):
            for axis in ("in", "out"):
                if ("gradient", path, axis) in self.asked:
                    norms = torch.linalg.vector_norm(gradient, dim=0 if axis == "in" else 1, dtype=torch.float64)
                    answers[("gradient", path, axis)] = norms.square().cpu()
            # The generator frees it before it forms the next group.
            del gradient

        def squares(measure: Measure, path: str, axis: Axis) -> Tensor:
            if measure == "weight":
                return weights(measure, path, axis)
            answer = answers[(measure, path, axis)]
            standing = order.layout.get(path, {}).get(axis)
            return answer if standing is None else answer[standing.argsort()]

        return squares
