"""GaLore: its steps against the formula written out densely, what it remembers, and what a checkpoint brings back."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from leantune import methods
from leantune.core.errors import ConfigError, MethodError, TargetError
from leantune.methods._projection import ProjectedAdamW, is_right, projection_of
from leantune.methods.galore import GaLoreConfig, projected
from leantune.methods.lisa import blocks_of
from leantune.testing.closeness import assert_close, assert_same, assert_same_state

RANK, GAP, SCALE, RATE, DECAY = 3, 4, 0.25, 0.05, 0.1
BETAS, EPS = (0.9, 0.999), 1e-8


def gradients(shape: tuple[int, ...], steps: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def group(*parameters: nn.Parameter, kind: str = "std", rank: int = RANK, decay: float = DECAY) -> dict[str, Any]:
    own = {"rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": kind}
    return {"params": list(parameters), "weight_decay": decay, **own}


def take(optimizer: Any, parameter: nn.Parameter, found: list[Tensor]) -> None:
    for gradient in found:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def written_out(weight: Tensor, found: list[Tensor], right: bool) -> Tensor:
    """Algorithm 2 of the paper with sums over the whole history, in place of moments that are carried along."""
    bases: list[Tensor] = []
    seen: list[Tensor] = []
    for step, gradient in enumerate(found, 1):
        if (step - 1) % GAP == 0:
            U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
            bases.append(Vh[:RANK] if right else U[:, :RANK])
        P = bases[-1]
        seen.append(gradient @ P.T if right else P.T @ gradient)
        weights = [(BETAS[0] ** (step - k), BETAS[1] ** (step - k)) for k in range(1, step + 1)]
        M = sum((1 - BETAS[0]) * own[0] * R for own, R in zip(weights, seen, strict=True)) / (1 - BETAS[0] ** step)
        V = sum((1 - BETAS[1]) * own[1] * R**2 for own, R in zip(weights, seen, strict=True)) / (1 - BETAS[1] ** step)
        N = M / (V.sqrt() + EPS)
        weight = weight - RATE * DECAY * weight - RATE * SCALE * (N @ P if right else P @ N)
    return weight


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("kind", ["std", "reverse_std", "right", "left"])
def test_steps_are_the_formula(shape: tuple[int, int], kind: Any) -> None:
    found = gradients(shape, 11)
    weight = gradients(shape, 1, seed=9)[0]
    parameter = nn.Parameter(weight.clone())
    take(ProjectedAdamW([group(parameter, kind=kind)], lr=RATE, betas=BETAS, eps=EPS), parameter, found)
    right = {"std": shape[0] >= shape[1], "reverse_std": shape[0] < shape[1], "right": True, "left": False}[kind]
    exact = written_out(weight, found, right)
    # Eleven steps of a dozen roundings each.
    assert_close(parameter.detach(), exact, torch.float64, 16, 11, wrong=(weight,), what=f"{shape}, {kind}")


def test_a_group_without_rank_is_torchs_adamw() -> None:
    found = gradients((5, 4), 9)
    mine, theirs = (nn.Parameter(gradients((5, 4), 1, seed=9)[0].clone()) for _ in range(2))
    take(ProjectedAdamW([mine], lr=RATE, weight_decay=DECAY), mine, found)
    take(torch.optim.AdamW([theirs], lr=RATE, weight_decay=DECAY), theirs, found)
    assert_close(mine.detach(), theirs.detach(), torch.float64, 16, 9, what="weight")


def test_the_smaller_side_is_projected_and_its_rows_are_orthonormal() -> None:
    assert [is_right(shape, "std") for shape in ((7, 5), (5, 7), (5, 5))] == [True, False, True]
    gradient = gradients((7, 5), 1)[0]
    for right, shape in ((True, (RANK, 5)), (False, (7, RANK))):
        P = projection_of(gradient, RANK, right)
        assert P.shape == shape
        gram = P @ P.T if right else P.T @ P
        assert_close(gram, torch.eye(RANK, dtype=torch.float64), torch.float64, 16, 1, what="P P^T")
    # The leading directions: no others keep more of the gradient.
    kept = (gradient @ projection_of(gradient, RANK, True).T).norm()
    assert kept.item() == pytest.approx(torch.linalg.svdvals(gradient)[:RANK].norm().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_it_remembers(dtype: torch.dtype) -> None:
    tall, wide, small = (nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((40, 24), (24, 40), (2, 9)))
    optimizer = ProjectedAdamW([group(tall, wide, small)], lr=RATE)
    for parameter in (tall, wide, small):
        take(optimizer, parameter, [])
        parameter.grad = gradients(tuple(parameter.shape), 1)[0].to(dtype)
    optimizer.step()
    for parameter, moments, projection in (
        (tall, (40, RANK), (RANK, 24)),
        (wide, (RANK, 40), (24, RANK)),
        (small, (2, 9), (2, 2)),
    ):
        wanted = {"step": (), "projection": projection, "exp_avg": moments, "exp_avg_sq": moments}
        assert {name: tuple(value.shape) for name, value in optimizer.state[parameter].items()} == wanted
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    kept = [value.dtype for own in optimizer.state.values() for name, value in own.items() if name != "step"]
    assert set(kept) == {at_least}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_brings_back_every_bit_and_needs_no_pickle(dtype: torch.dtype) -> None:
    found = gradients((9, 6), 12)
    whole = nn.Parameter(gradients((9, 6), 1, seed=9)[0].to(dtype))
    other = nn.Parameter(whole.detach().clone())
    first = ProjectedAdamW([group(whole)], lr=RATE)
    half = ProjectedAdamW([group(other)], lr=RATE)
    # In the middle between two computations of the subspace.
    take(half, other, found[:6])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = ProjectedAdamW([group(other)], lr=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["lr"] == RATE
    assert_same_state(dict(resumed.state[other]), dict(half.state[other]), "state")
    take(resumed, other, found[6:])
    take(first, whole, found)
    assert_same(other.detach(), whole.detach(), "weight")


def test_all_linear_layers_but_the_head_are_projected() -> None:
    for family in tiny.EVERY:
        model = tiny.model(family)
        names = projected(model, GaLoreConfig())
        inside = {id(each) for block in blocks_of(model) for each in block.parameters()}
        assert set(map(id, names.values())) <= inside | {
            id(each) for name, each in model.named_parameters() if "pooler" in name or name.startswith("encoder.block")
        }, family
        blocks = {f"{name}.weight" for name in tiny.linears(model)}
        assert blocks <= set(names), family


def test_named_modules_are_projected_and_the_rest_is_not() -> None:
    model = methods.get("galore").apply(tiny.model("llama"), GaLoreConfig(target_modules=["q_proj"], rank=2))
    plan = methods.get("galore").plan(model)
    assert plan.parameter_groups is not None
    assert plan.optimizer is not None
    matrices, others, vectors = plan.parameter_groups(model, RATE, DECAY)
    queries = [each for name, each in model.named_parameters() if "q_proj.weight" in name]
    assert set(map(id, matrices["params"])) == set(map(id, queries))
    assert (matrices["rank"], matrices["scale"], matrices["update_proj_gap"]) == (2, 0.25, 200)
    assert [each["weight_decay"] for each in (matrices, others, vectors)] == [DECAY, DECAY, 0.0]
    counted = sum(each.numel() for found in (matrices, others, vectors) for each in found["params"])
    assert counted == sum(each.numel() for each in model.parameters())
    with pytest.raises(TargetError, match=r"nowhere.*q_proj"):
        projected(model, GaLoreConfig(target_modules=["nowhere"]))
    sharded = SimpleNamespace(fsdp="full_shard", deepspeed=None)
    with pytest.raises(MethodError, match="sharded"):
        plan.optimizer([matrices], RATE, sharded)


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"rank(.|\n)*scale(.|\n)*proj_type"):
        GaLoreConfig(rank=0, scale=0.0, proj_type="full")  # type: ignore[arg-type]
