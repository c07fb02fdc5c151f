"""Conversations from a corpus to indexed data, and their sequences; what cannot be used is refused in a sentence."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from megadiff.data.config import DataConfig
from megadiff.data.conversations import ConversationOptions, chat_options, chat_prompt, encoder_of
from megadiff.data.documents import Corpus
from megadiff.data.indexed_format import read_manifest, tokenizer_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.mixture import next_mixture
from megadiff.data.open import open_data
from megadiff.data.preprocess import DocumentMarkers, preprocess
from megadiff.data.review import advice, validation_facts
from megadiff.data.sequences import Padding, division_of, padding_of
from megadiff.data.source_statistics import excerpts, statistics_of
from megadiff.data.tokenizers import load_tokenizer
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.config import ConditioningConfig, noise_config
from megadiff.diffusion.noise_process import build_process
from megadiff.diffusion.noising import noise_batch, with_given
from megadiff.errors import ConfigError, DataError
from megadiff.methods import refuse_conversations
from megadiff.methods.adaptation import Adaptation
from megadiff.methods.gidd import Gidd
from megadiff.run.check import check
from megadiff.run.step_sequences import step_sequences
from tests.data.test_chat_template import CASES, SECOND, SYSTEM, TURN, write_tokenizer
from tests.support.forked_command import call_forked
from tests.support.runs import toy_config

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


def opened(config, *, seed=1):
    """Return the data of a run of 8 tokens a sequence."""
    return open_data(
        DataConfig(tokenizer="byte", **config), ByteTokenizer(), seq_length=8, seed=seed, valid_sequences=4
    )


def test_conversations_and_text_mix(tmp_path):
    write_conversations(tmp_path / "chat", [[[10 + i], [50 + i]] for i in range(6)])
    with IndexedWriter(tmp_path / "text", vocab_size=260, mask_id=3) as writer:
        writer.add_documents(np.full(48, 200), [48])
        writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=1)
    chat, text = (str(tmp_path / name) for name in ("chat", "text"))
    data = opened({"train": [chat, text], "valid": [chat], "padding": "pad"})
    assert data.conversations_key == "data.train[0]"
    clean, predicted = data.sequences(range(12)), data.predicted(range(12))
    is_chat = clean[:, 0] < 100
    assert is_chat.sum() == 6  # one epoch of both
    assert sorted(clean[is_chat, 0]) == [10, 11, 12, 13, 14, 15]
    assert (clean[is_chat, 2:] == PAD).all()
    assert (predicted[is_chat] == (np.arange(8) == 1)).all()
    assert predicted[~is_chat].all()
    assert opened({"train": [text]}).predicted(range(4)) is None
    valid = data.valid[0]
    assert (valid.predicted(range(4)) == (np.arange(8) == 1)).all()
    assert valid.bytes_per_token is None
    with pytest.raises(DataError, match=r"data.padding, which fills"):
        opened({"train": [text], "valid": [chat]})


def test_another_padding_is_another_mixture(tmp_path):
    write_conversations(tmp_path / "p", SPANS)
    prints = {name: opened({"train": [str(tmp_path / "p")], "padding": name}).fingerprint for name in ("eos", "pad")}
    assert prints["eos"] != prints["pad"]
    assert prints["eos"] == opened({"train": [str(tmp_path / "p")], "padding": "eos"}).fingerprint


def test_what_is_cut_is_said(tmp_path):
    write_conversations(tmp_path / "p", SPANS)
    data = opened({"train": [str(tmp_path / "p")], "valid": [str(tmp_path / "p")], "padding": "eos"})
    found = [
        str(one) for one in advice(data, DataConfig(train=["p"], tokenizer="byte"), end=9, length="", eval_sequences=4)
    ]
    wanted = "data.train[0] (p): of 5 conversations 1 are cut at model.seq_length = 8, and 1 are left out, since all of"
    assert any(line.startswith(wanted) for line in found), found
    assert validation_facts(data)[0].measured_tokens == 2 + 4 + 1 + 2


def test_conversations_that_were_added_come_before_a_repeat(tmp_path):
    """A file of conversations that has grown goes on as grown text does, also behind one that is left out."""
    spans = [[[10 + i], [50 + i]] for i in range(6)]
    write_conversations(tmp_path / "old", [*spans, SPANS[1]])
    write_conversations(tmp_path / "new", [*spans, SPANS[1], *([[30 + i], [70 + i]] for i in range(4))])
    before = opened({"train": [str(tmp_path / "old")], "padding": "eos"})
    drawn = [int(ids[0]) for ids in before.sequences(range(4))]
    after = opened({"train": [str(tmp_path / "new")], "padding": "eos"})
    mixture = next_mixture(before.mixture_at(4), after.identities, first_sample=4)
    assert mixture.sources[0].parts
    grown = after.continued(mixture)
    drawn += [int(ids[0]) for ids in grown.sequences(range(4, 10))]
    assert sorted(drawn) == [*range(10, 16), *range(30, 34)]
    assert (grown.predicted(range(4, 10)) == (np.arange(8) == 1)).all()


def test_statistics_and_excerpts_mark_the_answers(tmp_path):
    byte = ByteTokenizer()
    reader = write_conversations(tmp_path / "p", [[byte.encode("Hi?"), byte.encode("Yo."), byte.encode("Ha"), [EOS]]])
    (found,) = excerpts(reader, [0], tokens=100, tokenizer=byte)
    assert found.text == "«Hi?»Yo.«Ha»⟨eos⟩"
    assert excerpts(reader, [0], tokens=2, tokenizer=byte)[0].text == "«Hi»"
    (figures,) = statistics_of([reader])
    assert figures.answer_tokens == 4


def test_a_step_shows_what_is_given(tmp_path):
    write_conversations(tmp_path / "p", SPANS)
    config = toy_config(
        tmp_path / "p", tmp_path, model__seq_length=8, data__padding="eos", data__valid=[], noise__shift="masked"
    )
    wanted = {0: "..xx....", 2: ".x.xxx..", 3: "x.......", 4: "......xx"}  # by document; the second is left out
    shown = step_sequences(config, 1, sequences=0).sequences
    assert {sequence.origin.document for sequence in shown} == set(wanted)
    for sequence in shown:
        given = "".join(".x"[token.state != "given"] for token in sequence.tokens)
        assert given == wanted[sequence.origin.document]
        assert {token.document for token in sequence.tokens} == {sequence.origin.document}
        assert all(token.weight == 0 for token in sequence.tokens if token.state == "given")


def test_a_message_or_a_prompt_is_generated_from(tmp_path):
    for words, sentence in (
        (
            ("--message", "a", "--prompt", "b"),
            "--message makes a prompt, and --prompt is one already; give one of them",
        ),
        (("--chat-template", "f"), "--chat-template has no meaning without --message; give that too"),
    ):
        ended = call_forked("tools/generate.py", "--model", tmp_path, *words)
        assert (ended.code, sentence in ended.err) == (2, True), ended.err


def test_a_message_becomes_the_prompt_of_training(tokenizer):
    options = chat_options(tokenizer, "messages")
    found = chat_prompt(load_tokenizer(tokenizer), options, TURN[0]["content"])
    whole = next(
        encoder_of(load_tokenizer(tokenizer), options, prepend_bos=False, append_eod=False).encode(json.dumps([TURN]))
    )
    assert found == [token for token, is_answer in zip(*whole[:2], strict=True) if not is_answer]
    with pytest.raises(DataError, match="message 1 spells the special token"):
        chat_prompt(load_tokenizer(tokenizer), options, "<|im_end|>")


def test_a_method_that_knows_only_text_is_refused():
    class OnlyText(Gidd):
        def batch(self, clean, sample_index, step_batch):
            raise NotImplementedError

    with pytest.raises(ConfigError, match=r"data.train\[0\] holds conversations, but the method OnlyText has no"):
        refuse_conversations(OnlyText.__new__(OnlyText), "data.train[0]")
    with pytest.raises(ConfigError, match=r"data.train\[0\] holds conversations, but method.name is adaptation, which"):
        refuse_conversations(Adaptation.__new__(Adaptation), "data.train[0]")
    refuse_conversations(Gidd.__new__(Gidd), "data.train[0]")


def test_check_refuses_such_a_method_as_a_run_would(tmp_path):
    write_conversations(tmp_path / "p", SPANS)
    settings = {"model__seq_length": 8, "data__padding": "eos", "data__valid": []}
    with pytest.raises(ConfigError, match=r"data.train\[0\] holds conversations, but method.name is adaptation"):
        check(toy_config(tmp_path / "p", tmp_path, method__name="adaptation", **settings))
    assert "tokenizer " in check(toy_config(tmp_path / "p", tmp_path, **settings))


@pytest.mark.parametrize("shift", ["masked", "balanced", "uniform"])
def test_given_tokens_are_clean_and_the_others_noised_as_in_text(shift):
    process = build_process(noise_config(shift=shift), vocab_size=260, mask_id=3)
    clean = np.random.default_rng(0).integers(4, 260, (16, 32))
    predicted = np.random.default_rng(1).random(clean.shape) < 0.5
    conditioning = ConditioningConfig(pad_insertion=0.3, infilling=0.3)
    text = noise_batch(
        clean, seed=1, sample_index=np.arange(16), process=process, conditioning=conditioning, pad_id=PAD
    )
    found = with_given(text, predicted, process)
    for row in range(16):
        for place in range(32):
            is_answer = predicted[row, int(text.source[row, place])]
            assert bool(found.is_noisy[row, place]) == (is_answer and bool(text.is_noisy[row, place]))
            wanted = text.noised if found.is_noisy[row, place] else text.clean
            assert found.noised[row, place] == wanted[row, place]
            level = text.log_snr[row, place] if found.is_noisy[row, place] else process.schedule.max_log_snr
            assert found.log_snr[row, place] == level


def test_padding_needs_its_token():
    byte = ByteTokenizer()
    assert padding_of(None, byte) is None
    found = [padding_of(name, byte) for name in ("predicted_eos", "eos", "pad")]
    assert found == [(1, True, False), (1, False, False), (2, False, False)]
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
