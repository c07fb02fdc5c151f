"""Muon: momentum made orthogonal for the blocks' matrices, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw

from megadiff.optim.pieces import Piece, on_owners, piece_of

if TYPE_CHECKING:
    from megadiff.optim.members.muon import Settings

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al., chosen so that five iterations bring singular values from 0.01 and more near 1."""
_SMALLEST = 1e-30
"""Added to a norm, so that a gradient of zeros gives an update of zeros."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices of the role `hidden`, with decoupled decay, and AdamW for other parameters.

    For a matrix of m x n, with gradient g and momentum b:

        b     <- momentum b + (1 - momentum) g
        o     <- orthogonalise(momentum b + (1 - momentum) g)      (of b without `nesterov`)
        theta <- theta - lr (s o + weight_decay theta)

    `standard`: s = update_scale sqrt(max(m, n)), which gives the elements a root mean square of `update_scale`, about
    that of AdamW's updates, so that a rate tuned for AdamW serves (arXiv:2502.16982, equation 4). `completep`:
    s = update_scale sqrt(m n), so that the update's spectral norm is that of an aligned update by AdamW with elements
    of size `update_scale`, and lr / hidden transfers over widths as it does there.

    Packed queries, keys and values are three matrices, and so are a gate and what it multiplies two. Cuts of matrices
    over tensor ranks are made orthogonal together; of parts on data-parallel ranks, one rank makes the whole matrix
    orthogonal for all that hold parts. The momentum is called `exp_avg`; matrices have no `exp_avg_sq`.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: Settings) -> None:
        """Take parameter groups with an `lr`, a `weight_decay` and an `eps` each."""
        super().__init__(groups, {})
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step on the gradients that the parameters hold.

        Collective over the ranks that hold pieces of the same matrices.
        """
        result = closure() if closure is not None else None
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            for parameter in present:
                if not self.state[parameter]:
                    self.state[parameter] = initial_state(parameter, group)
            matrices = [p for p in present if piece_of(p).role == "hidden"]
            self._update_matrices(group, matrices)
            self._update_others(group, [p for p in present if piece_of(p).role != "hidden"])
        return result

    def _update_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        whole = [p for p in parameters if not piece_of(p).is_split]
        split = [p for p in parameters if piece_of(p).is_split]
        for parameter in whole:
            piece = piece_of(parameter)
            orthogonal = self._orthogonal(piece, self._direction(parameter).view(piece.shape))
            self._update(group, parameter, orthogonal.view_as(parameter))
        directions = [self._direction(p) for p in split]
        for parameter, orthogonal in zip(split, on_owners(split, directions, self._orthogonal), strict=True):
            self._update(group, parameter, orthogonal)

    def _direction(self, parameter: Tensor) -> Tensor:
        """Return the momentum, or with `nesterov` that of one more step with the same gradient."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        state["step"] += 1
        decay, momentum = self._settings.momentum, state["exp_avg"]
        momentum.lerp_(gradient.to(momentum.dtype), 1 - decay)
        return gradient.to(momentum.dtype).lerp(momentum, decay) if self._settings.nesterov else momentum

    def _orthogonal(self, piece: Piece, direction: Tensor) -> Tensor:
        """Return the update s o of a whole weight."""
        wanted = self._settings.newton_schulz_precision
        is_bf16 = wanted == "bf16" or (wanted == "auto" and direction.is_cuda)
        made = []
        for matrices in piece.matrices(direction):
            orthogonal = orthogonalise(
                matrices,
                steps=self._settings.newton_schulz_steps,
                dtype=torch.bfloat16 if is_bf16 else torch.float32,
                cut_dim=piece.cut_dim,
                group=piece.tensor_group,
            )
            made.append(orthogonal.to(direction.dtype) * self._scale(*piece.whole_shape(matrices)))
        return piece.weight(made)

    def _update(self, group: dict[str, Any], parameter: Tensor, direction: Tensor) -> None:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"])

    def _scale(self, rows: int, columns: int) -> float:
        size = rows * columns if self._settings.parametrisation == "completep" else max(rows, columns)
        return self._settings.update_scale * math.sqrt(size)

    def _update_others(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=self._settings.beta1,
            beta2=self._settings.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(
    matrices: Tensor,
    *,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    cut_dim: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Return the nearest matrices whose singular values are about 1, by Newton and Schulz's iteration.

    With X divided by its Frobenius norm, each iteration is X <- a X + (b A + c A^2) X with A = X X^T, or the same from
    the right with A = X^T X. A sums over the dimension that tensor ranks cut, so one all-reduce of A and no other
    communication makes an iteration exact on cuts.

    Args:
        matrices: [k, m, n], this tensor rank's cut.
        steps: number of iterations.
        dtype: of the products; the norm is taken in float32.
        cut_dim: 0 or 1 for the rows or columns that the ranks of `group` share; None for whole matrices.
        group: the tensor group; collective over it.

    Returns:
        [k, m, n] in `dtype`.
    """
    a, b, c = COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32).double()
    norms = _summed(norms.square(), group).sqrt() if group is not None else norms
    x = (matrices / (norms + _SMALLEST).to(matrices.dtype)).to(dtype)
    from_left = x.shape[-2] <= x.shape[-1] if cut_dim is None else cut_dim == 1
    for _ in range(steps):
        gram = _summed(x @ x.mT if from_left else x.mT @ x, group)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a) if from_left else torch.baddbmm(x, x, polynomial, beta=a)
    return x


def _summed(values: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def initial_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Return a count of steps and zero moments: one for a matrix, two for any other parameter."""
    del group
    keys = ("exp_avg",) if piece_of(parameter).role == "hidden" else ("exp_avg", "exp_avg_sq")
    moments = {key: torch.zeros_like(parameter, dtype=torch.float32) for key in keys}
    return {"step": torch.zeros(()), **moments}
