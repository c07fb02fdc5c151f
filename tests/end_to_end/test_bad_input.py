"""A user's mistake ends with exit code 2 and one message that says where, what was wanted, what was found."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import pretrain_dlm
from megadiff.data.tokenizer_files import load_tokenizer
from megadiff.errors import run_command
from tests.support.commands import call, write_yaml
from tests.support.ranks import on_ranks
from tests.support.runs import toy_tree, write_corpus


@pytest.fixture
def description(toy_corpus, tmp_path):
    return write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path / "runs"))


@pytest.fixture
def pretrain(monkeypatch):
    """Call `pretrain_dlm.py` in this process, as far as it gets before a process group: (exit code, stderr)."""
    logger = logging.getLogger("megadiff")
    before = (logger.handlers[:], logger.propagate, logger.level)

    def run(*arguments, ranks=1):
        monkeypatch.setattr(sys, "argv", ["pretrain_dlm.py", *map(str, arguments)])
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        err = io.StringIO()
        with redirect_stderr(err), redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
            run_command(pretrain_dlm.main)
        return end.value.code, err.getvalue()

    yield run
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


DESCRIPTIONS = [
    ("optimizer.weigth_decay=0.1", 1, r"command line: unknown key `optimizer\.weigth_decay`; did you mean `weight_dec"),
    ("model.layers=many", 1, r"command line: `model\.layers` wants an integer, found `many`$"),
    ("noise.scale=1.5", 1, r"command line: `noise\.scale`: .*at most 1, got 1\.5: .*does not exist"),
    ("noise.shift=sideways", 1, r"noise\.shift.*masked.*balanced.*uniform.*sideways"),
    ("optimizer.name=adamm", 1, r"no optimizer `adamm`; there are: adamw"),
    ("model.heads=5", 1, r"model\.hidden is 32, which model\.heads = 5 does not divide"),
    ("parallel.tensor=3", 3, r"model\.heads is 4, which parallel\.tensor = 3 does not divide; 3 or 6 would do"),
    ("parallel.pipeline=3", 3, r"model\.layers is 4, which .*parallel\.virtual_pipeline = 3 does not divide"),
    ("batch.global_sequences=7", 1, r"batch\.global_sequences is 7, which .* = 2 does not divide; 6 or 8 would do"),
    (
        "parallel.tensor=2",
        3,
        r"the run has 3 rank\(s\), but parallel\.tensor=2 .* needs a multiple of 2; start 2 ranks",
    ),
    ("parallel.sequence=true", 1, r"parallel\.sequence is true but parallel\.tensor is 1"),
    ("parallel.virtual_pipeline=2", 1, r"parallel\.virtual_pipeline is 2 but parallel\.pipeline is 1"),
    ("parallel.overlap_param_gather=true", 1, r"overlap_param_gather needs parallel\.distributed_optimizer and"),
    ("data.train=[nowhere/text]", 1, r"data\.train\[0\]: .*nowhere/text: no indexed data; wanted nowhere/text\.idx"),
    (
        "data.tokenizer=nowhere",
        1,
        r"nowhere: wanted the word `byte`, .* found nothing; check the path or run tools/train_tok",
    ),
    ("model.seq_length=9000", 1, r"wanted at least one row of 9000 tokens, found \d+ in all; give more text or lower"),
    ("platform=cuda", 1, r"platform is `cuda` but torch sees no CUDA device here; set `platform=cpu`"),
    ("output_dir=/proc/nowhere", 1, r"the run folder /proc/nowhere/toy cannot be written \(.*\); set output_dir to a"),
    ("output_dir=/dev/null", 1, r"the run folder /dev/null/toy cannot be written \(Not a directory\); set output_dir"),
]


@pytest.mark.parametrize(("override", "ranks", "message"), DESCRIPTIONS)
def test_a_description_that_cannot_be_is_refused_in_a_sentence(pretrain, description, override, ranks, message):
    code, err = pretrain("--config", description, override, ranks=ranks)
    assert code == 2, err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(message, err), err


def _cut(prefix):
    os.truncate(f"{prefix}.bin", 1001)


def _empty_index(prefix):
    os.truncate(f"{prefix}.idx", 0)


def _no_manifest_and_a_big_id(prefix):
    for end in (".bin", ".idx", ".json"):
        os.remove(f"{prefix}{end}")
    write_corpus(prefix, tokens=600, vocab_size=4000)
    os.remove(f"{prefix}.json")
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * 17)
        file.write((3999).to_bytes(2, "little"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "copy.bin: wanted "),
        (_empty_index, "copy.idx: "),
        (_no_manifest_and_a_big_id, "has the token id 3999 at position"),
    ],
)
def test_damaged_data_are_refused_with_their_key_and_file(pretrain, description, toy_corpus, tmp_path, damage, message):
    for end in (".bin", ".idx", ".json"):
        shutil.copy(f"{toy_corpus}{end}", tmp_path / f"copy{end}")
    damage(tmp_path / "copy")
    code, err = pretrain("--config", description, f"data.train=[{tmp_path}/copy]")
    assert (code, err.startswith("error: data.train[0]: ")) == (2, True), err
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.fixture
def tokenizer_without_mask(tmp_path):
    words = {f"w{i}": i for i in range(50)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_data_of_another_tokenizer_are_refused(pretrain, description, tokenizer_without_mask):
    code, err = pretrain("--config", description, f"data.tokenizer={tokenizer_without_mask}")
    assert code == 2
    assert "wrong vocabulary for the data: made with tokenizer byte" in err
    assert "set data.tokenizer to the first or preprocess the corpus with the second" in err


def test_a_tokenizer_without_a_mask_gets_an_id_no_text_has(tokenizer_without_mask):
    tokenizer = load_tokenizer(str(tokenizer_without_mask))
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (51, 50)


@pytest.mark.end_to_end
def test_the_command_itself_ends_with_2_and_no_trace(description):
    code, out, err = call("pretrain_dlm.py", "--config", description, "optimizer.lr=fast")
    assert (code, out) == (2, "")
    assert err.startswith("error: command line: ")
    assert len(err.splitlines()) == 1


@pytest.mark.end_to_end
def test_the_command_says_what_it_would_do_and_exits_with_0(description):
    code, out, err = call("pretrain_dlm.py", "--config", description, "--check", "--ranks", "4", "parallel.tensor=2")
    assert code == 0, err
    assert "layout            4 rank(s): tensor 2 x pipeline 1 x data 2" in out
    assert "tokens per step   128 (8 rows of 16, 2 microbatch(es) of 2 per replica)" in out


def _train_then_change(trees):
    """Stderr of the second run, whose description was changed, on the first one's folder."""
    from tests.support.runs import RunConfig, train_on_rank

    train_on_rank(RunConfig.model_validate(trees[0]), 1, save=True)
    err = io.StringIO()

    def main():
        train_on_rank(RunConfig.model_validate(trees[1]), 1)

    with redirect_stderr(err):
        try:
            run_command(main)
        except SystemExit as end:
            return end.code, err.getvalue()
    return 0, err.getvalue()


def test_the_checkpoint_of_another_model_is_refused_with_every_difference(toy_corpus, tmp_path):
    short = {"schedule__steps": 4, "data__valid": []}
    trees = [
        toy_tree(toy_corpus, tmp_path, **short),
        toy_tree(toy_corpus, tmp_path, **short, model__layers=2, seed=4, optimizer__lr=1.0),
    ]
    code, err = on_ranks(1, _train_then_change, trees)[0]
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/toy/checkpoints/step_00000004 belongs to another run; ")
    assert "seed: 3 -> 4; model.layers: 4 -> 2. Give the run another `name`" in err
