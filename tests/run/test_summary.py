"""Numbers of a run description before anything starts, with and without a fitting number of ranks."""

from __future__ import annotations

import math
import re

import pytest
from pydantic import ValidationError

from megadiff.errors import ConfigError
from megadiff.model import cost
from megadiff.platform.quiet import quiet
from megadiff.run.summary import (
    NoLayoutError,
    describe_sizes,
    fitting_ranks,
    lay_out_run,
    learning_rates,
    ranks_to_check,
)
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, toy_config

with quiet():
    from megadiff.model.initialisation import role_of
    from megadiff.optim.pieces import parameter_groups
    from megadiff.run.check import check
    from megadiff.run.resume import ResumeOptions
    from tests.support.toy_model import build_on_rank

ROLES = {"block matrices": "hidden", "embedding": "embedding", "output head": "head", "norm gains": "norm"}
ROLES |= {"biases": "bias"}
LINE = re.compile(r"learning rate +(.*), ([\d,]+) parameters: peak (\S+) \((.*)\), weight decay (\S+), eps (\S+)")


@pytest.fixture
def tensor_2(toy_corpus, tmp_path):
    return toy_config(
        toy_corpus,
        tmp_path,
        parallel__tensor=2,
        parallel__pipeline=2,
        batch={"global_batch_size": 12, "micro_batch_size": 2},
    )


def test_check_lays_out_on_the_fewest_ranks_that_fit(tensor_2, monkeypatch):
    """12 sequences in microbatches of 2 go on 1, 2, 3 or 6 replicas of 4 ranks."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert fitting_ranks(tensor_2, vocab_size=260) == [4, 8, 12, 24]
    text = check(tensor_2)
    assert "ranks             4, the fewest that fit; --ranks N lays the run out on N; 8, 12, 24 fit too" in text
    assert "layout            4 rank(s): tensor 2 x pipeline 2 x data 1" in text
    assert "layout            12 rank(s): tensor 2 x pipeline 2 x data 3" in check(tensor_2, ranks=12)


def test_a_launcher_s_number_of_ranks_is_what_is_checked(tensor_2, monkeypatch):
    assert ranks_to_check(tensor_2, None, launched=8) == (8, [])
    assert ranks_to_check(tensor_2, 12, launched=8) == (12, [])
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "layout            8 rank(s)" in check(tensor_2)


def test_an_unfit_number_of_ranks_is_refused_with_those_that_fit(tensor_2):
    for ranks, rule in ((3, "needs a multiple of 4"), (16, "does not divide")):
        with pytest.raises(NoLayoutError, match=rule) as refused:
            lay_out_run(tensor_2, world_size=ranks, vocab_size=260)
        assert str(refused.value).endswith("; numbers of ranks that fit: 4, 8, 12, 24 (--check --ranks 4)")
        assert [line.split()[0] for line in refused.value.sizes] == ["parameters", "vocabulary", "FLOPs"]


def test_a_description_that_fits_no_ranks_still_has_sizes(toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path, parallel__tensor=3)  # 4 heads
    with pytest.raises(NoLayoutError, match=r"model\.heads is 4, which parallel.tensor = 3 does not divide") as refused:
        check(config)
    assert str(refused.value).endswith("; this holds for every number of ranks")
    assert refused.value.sizes[0].startswith("parameters")


def test_the_command_prints_sizes_and_then_the_reason(toy_corpus, tmp_path):
    ended = call_forked(
        "pretrain_dlm.py", "--config", "examples/demo.yaml", "--check", "--ranks", "3", f"data.train=[{toy_corpus}]",
        "data.valid=[]", "data.tokenizer=byte", "parallel.tensor=2",
    )  # fmt: skip
    assert ended.code == 2
    assert ended.out.startswith("parameters ")
    assert ended.err.count("\n") == 1
    assert "--ranks" in ended.err


@pytest.mark.parametrize(
    ("key", "hint"),
    [("batch.micro_sequence", "batch.micro_batch_size"), ("sed", "seed"), ("noise.shfit", "noise.shift")],
)
def test_a_key_that_no_description_has_cannot_be_allowed_to_change(tensor_2, key, hint):
    with pytest.raises(ConfigError) as refused:
        check(tensor_2, ranks=4, resume_options=ResumeOptions(allowed=[key]))
    assert str(refused.value) == f"--allow-change {key}: a run description has no such key; did you mean `{hint}`?"
    for known in ("noise.p_uniform", "batch.micro_batch_size", "seed", "noise"):
        ResumeOptions(allowed=[known]).check(tensor_2)


def built_groups(config):
    """Return, for each role of a model that is really built: parameters, rate, decay and eps of its group."""
    chunks, _ = build_on_rank(config.model)
    named = [(role_of(name), parameter) for name, parameter in chunks[0].named_parameters()]
    groups = parameter_groups(named, config.optimizer, config.optimizer_scale)
    found: dict[str, list[float]] = {}
    for role, parameter in named:
        (group,) = [g for g in groups if any(parameter is member for member in g["params"])]
        counted = found.setdefault(role, [0, group["lr"], group["weight_decay"], group["eps"]])
        counted[0] += parameter.numel()
    return found


@pytest.mark.parametrize("parametrisation", ["standard", "completep"])
def test_each_role_has_a_line_with_the_numbers_of_its_updates(toy_corpus, tmp_path, parametrisation):
    changes = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
    optimizer = {"lr": 0.3, "weight_decay": 0.01, "eps": 1e-6, "parametrisation": parametrisation}
    changes |= {f"optimizer__{key}": value for key, value in optimizer.items()}
    config = toy_config(toy_corpus, tmp_path, model__vocab_multiple=1, **changes)
    (built,) = on_ranks(1, built_groups, config)
    lines = learning_rates(config, cost.parameters(config.shape(vocab_size=260)))
    shown = {ROLES[m[1]]: m for line in lines if (m := LINE.fullmatch(line))}
    assert set(shown) == set(built)
    for role, (count, lr, decay, eps) in built.items():
        line = shown[role]
        assert int(line[2].replace(",", "")) == count
        assert float(line[3]) == pytest.approx(lr, rel=1e-3)
        assert (float(line[5]), float(line[6])) == (pytest.approx(decay, rel=1e-3), pytest.approx(eps, rel=1e-2))
    assert any("CompleteP's base rate" in line for line in lines) == (parametrisation == "completep")


def test_matrices_of_muon_show_the_settings_that_their_updates_use(toy_corpus, tmp_path):
    muon = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "eps": 1e-6, "momentum": 0.9, "update_scale": 0.3}
    config = toy_config(toy_corpus, tmp_path, **{f"optimizer__{key}": value for key, value in muon.items()})
    lines = learning_rates(config, cost.parameters(config.shape(vocab_size=260)))
    (matrices,) = [line for line in lines if "block matrices" in line]
    assert matrices.endswith(", weight decay 0.1, momentum 0.9, nesterov true, newton_schulz_steps 5, update_scale 0.3")
    others = [line for line in lines if line is not matrices]
    assert len(others) == 3
    for line in others:
        assert line.endswith(", eps 1e-06"), line
        assert "momentum" not in line


def test_the_factor_between_the_setting_and_the_rate_is_shown(toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path, optimizer__lr=0.5, optimizer__parametrisation="completep")
    text = "\n".join(learning_rates(config, cost.parameters(config.shape(vocab_size=260))))
    assert "block matrices, 49,152 parameters: peak 0.01562 (0.5 x 1/32)" in text
    assert "peak 0.01 (0.5 x 0.02)" in text
    assert "biases" not in text


def test_a_run_in_flops_is_as_long_as_its_count_makes_it(toy_corpus, tmp_path):
    """Steps follow from each count by name; the default is the count without embedding and head."""

    def of_length(**schedule):
        settings = {"flops": 1e12, "warmup_steps": 0, **schedule}
        return toy_config(toy_corpus, tmp_path, schedule=settings, data__vocab_size=260)

    runs = {count: of_length(flop_count=count) for count in ("deepseek", "chinchilla", "full")}
    for count, config in runs.items():
        per_token = cost.flops_per_token(config.shape(vocab_size=260), count)
        assert config.steps == math.ceil(1e12 / per_token / config.tokens_per_step)
    assert runs["full"].steps < runs["deepseek"].steps < runs["chinchilla"].steps
    assert of_length().steps == runs["deepseek"].steps


def test_a_count_with_the_head_needs_the_vocabulary(toy_corpus, tmp_path):
    with pytest.raises(ValidationError, match=r"schedule\.flop_count=full counts the head, .* data\.vocab_size"):
        toy_config(toy_corpus, tmp_path, schedule={"flops": 1e12, "warmup_steps": 0, "flop_count": "full"})


def test_the_summary_has_three_counts_by_name(toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path)
    shape = config.shape(vocab_size=260)
    (line,) = [line for line in describe_sizes(config, shape) if line.startswith("FLOPs per token")]
    counts = [f"{count} {cost.flops_per_token(shape, count):.5g}" for count in ("deepseek", "chinchilla", "full")]
    assert line == f"FLOPs per token   {', '.join(counts)}"
