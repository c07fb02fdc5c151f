"""The fast library is used only where it proves to give the same ids; tests of the proof need no library."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from megadiff.data.documents import Corpus, sample
from megadiff.data.preprocess import preprocess
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.data.tokenizers import _gigatoken as module
from megadiff.data.tokenizers import chosen_backend, load_for_batches, load_tokenizer
from megadiff.errors import DataError
from tests.data.hard_documents import hard_documents
from tests.data.shards.corpus import FRAMING, contents, write_files
from tests.fixtures.tokenizers import shapes
from tests.support.forked_command import call_forked

HARD_DOCUMENTS = int(os.environ.get("MEGADIFF_HARD_DOCUMENTS", "2000"))
NAME = {"id": 400, "content": "x", "special": False}
TEXTS = [f"The cat no. {n} sat; it's née {n * n}.\n\n  def f(x):\n    return x_{n % 7}" for n in range(300)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TEXTS, folder, kind="bpe", vocab_size=400)
    return folder


@pytest.fixture
def library(monkeypatch, trained):
    """A library that encodes by `tokenizers`, with a list of texts for which it gives other ids."""
    inner = load_tokenizer(trained)
    fake = types.SimpleNamespace(wrong=set(), loaded=0, seen=[], definition={})

    def encode(text):
        fake.seen.append(text)
        return np.array([*inner.encode(text), *([7] if text in fake.wrong else [])], dtype=np.uint32)

    def from_json(definition):
        fake.loaded += 1
        fake.definition = json.loads(definition)
        assert not [token for token in json.loads(definition)["added_tokens"] if token["special"]]
        return types.SimpleNamespace(encode=encode)

    imitation = types.ModuleType("gigatoken")
    imitation.Tokenizer = types.SimpleNamespace(from_json=from_json)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gigatoken", imitation)
    return fake


@pytest.fixture
def both(library, trained):
    """The tokenizer with that library and without."""
    return load_for_batches(trained, "gigatoken"), load_tokenizer(trained)


def lists(arrays):
    return [ids.tolist() for ids in arrays]


def test_without_the_library_auto_says_why(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert chosen_backend("auto", trained, [])[:2] == (
        "tokenizers",
        "it is not installed; pip install 'megadiff[gigatoken]'",
    )
    with pytest.raises(
        DataError, match=r"--backend gigatoken cannot be used for .*: it is not installed; .*; use --ba"
    ):
        chosen_backend("gigatoken", trained, [])
    assert chosen_backend("tokenizers", trained, [])[:2] == ("tokenizers", None)


def test_other_ids_for_a_hard_string_or_the_sample_are_found(library, trained):
    assert chosen_backend("auto", trained, TEXTS)[:2] == ("gigatoken", None)
    for text, said in ((TEXTS[9], "The cat no"), ("\r\n\r\n \r \n", r"\\r\\n")):
        library.wrong = {text}
        backend, reason, _ = chosen_backend("auto", trained, TEXTS)
        assert backend == "tokenizers"
        assert reason is not None
        assert reason.startswith("it gives other ids for ")
        with pytest.raises(DataError, match=f"other ids for .*{said}.*; use --backend auto or tokenizers"):
            chosen_backend("gigatoken", trained, TEXTS)


def test_ids_that_change_later_end_the_run(library, trained, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("good words\nbad words\n")
    library.wrong = {"bad words"}
    with pytest.raises(
        module.OtherIdsError, match=r"gigatoken gives other ids than tokenizers for 'bad words'; repeat the comm"
    ):
        preprocess(Corpus([file], text_split="line"), tmp_path / "p", trained, backend="gigatoken")
    assert not list(tmp_path.glob("p.*"))


def test_the_library_is_loaded_again_after_much_text(library, trained, monkeypatch):
    monkeypatch.setattr(module, "_RENEW_CHARACTERS", 10_000)
    tokenizer = load_for_batches(trained, "gigatoken")
    assert library.loaded == 1
    for _ in range(8):
        tokenizer.encode_batch(TEXTS[:100])
    assert library.loaded > 3


def test_normal_forms_of_unicode_are_those_of_tokenizers(library, trained):
    tokenizer = load_for_batches(trained, "gigatoken")
    assert library.definition["normalizer"] is None
    library.seen.clear()
    moved_by_newer_unicode = "a\u0483\u1aca"
    tokenizer.encode_batch(["plain", "e\u0301", moved_by_newer_unicode])
    assert library.seen == ["plain", "é"]  # what is newer goes to `tokenizers` as it is


def test_settled_characters_are_those_of_all_of_unicode():
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    every = map(chr, range(0x30000))
    settled = {c for c in every if old(c) == new(c) and new(c) not in ("Cn", "Cs")}
    assert settled == {c for c in map(chr, range(0x110000)) if module.unsettled().search(c) is None}


@pytest.mark.parametrize("form", module._FORMS)
def test_settled_characters_have_the_normal_forms_that_python_knows(form):
    normalize = getattr(normalizers, form)().normalize_str
    settled = [c for c in map(chr, range(0x30000)) if module.unsettled().search(c) is None]
    for c in settled:
        for text in (c, f"a{c}", f"a\u0334{c}", f"a{c}\u0345\u0334", f"\u1100{c}", unicodedata.normalize("NFD", c)):
            if unicodedata.is_normalized(form, text):
                assert normalize(text) == text, ascii(text)


def test_texts_with_newer_characters_are_encoded_by_tokenizers(library, trained):
    fast = load_for_batches(trained, "gigatoken")
    texts = ["née 中文 ア 한 ع ½ “x” €", 'x = "\U00016ecf",\n', "a new emoji \U0001fae8", "n"]
    library.wrong = set(texts[1:3])
    assert fast.encode_batch(texts) == load_tokenizer(trained).encode_batch(texts)
    assert [bool(module.unsettled().search(text)) for text in texts] == [False, True, True, False]


def test_only_words_with_newer_characters_are_encoded_by_tokenizers(library, trained):
    fast, plain = load_for_batches(trained, "gigatoken"), load_tokenizer(trained)
    text = "old é;\na new \U0001fae8\n  indented\nold\n\nolder and\nnew 🤍 \nend\n'll"
    library.seen.clear()
    assert lists(fast._encoded([text, "ascii"])) == plain.encode_batch([text, "ascii"])
    assert library.seen == ["old é;\na new", "old\n\nolder and\nnew", "'ll", "ascii"]


def test_a_long_text_is_encoded_in_parts(library, trained, monkeypatch):
    monkeypatch.setattr(module, "_LONG_CHARACTERS", 1000)
    fast, plain = load_for_batches(trained, "gigatoken"), load_tokenizer(trained)
    for text in ("".join(TEXTS), "".join(TEXTS) + "中" * 5000, "中" * 5000, ""):
        library.seen.clear()
        pieces = list(fast.encode_pieces(text))
        assert [token for piece in pieces for token in piece] == plain.encode(text)
        assert max(map(len, library.seen), default=0) < 2000
        assert (len(pieces) > 10) == text.startswith(TEXTS[0])


def test_a_stretch_of_a_long_text_is_compared(library, trained):
    fast, plain = load_for_batches(trained, "gigatoken"), load_tokenizer(trained)
    text = "".join(TEXTS)
    assert len(text) > 2 * module._COMPARED_CHARACTERS
    assert fast.encode_batch([text]) == plain.encode_batch([text])
    library.wrong = {seen for seen in library.seen if len(seen) == module._COMPARED_CHARACTERS}
    assert library.wrong
    other = load_for_batches(trained, "gigatoken")
    with pytest.raises(module.OtherIdsError, match="gigatoken gives other ids than tokenizers"):
        other.encode_batch([text])


def with_pad(trained, folder, letter):
    """Return a copy of the tokenizer with a letter for padding, so that no text may have the token of this letter."""
    shutil.copytree(trained, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": letter}))
    return folder


def test_a_stretch_that_ends_inside_a_word_puts_no_text_at_fault(library, trained, tmp_path):
    tokenizer = with_pad(trained, tmp_path / "tokenizer", "T")
    fast, plain = load_for_batches(tokenizer, "gigatoken"), load_tokenizer(tokenizer)
    text = "so " + "old " * 2047 + "The cat" + " old" * 10
    end = 2 * module._COMPARED_CHARACTERS  # of the stretch of the first batch
    assert text[end - 1 : end + 1] == "Th"
    with pytest.raises(DataError, match="the special token 'T'"):
        plain.encode(text[:end])
    assert fast.encode_batch([text]) == plain.encode_batch([text])


def test_a_text_at_fault_in_the_sample_does_not_leave_the_library_out(library, trained, tmp_path):
    tokenizer = with_pad(trained, tmp_path / "tokenizer", "Q")
    assert chosen_backend("auto", tokenizer, ["née", "née Q"])[:2] == ("gigatoken", None)
    library.wrong = {"née"}
    assert chosen_backend("auto", tokenizer, ["née", "née Q"]).name == "tokenizers"


def test_texts_of_which_one_is_at_fault_are_tokenized_alone(library, trained, tmp_path):
    tokenizer = with_pad(trained, tmp_path / "tokenizer", "Q")
    file = tmp_path / "a.txt"
    file.write_text("fine\nnée Q\nnée\n")
    corpora = {name: Corpus([file], text_split="line", max_bad_lines=1) for name in ("tokenizers", "gigatoken")}
    for name, corpus in corpora.items():
        preprocess(corpus, tmp_path / name, tokenizer, framing=FRAMING, backend=name)
        assert corpus.report.documents == 2
        assert "a.txt:2: document 2 of the file: the tokenizer turns its text into" in corpus.report.bad_examples[0]
    assert contents(tmp_path / "tokenizers") == contents(tmp_path / "gigatoken")


@pytest.mark.parametrize(
    "change",
    [
        lambda definition: definition["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda definition: definition["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": "x"}),
        lambda definition: definition.update(pre_tokenizer=None),
        lambda definition: definition["added_tokens"].append({**NAME, "lstrip": True}),
        lambda definition: definition["added_tokens"].append({**NAME, "rstrip": True}),
        lambda definition: definition["added_tokens"].append({**NAME, "content": "x y"}),
    ],
)
def test_texts_stay_whole_where_a_cut_might_change_them(library, trained, change):
    definition = json.loads((trained / "tokenizer.json").read_text())
    plain = module._plain(definition)
    module._normal_form(plain)
    assert module._has_cuts(plain)
    change(definition)
    plain = module._plain(definition)
    module._normal_form(plain)
    assert not module._has_cuts(plain)


@given(st.text(alphabet="ab;#' \n\r\t1é\U0001fae8", max_size=60))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_a_text_have_its_ids(both, text):
    fast, plain = both
    parts = fast._parts(text)
    assert "".join(part for part, _ in parts) == text
    assert all(module.unsettled().search(part) is None for part, is_settled in parts if is_settled)
    assert lists(fast._encoded([text])) == plain.encode_batch([text])


def test_a_normal_form_between_other_steps_leaves_the_library_out(library, trained, tmp_path):
    definition = json.loads((trained / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    wanted = ("tokenizers", "its normal form of Unicode is one of several steps")
    assert chosen_backend("auto", tmp_path, TEXTS)[:2] == wanted


def test_added_names_are_found_by_tokenizers_beside_a_normal_form(library, trained, tmp_path):
    definition = json.loads((trained / "tokenizer.json").read_text())
    named = {"id": 400, "content": "<think>", "special": False, "normalized": False}
    definition["added_tokens"].append({**named, "single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    plain, fast = load_tokenizer(tmp_path), load_for_batches(tmp_path, "gigatoken")
    texts = ["née", "<think>\u0301 née", "née"]
    wanted = plain.encode_batch(texts)
    assert 400 in wanted[1]
    assert fast.encode_batch(texts) == wanted


def test_half_a_surrogate_pair_is_refused_by_either(library, trained):
    fast = load_for_batches(trained, "gigatoken")
    for tokenizer in (load_tokenizer(trained), fast):
        with pytest.raises(DataError, match="cannot be tokenized: it is no valid Unicode text"):
            tokenizer.encode_batch(["fine", "half \ud83d", "née"])


@pytest.mark.parametrize("shape", ["own_bpe", "llama3", "qwen", "roberta", "gemma", "llama2_json"])
def test_the_real_library_gives_the_same_ids_of_hard_documents(tmp_path, shape):
    pytest.importorskip("gigatoken")
    folder = tmp_path / shape
    if shape == "own_bpe":  # whose merges show where such texts are split
        train_tokenizer([*hard_documents(1000, seed=1), *TEXTS], folder, kind="bpe", vocab_size=8000)
    else:
        getattr(shapes, shape)(folder)
    plain, fast = load_tokenizer(folder), load_for_batches(folder, "gigatoken")
    texts = list(hard_documents(HARD_DOCUMENTS))
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        found = lists(fast._encoded(part))  # without the comparison and the way back that a failure takes
        for text, wanted, ids in zip(part, plain.encode_batch(part), found, strict=True):
            assert ids == wanted, ascii(text)


def test_other_kinds_of_tokenizers_keep_their_own_way(library):
    assert chosen_backend("auto", "byte", [])[:2] == ("tokenizers", "it takes tokenizers of a tokenizer.json only")


def test_the_sample_comes_from_files_all_over_the_corpus(tmp_path):
    files = write_files(tmp_path)
    found = sample(Corpus(files, max_bad_lines=0))
    assert {"a text of\n\nits own", "last"} <= set(found)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nbad\n')
    assert sample(Corpus([tmp_path / "bad.jsonl"])) == ["fine"]


def test_the_sample_of_many_files_is_no_larger_than_that_of_one(tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(20)]
    for number, file in enumerate(files):
        file.write_text(f"{number} " * 20_000)
    found = sample(Corpus(files))
    assert len(found) == 16
    assert {len(text) for text in found} == {2**17 // 16}
    assert [len(text) for text in sample(Corpus(files[:1]))] == [40_000]


@pytest.mark.parametrize(
    "shape", ["own_bpe", "llama3", "qwen", "gpt2", "roberta", "bert", "t5", "gemma", "llama2_json"]
)
def test_the_real_library_fits_or_is_left_out(tmp_path, shape):
    pytest.importorskip("gigatoken")
    folder = getattr(shapes, shape)(tmp_path / shape)
    backend, reason, _ = chosen_backend("auto", folder, TEXTS)
    if shape == "own_bpe":
        assert (backend, reason) == ("gigatoken", None)
    if backend == "gigatoken":
        plain, fast = load_tokenizer(folder), load_for_batches(folder, "gigatoken")
        wanted = plain.encode_batch([*module.hard_strings(), *TEXTS])
        found = fast.encode_batch([*module.hard_strings(), *TEXTS])
        assert found == wanted


def test_the_real_library_writes_the_same_bytes(tmp_path, trained):
    pytest.importorskip("gigatoken")
    files = write_files(tmp_path)
    preprocess(Corpus(files), tmp_path / "plain", trained, framing=FRAMING)
    preprocess(Corpus(files), tmp_path / "fast", trained, framing=FRAMING, backend="gigatoken")
    assert contents(tmp_path / "plain") == contents(tmp_path / "fast")
    words = ["--input", *files, "--tokenizer", trained, "--append-eod", "--backend", "auto", "--workers", "2"]
    ended = call_forked("tools/preprocess_data.py", *words, "--output-prefix", tmp_path / "two")
    assert (ended.code, ended.err) == (0, "")
    assert contents(tmp_path / "two") == contents(tmp_path / "plain")
