"""The parts of the demo that are its own: what its table counts, and how its run is stopped and judged."""

from __future__ import annotations

import json

import pytest

from megadiff.config.load import load_config
from megadiff.errors import MegadiffError
from megadiff.run.config import RunConfig
from tests.support.commands import REPOSITORY
from tools import demo


def test_words_are_counted_against_those_of_the_text(tmp_path):
    """Five of seven: `zqx` and `objec` are none; single letters, digits and the numbers of the lines do not count."""
    corpus = tmp_path / "train.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in ("The object is returned.", "A list_item")))
    texts = "[1] the Object zqx 42 x objec\n[2] is list item\n"
    assert demo.word_share(texts, corpus) == pytest.approx(5 / 7)
    assert demo.word_share("[1] 7 ++\n", corpus) == 0.0


def closing(tmp_path, after: float) -> None:
    config = load_config(REPOSITORY / "examples/demo.yaml", [f"output_dir={tmp_path}"], RunConfig)
    config.folder.mkdir()
    line = {"step": 0, "eval_elbo": 7.638, "eval_unigram": 6.5, "eval_bigram": 4.4}
    (config.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = {"eval_elbo": after, "eval_elbo_stderr": 0.05, "eval_bits_per_byte": after / 2.1}
    (config.folder / "elbo.json").write_text(json.dumps(found))
    demo._close(config, 0.9, 400.0)


def test_the_table_has_both_baselines_and_a_model_that_learned_passes(tmp_path, capsys):
    closing(tmp_path, 5.5)
    out = " ".join(capsys.readouterr().out.split())
    for said in ("6.500 nats per token", "4.400 nats per token", "15% below", "90% of the sampled words"):
        assert said in out


def test_a_model_that_did_not_learn_ends_the_demo_with_what_was_found(tmp_path):
    with pytest.raises(MegadiffError, match=r"from 7\.638 to 6\.000; .* below 90% of the unigram entropy of 6\.500"):
        closing(tmp_path, 6.0)


def test_the_example_is_short():
    assert len((REPOSITORY / "examples/demo.yaml").read_text().splitlines()) <= 40
