"""The fast library is used only where it proves to give the same ids; tests of the proof need no library."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megadiff.data.documents import Corpus, sample
from megadiff.data.preprocess import preprocess
from megadiff.data.tokenizer_files import chosen_backend, load_for_batches, load_tokenizer
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.data.tokenizers import _gigatoken as module
from megadiff.errors import DataError
from tests.data.hard_documents import hard_documents
from tests.data.shards.corpus import FRAMING, contents, write_files
from tests.fixtures.tokenizers import shapes
from tests.support.forked_command import call_forked

HARD_DOCUMENTS = int(os.environ.get("MEGADIFF_HARD_DOCUMENTS", "2000"))
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

    def encode_batch_list(texts, parallel):
        fake.seen += texts
        found = inner.encode_batch(texts)
        return [[*ids, 7] if text in fake.wrong else ids for text, ids in zip(texts, found, strict=True)]

    def from_json(definition):
        fake.loaded += 1
        fake.definition = json.loads(definition)
        assert not [token for token in json.loads(definition)["added_tokens"] if token["special"]]
        return types.SimpleNamespace(encode_batch_list=encode_batch_list)

    imitation = types.ModuleType("gigatoken")
    imitation.Tokenizer = types.SimpleNamespace(from_json=from_json)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gigatoken", imitation)
    return fake


def test_without_the_library_auto_says_why(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert chosen_backend("auto", trained, []) == (
        "tokenizers",
        "it is not installed; pip install 'megadiff[gigatoken]'",
    )
    with pytest.raises(
        DataError, match=r"--backend gigatoken cannot be used for .*: it is not installed; .*; use --ba"
    ):
        chosen_backend("gigatoken", trained, [])
    assert chosen_backend("tokenizers", trained, []) == ("tokenizers", None)


def test_other_ids_for_a_hard_string_or_the_sample_are_found(library, trained):
    assert chosen_backend("auto", trained, TEXTS) == ("gigatoken", None)
    for text, said in ((TEXTS[9], "The cat no"), ("\r\n\r\n \r \n", r"\\r\\n")):
        library.wrong = {text}
        backend, reason = chosen_backend("auto", trained, TEXTS)
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
    tokenizer = load_for_batches(trained, "gigatoken", parallel=False)
    assert library.loaded == 1
    for _ in range(8):
        tokenizer.encode_batch(TEXTS[:100])
    assert library.loaded > 3


def test_normal_forms_of_unicode_are_those_of_tokenizers(library, trained):
    tokenizer = load_for_batches(trained, "gigatoken", parallel=False)
    assert library.definition["normalizer"] is None
    library.seen.clear()
    moved_by_newer_unicode = "a\u0483\u1aca"
    tokenizer.encode_batch(["plain", "e\u0301", moved_by_newer_unicode])
    assert library.seen == ["plain", "é"]  # what is newer goes to `tokenizers` as it is


def test_texts_with_newer_characters_are_encoded_by_tokenizers(library, trained):
    fast = load_for_batches(trained, "gigatoken", parallel=False)
    texts = ["née 中文 ア 한 ع ½ “x” €", 'x = "\U00016ecf",\n', "a new emoji \U0001fae8", "n"]
    library.wrong = set(texts[1:3])
    assert fast.encode_batch(texts) == load_tokenizer(trained).encode_batch(texts)
    assert [bool(module.unsettled().search(text)) for text in texts] == [False, True, True, False]


def test_only_lines_with_newer_characters_are_encoded_by_tokenizers(library, trained):
    fast, plain = load_for_batches(trained, "gigatoken", parallel=False), load_tokenizer(trained)
    text = "old é;\nnew \U0001fae8\n  indented\nold\n\nolder\nnew 🤍 \nend\n'll"
    library.seen.clear()
    assert fast._encoded([text, "ascii"]) == plain.encode_batch([text, "ascii"])
    assert library.seen == ["old é;\n", "old\n\nolder\n", "'ll", "ascii"]


@pytest.mark.parametrize(
    "change",
    [
        lambda definition: definition["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda definition: definition["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": "x"}),
        lambda definition: definition.update(pre_tokenizer=None),
        lambda definition: definition["added_tokens"].append(
            {"id": 400, "content": "x", "special": False, "lstrip": True, "rstrip": False, "normalized": False}
            | {"single_word": False}
        ),
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
def test_parts_of_a_text_have_its_ids(library, trained, text):
    fast, plain = load_for_batches(trained, "gigatoken", parallel=False), load_tokenizer(trained)
    parts = fast._parts(text)
    assert "".join(part for part, _ in parts) == text
    assert all(module.unsettled().search(part) is None for part, is_settled in parts if is_settled)
    assert fast._encoded([text]) == plain.encode_batch([text])


def test_a_normal_form_between_other_steps_leaves_the_library_out(library, trained, tmp_path):
    definition = json.loads((trained / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    wanted = ("tokenizers", "its normal form of Unicode is one of several steps")
    assert chosen_backend("auto", tmp_path, TEXTS) == wanted


def test_added_names_are_found_by_tokenizers_beside_a_normal_form(library, trained, tmp_path):
    definition = json.loads((trained / "tokenizer.json").read_text())
    named = {"id": 400, "content": "<think>", "special": False, "normalized": False}
    definition["added_tokens"].append({**named, "single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    plain, fast = load_tokenizer(tmp_path), load_for_batches(tmp_path, "gigatoken", parallel=False)
    texts = ["née", "<think>\u0301 née", "née"]
    wanted = plain.encode_batch(texts)
    assert 400 in wanted[1]
    assert fast.encode_batch(texts) == wanted


def test_half_a_surrogate_pair_is_refused_by_either(library, trained):
    fast = load_for_batches(trained, "gigatoken", parallel=False)
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
    plain, fast = load_tokenizer(folder), load_for_batches(folder, "gigatoken", parallel=False)
    texts = list(hard_documents(HARD_DOCUMENTS))
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        found = fast._encoded(part)  # without the comparison and the way back that a failure takes
        for text, wanted, ids in zip(part, plain.encode_batch(part), found, strict=True):
            assert ids == wanted, ascii(text)


def test_other_kinds_of_tokenizers_keep_their_own_way(library):
    assert chosen_backend("auto", "byte", []) == ("tokenizers", "it takes tokenizers of a tokenizer.json only")


def test_the_sample_comes_from_files_all_over_the_corpus(tmp_path):
    files = write_files(tmp_path)
    found = sample(Corpus(files, max_bad_lines=0))
    assert {"a text of\n\nits own", "last"} <= set(found)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nbad\n')
    assert sample(Corpus([tmp_path / "bad.jsonl"])) == ["fine"]


@pytest.mark.parametrize(
    "shape", ["own_bpe", "llama3", "qwen", "gpt2", "roberta", "bert", "t5", "gemma", "llama2_json"]
)
def test_the_real_library_fits_or_is_left_out(tmp_path, shape):
    pytest.importorskip("gigatoken")
    folder = getattr(shapes, shape)(tmp_path / shape)
    backend, reason = chosen_backend("auto", folder, TEXTS)
    if shape == "own_bpe":
        assert (backend, reason) == ("gigatoken", None)
    if backend == "gigatoken":
        plain, fast = load_tokenizer(folder), load_for_batches(folder, "gigatoken", parallel=False)
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
