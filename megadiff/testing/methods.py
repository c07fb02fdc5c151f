"""The contract of a training method: pure batches, one curve on every layout and after a resume, sound evaluation.

from megadiff.testing import check_method

check_method({"name": "my_package.my_method", "own_setting": 3}, noise__shift="masked")
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.data.config import StepBatch
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.noise_process import build_process
from megadiff.diffusion.noising import NoisedBatch
from megadiff.errors import ConfigError
from megadiff.eval.likelihood import BoundSettings, Item
from megadiff.loss.fused_lm_head import fused_objective
from megadiff.methods import Method, MethodContext, build_method
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.run.load_model import load_model
from megadiff.testing.ranks import on_ranks
from megadiff.testing.toy_run import (
    LAYOUTS,
    SAVED,
    STEPS,
    copy_as_killed,
    figures,
    toy_config,
    wire_on_rank,
    write_corpus,
)

_TOLERANCE = 5e-5
"""Relative difference that the order of summation explains between layouts, after a few float32 steps."""
_SEQUENCES, _PREDICTED = 24, 259
"""Sequences of the check of batches; number of tokens that the byte tokenizer's model predicts, all but the mask."""


def check_method(
    entry: str | Mapping[str, Any], *, layouts: Mapping[str, tuple[int, dict[str, Any]]] = LAYOUTS, **settings: Any
) -> None:
    """Check that a training method keeps the family's promises.

    Batches are pure functions of the samples, with positions and shapes that agree. A toy model is trained for real,
    on one rank and on forked ranks in several layouts: every layout gives the figures of one rank up to rounding, and
    a run resumed from its checkpoint gives its own to the bit. A model that predicts every token alike is evaluated at
    no less than log(number of tokens), the entropy of such predictions: a figure below it is no bound. A likelihood
    that is called exact must add up to one over all continuations by one token. Sampler and export either work or are
    refused in one sentence.

    Processes are forked, so nothing may have opened a process group, and torch should use one thread
    (`torch.set_num_threads(1)`). Takes about ten CPU seconds after importing torch and megatron-core.

    Args:
        entry: the section `method`, or its `name`.
        layouts: number of ranks and settings of the toy run, by name; the first must be one rank.
        settings: further settings of the toy run, such as `noise__shift="masked"`.

    Raises:
        AssertionError: a promise is broken, or a rank raised; the message names the layout.
        ConfigError, ValidationError: the method does not exist, or its settings are wrong.
    """
    section = {"name": entry} if isinstance(entry, str) else dict(entry)
    settings = {"model__layers": 2, **settings, "method": section}
    with TemporaryDirectory() as name, quiet():
        folder = Path(name)
        corpus = write_corpus(folder / "corpus")
        check_batches(method_of(toy_config(corpus, folder, **settings)))
        wanted: list[dict[str, Any]] = []
        for layout, (world_size, own) in layouts.items():
            root = folder / layout.replace(" ", "_")
            whole, resumed = (_config(corpus, root, run, {**settings, **own}) for run in ("whole", "resumed"))
            try:
                on_ranks(world_size, train_both, whole, resumed)
            except AssertionError as error:
                raise AssertionError(f"{layout}: {error}") from None
            found = figures(whole)
            assert found == figures(resumed), f"{layout}: the resumed run has other figures"
            wanted = wanted or found
            _assert_close(layout, found, wanted)
            if world_size == 1:
                with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
                    pool.submit(_check_trained, whole.folder).result()
        first = {"model__head_init": 0.0, "schedule__steps": 1, "schedule__warmup_steps": 0}
        untrained = _config(corpus, folder, "untrained", {**settings, **first})
        on_ranks(1, _evaluate_untrained, untrained)


def method_of(config: RunConfig) -> Method:
    """Return the method of a toy run, over the byte tokenizer, without a model."""
    tokenizer = ByteTokenizer()
    context = MethodContext(
        process=build_process(config.noise, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id),
        tokenizer=tokenizer,
        noise=config.noise,
        objective=config.objective,
        conditioning=config.conditioning,
        loss_kernel=fused_objective,
        seed=config.seed,
    )
    return build_method(config.method, context)


def check_batches(method: Method, *, length: int = 16) -> None:
    """Check that batches are pure functions of samples and tokens, and that their parts agree.

    Raises:
        AssertionError: they are not.
    """
    clean = np.random.default_rng(0).integers(4, 260, (_SEQUENCES, length))
    samples, step = [*range(48, 48 + _SEQUENCES)], StepBatch(2, 48, _SEQUENCES)
    whole = method.batch(clean, samples, step)
    _check_shapes(whole, length)
    order = np.random.default_rng(1).permutation(_SEQUENCES)
    mixed = method.batch(clean[order], [samples[i] for i in order], step)
    alone = [method.batch(clean[i : i + 1], [samples[i]], step) for i in range(_SEQUENCES)]
    for name, value in whole.columns().items():
        assert torch.equal(value[order], getattr(mixed, name)), f"batch: {name} depends on the order of the sequences"
        parts = torch.cat([getattr(one, name) for one in alone])
        assert torch.equal(value, parts), f"batch: {name} of a sequence depends on its microbatch"
    pattern = method.attention(whole)
    assert pattern.prefix_lengths.device.type == "cpu", "attention: prefix lengths must be on the CPU"
    assert pattern.prefix_lengths.shape == (_SEQUENCES,), "attention: one prefix length a sequence"
    assert ((pattern.prefix_lengths >= 0) & (pattern.prefix_lengths <= length)).all(), "attention: a prefix is too long"
    counted = method.loss_tokens(whole)
    if counted is not None:
        assert counted.unique().numel() == counted.numel(), "loss_tokens: a position comes twice"
        assert counted.numel() == 0 or int(counted.max()) < whole.noised.numel(), "loss_tokens: a position is too large"
    _check_weights(method, whole, counted)
    if "predicted" in signature(method.batch).parameters:
        _check_predicted(method, clean, samples, step)
    if "documents" in signature(method.batch).parameters:
        _check_documents(method, clean, samples, step)


def _check_predicted(method: Method, clean: npt.NDArray[np.int64], samples: list[int], step: StepBatch) -> None:
    """Check that the tokens of conversations that are not to be predicted stay clean and have no loss."""
    predicted = np.random.default_rng(2).random(clean.shape) < np.linspace(0, 1, clean.shape[0])[:, None]
    text, found = method.batch(clean, samples, step), method.batch(clean, samples, step, predicted)
    _check_shapes(found, clean.shape[1])
    allowed = torch.from_numpy(predicted).gather(1, found.source)
    assert not (found.is_noisy & ~allowed).any(), "batch: a token that is not to be predicted is noisy"
    assert torch.equal(found.is_noisy, text.is_noisy & allowed), "batch: is_noisy of predicted tokens differs"
    assert torch.equal(found.noised[allowed], text.noised[allowed]), "batch: a predicted token has other noise"
    if not method.adds_start_token:
        given = ~found.is_noisy
        assert torch.equal(found.noised[given], found.clean[given]), "batch: a given token is changed"
    _check_weights(method, found, method.loss_tokens(found))
    mine = method.batch(clean[3:4], samples[3:4], step, predicted[3:4])
    for name, value in found.columns().items():
        assert torch.equal(value[3:4], getattr(mine, name)), f"batch: {name} of a conversation depends on others"


def _check_documents(method: Method, clean: npt.NDArray[np.int64], samples: list[int], step: StepBatch) -> None:
    """Check that several conversations in a sequence are kept apart, with the noise of one."""
    predicted = np.random.default_rng(3).random(clean.shape) < 0.7
    documents = (np.arange(clean.shape[1]) >= np.arange(clean.shape[0])[:, None]).astype(np.int64)
    one, found = (method.batch(clean, samples, step, predicted, *more) for more in ((), (documents,)))
    assert torch.equal(one.is_noisy, found.is_noisy), "batch: is_noisy depends on documents"
    assert torch.equal(one.log_snr, found.log_snr), "batch: log_snr depends on documents"
    wanted = torch.from_numpy(documents).gather(1, found.source)
    assert found.documents is not None, "batch: it does not hand on documents"
    assert torch.equal(found.documents, wanted), "batch: documents do not follow the tokens"
    lengths = method.attention(found).documents
    assert lengths is not None, "attention: it does not keep documents apart"
    for row, own in zip(wanted, lengths.tolist(), strict=True):
        counts = row.unique_consecutive(return_counts=True)[1].tolist()
        assert [length for length in own if length] == counts, "attention: documents have other lengths"
    mine = method.batch(clean[3:4], samples[3:4], step, predicted[3:4], documents[3:4])
    for name, value in found.columns().items():
        assert torch.equal(value[3:4], getattr(mine, name)), f"batch: {name} of documents depends on other sequences"


def _check_weights(method: Method, batch: NoisedBatch, counted: Tensor | None) -> None:
    weights = method.loss_weights(batch)
    if weights is None:
        return
    assert weights.shape == batch.noised.shape, f"loss_weights: wanted [B, L], found {tuple(weights.shape)}"
    assert bool((weights.isfinite() & (weights >= 0)).all()), "loss_weights: a weight is negative or not finite"
    assert not weights[~batch.is_noisy].any(), "loss_weights: a noise-free token has a weight"
    if counted is not None:
        left_out = torch.ones(weights.numel(), dtype=torch.bool)
        left_out[counted] = False
        assert not weights.t().reshape(-1)[left_out].any(), "loss_weights: a token outside loss_tokens has a weight"


def _check_shapes(batch: NoisedBatch, length: int) -> None:
    kinds = {"noised": torch.int64, "clean": torch.int64, "log_snr": torch.float32, "is_noisy": torch.bool}
    for name, dtype in kinds.items():
        value: Tensor = getattr(batch, name)
        found = f"{tuple(value.shape)} {value.dtype}"
        assert value.shape == (_SEQUENCES, length), f"batch: {name} must have shape [B, L], found {found}"
        assert value.dtype == dtype, f"batch: {name} must be {dtype}, found {found}"
        assert value.device.type == "cpu", f"batch: {name} must be on the CPU"
    for name in ("prompt_length", "pattern"):
        assert getattr(batch, name).shape == (_SEQUENCES,), f"batch: {name} must have shape [B]"


def _config(corpus: Path, root: Path, name: str, settings: Mapping[str, Any]) -> RunConfig:
    shared = {"schedule__steps": STEPS, "checkpoint__every": SAVED, "eval__every": SAVED, "eval__sequences": 6}
    return toy_config(corpus, root, **{**shared, **settings, "name": name})


def train_both(whole: RunConfig, resumed: RunConfig) -> None:
    """Train on this rank from the beginning, and from the checkpoint in the middle."""
    wire_on_rank(whole, dist.get_world_size()).train()
    dist.barrier()
    if dist.get_rank() == 0:
        copy_as_killed(whole.folder, resumed.folder)
    dist.barrier()
    wire_on_rank(resumed, dist.get_world_size()).train()


def _assert_close(layout: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        for key in ("loss", "elbo", "grad_norm", "eval_elbo"):
            if key in one:
                a, b = float(one[key]), float(other[key])
                assert math.isfinite(a), f"{layout}: {key} of step {one['step']} is {a}"
                assert abs(a - b) <= _TOLERANCE * max(1.0, abs(b)), (
                    f"{layout}: {key} of step {one['step']} is {a}, on one rank it is {b}"
                )


def _check_trained(run: Path) -> None:
    """Check likelihoods, sampler and export of a trained model; in a process of its own."""
    with load_model(run, platform="cpu") as model:
        method, vocab_size, mask_id = model.method, model.process.vocab_size, model.process.mask_id
        prompt, items = (40, 50, 60), [Item((40, 50), (60, 7)), Item((), (9, 9, 30))]
        try:
            estimator = method.estimator(BoundSettings(draws=4))
        except ConfigError:
            estimator = None
        if estimator is not None:
            found = estimator.likelihoods(model, items)
            assert all(math.isfinite(one.nll) and one.nll > 0 for one in found), f"likelihoods: {found}"
            assert [one.tokens for one in found] == [2, 3], f"likelihoods: other numbers of tokens: {found}"
            assert [len(estimator.are_greedy(model, [item], 0)) for item in items] == [1, 1]
            if estimator.kind == "exact":
                every = [Item(prompt, (token,)) for token in range(vocab_size) if token != mask_id]
                total = math.fsum(math.exp(-one.nll) for one in estimator.likelihoods(model, every))
                assert abs(total - 1.0) < 1e-4, f"exact likelihoods of all next tokens add up to {total}"
        try:
            sampler = method.sampler()
        except ConfigError:
            sampler = None
        if sampler is not None:
            given = torch.tensor([prompt, prompt])
            drawn = sampler.generate(model.denoise, given, sampler.settings(5, max_denoising_steps=5), seed=1).sequences
            assert drawn.shape == (2, 8), f"sampler: wanted 2 sequences of 8 tokens, found {tuple(drawn.shape)}"
            assert torch.equal(drawn[:, :3], given), "sampler: it changes the prompt"
            assert not (drawn == mask_id).any(), "sampler: masks are left"
        with suppress(ConfigError):
            json.dumps(method.export_config(), allow_nan=False)
        assert method.description, "description: it is empty"


def _evaluate_untrained(config: RunConfig) -> None:
    """Evaluate a model whose logits are all 0, before its first step."""
    wire_on_rank(config, 1).train()
    line = next(line for line in figures(config) if "eval_elbo" in line)
    floor, found, error = math.log(_PREDICTED), line["eval_elbo"], line["eval_elbo_stderr"] or 0.0
    assert found >= floor - 4 * error - 0.02, (
        f"validation: a model that predicts all {_PREDICTED} tokens alike is evaluated at {found:.4f} +- {error:.4f} "
        f"nats per token, below their entropy {floor:.4f}"
    )
