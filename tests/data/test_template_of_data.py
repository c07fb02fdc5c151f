"""The chat template that made data of messages is recorded with them, and another one is named where it matters."""

from __future__ import annotations

import hashlib
import json

import pytest

from megadiff.data.config import DataConfig
from megadiff.data.conversations import chat_options
from megadiff.data.documents import Corpus
from megadiff.data.indexed_format import read_manifest
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.open import open_data
from megadiff.data.preprocess import DocumentMarkers, preprocess
from megadiff.data.review import advice
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank

PLAIN = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
OTHER = PLAIN.replace(";", "|")
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def of(template):
    return hashlib.sha256(template.encode()).hexdigest()


@pytest.fixture
def chats(tmp_path):
    """Indexed chats made with each template, with the files of the templates beside them."""
    (tmp_path / "in.jsonl").write_text(8 * (json.dumps({"messages": CHAT}) + "\n"))
    for name, template in (("plain", PLAIN), ("other", OTHER)):
        (tmp_path / f"{name}.jinja").write_text(template)
        options = chat_options("byte", "messages", template=tmp_path / f"{name}.jinja")
        corpus = Corpus([tmp_path / "in.jsonl"], fields=options.fields)
        preprocess(corpus, tmp_path / name, "byte", framing=DocumentMarkers(conversations=options))
    return tmp_path


def opened(paths, **keys):
    config = DataConfig(train=[str(path) for path in paths], tokenizer="byte", padding="eos", **keys)
    data = open_data(config, ByteTokenizer(), seq_length=16, seed=1, valid_sequences=4, samples=4)
    return data, [str(one) for one in advice(data, config, end=4, length="", eval_sequences=4)]


def test_the_manifest_names_the_template_and_older_ones_load(chats):
    assert read_manifest(chats / "plain.json").chat_template == of(PLAIN)
    assert IndexedReader(chats / "other").chat_template == of(OTHER)
    found = json.loads((chats / "plain.json").read_text())
    del found["chat_template"]
    (chats / "plain.json").write_text(json.dumps(found))
    assert IndexedReader(chats / "plain").chat_template is None
    assert opened([chats / "plain"])[0].chat_templates == []
    (chats / "plain.json").write_text(json.dumps({**found, "chat_template": "plain"}))
    with pytest.raises(DataError, match=r"plain.json: `chat_template` in the manifest"):
        IndexedReader(chats / "plain")


def test_shards_and_their_merge_name_the_template(chats):
    common = ("tools/preprocess_data.py", "--input", chats / "in.jsonl", "--tokenizer", "byte")
    template = ("--chat-key", "messages", "--chat-template", chats / "plain.jinja")
    assert call_forked(*common, *template, "--shards", chats / "shards").code == 0
    assert IndexedReader(chats / "shards").chat_template == of(PLAIN)
    assert call_forked(common[0], "--merge", chats / "shards", "--output-prefix", chats / "merged").code == 0
    assert IndexedReader(chats / "merged").chat_template == of(PLAIN)


def test_sources_of_different_templates_are_warned_of(chats):
    data, found = opened([chats / "plain"], valid=[str(chats / "plain")])
    assert data.chat_templates == [of(PLAIN)]
    assert not any("template" in line for line in found)
    named = f"{of(PLAIN)[:12]}, data.{{}} with {of(OTHER)[:12]}; preprocess the messages again"
    for keys, key in (({"valid": [str(chats / "other")]}, "valid[0]"), ({}, "train[1]")):
        _, found = opened([chats / "plain", *([] if keys else [chats / "other"])], **keys)
        wanted = f"sources were made with different chat templates: data.train[0] with {named.format(key)}"
        assert sum(line.startswith(wanted) for line in found) == 1, found


def test_a_message_in_another_template_is_warned_of(chats):
    config = toy_config(
        chats / "plain", chats, model__seq_length=24, data__padding="eos", schedule__steps=3, data__valid=[]
    )
    on_ranks(1, train_on_rank, config, 1, save=True)
    for name, is_warned in (("plain", False), ("other", True)):
        ended = call_forked(
            "tools/generate.py",
            "--model",
            config.folder,
            "--message",
            "1+1=",
            "--num-tokens",
            "2",
            "--steps",
            "2",
            "--chat-template",
            chats / f"{name}.jinja",
        )
        warning = f"the chat template {of(OTHER)[:12]} is not that of the training data ({of(PLAIN)[:12]}), so the"
        assert (ended.code, warning in ended.err) == (0, is_warned), ended.err
