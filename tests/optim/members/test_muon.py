"""Muon: the iteration against float64, cuts against whole matrices, the update against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.optim.members.muon import Settings, build
from megadiff.optim.muon import COEFFICIENTS, orthogonalise
from megadiff.optim.pieces import Piece, mark_whole, on_owners
from tests.support.ranks import on_ranks

SHAPES = {"wide": (12, 48), "tall": (48, 12), "square": (24, 24)}


def _matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.normal(size=shape) * 10.0 ** draw.uniform(-2, 2, size=shape[1])).float()


def _by_definition(matrix: Tensor, steps: int = 5) -> np.ndarray:
    """Return the iteration's result in float64, from singular values alone."""
    u, values, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return (u * values) @ v


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_iteration_is_that_of_the_singular_values(shape):
    matrix = _matrix(shape)
    found = orthogonalise(matrix[None])[0]
    assert np.abs(found.numpy() - _by_definition(matrix)).max() < 1e-4


def test_singular_values_come_near_one():
    matrix = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 256))).float()
    values = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
    assert 0.68 < values.min() < values.max() < 1.14
    rounded = torch.linalg.svdvals(orthogonalise(matrix[None], dtype=torch.bfloat16)[0].float())
    assert 0.65 < rounded.min() < rounded.max() < 1.2


def _of_cuts() -> float:
    """Return the largest difference on this rank between its cut of the whole result and the result of its cut."""
    ranks, rank, worst = dist.get_world_size(), dist.get_rank(), 0.0
    for shape in SHAPES.values():
        matrix = torch.stack([_matrix(shape, seed) for seed in range(3)])
        for dim in (0, 1):
            cut = matrix.chunk(ranks, 1 + dim)[rank]
            found = orthogonalise(cut, cut_dim=dim, group=dist.group.WORLD)
            whole = torch.stack([torch.from_numpy(_by_definition(m)) for m in matrix]).chunk(ranks, 1 + dim)[rank]
            worst = max(worst, float((found - whole).abs().max()))
    return worst


def test_cuts_are_made_orthogonal_together():
    assert max(on_ranks(4, _of_cuts)) < 1e-4


def _packed(rows: tuple[int, ...], repeats: int, columns: int) -> tuple[list[Tensor], Tensor]:
    """Return matrices, and the weight in which each repeat has its rows of all of them."""
    sizes = [repeats * height for height in rows]
    drawn = torch.arange(float(sum(sizes) * columns)).view(-1, columns).split(sizes)
    blocks = [
        one[k * height : (k + 1) * height] for k in range(repeats) for one, height in zip(drawn, rows, strict=True)
    ]
    return list(drawn), torch.cat(blocks)


@pytest.mark.parametrize(("rows", "stacks"), [((4, 4, 4), [3]), ((8, 4, 4), [1, 2]), ((1, 1), [2]), ((2, 1), [1, 1])])
def test_packed_matrices_are_taken_apart(rows: tuple[int, ...], stacks: list[int]) -> None:
    """Queries, keys and values with as many heads or fewer, and a gate beside its values."""
    wanted, weight = _packed(rows, repeats=2, columns=6)
    piece = Piece("hidden", weight.shape, packed_rows=rows)
    found = piece.matrices(weight)
    assert [len(stack) for stack in found] == stacks
    assert all(torch.equal(one, other) for one, other in zip((m for s in found for m in s), wanted, strict=True))
    assert torch.equal(piece.weight(found), weight)
    assert piece.whole_shape(found[0]) == (2 * rows[0], 6)


def _parts(size: int, cuts: list[int]) -> tuple[tuple[int, range], ...]:
    """Return parts of consecutive ranks from the first element of each; ranks without elements hold none."""
    ends = [*cuts[1:], size]
    return tuple((rank, range(a, b)) for rank, (a, b) in enumerate(zip(cuts, ends, strict=True)) if b > a)


SPLITS = [_parts(24, [0, 5, 6, 20]), _parts(24, [0, 0, 0, 7]), _parts(24, [0, 11, 24, 24]), _parts(24, [0, 1, 1, 1])]
"""Four weights on four ranks: in four, two, two and two parts."""


def _worked_on() -> list[tuple[int, list[int], list[float]]]:
    """Return, for every weight of which this rank holds a part: its number, who worked on it, and the results."""
    rank, held = dist.get_rank(), []
    for number, parts in enumerate(SPLITS):
        for holder, elements in parts:
            if holder == rank:
                parameter = torch.arange(24.0)[elements.start : elements.stop] + 100 * number
                owner = parts[number % len(parts)][0]
                parameter.piece = Piece("hidden", torch.Size((4, 6)), parts=parts, owner=owner)  # type: ignore[attr-defined]
                held.append((number, parameter))
    worked: list[int] = []

    def work(piece: Piece, whole: Tensor) -> Tensor:
        worked.append(int(whole[0, 0]) // 100)
        return whole.flip(0) + piece.shape[1]

    results = on_owners([p for _, p in held], [p for _, p in held], work)
    return [(number, worked, result.tolist()) for (number, _), result in zip(held, results, strict=True)]


def test_one_of_the_holders_works_on_a_weight_for_all():
    by_rank = on_ranks(4, _worked_on)
    for number, parts in enumerate(SPLITS):
        wanted = (torch.arange(24.0).view(4, 6) + 100 * number).flip(0).reshape(-1) + 6
        found = [(rank, worked, values) for rank in range(4) for n, worked, values in by_rank[rank] if n == number]
        assert [value for _, _, values in found for value in values] == wanted.tolist()
        owner = parts[number % len(parts)][0]
        assert [rank for rank, worked, _ in found if number in worked] == [owner]


def test_tiny_and_huge_gradients_are_directions_too():
    matrix = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 256))).float()
    wanted = orthogonalise(matrix[None])
    for size in (1e-17, 1e-10, 1e15):
        torch.testing.assert_close(orthogonalise(matrix[None] * size), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def _settings(**changes: object) -> Settings:
    return Settings.model_validate({"name": "muon", "lr": 0.1, "eps": 1e-8, **changes})


def _group(*parameters: torch.nn.Parameter, lr: float = 0.1, decay: float = 0.2) -> dict:
    return {"params": list(parameters), "lr": lr, "weight_decay": decay, "eps": 1e-8}


SCALES: dict[str, Callable[[int, int], float]] = {
    "standard": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "completep": lambda m, n: 0.2 * math.sqrt(m * n),
}


@pytest.mark.parametrize("parametrisation", SCALES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_follow_the_definition(parametrisation, nesterov):
    theta = torch.nn.Parameter(_matrix((6, 10)))
    mark_whole("hidden", theta)
    optimizer = build([_group(theta)], _settings(parametrisation=parametrisation, nesterov=nesterov))
    wanted, momentum = theta.detach().double().numpy(), np.zeros((6, 10))
    for step in range(3):
        gradient = _matrix((6, 10), seed=step + 1)
        theta.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient.double().numpy()
        ahead = 0.95 * momentum + 0.05 * gradient.double().numpy() if nesterov else momentum
        orthogonal = _by_definition(torch.from_numpy(ahead))
        wanted = wanted * (1 - 0.1 * 0.2) - 0.1 * SCALES[parametrisation](6, 10) * orthogonal
        np.testing.assert_allclose(theta.detach().numpy(), wanted, rtol=1e-4, atol=2e-4)


def test_other_parameters_are_updated_by_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    mark_whole("norm", ours)
    optimizer = build([_group(ours)], _settings(beta2=0.95))
    plain = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
    for step in range(4):
        for parameter, one in ((ours, optimizer), (theirs, plain)):
            parameter.grad = torch.cos(torch.arange(7.0) + step)
            one.step()
    assert torch.equal(ours, theirs)


def test_a_step_does_not_depend_on_the_gradients_size():
    theta, other = (torch.nn.Parameter(torch.zeros(4, 8)) for _ in range(2))
    for parameter, size in ((theta, 1.0), (other, 1e-3)):
        mark_whole("hidden", parameter)
        parameter.grad = _matrix((4, 8)) * size
        build([_group(parameter)], _settings()).step()
    torch.testing.assert_close(theta, other, rtol=1e-3, atol=1e-5)
    rms = theta.detach().square().mean().sqrt()
    assert 0.7 * 0.02 < rms < 1.15 * 0.02, "the rate times `update_scale`"
