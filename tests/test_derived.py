"""Numbers of a run description before anything starts, with and without a fitting number of ranks."""

from __future__ import annotations

import pytest

from megadiff.derived import NoLayoutError, fitting_ranks, lay_out_run, ranks_to_check
from megadiff.errors import ConfigError
from megadiff.platform.quiet import quiet
from tests.support.forked_command import call_forked
from tests.support.runs import toy_config

with quiet():
    from megadiff import build
    from megadiff.resumption import Resumption


@pytest.fixture
def tensor_2(toy_corpus, tmp_path):
    return toy_config(
        toy_corpus,
        tmp_path,
        parallel__tensor=2,
        parallel__pipeline=2,
        batch={"global_sequences": 12, "micro_sequences": 2},
    )


def test_check_lays_out_on_the_fewest_ranks_that_fit(tensor_2, monkeypatch):
    """12 sequences in microbatches of 2 go on 1, 2, 3 or 6 replicas of 4 ranks."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert fitting_ranks(tensor_2, vocab_size=260) == [4, 8, 12, 24]
    text = build.check(tensor_2)
    assert "ranks             4, the fewest that fit; --ranks N lays the run out on N; 8, 12, 24 fit too" in text
    assert "layout            4 rank(s): tensor 2 x pipeline 2 x data 1" in text
    assert "layout            12 rank(s): tensor 2 x pipeline 2 x data 3" in build.check(tensor_2, ranks=12)


def test_a_launcher_s_number_of_ranks_is_what_is_checked(tensor_2, monkeypatch):
    assert ranks_to_check(tensor_2, None, launched=8) == (8, [])
    assert ranks_to_check(tensor_2, 12, launched=8) == (12, [])
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "layout            8 rank(s)" in build.check(tensor_2)


def test_a_number_of_ranks_that_does_not_fit_is_refused_with_those_that_do(tensor_2):
    for ranks, rule in ((3, "needs a multiple of 4"), (16, "does not divide")):
        with pytest.raises(NoLayoutError, match=rule) as refused:
            lay_out_run(tensor_2, world_size=ranks, vocab_size=260)
        assert str(refused.value).endswith("; numbers of ranks that fit: 4, 8, 12, 24 (--check --ranks 4)")
        assert [line.split()[0] for line in refused.value.sizes] == ["parameters", "vocabulary", "FLOPs"]


def test_a_description_that_fits_no_ranks_still_has_sizes(toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path, parallel__tensor=3)  # 4 heads
    with pytest.raises(NoLayoutError, match=r"model\.heads is 4, which parallel.tensor = 3 does not divide") as refused:
        build.check(config)
    assert str(refused.value).endswith("; no number fits")
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
    [("batch.micro_sequence", "batch.micro_sequences"), ("sed", "seed"), ("noise.shfit", "noise.shift")],
)
def test_a_key_that_no_description_has_cannot_be_allowed_to_change(tensor_2, key, hint):
    with pytest.raises(ConfigError) as refused:
        build.check(tensor_2, ranks=4, resumption=Resumption(allowed=[key]))
    assert str(refused.value) == f"--allow-change {key}: a run description has no such key; did you mean `{hint}`?"
    for known in ("noise.p_uniform", "batch.micro_sequences", "seed", "noise"):
        Resumption(allowed=[known]).check()
