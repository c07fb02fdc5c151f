"""Coordinate check: models of many sizes take a few optimizer steps, and their activations and updates are measured.

`megadiff.scaling.optimum` holds what is expected, and `megadiff coordinate_check` explains and prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadiff.config.load import load_config
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.diffusion.noising import NoisedBatch, noise_batch
from megadiff.diffusion.objective import gidd_objective
from megadiff.errors import ConfigError
from megadiff.optim.config import Scale
from megadiff.optim.members import load_member
from megadiff.optim.pieces import parameter_groups
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.scaling.optimum import EDITS, HEAD_DIM, OVERRIDES, STEPS, Size, bands_of, judge

with quiet():
    from megadiff.model.denoiser import Denoiser, build_chunks
    from megadiff.model.initialisation import Role, initialise, role_of
    from megadiff.parallel.config import Layout
    from megadiff.parallel.topology import Topology, open_topology
    from megadiff.platform.machine import Platform, detect

VOCAB, MASK, ROWS, LENGTH = 260, 3, 8, 32
SETTINGS = (
    "name=coordinates", "data.train=[sequences-made-here]", "data.tokenizer=byte", f"model.seq_length={LENGTH}",
    f"batch.global_batch_size={ROWS}", f"batch.micro_batch_size={ROWS}", "schedule.steps=100000",
    "precision.compute=fp32", "optimizer.lr=0.1", "optimizer.weight_decay=0.1",
)  # fmt: skip
"""Settings common to all models of the check, applied before the overrides of the command line."""


def check(
    grid: Sequence[Size], config: Path, *, without: str | None = None, overrides: Sequence[str] = ()
) -> tuple[dict[Size, dict[str, float]], list[str]]:
    """Measure every size in one open process group; return the statistics and a sentence for each violated
    property.

    Raises:
        ConfigError: `without` is a rule for the rate of a role that the model lacks.
    """
    base = (min(width for width, _ in grid), min(depth for _, depth in grid))
    platform = detect("cpu")
    topology = open_topology(Layout(1, 1, 1, 1, 1))
    measured = {}
    for width, depth in grid:
        removed = [OVERRIDES[without](width, base)] if without in OVERRIDES else []
        size = (f"model.hidden={width}", f"model.layers={depth}", f"model.heads={max(1, width // HEAD_DIM)}")
        settings = load_config(config, [*SETTINGS, *overrides, *size, *removed], RunConfig)
        roles, edit = EDITS.get(without or "", ((), None))
        model = _model(settings, platform, topology)
        groups = _groups(model, settings)
        for role in roles:
            assert edit is not None
            if role not in groups:
                if len(roles) == 1:
                    raise ConfigError(f"--without {without} changes the rate of {role} weights, which this model lacks")
                continue
            edit(groups[role], settings, base)
        measured[width, depth] = _measure(model, groups, settings)
    broken = [verdict.sentence() for verdict in judge(measured, bands_of(measured)) if not verdict.holds]
    broken += [
        f"logits before the first step have size {found['logits, start']:.3g} at width {width}, depth {depth}: "
        "the head starts at 0, so that the first prediction is uniform"
        for (width, depth), found in measured.items()
        if found["logits, start"] > 0 and not settings.model.tie_embeddings
    ][:1]
    return measured, broken


def _model(config: RunConfig, platform: Platform, topology: Topology) -> Denoiser:
    with quiet():
        chunks = build_chunks(
            config.model,
            vocab_size=VOCAB,
            parallel=config.parallel,
            precision=config.precision,
            platform=platform,
            topology=topology,
        )
    initialise(chunks, config.model, seed=config.seed, topology=topology)
    return chunks[0]


def _groups(model: Denoiser, config: RunConfig) -> dict[Role, dict[str, Any]]:
    """Return the run's own parameter groups, but one per role."""
    scale = Scale(config.model.hidden, config.model.layers, config.tokens_per_step, config.objective.reduction)
    by_role: dict[Role, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        by_role.setdefault(role_of(name), []).append((role_of(name), parameter))
    return {
        role: next(group for group in parameter_groups(pairs, config.optimizer, scale) if group["params"])
        for role, pairs in by_role.items()
    }


def _measure(model: Denoiser, groups: dict[Role, dict[str, Any]], config: RunConfig) -> dict[str, float]:
    """`STEPS` optimizer steps on one batch, and what they did."""
    process = build_process(config.noise, vocab_size=VOCAB, mask_id=MASK)
    sequences = noise_batch(
        _walks(), seed=0, sample_index=np.arange(ROWS), process=process, stratified=True, global_batch=ROWS
    )
    optimizer = load_member(config.optimizer.name).build(list(groups.values()), config.optimizer)
    begin = {role: [p.detach().clone() for p in group["params"]] for role, group in groups.items()}
    found: dict[str, float] = {}
    start: dict[str, list[Tensor]] = {}
    for step in range(STEPS + 1):
        with _watched(model) as seen:
            logits = model(sequences.noised)[..., :VOCAB]
        seen["logits"] = [logits.detach().clone()]
        if step == 0:
            start = dict(seen)
            found.update({f"{name}, start": _size(value) for name, value in seen.items()})
        if step == 1:
            found["logits, step 1"] = _size(seen["logits"])
            found["decay of hidden matrices"] = _size(_moved(groups["hidden"]["params"], begin["hidden"])) / _size(
                begin["hidden"]
            )
        optimizer.zero_grad()
        _loss(logits, sequences, process).backward()
        if step < STEPS:
            optimizer.step()
    found.update({f"{name}, end": _size(value) for name, value in seen.items()})
    found.update({f"change of {name}": _size(_moved(seen[name], start[name])) for name in ("stream", "scores")})
    seen_roles: dict[str, Role] = {"embedding": "embedding", "gains": "norm", "biases": "bias"}
    for name, role in seen_roles.items():
        if role in groups:
            found[f"change of {name}"] = _size(_moved(groups[role]["params"], begin[role]))
    gradients = [p.grad for p in groups["hidden"]["params"] if p.grad is not None]
    found["eps / gradient"] = groups["hidden"]["eps"] / _size(gradients)
    return found


def _walks() -> np.ndarray:
    """Return clean sequences in which a token depends on the previous one: they can be learned, and gradients agree."""
    draw = np.random.default_rng(0)
    first, steps = draw.integers(0, 50, size=(ROWS, 1)), draw.integers(1, 4, size=(ROWS, LENGTH))
    return 4 + (first + np.cumsum(steps, axis=1)) % 50


def _loss(logits: Tensor, sequences: NoisedBatch, process: NoiseProcess) -> Tensor:
    terms = gidd_objective(logits.transpose(0, 1), sequences.clean, sequences.noised, sequences.log_snr, mixing=process)
    return terms.loss.sum()


@contextmanager
def _watched(model: Denoiser) -> Iterator[dict[str, list[Tensor]]]:
    """Record the embedding output, the residual stream after the last block and the attention logits of a
    forward pass."""
    seen: dict[str, list[Tensor]] = {"embedding": [], "stream": [], "scores": []}

    def scores(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        query, key = inputs[0].detach(), inputs[1].detach()
        seen["scores"].append(torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5)

    layers: Any = model.decoder.layers
    hooks = [
        model.embedding.register_forward_hook(lambda module, inputs, output: seen["embedding"].append(output.detach())),
        layers[-1].register_forward_hook(lambda module, inputs, output: seen["stream"].append(output[0].detach())),
        *(layer.self_attention.core_attention.register_forward_hook(scores) for layer in layers),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _moved(now: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    return [a.detach() - b for a, b in zip(now, before, strict=True)]


def _size(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square over all entries."""
    total = sum(float(x.detach().double().square().sum()) for x in tensors)
    return (total / sum(x.numel() for x in tensors)) ** 0.5
