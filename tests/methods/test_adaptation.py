"""Adaptation of autoregressive models: which tokens see what, which have a loss, and how large it is."""

from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megadiff.data.config import StepBatch
from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.objective import gidd_objective
from megadiff.export.export import export
from megadiff.loss.lm_head import VocabShard
from megadiff.parallel.step_metrics import metrics_of, report_sums, sequence_counts
from megadiff.platform.quiet import quiet
from megadiff.run.check import check
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank

with quiet():
    from megadiff.parallel.objective import DeviceBatch
    from megadiff.run.load_model import load_model
    from megadiff.testing.methods import method_of
    from megadiff.testing.toy_run import wire_on_rank, write_corpus
    from megadiff.train.gradients import SequenceGradients

LENGTH = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def adaptation(corpus, folder, *, shift="balanced", **settings):
    own = {"name": "adaptation", **settings}
    return method_of(toy_config(corpus, folder, method=own, model__alignment="shifted", noise__shift=shift))


def batch_of(method, count=64, step=0, length=LENGTH):
    clean = np.random.default_rng(5).integers(4, 260, (count, length))
    return clean, method.batch(clean, [*range(count)], StepBatch(step, 0, count))


def test_attention_goes_from_causal_to_full(corpus, tmp_path):
    method = adaptation(corpus, tmp_path, anneal_steps=4)
    prefixes = [int(method.attention(batch_of(method, 3, step)[1]).prefix_lengths[0]) for step in range(6)]
    assert prefixes == [19, 15, 10, 5, 0, 0]  # of 20 tokens; the last one sees all before it in either way
    assert method.attention(batch_of(method, 3, 0)[1]).is_causal
    plain, annealed = batch_of(adaptation(corpus, tmp_path), 3)[1], batch_of(method, 3)[1]
    assert torch.equal(plain.noised, annealed.noised)
    assert torch.equal(plain.log_snr, annealed.log_snr)


@pytest.mark.parametrize("kind", ["block", "causal"])
def test_prompts_attend_as_the_export_says_where_no_more_is_causal(corpus, tmp_path, kind):
    prompts = {"prompt": 1.0, "prompt_attention": kind}
    method = method_of(toy_config(corpus, tmp_path, method={"name": "adaptation"}, conditioning=prompts))
    _, batch = batch_of(method)
    found, later = method.attention(batch), method.prompted_attention(batch.prompt_length, LENGTH)
    assert torch.equal(found.prefix_lengths, later.prefix_lengths)
    assert (found.is_causal, later.is_causal) == (kind == "causal", kind == "causal")


def test_gradients_of_a_hook_are_those_of_its_step(corpus, tmp_path):
    method = adaptation(corpus, tmp_path, anneal_steps=4)
    unused: Any = None
    gradients = SequenceGradients(unused, unused, method.batch, unused, [], unused, unused, LENGTH, 2)
    clean = np.full((2, LENGTH), 9)
    prefixes = [int(gradients.noised(clean, 0, step=step).prompt_length[0]) for step in (0, 2, 4)]
    assert prefixes == [19, 10, 0]


def test_a_share_of_sequences_predicts_next_tokens(corpus, tmp_path):
    method = adaptation(corpus, tmp_path, next_token_fraction=0.3, next_token_weight=0.25)
    clean, batch = batch_of(method, 2000)
    chosen = batch.pattern == NoisePattern.NEXT_TOKEN
    assert abs(float(chosen.float().mean()) - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert torch.equal(batch.noised[chosen], torch.from_numpy(clean)[chosen])
    assert torch.equal(batch.is_noisy[chosen].sum(0), chosen.sum() * (torch.arange(LENGTH) > 0))
    assert torch.equal(method.attention(batch).prefix_lengths, torch.where(chosen, LENGTH, 0))
    weights = method.loss_weights(batch)
    assert weights is not None
    assert weights[chosen].unique().tolist() == [0.0, 0.25]
    _, plain = batch_of(adaptation(corpus, tmp_path), 2000)
    for name, one in batch.columns().items():
        assert torch.equal(one[~chosen], getattr(plain, name)[~chosen])
    _, longer = batch_of(method, 2500)
    assert torch.equal((longer.pattern == NoisePattern.NEXT_TOKEN)[:2000], chosen)


@pytest.mark.parametrize("shift", ["masked", "balanced", "uniform"])
def test_both_losses_add_up_as_computed_from_whole_logits(corpus, tmp_path, shift):
    """Values and gradients in float64, with every probability written out."""
    weight = 0.7
    method = adaptation(corpus, tmp_path, shift=shift, next_token_fraction=0.5, next_token_weight=weight)
    _, batch = batch_of(method, 8)
    chosen = batch.pattern == NoisePattern.NEXT_TOKEN
    assert 0 < int(chosen.sum()) < 8
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(LENGTH, 8, 16, generator=draw, dtype=torch.float64, requires_grad=True)
    head = torch.randn(384, 16, generator=draw, dtype=torch.float64, requires_grad=True)
    placed = DeviceBatch(batch, method.loss_tokens(batch), method.attention(batch))
    output = method.loss(hidden, head, placed, VocabShard.of(head, method.process))
    found = torch.autograd.grad(output.loss, (hidden, head))

    logits = (hidden @ head.T)[..., : method.process.vocab_size].transpose(0, 1)
    logits = logits.index_fill(-1, torch.tensor([method.process.mask_id]), -torch.inf)
    log_p = logits.log_softmax(-1).gather(-1, batch.clean[..., None]).squeeze(-1)
    terms = gidd_objective(logits, batch.clean, batch.noised, batch.log_snr.double(), mixing=method.process)
    of_tokens = torch.where(chosen[:, None], -weight * log_p, terms.loss) * batch.is_noisy
    wanted = torch.autograd.grad(of_tokens.sum(), (hidden, head))
    torch.testing.assert_close(output.loss.detach(), of_tokens.sum().detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.terms.loss.t(), of_tokens.detach(), rtol=1e-6, atol=1e-9)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)

    line = metrics_of(report_sums(output.terms, batch, sequence_counts(batch)).tolist())
    nll = (-log_p[chosen] * batch.is_noisy[chosen]).sum() / batch.is_noisy[chosen].sum()
    assert line["elbo_next_token"] == pytest.approx(float(nll.detach()), rel=1e-6)
    with_level = sum(share[2] for share in line["loss_by_log_snr"])
    assert with_level == pytest.approx(_binned(terms.loss.detach(), batch, ~chosen), rel=1e-6)


def _binned(loss, batch, has_level):
    edges = [-torch.inf, -6.0, -3.0, 0.0, 3.0, 6.0, torch.inf]
    total = 0.0
    for low, high in pairwise(edges):
        inside = (batch.log_snr >= low) & (batch.log_snr < high) & has_level[:, None]
        total += float(loss[inside].sum() / inside.sum()) if inside.any() else 0.0
    return total


def test_a_microbatch_of_one_kind_alone_has_its_loss(corpus, tmp_path):
    method = adaptation(corpus, tmp_path, shift="masked", next_token_fraction=0.5)
    _, batch = batch_of(method, 8)
    hidden, head = torch.randn(LENGTH, 8, 16), torch.randn(384, 16)
    chosen = batch.pattern == NoisePattern.NEXT_TOKEN

    def loss(which: Any) -> float:
        part = batch.part(which)
        placed = DeviceBatch(part, method.loss_tokens(part), method.attention(part))
        return float(method.loss(hidden[:, which], head, placed, VocabShard.of(head, method.process)).loss)

    assert loss(chosen) + loss(~chosen) == pytest.approx(loss(slice(None)), rel=1e-5)
    assert min(loss(chosen), loss(~chosen)) > 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method__next_token_fraction": 0.2}, "needs model.alignment=shifted"),
        ({"method__anneal_steps": 2, "conditioning__prompt": 0.5}, "prompt_attention is block; set it to causal"),
        ({"method__next_token_fraction": 1.0, "model__alignment": "shifted"}, "less than 1"),
        ({"method__name": "next_token", "model__alignment": "shifted"}, "next_token moves the tokens itself"),
    ],
)
def test_what_does_not_go_together_is_refused(corpus, tmp_path, settings, reason):
    with pytest.raises(ValidationError, match=reason):
        toy_config(corpus, tmp_path, **{"method__name": "adaptation", **settings})


def logits(folder: Path, ids: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return torch.from_numpy(pool.submit(_logits, folder, ids, prefixes).result())


def _logits(folder: Path, ids: torch.Tensor, prefixes: torch.Tensor) -> Any:
    with load_model(folder, platform="cpu") as model, torch.no_grad():
        return model.chunks[0](ids, prefixes).transpose(0, 1).contiguous().numpy()


def test_outputs_move_by_one_position_and_a_causal_prefix_sees_no_target(corpus, tmp_path):
    """With causal attention the shifted model is the autoregressive one: no logits depend on their own token."""
    model = {"model__head_init": 0.3, "model__embed_init": 0.5, "data__valid": []}
    at = {"method__name": "adaptation", "schedule__steps": 3, **model}
    runs = {name: toy_config(corpus, tmp_path, name=name, model__alignment=name, **at) for name in ("same", "shifted")}
    folders = {}
    for name, config in runs.items():
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 0.0})})
        on_ranks(1, train_on_rank, config, 1, save=True)
        folders[name] = config.folder / "checkpoints/step_00000003"
    ids = torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(3))
    causal = torch.full((2,), -16)
    same, shifted = (logits(folders[name], ids, causal) for name in ("same", "shifted"))
    assert torch.equal(shifted[:, 1:], same[:, :-1])
    assert torch.equal(shifted[:, 0], same[:, 0])
    other = ids.clone()
    other[:, 9] = (ids[:, 9] + 1 - 4) % 256 + 4
    changed = logits(folders["shifted"], other, causal)
    assert torch.equal(changed[:, :10], shifted[:, :10])
    assert not torch.equal(changed[:, 10], shifted[:, 10])


def test_weights_alone_go_from_next_tokens_to_diffusion(corpus, tmp_path):
    """The adapted run begins at step 0 with the weights of the other, resumes from its own checkpoints, and exports."""
    model = {"model__head_init": 0.3, "data__valid": []}
    first = toy_config(corpus, tmp_path, name="first", method__name="next_token", schedule__steps=6, **model)
    on_ranks(1, train_on_rank, first, 1, save=True)
    start = str(first.folder / "checkpoints/step_00000006")
    adapted = {
        "method": {"name": "adaptation", "anneal_steps": 2, "next_token_fraction": 0.25},
        "model__alignment": "shifted",
        "noise__shift": "masked",
        "checkpoint": {"start_from": start, "weights_only": True, "every": 2},
        **model,
    }
    whole = toy_config(corpus, tmp_path, name="adapted", schedule__steps=4, **adapted)
    assert check(whole).endswith(f"weights of        {start}, with a new optimizer and schedule from step 0 on")
    assert "model.alignment is" not in check(whole).split("ranks  ", 1)[1]
    lines = on_ranks(1, train_on_rank, whole, 1, save=True)[0].lines
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    from_zero = toy_config(corpus, tmp_path, name="zero", schedule__steps=4, **{**adapted, "checkpoint": {}})
    assert on_ranks(1, train_on_rank, from_zero, 1)[0].lines[0]["loss"] != lines[0]["loss"]
    longer = toy_config(corpus, tmp_path, name="adapted", schedule__steps=6, **adapted)
    resumed = on_ranks(1, train_on_rank, longer, 1, save=True)[0].lines
    assert (resumed[:4], [line["step"] for line in resumed[4:]]) == (lines, [5, 6])
    for begun in (start, str(longer.folder / "checkpoints/step_00000006")):
        forgotten = {"checkpoint": {"start_from": begun, "weights_only": True}, "noise__shift": "masked", **model}
        said = check(toy_config(corpus, tmp_path, name="forgotten", **forgotten))
        assert (
            "model.alignment is same, but these weights were trained to predict the token after each position" in said
        )
    export(longer.folder, tmp_path / "out")
    with pytest.raises(ValidationError, match="weights_only is true, but start_from names no checkpoint"):
        toy_config(corpus, tmp_path, checkpoint={"weights_only": True})


def _warned(config):
    """Return the warnings that a run logs before its first step."""
    found, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("megadiff").addHandler(handler)
    wire_on_rank(config, 1)
    return found


def test_a_run_that_ends_before_attention_is_full_is_warned_of(corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    own = {"method": {"name": "adaptation", "anneal_steps": 4}, "name": "run"}
    warning = "method.anneal_steps is 4, but the run ends after 3 steps (schedule.steps = 3): the model would never"
    short, long = (toy_config(corpus, tmp_path / str(steps), schedule__steps=steps, **own) for steps in (3, 4))
    assert check(short).count(f"warning           {warning}") == 1
    assert "method.anneal_steps is" not in check(long)
    assert sum(line.startswith(warning) for line in on_ranks(1, _warned, short)[0]) == 1
