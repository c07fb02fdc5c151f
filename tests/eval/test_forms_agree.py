"""The bound is a number of the model: measuring it in log-SNR or in time gives the same one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadiff.config.section import Section
from megadiff.diffusion.config import NoiseConfig, noise_config
from megadiff.diffusion.noise_process import build_process
from megadiff.diffusion.noising import evaluation_noise
from megadiff.diffusion.schedules import LinearSchedule
from megadiff.platform.quiet import quiet
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, wire_on_rank, write_corpus

with quiet():
    from megadiff.eval.validation import EvalTask, ValidationEvaluator
    from megadiff.parallel.objective import DiffusionObjective
    from megadiff.train.hooks.checkpoint import CheckpointHook
    from megadiff.train.hooks.validation import ValidationHook


def _bounds(config: Section, forms: dict[str, NoiseConfig]) -> dict[str, tuple[float, float]]:
    """Train, then measure the same weights under each form: the bound and its standard error."""
    run = wire_on_rank(config, 1)  # type: ignore[arg-type]
    held_out = next(hook.evaluate for hook in run.hooks if isinstance(hook, ValidationHook))
    assert isinstance(held_out, ValidationEvaluator)
    run.hooks = [hook for hook in run.hooks if not isinstance(hook, CheckpointHook | ValidationHook)]
    run.train()
    found = {}
    for name, noise in forms.items():
        process = build_process(noise, vocab_size=260, mask_id=3)
        own = process.schedule
        # Both over the levels the process itself draws from: gidd_time leaves out what is cleaner than t = 1e-4.
        for kind, schedule in (("own", own), ("linear", LinearSchedule(own.min_log_snr, own.max_log_snr))):
            drawn = process.with_schedule(schedule)

            def sequences(clean, index, level, drawn=drawn):
                return evaluation_noise(clean, seed=0, sequence_index=index, level=level, num_levels=16, process=drawn)

            evaluator = ValidationEvaluator(
                sources=held_out.sources,
                task=EvalTask(DiffusionObjective(drawn), sequences, 16),
                chunks=held_out.chunks,
                topology=held_out.topology,
                device=held_out.device,
                micro_batch_size=held_out.micro_batch_size,
            )
            result = evaluator()
            found[f"{name}/{kind}"] = (result.elbo, result.stderr)
    return found


def test_the_log_snr_and_the_time_form_agree_on_the_same_trained_model(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", tokens=20000)
    config = toy_config(
        corpus,
        tmp_path,
        noise__shift="masked",
        schedule__steps=40,
        optimizer__lr=1e-2,
        eval__sequences=120,
        batch__micro_batch_size=8,
    )
    forms = {
        "snr": noise_config(shift="masked"),
        "time": noise_config(process="gidd_time"),
        "time with uniform tokens": noise_config(process="gidd_time", p_uniform=0.2),
    }
    found = on_ranks(1, _bounds, config, forms)[0]
    start = 5.557  # log N: the model must have learned for the comparison to mean something
    assert found["snr/own"][0] < 0.8 * start
    for one, other in (("snr/own", "time/own"), ("time with uniform tokens/own", "time with uniform tokens/linear")):
        (a, error_a), (b, error_b) = found[one], found[other]
        assert abs(a - b) < 2 * (error_a**2 + error_b**2) ** 0.5, found
        assert max(error_a, error_b) < 0.05 * a
    assert found["snr/own"] == pytest.approx(found["snr/linear"])
