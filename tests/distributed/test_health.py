"""What must happen alike on every rank when numbers go wrong on one: a skip, a spike, a flipped bit, a slow rank.

Several runs share one group of ranks; each rank returns what it saw and every test reads that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadiff.train.hooks import stragglers
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, wire_on_rank

pytestmark = pytest.mark.timeout(1800)

NAN = float("nan")
DISTOPT = {"parallel__distributed_optimizer": True}
OVERLAP = {**DISTOPT, "parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
TP2, PP2 = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
VP2 = {**PP2, "parallel__virtual_pipeline": 2}
BF16 = {"precision__compute": "bf16"}
LAYOUTS = {
    "dp2": {},
    "dp2_distopt": DISTOPT,
    "dp2_overlap_bf16": {**OVERLAP, **BF16},
    "tp2_sp": {**TP2, "parallel__sequence": True},
    "pp2_vp2": VP2,
}
SAMPLES_A_STEP = 8


class Heard(logging.Handler):
    """Keeps what a rank says."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def fingerprint(step) -> str:
    """Of every bit of this rank's weights, master weights, moments and step counters."""
    from megadiff.model.denoiser import gathered_weights

    digest = hashlib.sha256()
    base = step.optimizer._wrapped.optimizer
    with gathered_weights(step.chunks):
        tensors = [parameter.data for chunk in step.chunks for parameter in chunk.parameters()]
        for parameter in (parameter for group in base.param_groups for parameter in group["params"]):
            tensors += [parameter.data, *(value for _, value in sorted(base.state[parameter].items()))]
        for tensor in tensors:
            digest.update(torch.as_tensor(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def take(config, sabotage, change=None) -> dict[str, Any]:
    """Train on this rank with `sabotage(run, step number)` before every step; what happened."""
    from megadiff.errors import TrainingError
    from megadiff.train.hooks.checkpoint import CheckpointHook

    run = wire_on_rank(config, torch.distributed.get_world_size())
    run.hooks = [hook for hook in run.hooks if not isinstance(hook, CheckpointHook)]
    honest, done = run.step, iter(range(1, 1000))
    heard, prints, skips = Heard(), [fingerprint(honest)], []
    logging.getLogger("megadiff").addHandler(heard)

    def step(microbatches, lr, **options):
        taken = sabotage(honest, next(done), run)(microbatches, lr, **options)
        prints.append(fingerprint(honest))
        skips.append(taken.decision.skip)
        return taken

    run.step = step
    if change is not None:
        change(run, honest)
    ended = None
    try:
        run.train()
    except TrainingError as error:
        ended = f"{error.exit_code} {error}"
    logging.getLogger("megadiff").removeHandler(heard)
    return {"prints": prints, "skips": skips, "ended": ended, "heard": heard.lines, "state": run.health.state()}


def with_loss(step, change):
    """The step with `change(loss, its report)` on its way out."""
    honest = step.objective

    def loss(answer, placed):
        value, tokens, report = honest.report(answer, placed)
        report = report.clone()
        value, report[0] = change(value, report[0])
        return value, tokens, report

    return dataclasses.replace(step, objective=SimpleNamespace(place=honest.place, forward=honest.forward, report=loss))


def nan_loss(value, reported):
    """A loss that is not finite and whose derivative is."""
    return value + NAN, reported + NAN


def nan_gradient(value, reported):
    """A finite loss whose derivative is not."""
    return value + (value - value.detach()).abs().sqrt(), reported


def broken_at(steps, how, step, number, run, *, rank=1):
    """On one rank alone."""
    is_mine = torch.distributed.get_rank() == rank and number in steps
    return with_loss(step, how) if is_mine else step


def all_runs(jobs):
    """Several runs one after the other in one group of ranks."""
    return [take(*job) for job in jobs]


def strict_lines(config):
    """The lines of `metrics.jsonl`, by a reader that knows JSON alone."""

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    text = (config.folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture(scope="module")
def broken(toy_corpus, tmp_path_factory):
    """{(layout, how): (config, what each rank saw)}: steps 3 and 4 of 6 are not finite on the last rank."""
    root = tmp_path_factory.mktemp("broken")
    jobs = {}
    for name, layout in LAYOUTS.items():
        for how in (nan_loss, nan_gradient):
            config = toy_config(
                toy_corpus,
                root,
                name=f"{name}-{how.__name__}",
                schedule__steps=6,
                log__every=5,
                data__valid=[],
                **layout,
            )
            jobs[name, how.__name__] = (config, partial(broken_at, (3, 4), how))
    seen = on_ranks(2, all_runs, list(jobs.values()), timeout_s=1200)
    return {key: (config, [seen[rank][i] for rank in (0, 1)]) for i, (key, (config, _)) in enumerate(jobs.items())}


CASES = [(layout, how) for layout in LAYOUTS for how in ("nan_loss", "nan_gradient")]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_non_finite_step_on_one_rank_changes_no_bit_on_any_rank(broken, case):
    _, ranks = broken[case]
    for seen in ranks:
        assert seen["skips"] == [None, None, "non_finite", "non_finite", None, None]
        changed = [before != after for before, after in zip(seen["prints"], seen["prints"][1:], strict=False)]
        assert changed == [True, True, False, False, True, True]
        assert seen["ended"] is None
        assert (seen["state"]["non_finite_consecutive"], seen["state"]["skipped"]) == (0, 2)
    assert ranks[0]["state"] == ranks[1]["state"]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_skipped_step_is_told_with_its_samples_and_what_broke(broken, case):
    layout, how = case
    config, ranks = broken[case]
    (third,) = (line for line in ranks[0]["heard"] if line.startswith("step 3: loss or gradient not finite"))
    assert "no update was made (1 consecutive, the run ends at 3); samples 16 to 23: " in third
    told = third.split("16 to 23: ")[1]
    if how == "nan_gradient":
        assert re.match(r"gradient on rank \d \(.+\), stage \d: \d+ tensor\(s\), nearest the output ", told)
    elif layout.startswith("dp"):  # microbatches of two sequences are dealt out in turn: rank 1 has every second pair
        assert re.fullmatch(r"loss of a microbatch on rank 1 \(.+\), samples 18, 19, 22, 23", told)
    else:  # every microbatch is the last stage's, or both tensor ranks'; rank 1 is the one that was broken
        assert re.fullmatch(r"loss of a microbatch on rank 1 \(.+\), samples 16, 17, 18, 19, 20, 21, 22, 23", told)
    steps = [line["step"] for line in strict_lines(config)]
    assert steps == [1, 3, 4, 5, 6], "a skipped step always has a line"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp2_sp"])
def test_a_skipped_steps_line_says_so_with_null_for_non_finites(broken, layout):
    config, _ = broken[layout, "nan_loss"]
    lines = {line["step"]: line for line in strict_lines(config)}
    assert (lines[3]["skipped"], lines[3]["loss"], lines[3]["grad_norm"]) == ("non_finite", None, None)
    assert lines[3]["lr"] > 0, "schedule and data go on"
    assert lines[3]["tokens"] == 3 * SAMPLES_A_STEP * 16
    assert "skipped" not in lines[1]
    assert lines[5]["loss"] > 0


def test_too_many_in_a_row_end_the_run_on_every_rank_with_all_samples(toy_corpus, tmp_path):
    common = {"schedule__steps": 9, "data__valid": [], "health__non_finite_limit": 3}
    config = toy_config(toy_corpus, tmp_path, **common)
    jobs = [
        (config, partial(broken_at, (2, 4, 5, 6, 7), nan_loss)),
        (toy_config(toy_corpus, tmp_path, name="again", **common), partial(broken_at, (4, 5, 6), nan_loss), counted),
    ]
    for first, resumed in on_ranks(2, all_runs, jobs):
        assert first["ended"].startswith("5 step 6: loss or gradient not finite 3 consecutive steps")
        assert "Their samples are 24 to 47; in the last step: loss of a microbatch on rank 1" in first["ended"]
        assert first["skips"] == [None, "non_finite", None, *["non_finite"] * 3]
        assert resumed["ended"].startswith("5 step 5: loss or gradient not finite 3 consecutive steps")


def counted(run, step):
    """After step 4, the state of a run that was resumed from a checkpoint with two skipped consecutive steps behind
    it."""
    report = run.health.report

    def after(number, decision, sources=()):
        report(number, decision, sources)
        if number == 4:
            saved = json.loads(json.dumps(run.health.state()))
            run.health.restore({**saved, "non_finite_consecutive": 2})

    run.health.report = after


def louder(value, reported):
    """A loss a thousand times its size on one rank."""
    return 1000 * value, 1000 * reported


def test_a_spike_on_one_rank_is_skipped_by_all_on_request_or_only_logged(toy_corpus, tmp_path):
    common = {"schedule__steps": 8, "data__valid": [], "health__spike_window": 8, "optimizer__clip_grad": 0}
    jobs = [
        (
            toy_config(toy_corpus, tmp_path, name=f"{name}-{skip}", health__skip_spikes=skip, **common, **layout),
            partial(broken_at, (7,), louder),
        )
        for name, layout in {"dp2": {}, "pp2": PP2}.items()
        for skip in (True, False)
    ]
    for skipping, logging_only, *others in on_ranks(2, all_runs, jobs):
        for seen in (skipping, others[0]):
            assert seen["skips"] == [None] * 6 + ["spike", None]
            assert seen["prints"][6] == seen["prints"][7] != seen["prints"][8]
            assert seen["state"]["skipped"] == 1
        for seen in (logging_only, others[1]):
            assert seen["skips"] == [None] * 8
            assert seen["prints"][6] != seen["prints"][7]
        for seen, made in ((skipping, "no update was made"), (logging_only, "the update was made")):
            told = [line for line in seen["heard"] if line.startswith("step 7: spike: ")]
            assert [re.sub(r": spike: (\w+) .*?; ", r" \1; ", line) for line in told] == [
                f"step 7 loss; {made}; samples 48 to 55",
                f"step 7 grad_norm; {made}; samples 48 to 55",
            ]


def flip_one_bit(name, rank, run, step, *, at=2):
    """Before the comparison of step `at`, on one rank: the lowest bit of one element."""
    from megadiff.train.hooks import Hook
    from megadiff.train.hooks.replicas import ReplicaCheck

    class Flip(Hook):
        """A hook that does what none may do."""

        def __call__(self, info):
            if info.step == at and torch.distributed.get_rank() == rank:
                weights = {n: p for chunk in step.chunks for n, p in chunk.named_parameters()}
                (tensor,) = (p for n, p in weights.items() if n.endswith(name))
                with torch.no_grad():
                    tensor.data.view(-1).view(torch.int16)[4] ^= 1

    place = next(i for i, hook in enumerate(run.hooks) if isinstance(hook, ReplicaCheck))
    run.hooks = [*run.hooks[:place], Flip(), *run.hooks[place:]]


def untouched(step, number, run):
    return step


FLIPS = {
    "dp2": ({}, "layers.0.mlp.linear_fc1.weight"),
    "dp2_bf16": (BF16, "layers.1.mlp.linear_fc2.weight"),
    "dp2_distopt": (DISTOPT, "layers.1.self_attention.linear_qkv.weight"),
    "tp2_norm": (TP2, "layers.0.input_layernorm.weight"),
    "tp2_sp_bias": ({**TP2, "parallel__sequence": True, "model__mlp_bias": True}, "layers.0.mlp.linear_fc2.bias"),
}
SOUND = ({}, OVERLAP, {**TP2, "parallel__sequence": True, "model__qk_norm": "head", "model__mlp_bias": True}, VP2)


def test_a_flipped_bit_in_one_replica_ends_the_run_naming_rank_and_tensor(toy_corpus, tmp_path):
    common = {"schedule__steps": 4, "data__valid": [], "model__layers": 2, "health__check_replicas_every": 2}
    jobs: list[Any] = [
        (
            toy_config(toy_corpus, tmp_path, name=name, **common, **layout),
            untouched,
            partial(flip_one_bit, tensor, 1, at=4),
        )
        for name, (layout, tensor) in FLIPS.items()
    ]
    for number, layout in enumerate(SOUND):
        sound = {**common, "model__layers": 4, **layout}
        jobs.append((toy_config(toy_corpus, tmp_path, name=f"sound-{number}", **sound), untouched))
    for seen in on_ranks(2, all_runs, jobs, timeout_s=1200):
        for tensor, message in zip(
            [tensor for _, tensor in FLIPS.values()], [one["ended"] for one in seen], strict=False
        ):
            assert message is not None, tensor
            assert message.startswith("5 step 4: ranks that should hold the same weights differ: rank 0 ("), message
            named = rf"rank 1 \([^;]+\) in decoder\.{re.escape(tensor)} \(they were equal after step 2\)"
            assert re.search(named, message), message
        assert [found["ended"] for found in seen[len(FLIPS) :]] == [None] * len(SOUND), "sound runs are not accused"


def test_of_four_replicas_only_the_one_that_differs_is_named(toy_corpus, tmp_path):
    config = toy_config(
        toy_corpus, tmp_path, schedule__steps=4, data__valid=[], model__layers=1, health__check_replicas_every=2
    )
    jobs = [(config, untouched, partial(flip_one_bit, "mlp.linear_fc1.weight", 2))]
    for (seen,) in on_ranks(4, all_runs, jobs):
        assert re.search(r"differ: rank 2 \([^;]+\) in decoder.layers.0.mlp.linear_fc1.weight \(", seen["ended"])


def sleepy(rank, step, number, run):
    """150 ms more in each microbatch's loss, on a machine that the ranks take to be theirs alone."""
    stragglers.has_contended_cores = lambda platform: False  # other tests run beside this one
    if torch.distributed.get_rank() != rank:
        return step

    def slowly(value, reported):
        time.sleep(0.15)
        return value, reported

    return with_loss(step, slowly)


def test_a_rank_that_sleeps_is_named_though_the_others_wait_for_it(toy_corpus, tmp_path):
    """The reduction makes every rank's step as long as the slowest one's; only the time inside computation tells."""
    config = toy_config(toy_corpus, tmp_path, schedule__steps=7, log__every=3, data__valid=[], model__layers=1)
    ((main,), (other,)) = on_ranks(2, all_runs, [(config, partial(sleepy, 1))])
    found = [
        re.match(r"step (\d+): rank (\d) \(.+\) is ([\d.]+) times slower than the median", line)
        for line in main["heard"]
    ]
    named = [match.groups() for match in found if match]
    assert {rank for _, rank, _ in named} == {"1"}, "on a machine busy with other work not every interval need tell"
    assert all(float(ratio) > 1.5 for *_, ratio in named)
    assert other["heard"] == [], "only the main rank speaks"
