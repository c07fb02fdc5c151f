"""A tokenizer from outside the package: under the contract test, and through every command that takes one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import DataError
from megadiff.platform.quiet import quiet
from megadiff.testing import check_tokenizer
from tests.support.forked_command import call_forked
from tests.testing.foreign import LION, WORDS, write_package

with quiet():
    from tests.support.runs import toy_tree

TEXTS = ("a list is a list", "the list was  short\n")
VOCABULARY = "a list is the was short of words here and there"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The value of `data.tokenizer`."""
    write_package(tmp_path, words=WORDS, lion=LION)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vocabulary.txt").write_text(VOCABULARY)
    yield f"theirs.words:{tmp_path / 'vocabulary.txt'}"
    for name in [name for name in sys.modules if name.split(".")[0] == "theirs"]:
        del sys.modules[name]


def test_a_tokenizer_from_outside_holds_the_contract(words: str) -> None:
    check_tokenizer(words, texts=TEXTS)
    tokenizer = load_tokenizer(words)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.mask_id) == (words, 13, 12)
    assert tokenizer.encode("a list of cats") == [1, 2, 7, 0]


def changed(old: str, new: str) -> str:
    """Return the text of the tokenizer with one place changed."""
    assert WORDS.count(old) == 1, old
    return WORDS.replace(old, new)


SABOTAGE = {
    "yields_the_mask": (
        changed("self._ids.get(word, 0)", "self._ids.get(word, self.mask_id)"),
        DataError,
        r"turns the text 'Once upon.*' into the special id 12; a model cannot tell it from a real one",
    ),
    "past_the_vocabulary": (
        changed("self._ids.get(word, 0)", "self._ids.get(word, 99)"),
        DataError,
        r"turns the text 'Once upon.*' into the id 99, which is not below its vocab_size 13",
    ),
    "yields_words": (
        changed("self._ids.get(word, 0)", "word"),
        DataError,
        r"turns the text 'Once upon.*' into something else than a list of integers",
    ),
    "fails": (
        changed("self._ids.get(word, 0)", "self._ids[word]"),
        DataError,
        r"`encode` of the tokenizer theirs\.bad.* failed at the text 'Once upon.*': KeyError: 'Once' \(bad\.py, line ",
    ),
    "exports_other_ids": (
        changed("WhitespaceSplit", "Whitespace"),
        AssertionError,
        r"theirs\.bad.*: .* has the ids \[.*\], and \[.*\] from its export in the tokenizers library",
    ),
    "new_each_time": (
        changed("json.dumps(self._words)", "repr(id(self))"),
        AssertionError,
        "another fingerprint each time it is loaded",
    ),
    "no_fingerprint": (
        changed("self.fingerprint =", "self.other ="),
        DataError,
        r"theirs\.bad.*: a tokenizer needs `fingerprint`; add what is missing",
    ),
    "no_build": ("X = 1\n", DataError, r"theirs\.bad has no function `build\(argument\)`"),
}


@pytest.mark.parametrize("kind", SABOTAGE)
def test_a_tokenizer_that_breaks_the_contract_is_named(words: str, tmp_path: Path, kind: str) -> None:
    text, error, sentence = SABOTAGE[kind]
    write_package(tmp_path, bad=text)
    with pytest.raises(error, match=sentence):
        check_tokenizer(words.replace("theirs.words", "theirs.bad"), texts=TEXTS)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("theirs.gone", "the module `theirs.gone` cannot be found: no module `theirs.gone`"),
        ("no_such_pkg.words:x", "no package `no_such_pkg` is installed or on PYTHONPATH"),
        ("tokenizers.json", "tokenizers.json: the tokenizer cannot be read"),
        ("hf_json:nowhere.json", "nowhere.json: the tokenizer cannot be read"),
    ],
)
def test_a_name_that_means_nothing_is_refused(words: str, path: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(path)


def test_every_command_takes_it(words: str, tmp_path: Path) -> None:
    """And an optimizer from outside with settings of its own, from the command line."""
    documents = [f"a list of words is here {'and there ' * (i % 5)}the list was short" for i in range(200)]
    texts, corpus, run = tmp_path / "texts.jsonl", tmp_path / "corpus", tmp_path / "run.yaml"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tree = toy_tree(corpus, tmp_path / "runs", model__layers=1, data__tokenizer=words)
    tree["schedule"] = {"steps": 3, "warmup_steps": 1}
    tree["optimizer"] = {"name": "theirs.lion", "lr": 1e-3, "weight_decay": 0.1}
    run.write_text(json.dumps(tree))
    model, exported = tmp_path / "runs/toy", tmp_path / "exported"
    outputs = []
    for command in (
        ["tools/preprocess_data.py", "--input", texts, "--output-prefix", corpus, "--tokenizer", words],
        ["pretrain_dlm.py", "--config", run, "--check", "optimizer.beta1=0.8"],
        ["pretrain_dlm.py", "--config", run, "optimizer.beta1=0.8"],
        ["tools/generate.py", "--model", model, "--prompt", "a list", "--num-tokens", "6", "--steps", "3"],
        ["tools/evaluate.py", "elbo", "--model", model, "--data", corpus, "--sequences", "4"],
        ["tools/convert_checkpoint.py", "export", "--checkpoint", model, "--output", exported, "--verify"],
    ):
        ended = call_forked(*command)
        assert ended.code == 0, f"{command[0]}: {ended.err}"
        outputs.append(ended.out + ended.err)
    check, trained, written = outputs[1], outputs[2], outputs[3]
    assert "eps" not in check.partition("learning rate")[2].partition("\n")[0]
    assert "theirs.lion" in trained
    assert words in trained
    assert set(written.split()) <= {"<unk>", *VOCABULARY.split()}
    assert "verified tokenizer: equal ids" in outputs[5]
    manifest = json.loads((model / "checkpoints/step_00000003/manifest.json").read_text())
    assert manifest["config"]["optimizer"]["beta1"] == 0.8
    assert manifest["tokenizer_fingerprint"] == load_tokenizer(words).fingerprint
    ended = call_forked("pretrain_dlm.py", "--config", run, "--check", "optimizer.momentum=0.8")
    assert ended.code == 2
    assert "unknown key `optimizer.momentum`" in ended.err


def test_a_tokenizer_without_export_is_refused_before_writing(words: str, tmp_path: Path) -> None:
    write_package(tmp_path, silent=changed("    def export(", "    def _unused("))
    tokenizer = load_tokenizer(words.replace("theirs.words", "theirs.silent"))
    assert tokenizer.export_limits is not None
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"cannot be exported, for it has no method `export\(folder, \*, seq_length"):
        tokenizer.export(tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]
    check_tokenizer(words.replace("theirs.words", "theirs.silent"), texts=TEXTS)
