"""Findings about a run description on this machine, each brought about for real."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megadiff.doctor import run
from megadiff.doctor.examination import Subject
from tests.support.runs import write_corpus

RUN_CHECKS = ("data", "description", "layout", "memory", "tokenizer")


def test_a_good_run_has_only_good_findings(findings_of, subject_of):
    for name in RUN_CHECKS:
        assert {level for level, *_ in findings_of(name, subject_of())} == {"OK"}, name


def test_without_a_run_there_is_nothing_to_say(findings_of):
    for name in RUN_CHECKS:
        assert findings_of(name, Subject({})) == []


def test_every_mistake_of_the_description_is_a_finding(findings_of):
    found = findings_of("description", Subject({}, problem="a.yaml:1: unknown key `x`\na.yaml:2: `y` wants an integer"))
    assert [(level, text[:8]) for level, text, _ in found] == [("FAIL", "a.yaml:1"), ("FAIL", "a.yaml:2")]


def test_a_missing_tokenizer_fails_once_and_other_checks_name_it(one_finding, subject_of):
    subject = subject_of(data__tokenizer="nowhere/tokenizer")
    level, text, remedy = one_finding("tokenizer", subject)
    assert (level, "found nothing" in text, "`megadiff train_tokenizer`" in remedy) == ("FAIL", True, True)
    assert one_finding("data", subject)[1:] == (
        "not checked: the data need the tokenizer, which cannot be loaded",
        "fix data.tokenizer first",
    )
    assert one_finding("layout", subject)[0] == "WARN"


def test_a_promised_vocabulary_stands_in_for_a_missing_tokenizer(one_finding, subject_of):
    subject = subject_of(data__tokenizer="nowhere/tokenizer", data__vocab_size=260)
    assert one_finding("layout", subject)[0] == "OK"
    level, text, _ = one_finding("memory", subject)
    assert level == "OK"
    assert text.endswith("; dry run of rank 0)")


def test_a_vocabulary_that_is_not_the_tokenizers(findings_of, subject_of):
    assert ("FAIL", "data.vocab_size is 300, but the tokenizer has 260 ids", "set it to 260") in findings_of(
        "tokenizer", subject_of(data__vocab_size=300)
    )


@pytest.fixture
def corpus_without_facts(tmp_path):
    """Data of unknown origin, as Megatron-LM makes them, with a largest id of one's choice."""

    def make(largest):
        prefix = write_corpus(tmp_path / "plain", tokens=600, vocab_size=4000)
        os.remove(f"{prefix}.json")
        with Path(f"{prefix}.bin").open("r+b") as file:
            file.seek(2 * 17)
            file.write(largest.to_bytes(2, "little"))
        return str(prefix)

    return make


def test_ids_beyond_the_vocabulary(findings_of, subject_of, corpus_without_facts):
    subject = subject_of(data__train=[corpus_without_facts(3999)], data__valid=[])
    level, text, remedy = findings_of("tokenizer", subject)[-1]
    assert (level, "the largest sampled id is 3,999 of 260" in text, "preprocess" in remedy) == ("FAIL", True, True)
    level, text, _ = findings_of("data", subject)[0]
    assert (level, "has the token id 3999 at position" in text) == ("FAIL", True)


def test_a_vocabulary_hardly_used(findings_of, subject_of, corpus_without_facts, tmp_path):
    words = {f"w{i}": i for i in range(1000)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = str(tmp_path / "tokenizer.json")
    subject = subject_of(data__train=[corpus_without_facts(60)], data__valid=[], data__tokenizer=tokenizer)
    level, text, _ = findings_of("tokenizer", subject)[-1]
    assert (level, "the largest sampled id is 60 of 1,001" in text) == ("WARN", True)


def test_data_that_are_not_there(findings_of, subject_of):
    level, text, remedy = findings_of("data", subject_of(data__train=["nowhere/text"]))[0]
    assert (level, "nowhere/text.idx" in text, "`megadiff preprocess_data`" in remedy) == ("FAIL", True, True)


def test_a_schedule_of_many_epochs_and_no_validation(findings_of, subject_of):
    found = findings_of("data", subject_of(schedule__steps=1000, data__valid=[]))
    assert [level for level, *_ in found] == ["OK", "OK", "OK", "WARN", "WARN"]
    assert "the schedule takes 128,000 tokens of 6,0" in found[3][1]
    assert found[3][1].endswith("epochs (schedule.steps = 1,000)")
    assert "data.valid is empty" in found[4][1]


def test_validation_that_is_training_text_or_smaller_than_is_wanted(findings_of, subject_of, toy_corpus, held_corpus):
    same = findings_of("data", subject_of(data__valid=[str(toy_corpus)]))
    assert ("WARN", "data.valid[0] (toy) is the same text as data.train[0] (toy)") in [
        (level, text.split(":")[0]) for level, text, _ in same
    ]
    swapped = findings_of("data", subject_of(data__train=[str(held_corpus)], data__valid=[str(toy_corpus)]))
    assert any("more than the 3,0" in text and "exchange" in remedy for _, text, remedy in swapped)
    few = findings_of("data", subject_of(eval__sequences=1000))
    assert [text for level, text, _ in few if level == "WARN"] == [
        "eval.sequences is 1,000, but data.valid[0] (held) has 187 sequences: all of them are measured, and no more"
    ]
    assert [text for level, text, _ in few if "measured" in text and level == "OK"] == [
        "data.valid[0] held: 3,004 tokens, 187 sequences, 187 of them (2,992 tokens) measured"
    ]


def test_a_layout_that_does_not_divide(one_finding, subject_of):
    level, text, remedy = one_finding("layout", subject_of(ranks=3, parallel__tensor=2))
    assert (level, "needs a multiple of 2" in text, "--ranks" in remedy) == ("FAIL", True, True)


def test_more_ranks_than_cores(findings_of, subject_of):
    ranks = 4 * len(os.sched_getaffinity(0))
    subject = subject_of(ranks=ranks, batch={"global_batch_size": ranks, "micro_batch_size": 1})
    assert [level for level, *_ in findings_of("layout", subject)] == ["OK", "WARN"]
    over_nodes = Subject({"SLURM_NNODES": str(ranks)}, subject.config, wanted_ranks=ranks)
    assert [level for level, *_ in findings_of("layout", over_nodes)] == ["OK"]


def test_a_model_beyond_all_memory(one_finding, subject_of):
    level, text, remedy = one_finding("memory", subject_of(model__layers=800, model__hidden=16384))
    assert (level, "GiB a rank of" in text, text.endswith("; closed form)")) == ("FAIL", True, True)
    assert remedy.startswith("no layout of 1 rank(s) fits: take more ranks")


def test_the_settings_that_are_suggested_do_fit(subject_of):
    """For 8 GPUs of made-up sizes between what fits nowhere and what fits as it is."""
    config = subject_of(
        model={"layers": 32, "hidden": 4096, "heads": 32, "seq_length": 2048},
        batch={"global_batch_size": 64, "micro_batch_size": 8},
    ).config
    as_it_is = run.estimate(config, 8, 32000)
    seen = set()
    for share in (0.9, 0.5, 0.2, 0.12):
        held = int(share * as_it_is)
        said = run._remedy(config, 8, 32000, held, time.monotonic() - 1)
        assert said.endswith(" by the closed form")
        changes = dict(word.split("=") for word in said.split() if "=" in word)
        assert changes, said
        values = {key: value == "true" if value in ("true", "false") else int(value) for key, value in changes.items()}
        assert run.estimate(run.changed(config, values), 8, 32000) <= held
        seen |= set(changes)
    assert len(seen) > 1
    assert run._remedy(config, 8, 32000, 1000, math.inf).startswith("no layout")


def test_memory_that_is_nearly_full_is_a_warning(one_finding, subject_of, monkeypatch):
    subject = subject_of(model__hidden=512, model__heads=4)
    needed = run.estimate(subject.config, 1, 260)
    monkeypatch.setattr(type(subject.platform), "memory_bytes", lambda platform: int(needed / 0.9))
    level, text, _ = one_finding("memory", subject)
    assert (level, "; dry run of rank 0)" in text) == ("WARN", True)


def test_a_suggestion_is_built_before_it_is_made(one_finding, subject_of, monkeypatch):
    """The closed form is made to think that everything fits but the run as it is, which a dry run corrects."""
    subject = subject_of(model={"layers": 2, "hidden": 256, "heads": 4, "seq_length": 128})
    whole = run.estimate(subject.config, 1, 260)
    halved = run.changed(subject.config, {"batch.micro_batch_size": 1})
    half = run.estimate(halved, 1, 260)
    assert half < 0.9 * whole
    monkeypatch.setattr(type(subject.platform), "memory_bytes", lambda platform: int((half + whole) / 2 / run._CLOSE))
    level, _, remedy = one_finding("memory", subject)
    assert level == "WARN"
    assert re.fullmatch(r"batch\.micro_batch_size=1 would take \S+ GiB by a dry run", remedy)


def test_a_run_that_a_dry_run_refuses_fails_with_its_sentence(one_finding, subject_of):
    subject = subject_of(ranks=2, parallel__tensor=2, precision__compile=True)
    level, text, remedy = one_finding("memory", subject)
    assert level == "FAIL"
    assert text.startswith("a dry run refuses the run: precision.compile does not work with parallel.tensor=2")
    assert remedy


def test_a_dry_run_without_an_answer_leaves_the_closed_form(one_finding, subject_of, monkeypatch):
    monkeypatch.setattr(run, "dry_runs", lambda runs, limit_s: None)
    level, text, _ = one_finding("memory", subject_of())
    assert (level, text.endswith("; closed form)")) == ("OK", True)
