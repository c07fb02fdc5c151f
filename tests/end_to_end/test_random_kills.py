"""SIGKILL of a random rank at a random moment, then the same run again: the uninterrupted curve, bit for bit.

`MEGADIFF_KILLS=100 python -m pytest tests/end_to_end/test_random_kills.py -s` does it a hundred times.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from megadiff.run.config import RunConfig
from tests.support.runs import toy_config
from tests.support.whole_runs import Ranks, last_step, run_to_end

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("MEGADIFF_KILLS", "4"))
KILLS_OF_A_RUN = 2
"""Kills of a run before it trains to its end: the second one strikes a run that has resumed, or not even begun."""
STEPS, EVERY = 20, 3


def _config(corpus: Path, output: Path, name: str) -> RunConfig:
    return toy_config(
        corpus,
        output,
        name=name,
        model__layers=2,
        parallel__tensor=2,
        data__valid=[],
        schedule__steps=STEPS,
        checkpoint__every=EVERY,
    )


def test_killed_anywhere_the_same_run_again_gives_the_same_curve(toy_corpus: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    wanted = run_to_end(_config(toy_corpus, tmp_path, "whole"), 2)
    lasted = time.monotonic() - began
    assert len(wanted) == STEPS
    draw = random.Random(int(os.environ.get("MEGADIFF_SEED", "0")))
    killed_at, slowest, config = [], 0.0, _config(toy_corpus, tmp_path, "killed-0")
    for number in range(KILLS):
        ranks, started = Ranks(config, 2), time.monotonic()
        ranks.wait_until_watched()
        left = lasted * (1.0 - 0.5 * last_step(config.folder) / STEPS)  # about half of a run is its start
        time.sleep(draw.uniform(0.0, 1.0) * max(0.0, left - (time.monotonic() - started)))
        victim = draw.randrange(2)
        ranks.send(victim, signal.SIGKILL)
        struck = time.monotonic()
        codes = ranks.end(within_s=60)
        slowest = max(slowest, time.monotonic() - struck)
        assert None not in codes, f"kill {number}: a rank outlived its peer by a minute: {codes}"
        killed_at.append(last_step(config.folder))
        if number % KILLS_OF_A_RUN == KILLS_OF_A_RUN - 1 or number == KILLS - 1:
            assert run_to_end(config, 2) == wanted, f"kill {number} of rank {victim}, kills after steps {killed_at}"
            config = _config(toy_corpus, tmp_path, f"killed-{number + 1}")
    print(
        f"{KILLS} of {KILLS} curves bit-identical; killed after steps {sorted(killed_at)}; "
        f"slowest end of the other rank {slowest:.1f} s"
    )
    assert any(0 < step < STEPS for step in killed_at), "no kill fell into training"
