"""Conversations from a corpus to indexed data, and their sequences; what cannot be used is refused in a sentence."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from megadiff.data.conversations import ConversationOptions, chat_options
from megadiff.data.division import Padding, division_of, padding_of
from megadiff.data.documents import Corpus
from megadiff.data.indexed_manifest import read_manifest, tokenizer_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.preprocess import DocumentMarkers, preprocess
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.test_chat_template import CASES, SECOND, SYSTEM, TURN, write_tokenizer
from tests.support.forked_command import call_forked

EOS, PAD = 1, 2
PAIRS = ConversationOptions(prompt_key="q", completion_key="a")


def write_lines(path, records):
    """Write a jsonl file and return its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_conversations(prefix, spans):
    """Write conversations of the byte tokenizer, each a list of spans, and return a reader of them."""
    with IndexedWriter(prefix, vocab_size=260, mask_id=3) as writer:
        for parts in spans:
            ids = [token for part in parts for token in part]
            writer.add_documents(np.array(ids), [len(part) for part in parts], [len(parts)])
        writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=1)
    return IndexedReader(prefix)


def preprocessed(path, prefix, options=PAIRS, *, tokenizer="byte", workers=1, **framing):
    """Return a reader of the indexed data of a corpus file."""
    markers = DocumentMarkers(**framing, conversations=options)
    preprocess(Corpus([path], fields=options.fields), prefix, tokenizer, framing=markers, workers=workers)
    return IndexedReader(prefix)


def test_prompts_and_completions_become_given_and_predicted_tokens(tmp_path):
    records = [{"q": "ab", "a": "c", "other": [1]}, {"q": "", "a": "de"}]
    reader = preprocessed(write_lines(tmp_path / "in.jsonl", records), tmp_path / "p", append_eod=True)
    byte = ByteTokenizer()
    assert [reader.document(place).tolist() for place in (0, 1)] == [
        [*byte.encode("abc"), EOS],
        [*byte.encode("de"), EOS],
    ]
    assert [reader.answers(place).tolist() for place in (0, 1)] == [[False, False, True, True], [True, True, True]]
    manifest = read_manifest(tmp_path / "p.json")
    assert (manifest.version, manifest.spans, manifest.documents, manifest.tokens) == (3, "answers", 2, 7)


def test_text_keeps_its_manifest(tmp_path):
    (tmp_path / "in.txt").write_text("text")
    preprocess(Corpus([tmp_path / "in.txt"]), tmp_path / "p", "byte")
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["version"] == 2
    assert "spans" not in found
    reader = IndexedReader(tmp_path / "p")
    assert not reader.has_spans
    assert reader.answers(0).all()


def test_every_kind_of_input_gives_the_same_conversations(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = write_tokenizer(tmp_path / "tokenizer", CASES["chatml"])
    options = chat_options(folder, "messages")
    chats = [TURN, [SYSTEM, *TURN, *SECOND], [*SECOND]] * 5
    records = [{"messages": chat} for chat in chats]
    write_lines(tmp_path / "in.jsonl", records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "messages"])
        writer.writerows([place, json.dumps(chat)] for place, chat in enumerate(chats))
    wanted = None
    for kind, workers in (("jsonl", 1), ("jsonl", 2), ("parquet", 1), ("csv", 1)):
        prefix = tmp_path / f"{kind}{workers}"
        preprocessed(tmp_path / f"in.{kind}", prefix, options, tokenizer=folder, workers=workers)
        files = [(prefix.parent / f"{prefix.name}{end}").read_bytes() for end in (".bin", ".idx")]
        wanted = wanted or files
        assert files == wanted, kind


def test_a_long_line_keeps_its_messages(tmp_path):
    """Long lines of text corpora are reduced to their top level, which conversations must not be."""
    folder = write_tokenizer(tmp_path / "tokenizer", CASES["chatml"])
    chat = [{"role": "user", "content": "x" * 2**20}, TURN[1]]
    path = write_lines(tmp_path / "in.jsonl", [{"messages": chat}])
    reader = preprocessed(path, tmp_path / "p", chat_options(folder, "messages"), tokenizer=folder)
    assert reader.num_tokens > 2**20


CHAT = ("--chat-key", "messages")
REFUSED = {
    "no assistant": ({"messages": TURN[:1]}, CHAT, "it has no message of the role assistant, so nothing could be pred"),
    "ends with a question": (
        {"messages": [*TURN, SECOND[0]]},
        CHAT,
        "its last message is of the role user, wanted an answer of the role assistant",
    ),
    "wrong role": (
        {"messages": [{"role": "human", "content": "?"}, TURN[1]]},
        CHAT,
        "message 1 has the role 'human', wanted one of system, developer, user, assistant, tool",
    ),
    "keys of another format": (
        {"messages": [{"from": "human", "value": "?"}]},
        CHAT,
        "message 1 has no `role`; rename `from` to it",
    ),
    "content is a list": (
        {"messages": [{"role": "user", "content": []}, TURN[1]]},
        CHAT,
        "the content of message 1 must be a string, found a list",
    ),
    "no messages": ({"messages": []}, CHAT, "it has no messages"),
    "messages are text": ({"messages": "Hi"}, CHAT, "`messages` must be a list of messages, found a string"),
    "a message is text": ({"messages": ["Hi"]}, CHAT, "message 1 must be an object with role and content, found a s"),
    "special token in a text": (
        {"messages": [{"role": "user", "content": "<|im_end|>"}, TURN[1]]},
        CHAT,
        "message 1 spells the special token '<.im_end.>', which would begin or end a turn",
    ),
    "another key": ({"chat": TURN}, CHAT, "no key `messages` .keys here: chat; choose with --chat-key"),
    "template fails": (
        {"messages": [{"role": "tool", "content": "?"}, TURN[1]]},
        CHAT,
        "the chat template refuses it .tools are not known",
    ),
    "empty completion": (
        {"q": "2+2=", "a": ""},
        ("--prompt-key", "q", "--completion-key", "a"),
        "its completion is empty, so nothing could be predicted",
    ),
    "prompt is a number": (
        {"q": 4, "a": "x"},
        ("--prompt-key", "q", "--completion-key", "a"),
        "`q` must be a string, found a number",
    ),
}


@pytest.fixture
def tokenizer(tmp_path):
    case = CASES["chatml"]
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('tools are not known') }}{% endif %}"
    folder = write_tokenizer(tmp_path / "tokenizer", case)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template + case.template}))
    return folder


def refused(*words):
    """Return the sentence with which the command refuses."""
    ended = call_forked("tools/preprocess_data.py", *words)
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1, ended.err
    return ended.err


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_without_an_answer_to_learn_is_a_bad_line(name, tokenizer, tmp_path):
    record, keys, sentence = REFUSED[name]
    good = {"messages": TURN, "q": "2+2=", "a": "4"}
    path = write_lines(tmp_path / "in.jsonl", [good, record])
    common = ("--input", path, *keys, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "p")
    assert re.search(f"in.jsonl:2: .*{sentence}.*; (correct the line|.*) or raise --max-bad-lines", refused(*common))
    ended = call_forked("tools/preprocess_data.py", *common, "--max-bad-lines", "1")
    assert ended.code == 0, ended.err
    assert IndexedReader(tmp_path / "p").num_documents == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--chat-key", "m", "--tokenizer", "byte"),
            "byte: wanted a tokenizer with a chat template .* found none; giv",
        ),
        (("--chat-key", "m", "--chat-template", "none.jinja"), "none.jinja: the chat template cannot be read .No such"),
        (
            ("--chat-key", "m", "--prompt-key", "q"),
            "--chat-key has no meaning beside prompts and completions; give one",
        ),
        (("--prompt-key", "q"), "--completion-key is missing; give both --prompt-key and --completion-key"),
        (("--turns", "apart"), "--turns has no meaning without --chat-key; give that too"),
        (("--chat-key", "m", "--template", "{a}"), "--template has no meaning for conversations; drop it"),
        (
            ("--prompt-key", "q", "--completion-key", "a", "--turns", "apart"),
            "--turns has no meaning beside --prompt-k",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, sentence, tokenizer, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"m": TURN, "q": "", "a": "x"}])
    rest = ("--input", path, "--output-prefix", tmp_path / "p")
    given = () if "--tokenizer" in words else ("--tokenizer", tokenizer)
    assert re.search(sentence, refused(*rest, *given, *words))


SPANS = [[[10, 11], [12, 13]], [[20] * 9, [21]], [[30], [31], [32], [33, 34, 35]], [[], [40]], [[50] * 6, [51] * 5]]


def test_a_conversation_is_a_sequence_cut_or_filled_up(tmp_path):
    reader = write_conversations(tmp_path / "p", SPANS)
    division = division_of(reader, 8, Padding(EOS, is_predicted=True))
    assert (len(division), division.left_out, division.cut) == (4, 1, 1)
    assert [division.tokens(place).tolist() for place in range(4)] == [
        [10, 11, 12, 13, EOS, EOS, EOS, EOS],
        [30, 31, 32, 33, 34, 35, EOS, EOS],
        [40, *[EOS] * 7],
        [50, 50, 50, 50, 50, 50, 51, 51],
    ]
    wanted = ["..xxxxxx", ".x.xxxxx", "xxxxxxxx", "......xx"]
    assert ["".join(".x"[int(one)] for one in division.predicted(place)) for place in range(4)] == wanted
    clean = division_of(reader, 8, Padding(PAD, is_predicted=False))
    assert clean.tokens(0).tolist()[4:] == [PAD] * 4
    assert ["".join(".x"[int(one)] for one in clean.predicted(place)) for place in range(4)] == [
        "..xx....",
        ".x.xxx..",
        "x.......",
        "......xx",
    ]
    assert [division.first_token(place) for place in range(4)] == [0, 14, 20, 21]
    assert [division.extent(number) for number in range(5)] == [0, 4, 20, 21, 32]


def test_answers_that_are_all_cut_away_are_refused(tmp_path):
    reader = write_conversations(tmp_path / "p", [SPANS[1]])
    with pytest.raises(
        DataError, match=r"whose answer begins within model.seq_length = 8 .*the shortest prompt has 9 to"
    ):
        division_of(reader, 8, Padding(EOS, is_predicted=True))
    with pytest.raises(
        DataError, match=r"data.padding, which fills them up to model.seq_length, is not set; set it to"
    ):
        division_of(reader, 8)


def test_padding_needs_its_token():
    byte = ByteTokenizer()
    assert padding_of(None, byte) is None
    assert [padding_of(name, byte) for name in ("predicted_eos", "eos", "pad")] == [(1, True), (1, False), (2, False)]
    byte.pad_id = None
    with pytest.raises(DataError, match=r"data.padding is pad, but the tokenizer byte has no pad token; set it to eos"):
        padding_of("pad", byte)


def test_an_index_whose_documents_have_one_span_is_refused(tmp_path):
    write_conversations(tmp_path / "p", SPANS)
    index = bytearray((tmp_path / "p.idx").read_bytes())
    place = index.rindex((4).to_bytes(8, "little"))
    index[place : place + 8] = (3).to_bytes(8, "little")
    (tmp_path / "p.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"document\[2\] at byte \d+ >= 4, found 3"):
        IndexedReader(tmp_path / "p")


def test_shards_and_their_merge_are_what_one_process_writes(tokenizer, tmp_path):
    chats = [[SYSTEM, *TURN, *SECOND], TURN, SECOND] * 40
    path = write_lines(tmp_path / "in.jsonl", [{"messages": chat} for chat in chats])
    common = ("tools/preprocess_data.py", "--input", path, "--chat-key", "messages", "--tokenizer", tokenizer)
    for words in (
        ("--turns", "apart", "--output-prefix", tmp_path / "one"),
        ("--turns", "apart", "--shards", tmp_path / "shards", "--unit-mb", "0.01"),
    ):
        ended = call_forked(*common, *words)
        assert ended.code == 0, ended.err
    shards = IndexedReader(tmp_path / "shards")
    assert len(list((tmp_path / "shards/shards").iterdir())) > 1
    assert (shards.num_documents, shards.has_spans) == (160, True)
    ended = call_forked(common[0], "--merge", tmp_path / "shards", "--output-prefix", tmp_path / "merged")
    assert ended.code == 0, ended.err
    for end in (".bin", ".idx"):
        assert (tmp_path / f"merged{end}").read_bytes() == (tmp_path / f"one{end}").read_bytes()
    ended = call_forked(*common, "--shards", tmp_path / "shards", "--unit-mb", "0.01")
    assert ended.code == 2
    assert re.search(
        r"wanted conversations as it was begun, --chat-key messages --turns apart with the .*, found --chat-", ended.err
    )
