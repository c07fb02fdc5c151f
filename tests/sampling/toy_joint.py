"""An enumerable text: four real tokens and a mask, four positions, a known joint distribution, the exact denoiser.

Real tokens are 0, 1, 3 and 4, the mask is 2, so that nothing can rely on the mask's place.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.sampling.standalone import Step

VOCAB, MASK, LENGTH = 5, 2, 4
REAL = torch.tensor([0, 1, 3, 4])
NOISES = {"masked": -1000.0, "hybrid": 0.0, "uniform": 1000.0}


def joint() -> Tensor:
    """P(x_1..x_4) over indices of REAL, [4, 4, 4, 4] float64: neighbours depend on each other strongly."""
    draw = np.random.default_rng(5)
    first, step = draw.dirichlet(np.ones(4)), draw.dirichlet(0.4 * np.ones(4), size=4)
    far = draw.dirichlet(np.ones(4), size=4)
    table = np.einsum("a,ab,bc,cd,ad->abcd", first, step, step, step, far) + 1e-4
    return torch.from_numpy(table / table.sum())


JOINT = joint()


def probability(sequence: list[int]) -> float:
    """P of a clean sequence of ids."""
    places = {int(token): i for i, token in enumerate(REAL)}
    return float(JOINT[tuple(places[token] for token in sequence)])


def leave_one_out(ids: Tensor, log_snr: float, process: NoiseProcess) -> Tensor:
    """log P(x_i | z of the other positions) at a level, as logits [B, 4, V]; -inf at the mask."""
    level = torch.tensor(log_snr, dtype=torch.float64)
    noise = torch.sigmoid(-level) * process.pi_at(level, ids)
    like = noise.unsqueeze(-1) + torch.sigmoid(level) * (ids.unsqueeze(-1) == REAL)  # [B, 4, 4]
    left, right = (torch.einsum("na,nb->nab", like[:, i], like[:, i + 1]).flatten(1) for i in (0, 2))
    pairs = JOINT.reshape(16, 16)
    first, last = (right @ pairs.T).reshape(-1, 4, 4), (left @ pairs).reshape(-1, 4, 4)
    parts = [
        (first * like[:, 1, None, :]).sum(2),
        (first * like[:, 0, :, None]).sum(1),
        (last * like[:, 3, None, :]).sum(2),
        (last * like[:, 2, :, None]).sum(1),
    ]
    out = torch.full((*ids.shape, VOCAB), -torch.inf, dtype=torch.float64)
    out[..., REAL] = torch.stack(parts, dim=1).log()
    return out


class ExactDenoiser:
    """The leave-one-out posterior at the level the sampler is at, which it learns as an observer of the steps."""

    def __init__(self, process: NoiseProcess) -> None:
        self.process, self.log_snr, self.calls = process, -9.0, 0

    def on_step(self, step: Step) -> None:
        self.log_snr = step.log_snr

    def __call__(self, ids: Tensor, _prefix_length: int) -> Tensor:
        self.calls += 1
        return leave_one_out(ids, self.log_snr, self.process)


def counts(ids: Tensor) -> np.ndarray:
    """How often each of the 256 texts came up."""
    index = torch.searchsorted(REAL, ids)
    assert torch.equal(REAL[index], ids), "a mask or an unknown id is left"
    return np.bincount((index * torch.tensor([64, 16, 4, 1])).sum(dim=1).numpy(), minlength=256)


def chi_square(ids: Tensor) -> tuple[float, float]:
    """Statistic over its degrees of freedom, and the p-value, of sequences against JOINT; rare texts are pooled."""
    from scipy import stats

    seen, want = counts(ids), JOINT.numpy().ravel() * len(ids)
    common = want >= 8
    seen_cells = np.append(seen[common], seen[~common].sum())
    want_cells = np.append(want[common], want[~common].sum())
    found = stats.chisquare(seen_cells, want_cells)
    return float(found.statistic) / (len(seen_cells) - 1), float(found.pvalue)
