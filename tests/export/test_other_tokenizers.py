"""Tokenizers of other projects the whole way: corpus, training, export, Transformers, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megadiff.checkpoint.manifest import read_manifest
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.tokenizers import load_tokenizer
from megadiff.eval.texts_likelihood import SpecialTokens
from megadiff.export.verify import sample_ids
from tests.fixtures.tokenizers.shapes import CORPUS, SHAPES, TEXTS
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")

FRAMED = {"roberta": True, "llama2": False, "hole": False}
"""Shapes, and whether their data are made with bos before each document."""


@dataclass
class Made:
    shape: str
    source: Path
    data: Path
    checkpoint: Path
    folder: Path


def ended(*command):
    found = call_forked(*command)
    assert found.code == 0, found.err
    return found


@pytest.fixture(scope="module", params=FRAMED)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = SHAPES[request.param](folder / "tokenizer")
    lines = [json.dumps({"text": text, "score": float("nan")}) for text in [*TEXTS, *CORPUS]]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    words = ["--input", folder / "corpus.jsonl", "--output-prefix", folder / "data", "--tokenizer", source]
    ended("tools/preprocess_data.py", *words, "--append-eod", *(["--prepend-bos"] if FRAMED[request.param] else []))
    tree = {"data__train": [str(folder / "data")], "data__valid": [], "data__tokenizer": str(source)}
    config = toy_config(folder / "data", folder / "runs", schedule__steps=4, model__layers=2, **tree)
    on_ranks(1, train_on_rank, config, 1, save=True)
    checkpoint = config.folder / "checkpoints/step_00000004"
    verify = ["--verify"] if request.param == "roberta" else []
    out = ended("tools/convert_checkpoint.py", "export", "--checkpoint", checkpoint, "--output", folder / "hf", *verify)
    assert ("verified tokenizer: equal ids of" in out.out) == bool(verify)
    return Made(request.param, source, folder / "data", checkpoint, folder / "hf")


def test_ids_in_transformers_are_those_that_were_trained_on(made):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(made.folder)
    reader = IndexedReader(made.data)
    trained = [reader.document(i).tolist() for i in range(reader.num_documents)]
    found = [tokenizer(text).input_ids for text in [*TEXTS, *CORPUS]]
    eos, empty = tokenizer.eos_token_id, len([tokenizer.bos_token_id] * FRAMED[made.shape])
    assert [[*ids, eos] for ids in found if len(ids) > empty] == trained
    assert tokenizer.mask_token_id == json.loads((made.folder / "config.json").read_text())["mask_token_id"]


def test_the_fact_that_documents_begin_with_bos_travels(made, tmp_path):
    manifest = read_manifest(made.checkpoint)
    assert manifest.prepended_bos is FRAMED[made.shape]
    assert json.loads((made.folder / "config.json").read_text())["prepended_bos"] is FRAMED[made.shape]
    ended("tools/convert_checkpoint.py", "import", "--input", made.folder, "--output", tmp_path / "back")
    again = read_manifest(tmp_path / "back")
    assert again.prepended_bos is FRAMED[made.shape]
    assert again.tokenizer_fingerprint == manifest.tokenizer_fingerprint == load_tokenizer(made.source).fingerprint


def test_every_command_frames_a_prompt_as_the_data_were(made, tmp_path):
    if made.shape == "llama2":
        pytest.skip("one shape framed with bos and one without are enough")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The cat sat"}\n')
    bos = ["--prepend-bos"] if load_tokenizer(made.source).bos_id is not None else []
    measured, drawn = {}, {}
    for option in ("as trained", *bos, "--no-prepend-bos"):
        options = [] if option == "as trained" else [option]
        words = ["--model", made.checkpoint, *options]
        out = tmp_path / "out.json"
        likelihood = ["--data", texts, "--text-key", "text", "--draws", "4", "--output", out]
        ended("tools/evaluate.py", "likelihood", *words, *likelihood)
        found = json.loads(out.read_text())
        measured[option] = (found["prepend_bos"], found["nll"])
        prompt = ["--prompt", "The cat", "--num-tokens", "6", "--steps", "4"]
        drawn[option] = ended("tools/generate.py", *words, *prompt).out
    default = "--prepend-bos" if FRAMED[made.shape] else "--no-prepend-bos"
    assert measured["as trained"] == measured[default]
    assert measured["as trained"][0] is FRAMED[made.shape]
    assert drawn["as trained"] == drawn[default]
    assert len({nll for _, nll in measured.values()}) == len({*drawn.values()}) == (2 if bos else 1)


def test_sample_texts_are_framed_as_prompts(made):
    tokenizer = load_tokenizer(made.source)
    found = sample_ids(tokenizer, prepend_bos=FRAMED[made.shape])
    start = [tokenizer.bos_id] * FRAMED[made.shape]
    assert found[""] == start
    assert found["Once upon a time, there were 12345 cats."][: len(start)] == start
    assert any(name in text for text in found for name in ("<mask>", "</s>"))


class FramedModel:
    """The part of a model that framing looks at."""

    def __init__(self, *, prepends_bos, adds_start_token):
        self.prepends_bos, self.adds_start_token = prepends_bos, adds_start_token


@pytest.mark.parametrize(
    ("trained", "autoregressive", "asked", "wanted"),
    [
        (True, False, None, True),
        (True, False, False, False),
        (False, False, None, False),
        (False, False, True, True),
        (True, True, None, False),  # its sequences begin with bos anyway
        (True, True, True, True),
    ],
)
def test_framing_follows_the_data_unless_asked_otherwise(trained, autoregressive, asked, wanted):
    model = FramedModel(prepends_bos=trained, adds_start_token=autoregressive)
    assert SpecialTokens.like_the_data(model, prepend_bos=asked).prepend_bos is wanted
