"""Products added to what is there, in place: what the kernels of linear layers share."""

from __future__ import annotations

from torch import Tensor


def add_product(flat: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """``flat += scale a b`` in place, in one pass where the dtypes agree.

    Args:
        flat: ``(n, m)``.
        a: ``(n, k)``.
        b: ``(k, m)``, in the dtype of ``a``, in which the product is formed.
        scale: its factor.
    """
    if flat.dtype == a.dtype == b.dtype:
        flat.addmm_(a, b, alpha=scale)
    else:
        flat.add_(a @ b, alpha=scale)
