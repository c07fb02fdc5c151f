from __future__ import annotations

import json
import math

import pytest

from megadiff.data.config import BatchSizes
from megadiff.errors import TrainingError
from megadiff.train.config import HealthConfig
from megadiff.train.health import Health, NonFiniteSource, StepDecision
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, wire_on_rank

NAN, INF = math.nan, math.inf


def health_of(**settings):
    return Health(HealthConfig(**settings), sizes=BatchSizes(8))


def figures(count, *, seed=0):
    """Loss and gradient norm that scatter about 3 and 1."""
    return [(3 + 0.1 * math.sin(7 * (i + seed)), 1 + 0.05 * math.cos(5 * (i + seed))) for i in range(count)]


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (3.0, NAN), (3.0, INF), (-INF, NAN)])
def test_no_update_is_made_where_loss_or_norm_is_not_finite(loss, norm):
    health = health_of()
    assert health.check(3.0, 1.0) == StepDecision()
    assert health.check(loss, norm) == StepDecision("non_finite")
    assert (health.state()["non_finite_consecutive"], health.skipped) == (1, 1)
    assert health.state()["loss"] == [3.0], "what is not finite never joins the running figures"
    health.check(3.0, 1.0)
    assert (health.state()["non_finite_consecutive"], health.skipped) == (0, 1)


def test_the_run_ends_after_the_limit_in_a_row_with_all_their_samples(caplog):
    health, source = health_of(non_finite_limit=2), NonFiniteSource(5, "node3", 1, (2, 3), ())
    for step, norm in ((1, 1.0), (2, NAN), (3, 1.0), (4, NAN)):
        health.report(step, health.check(3.0, norm), (source,))
    with pytest.raises(TrainingError) as raised:
        health.report(5, health.check(3.0, NAN), (source,))
    said = str(raised.value)
    assert said.startswith("step 5: loss or gradient not finite 2 consecutive steps (health.non_finite_limit is 2); ")
    assert (
        "Their samples are 24 to 39; in the last step: loss of a microbatch on rank 5 (node3), samples 34, 35." in said
    )
    assert raised.value.exit_code == 5
    assert [line.split(":")[0] for line in caplog.messages] == ["step 2", "step 4", "step 5"]


def test_a_broken_gradient_is_located_by_rank_stage_and_last_tensor():
    source = NonFiniteSource(2, "node1", 1, (), ("a.weight", "b.weight"))
    assert source.describe(80) == "gradient on rank 2 (node1), stage 1: 2 tensor(s), nearest the output b.weight"


@pytest.mark.parametrize("which", ["loss", "grad_norm"])
@pytest.mark.parametrize("skips", [True, False])
def test_a_spike_is_named_and_skipped_only_where_asked(which, skips):
    health = health_of(spike_window=16, spike_sigma=6.0, skip_spikes=skips)
    for loss, norm in figures(20):
        assert health.check(loss, norm) == StepDecision()
    decision = health.check(30.0 if which == "loss" else 3.0, 10.0 if which == "grad_norm" else 1.0)
    assert decision.skip == ("spike" if skips else None)
    (told,) = decision.spikes
    assert told.startswith(f"{which} {'30' if which == 'loss' else '10'} against ")
    assert told.endswith(" over the 16 steps before")
    assert health.skipped == int(skips)


def test_a_spike_is_logged_with_the_samples_of_its_step(caplog):
    health_of().report(11, StepDecision("spike", ("loss 9 against 3 +- 0.1 over the 128 steps before",)))
    (line,) = caplog.messages
    assert line.startswith("step 11: spike: loss 9 against 3 +- 0.1")
    assert line.endswith("; no update was made; samples 80 to 87")


def test_a_fall_is_no_spike_and_half_a_window_is_needed_to_judge():
    health = health_of(spike_window=16, skip_spikes=True)
    for loss, norm in figures(7):
        health.check(loss, norm)
    assert health.check(1e6, 1e6) == StepDecision(), "seven values are fewer than half of sixteen"
    health = health_of(spike_window=16, skip_spikes=True)
    for loss, norm in figures(20):
        health.check(loss, norm)
    assert health.check(0.0, 0.0) == StepDecision()


def test_a_new_level_is_taken_for_normal_after_a_few_steps():
    health = health_of(spike_window=16, skip_spikes=True)
    for loss, norm in figures(16):
        health.check(loss, norm)
    skipped = [health.check(loss + 5, norm).skip for loss, norm in figures(16)]
    assert skipped[0] == "spike"
    assert skipped.count("spike") < 4
    assert skipped[-1] is None


@pytest.mark.parametrize("cut", [0, 3, 15, 40, 69])
def test_a_resumed_run_decides_as_the_uninterrupted_one(cut):
    """The state passes through JSON, as in a checkpoint's manifest."""
    course = [*figures(40), (9.0, 1.0), *figures(8, seed=3), (3.0, NAN), (INF, 1.0), *figures(20, seed=5), (3.0, 2.0)]
    settings = {"spike_window": 32, "skip_spikes": True}
    whole = health_of(**settings)
    expected = [whole.check(*step) for step in course]
    assert sorted({decision.skip for decision in expected}, key=str) == [None, "non_finite", "spike"]
    before = health_of(**settings)
    for step in course[:cut]:
        before.check(*step)
    after = health_of(**settings)
    after.restore(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert [after.check(*step) for step in course[cut:]] == expected[cut:]
    assert after.state() == whole.state()


def test_an_older_checkpoint_without_state_and_a_smaller_window_are_taken():
    health = health_of(spike_window=8)
    health.restore({})
    assert health.state() == {"non_finite_consecutive": 0, "skipped": 0, "loss": [], "grad_norm": []}
    health.restore({"loss": list(range(100)), "grad_norm": list(range(100))})
    assert health.state()["loss"] == [92, 93, 94, 95, 96, 97, 98, 99]


def _judged_on_rank(configs):
    """What wired runs decide on steady losses and gradient norms, and then on a high one."""
    found = []
    for config in configs:
        run = wire_on_rank(config, 1)
        steady = [run.step.check(1.0 + 0.01 * (step % 3), 1.0).skip for step in range(8)]
        found.append((steady, run.step.check(1.1, 1.0).skip))
        run.close()
    return found


def test_a_wired_run_is_judged_by_its_own_settings(toy_corpus, tmp_path):
    """Eight steps fill no window of 128, and a rise of ten percent is a spike where they do."""
    strict = {"spike_window": 8, "spike_sigma": 3.0, "skip_spikes": True}
    configs = [
        toy_config(toy_corpus, tmp_path, name=f"run{number}", data__valid=[], health=health)
        for number, health in enumerate(({}, strict, {**strict, "spike_sigma": 100.0}))
    ]
    usual, judged, lenient = on_ranks(1, _judged_on_rank, configs)[0]
    assert judged == ([None] * 8, "spike")
    assert usual == lenient == ([None] * 8, None)
