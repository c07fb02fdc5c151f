"""The goodput of made-up histories on a clock the test holds, and the save interval against simulated failures."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from megadiff.config.load import load_config
from megadiff.supervision import process
from megadiff.train.config import GoodputConfig
from megadiff.train.goodput import Goodput, best_interval, daly, expected_loss, read_attempts, young
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config

HOUR = 3600.0


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now=1e9):
        self.now = now

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def start(tmp_path, clock):
    """Start an attempt of the run."""

    def begin(*, mtbf_hours=None, save_every=1000, wall=clock):
        config = GoodputConfig(mtbf_hours=mtbf_hours)
        return Goodput(tmp_path / "goodput.json", config, save_every=save_every, wall=wall, tick=clock)

    return begin


def take(meter, clock, steps, seconds=1.0, waited_s=0.0):
    for step in steps:
        clock.passes(seconds)
        meter.step_taken(step, seconds, waited_s=waited_s)


def save(meter, clock, stall_s, whole_s=None):
    clock.passes(stall_s)
    meter.save_completed(stall_s if whole_s is None else whole_s, stall_s=stall_s)


def test_one_attempt_by_hand(start, clock):
    """10 s of setup, 80 steps of 1 s of which 0.25 s waited for data, 4 s of evaluation, 6 s of saving: 60 of 100 s."""
    meter = start()
    with meter.during("setup"):
        clock.passes(10)
    take(meter, clock, range(1, 81), waited_s=0.25)
    meter.spent("evaluate", 4)
    clock.passes(4)
    save(meter, clock, 6)
    assert meter.wall_s == pytest.approx(100)
    assert meter.fraction == pytest.approx(0.6)
    assert meter.as_metrics() == pytest.approx(
        {
            "goodput": 0.6,
            "attempts": 1,
            "setup_s": 10,
            "wait_for_data_s": 20,
            "evaluate_s": 4,
            "save_stall_s": 6,
            "lost_s": 0,
            "down_s": 0,
            "suggested_save_steps": None,
        }
    )


def test_a_repeated_step_counts_once_and_is_lost_the_second_time(start, clock):
    """Killed after step 150 with a checkpoint at 100; 20 s down; 50 of the 100 steps that follow are repeated."""
    first = start()
    take(first, clock, range(1, 151))
    first.write()
    clock.passes(20)
    second = start()
    take(second, clock, range(101, 201))
    assert (second.total("step"), second.total("lost"), second.as_metrics()["down_s"]) == (200, 50, 20)
    assert second.fraction == pytest.approx(200 / 270)
    assert (len(second.attempts), second.interruptions, second.failures) == (2, 1, 1)


def test_unlogged_steps_of_a_killed_attempt_are_down_time_until_repeated(start, clock):
    first = start()
    take(first, clock, range(1, 11))
    first.write()
    take(first, clock, range(11, 15))  # killed before the next line
    second = start()
    take(second, clock, range(11, 21))
    assert (second.total("lost"), second.as_metrics()["down_s"]) == (0, 4)
    assert second.fraction == pytest.approx(20 / 24)


def test_only_what_nobody_asked_for_is_a_failure(start, clock):
    for ending in ("stopped", "failed", None, "stopped"):
        meter = start()
        clock.passes(HOUR)
        meter.write() if ending is None else meter.close(ending)
    meter = start()
    assert (meter.interruptions, meter.failures) == (4, 2)
    assert meter.mtbf_s == pytest.approx(2 * HOUR)


def test_a_pause_before_a_finished_run_is_extended_is_not_counted(start, clock):
    first = start()
    take(first, clock, range(1, 11))
    first.close("finished")
    clock.passes(30 * 24 * HOUR)
    second = start()
    take(second, clock, range(11, 21))
    assert second.fraction == pytest.approx(1.0)
    assert second.interruptions == 0


def test_a_clock_that_was_set_back_makes_no_negative_time(start, clock):
    first = start()
    take(first, clock, range(1, 11))
    first.write()
    second = start(wall=Clock(clock.now - 400 * 24 * HOUR))
    take(second, clock, range(11, 21))
    assert (second.attempts[1].down_s, second.fraction) == (0, pytest.approx(1.0))


def test_the_example_of_the_documentation(start, clock):
    """Save stall 5 s, MTBF 8 h, steps of 1.3 s: sqrt(2 x 5 s x 28,800 s) = 537 s = 413 steps."""
    meter = start(mtbf_hours=8)
    take(meter, clock, range(1, 1001), seconds=1.3)
    save(meter, clock, 5.0)
    assert meter.describe() == (
        "goodput 99.6 % over 1 attempt; save every 413 steps (537 s) suggested by Young/Daly from a save cost of "
        "5.0 s and MTBF 8.0 h (given); now 1000, which loses 2.6 % instead of 1.9 %"
    )
    assert meter.as_metrics()["suggested_save_steps"] == 413


@pytest.mark.parametrize(("stall_s", "restart_s", "loss"), [(5, 180, 0.025), (1, 60, 0.01)])
def test_the_goodput_promised_for_eight_hours_between_failures(stall_s, restart_s, loss):
    interval = young(stall_s, 8 * HOUR)
    found = expected_loss(interval, stall_s, 8 * HOUR, restart_s=restart_s)
    assert found == pytest.approx(loss, abs=5e-4)


def test_what_is_missing_for_a_suggestion_is_said(start, clock):
    meter = start()
    assert meter.describe() == "goodput 0.0 % over 1 attempt; no save measured yet"
    take(meter, clock, range(1, 11))
    save(meter, clock, 2.0)
    assert meter.describe().endswith("a save costs 2.0 s; set goodput.mtbf_hours to have a save interval suggested")
    meter.write()
    clock.passes(48)
    again = start()
    assert again.describe().endswith("over 2 attempts; a save costs 2.0 s; no step measured yet")
    take(again, clock, range(11, 35))
    assert "MTBF 0.0 h (seen: 1 failure(s))" in again.describe()


def test_a_background_save_costs_its_stall_and_is_not_advised_too_often(start, clock):
    meter = start(mtbf_hours=8)
    take(meter, clock, range(1, 101))
    save(meter, clock, 1.0, whole_s=30.0)
    found = meter.suggestion()
    assert (meter.save_cost_s, found.seconds) == (1.0, pytest.approx(240))
    slow = start(mtbf_hours=8)
    take(slow, clock, range(101, 201))
    save(slow, clock, 1.0, whole_s=900.0)
    assert slow.suggestion().steps == 900


def test_the_file_outlives_attempts_and_a_broken_one_is_set_aside(start, clock, tmp_path, caplog, monkeypatch):
    path = tmp_path / "goodput.json"
    for number in range(3):
        meter = start()
        take(meter, clock, range(10 * number + 1, 10 * number + 11))
        meter.close("stopped")
    whole = path.read_bytes()
    assert [attempt.last_step for attempt in read_attempts(path)] == [10, 20, 30]
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.getLogger("megadiff"), "propagate", True)  # another test's run may have turned it off
    for cut in range(len(whole) - 1):  # the last byte is a newline
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert read_attempts(path) == []
        assert "is damaged" in caplog.text
        assert not path.exists()
        assert (tmp_path / "goodput.json.bad").read_bytes() == whole[:cut]
    assert start().attempts[0].steps == 0


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[1]", b'[{"started": NaN, "updated": 1}]', b"\xff\xfe", b'[{"started": 1, "updated": 1, "saves": -1}]'],
)
def test_a_file_of_something_else_costs_a_warning(tmp_path, content):
    path = tmp_path / "goodput.json"
    path.write_bytes(content)
    assert read_attempts(path) == []
    assert not path.exists()


def test_a_disk_that_refuses_ends_no_run(clock, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megadiff"), "propagate", True)
    meter = Goodput(Path(os.devnull) / "goodput.json", GoodputConfig(), save_every=10, wall=clock, tick=clock)
    meter.write()
    meter.close("finished")
    assert [record.levelname for record in caplog.records if "cannot be written" in record.message] == ["WARNING"]


def test_ranks_without_a_file_count_too(clock):
    meter = Goodput(None, GoodputConfig(), save_every=10, wall=clock, tick=clock)
    take(meter, clock, range(1, 5))
    meter.close("finished")
    assert meter.fraction == 1.0


def test_records_of_a_later_version_load(start, tmp_path, clock):
    start().close("stopped")
    path = tmp_path / "goodput.json"
    (record,) = json.loads(path.read_text())
    path.write_text(json.dumps([{**record, "of_tomorrow": 1}]))
    assert len(start().attempts) == 2


def test_the_section_refuses_a_failure_rate_that_cannot_be(tmp_path):
    file = tmp_path / "goodput.yaml"
    file.write_text("mtbf_hours: 8")
    assert load_config(file, [], GoodputConfig).mtbf_hours == 8.0
    with pytest.raises(Exception, match="`mtbf_hours` must be greater than 0, found `0`"):
        load_config(file, ["mtbf_hours=0"], GoodputConfig)


def share_of_useful_time(interval, *, cost, mtbf, restart, work, seed):
    """Live through a run: work, save, fail at random moments, go back to the last save."""
    draw = random.Random(seed)
    now = saved = 0.0
    failure = draw.expovariate(1 / mtbf)
    while saved < work:
        part = min(interval, work - saved)
        if now + part + cost < failure:
            now, saved = now + part + cost, saved + part
            continue
        now = failure + restart
        failure = now + draw.expovariate(1 / mtbf)
    return work / now


@pytest.mark.parametrize("cost", [5.0, 300.0, 3000.0], ids="save {:.0f} s".format)
def test_with_random_failures_the_suggestion_is_the_best_of_a_grid(cost):
    mtbf, restart = 8 * HOUR, 180.0
    suggested = best_interval(cost, mtbf)
    factors = [1 / 4, 1 / 2, 1 / 1.5, 1, 1.5, 2, 4]
    shares = [
        sum(
            share_of_useful_time(
                factor * suggested, cost=cost, mtbf=mtbf, restart=restart, work=400 * mtbf, seed=seed
            )
            for seed in range(4)
        )
        / 4
        for factor in factors
    ]  # fmt: skip
    best = max(shares)
    assert shares[3] > best - 0.002
    assert shares[3] > shares[0] + 0.002
    assert shares[3] > shares[-1] + 0.002
    said = 1 - expected_loss(suggested, cost, mtbf, restart_s=restart)
    assert shares[3] == pytest.approx(said, abs=0.01)


def test_a_meter_that_outlives_failures_agrees_with_the_simulation(start, clock):
    """Steps of 1 s, a save of 4 s every 60, failures about every 600 s, 30 s to come back: the time that counted."""
    draw, steps = random.Random(1), 4000
    failure = clock.now + draw.expovariate(1 / 600)
    began, saved = clock.now, 0
    while saved < steps:
        meter = start(save_every=60)
        step = saved
        while clock.now < failure and saved < steps:
            take(meter, clock, [step := step + 1])
            if step % 60 == 0 or step == steps:
                save(meter, clock, 4.0)
                saved = step
            meter.write()
        if saved < steps:
            clock.passes(30)
            failure = clock.now + draw.expovariate(1 / 600)
    assert meter.failures >= 4
    assert meter.fraction == pytest.approx(steps / (clock.now - began), abs=1e-9)
    assert meter.total("step") == steps
    assert meter.mtbf_s == pytest.approx(600, rel=0.6)
    assert meter.suggestion().seconds == pytest.approx(math.sqrt(2 * 4 * meter.mtbf_s))


def test_dalys_interval_tends_to_youngs_and_stays_positive():
    assert daly(5, 8 * HOUR) == pytest.approx(young(5, 8 * HOUR), rel=0.01)
    assert daly(100, 50) == 50
    assert daly(100, 60.0) < young(100, 60)
    assert expected_loss(1e9, 1, 60) == 1.0


class CrashError(Exception):
    """Stands for whatever ends a process."""


def _attempt(config, *, crash_after=None):
    """A real run, its time taken by the meter that `build` and the loop hand around."""
    from megadiff.run import build
    from megadiff.run.folder import Supervision
    from megadiff.train.hooks import Hook
    from tests.support.runs import platform_on_rank

    config.folder.mkdir(parents=True, exist_ok=True)
    meter = Goodput(config.folder / "goodput.json", GoodputConfig(mtbf_hours=8), save_every=config.checkpoint.every)
    with meter.during("setup"):
        supervision = dataclasses.replace(Supervision.none(config), goodput=meter)
        run = build.build_trainer(build.validate_run(config, world_size=1), platform_on_rank(), None, supervision)

    class Crashes(Hook):
        def __call__(self, info):
            if info.step == crash_after:
                raise CrashError

    run.hooks = [*run.hooks, Crashes()]
    try:
        run.train()
    except CrashError:
        return None
    return {**meter.as_metrics(), "steps_s": meter.total("step"), "wall_s": meter.wall_s, "said": meter.describe()}


def _two_attempts(config):
    return [_attempt(config, crash_after=8), _attempt(config)]


def test_a_real_run_that_crashed_and_went_on(toy_corpus, tmp_path):
    """Of 12 steps, saved after 5 and 10, killed after 8: steps 6 to 8 are taken twice."""
    config = toy_config(toy_corpus, tmp_path, schedule__steps=12, checkpoint={"every": 5, "async": False})
    _, found = on_ranks(1, _two_attempts, config)[0]
    first, second = read_attempts(config.folder / "goodput.json")
    assert (first.last_step, first.ended, second.last_step, second.ended) == (8, "failed", 12, "finished")
    assert (second.steps, second.saves) == (7, 2)
    assert second.in_phase("lost") > 0 == first.in_phase("lost")
    assert 0 < found["goodput"] < 1
    counted = ("steps_s", "setup_s", "lost_s", "save_stall_s", "evaluate_s", "down_s", "wait_for_data_s")
    assert sum(found[key] for key in counted) <= found["wall_s"]
    assert sum(found[key] for key in counted) > 0.5 * found["wall_s"]
    assert found["said"].startswith(f"goodput {100 * found['goodput']:.1f} % over 2 attempts; save every ")


def test_time_before_the_record_counts_as_setting_up(tmp_path, clock):
    """Imports: 20 s before, 10 s of steps after; the attempt began 20 s before its record was opened."""
    path = tmp_path / "goodput.json"
    goodput = Goodput(path, GoodputConfig(), save_every=10, before_s=20.0, wall=clock, tick=clock)
    clock.passes(10.0)
    goodput.step_taken(1, 10.0)
    goodput.close("finished")
    (attempt,) = read_attempts(path)
    assert (attempt.elapsed_s, attempt.in_phase("setup"), clock.now - attempt.started) == (30.0, 20.0, 30.0)
    assert goodput.fraction == pytest.approx(1 / 3)


def test_the_age_of_a_process_is_its_own():
    begun = time.monotonic()
    child = subprocess.Popen(["sleep", "5"])
    time.sleep(0.3)
    age, most = process.age_s(child.pid), time.monotonic() - begun
    child.kill()
    child.wait()
    assert most - 0.2 <= age <= most + 0.02
    assert process.age_s(2**22 + 1) == 0.0
