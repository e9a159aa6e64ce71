"""A change of rank k at rank r: the best one, its error exact, the product never formed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import answers, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_lora_conversion import dense_change, products
from torch import Tensor

import leantune
from leantune.adapters import recompression
from leantune.adapters.recompression import RankError, Recompression, recompress, recompress_all
from leantune.core.errors import AdapterError
from leantune.testing.closeness import assert_close, assert_same

Maker = Callable[..., Any]
EXACT = torch.float64


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = EXACT) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT).to(dtype)


def boosters(out: int, into: int, ranks: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors side by side, the later ones smaller, as rounds leave them."""
    parts = [(0.6**t * noise(out, r, seed=seed + t), noise(r, into, seed=seed + 50 + t)) for t, r in enumerate(ranks)]
    return torch.cat([B for B, _ in parts], 1), torch.cat([A for _, A in parts])


@pytest.mark.parametrize(("out", "into"), [(9, 7), (40, 5), (4, 30)])
@pytest.mark.parametrize("r", [1, 2, 3, 6])
def test_it_is_the_truncated_svd_of_the_product(out: int, into: int, r: int) -> None:
    """Also where k is above a side of the matrix, so that one QR is wide."""
    B, A = boosters(out, into, [1, 2, 1, 1, 3])
    smaller_B, smaller_A, error = recompress(B, A, r)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    assert smaller_A.shape == (min(r, out, into), into)
    assert_close(smaller_B @ smaller_A, (U[:, :r] * S[:r]) @ Vh[:r], EXACT, 200, 64)
    left_out = (B @ A - smaller_B @ smaller_A).double()
    tail = S[r:]
    assert error.absolute == pytest.approx(left_out.norm().item(), abs=1e-12)
    assert error.absolute == pytest.approx(tail.norm().item(), abs=1e-12)
    assert error.spectral == pytest.approx(tail[0].item() if len(tail) else 0.0, abs=1e-12)
    assert error.relative == pytest.approx(error.absolute / (B @ A).norm().item(), abs=1e-12)
    assert error.norm == pytest.approx((B @ A).norm().item())
    assert error.rank == min(out, into, 8)


def test_no_other_factors_of_that_rank_come_nearer() -> None:
    B, A = boosters(12, 10, [1] * 6)
    smaller_B, smaller_A, error = recompress(B, A, 2)
    for seed in range(30):
        step = 1e-3 * (1 + seed % 5)
        other_B, other_A = (each + step * noise(*each.shape, seed=seed) for each in (smaller_B, smaller_A))
        assert (B @ A - other_B @ other_A).norm() > error.absolute
    # Singular values are shared evenly: neither factor carries the size of both.
    assert_close(smaller_B.T @ smaller_B, smaller_A @ smaller_A.T, EXACT, 200, 64)


@given(
    out=st.integers(1, 24),
    into=st.integers(1, 24),
    k=st.integers(1, 12),
    true=st.integers(1, 6),
    r=st.integers(1, 14),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_rank_that_suffices_loses_rounding_alone(out: int, into: int, k: int, true: int, r: int, seed: int) -> None:
    """``B A`` of rank ``true`` in k columns, in float32: from r = true on the product is the same to float32's eps."""
    true = min(true, k, out, into)
    B = (noise(out, true, seed=seed) @ noise(true, k, seed=seed + 1)).float()
    A = noise(k, into, seed=seed + 2).float()
    smaller_B, smaller_A, error = recompress(B, A, r)
    product = B.double() @ A.double()
    assert smaller_B.dtype == smaller_A.dtype == torch.float32
    distance = (smaller_B.double() @ smaller_A.double() - product).norm().item()
    rounding = 4 * torch.finfo(torch.float32).eps * (product.norm().item() + B.norm().item() * A.norm().item())
    assert abs(distance - error.absolute) <= rounding
    if r >= true:
        assert distance <= rounding
        assert error.absolute <= rounding
    assert error.relative <= 1
    assert smaller_A.shape[0] <= max(r, 1)
    if r >= k:
        assert_same(smaller_B, B)
        assert_same(smaller_A, A)


def test_the_product_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor on the way is larger than a factor: a change of 3000 x 2000 has 6 million entries."""
    B, A = boosters(3000, 2000, [1] * 5)
    seen: list[int] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            parts = result if isinstance(result, tuple) else (result,)
            seen.extend(part.numel() for part in parts if isinstance(part, Tensor))
            return result

    with Counting():
        recompress(B, A, 2)
    assert 0 < max(seen) <= B.numel()


def test_a_change_of_nothing_stays_nothing() -> None:
    B, A, error = recompress(torch.zeros(4, 3), torch.randn(3, 5), 1)
    assert not B.any()
    assert error == RankError(0.0, 0.0, 0.0, 0.0, 0)
    assert A.isfinite().all()


def test_what_cannot_be_recompressed_is_refused() -> None:
    with pytest.raises(AdapterError, match="rank: 0; at least 1"):
        recompress(torch.ones(3, 2), torch.ones(2, 3), 0)
    with pytest.raises(AdapterError, match=r"module blocks\.3\.o_proj, recompress: factors that are not finite"):
        recompress_all({"blocks.3.o_proj": (torch.full((3, 2), torch.nan), torch.ones(2, 3))}, 1)


def test_the_whole_is_the_sum_of_its_layers() -> None:
    factors = {"low": boosters(8, 6, [1, 1], seed=1), "high": boosters(10, 9, [2, 1, 1], seed=2)}
    smaller, found = recompress_all(factors, 2)
    left_out = {path: (B @ A - smaller[path][0] @ smaller[path][1]).norm().item() for path, (B, A) in factors.items()}
    assert left_out["low"] == 0
    assert found.total.absolute == pytest.approx(left_out["high"])
    norm = sum((B @ A).norm().item() ** 2 for B, A in factors.values()) ** 0.5
    assert found.total.relative == pytest.approx(left_out["high"] / norm)
    assert (found.worst, found.needed_rank, found.is_exact) == ("high", 4, False)
    assert recompress_all(factors, 4)[1].is_exact
    told = json.loads(json.dumps(found.to_dict()))
    assert told["total"]["relative"] == found.total.relative
    assert told["layers"]["high"]["rank"] == 4


def test_a_lora_file_of_a_smaller_rank(lora: Maker, family: str, base: Maker, tmp_path: Path) -> None:
    """Ranks 2 and 5 at rank 2: stock PEFT loads it, and it is as far off as was said."""
    model = lora(family)
    changes = dense_change(lora(family))
    done = leantune.convert_to_lora(model, tmp_path / "lora", rank=2)
    found = done.recompression
    assert found is not None
    assert (done.rank, done.padded_rank, found.needed_rank) == (2, 2, 5)
    exported = products(tmp_path / "lora")
    for path, change in changes.items():
        off = (exported[path] - change).norm().item()
        assert off == pytest.approx(found.layers[path].absolute, abs=1e-5 * found.layers[path].norm)
    assert {path for path, error in found.layers.items() if error.relative > 1e-3} == {
        path for path in changes if path.endswith(("down_proj", "c_proj"))
    }
    assert done.max_abs_error == pytest.approx(
        max((exported[path] - change).abs().max().item() for path, change in changes.items()), rel=1e-4
    )
    answer = answers(PeftModel.from_pretrained(base(family), tmp_path / "lora").eval())[0]
    assert (answer - answers(model)[0]).abs().max() > 1e-3
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert f"{found.total.relative:.3%} of the change" in card


def test_a_lora_file_of_a_rank_that_suffices(s2ft: Maker, family: str, tmp_path: Path) -> None:
    model = s2ft(family)
    done = leantune.convert_to_lora(model, tmp_path / "lora", rank=64)
    assert done.recompression is not None
    assert done.recompression.is_exact
    assert done.max_abs_error == 0
    assert leantune.convert_to_lora(model, tmp_path / "plain").recompression is None


def test_a_boosted_adapter_of_few_directions_shrinks_for_free(lora: Maker, tmp_path: Path) -> None:
    """Columns that repeat each other: rank 5 on paper, 2 in truth."""
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data[2:] = parameter.data[:1]
    done = leantune.convert_to_lora(model, tmp_path / "lora", rank=2)
    assert done.recompression is not None
    assert done.recompression.is_exact
    assert done.recompression.needed_rank == 2
    assert done.max_abs_error < 1e-5


def test_an_exact_export_refuses_a_rank_that_leaves_something_out() -> None:
    errors = {"a": RankError(0.0, 0.0, 0.0, 1.0, 2), "b.c": RankError(0.3, 0.3, 0.2, 1.0, 7)}
    with pytest.raises(AdapterError, match=r"rank 3 leaves out 21.21% of the change \(30.00% in b.c\)") as caught:
        recompression.require_exact(Recompression(3, 7, errors), "LoRA export of run")
    assert "give --rank 7 or more" in str(caught.value)
    recompression.require_exact(Recompression(7, 7, {"a": errors["a"]}), "LoRA export of run")


def test_noise_has_no_smaller_rank(s2ft: Maker, tmp_path: Path) -> None:
    model = s2ft()
    fill(model)
    found = leantune.convert_to_lora(model, tmp_path / "lora", rank=1).recompression
    assert found is not None
    assert not found.is_exact
    assert 0.1 < found.total.relative < 1
