"""Conversations that share a sequence: where each goes, what its tokens are, and what is refused or warned of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megadiff.data.config import DataConfig
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.mixture import next_mixture
from megadiff.data.open import open_data
from megadiff.data.review import advice, describe_sources
from megadiff.data.sequences import OPEN_SEQUENCES, Padding, division_of, packed_sequences, padding_of
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.next_token import next_token_batch
from megadiff.errors import ConfigError
from megadiff.methods import refuse_packing
from megadiff.methods.gidd import Gidd
from megadiff.methods.next_token import NextToken
from megadiff.platform.quiet import quiet
from megadiff.report.data_page import describe_sequence
from megadiff.run.step_sequences import step_sequences
from tests.data.test_conversations import write_conversations
from tests.support.runs import toy_config

with quiet():
    from megadiff.run.check import check

EOS, PAD = 1, 2
PACKED = Padding(PAD, is_predicted=False, is_behind_several=True)
SPANS = [
    [[10, 11], [12, 13, 14]],  # 5 tokens: begins sequence 0
    [[20] * 9, [21]],  # nothing of its answer fits
    [[30], [31], [32], [33]],  # 4: begins sequence 1
    [[40, 41], [42]],  # 3: fills sequence 0 up
    [[50], [51] * 9],  # 10: is cut, and is sequence 2
    [[60], [61]],  # 2: joins sequence 1
    [[], [70, 71]],  # 2: fills sequence 1 up
    [[80], [81]],  # 2: begins sequence 3
]


def slow(lengths, capacity):
    """Return the sequence of each conversation by the rule as it is written, with a list of open sequences."""
    rooms, found, begun = {}, [], 0
    for length in lengths:
        fitting = [(room, sequence) for sequence, room in rooms.items() if room >= length]
        room, sequence = min(fitting, default=(capacity, begun))
        begun += sequence == begun
        found.append(sequence)
        rooms[sequence] = room - length
        rooms = {one: room for one, room in rooms.items() if room}
        if len(rooms) > OPEN_SEQUENCES:
            del rooms[min(rooms, key=lambda one: (rooms[one], one))]
    return found


@given(st.lists(st.integers(1, 40), min_size=1, max_size=300))
def test_every_conversation_joins_the_sequence_that_it_fills_best(lengths):
    found = packed_sequences(np.array(lengths), 40)
    assert found.tolist() == slow(lengths, 40)
    assert np.bincount(found, lengths).max() <= 40
    assert np.bincount(found).min() >= 1
    half = packed_sequences(np.array(lengths[: len(lengths) // 2]), 40)
    assert np.array_equal(half, found[: half.size])  # so a file may grow


@pytest.mark.parametrize("count", [33, 63, 64, 65, 200])
def test_no_more_sequences_than_allowed_wait_and_no_fewer(count):
    long = 1025 + np.random.default_rng(count).permutation(count)  # no two of them share a sequence
    short = np.random.default_rng(1).integers(1, 1000, 300)
    lengths = np.concatenate([long, short])
    found = packed_sequences(lengths, 2048)
    assert found[:count].tolist() == list(range(count))
    assert found.tolist() == slow(lengths.tolist(), 2048)
    fillers = packed_sequences(np.concatenate([long, 2048 - long]), 2048)[count:]
    assert (fillers < count).sum() >= min(count, OPEN_SEQUENCES)


def test_sequences_are_mostly_full_where_those_of_next_fit_are_not():
    lengths = np.random.default_rng(0).integers(1, 2049, 20_000)
    found = packed_sequences(lengths, 2048)
    assert lengths.sum() / (2048 * (found.max() + 1)) > 0.95


def test_packed_sequences_hold_whole_conversations_in_turn(tmp_path):
    division = division_of(write_conversations(tmp_path / "p", SPANS), 8, PACKED)
    assert (len(division), division.left_out, division.cut) == (4, 1, 1)
    rows = [
        ([10, 11, 12, 13, 14, 40, 41, 42], "..xxx..x", [0] * 5 + [1] * 3, [(0, 0), (5, 3)]),
        ([30, 31, 32, 33, 60, 61, 70, 71], ".x.x.xxx", [0] * 4 + [1] * 2 + [2] * 2, [(0, 2), (4, 5), (6, 6)]),
        ([50] + [51] * 7, ".xxxxxxx", [0] * 8, [(0, 4)]),
        ([80, 81] + [PAD] * 6, ".x......", [0] * 2 + [1] * 6, [(0, 7)]),
    ]
    for place, (tokens, predicted, documents, held) in enumerate(rows):
        assert division.tokens(place).tolist() == tokens
        assert "".join(".x"[int(one)] for one in division.predicted(place)) == predicted
        assert division.documents(place).tolist() == documents
        assert division.held(place) == held
        assert division.tokens(place).dtype == division.documents(place).dtype == np.int64
    assert [division.first_token(place) for place in range(4)] == [0, 15, 22, 36]
    assert division.filled == pytest.approx(26 / 32)


def many(count, seed=0):
    """Return conversations of which each is known by its first token and its length."""
    draw = np.random.default_rng(seed)
    return [[[4 + i], [200 + i % 50] * int(draw.integers(1, 8))] for i in range(count)]


def opened(prefix, **keys):
    config = DataConfig(**{"train": [str(prefix)], "tokenizer": "byte", "padding": "pad", "packing": True, **keys})
    return open_data(config, ByteTokenizer(), seq_length=8, seed=1, valid_sequences=4)


def conversations_in(data, samples):
    """Return the first token of each conversation in some samples' sequences; none is cut."""
    ids, documents, predicted = data.sequences(samples), data.documents(samples), data.predicted(samples)
    found = []
    for row, own, mask in zip(ids, documents, predicted, strict=True):
        starts = [0, *(np.flatnonzero(np.diff(own)) + 1)]
        found += [int(row[start]) for start in starts if row[start] != PAD]
        assert (mask == ((row != PAD) & ~np.isin(np.arange(8), starts))).all()
    return found


def test_an_epoch_holds_every_conversation_once(tmp_path):
    reader = write_conversations(tmp_path / "p", many(90))
    data = opened(tmp_path / "p")
    epoch = data.sources[0].sequences
    assert 90 * 2 <= reader.num_tokens <= 8 * epoch < 1.3 * reader.num_tokens
    for first in (0, epoch, 2 * epoch):
        assert sorted(conversations_in(data, range(first, first + epoch))) == list(range(4, 94))
    assert data.epochs_at(2 * epoch) == {"p": 2.0}


def test_text_beside_packed_conversations_is_one_document(tmp_path):
    write_conversations(tmp_path / "chat", many(20))
    with IndexedWriter(tmp_path / "text", vocab_size=260, mask_id=3) as writer:
        writer.add_document(np.full(160, 130))
        writer.finish(tokenizer=IndexedReader(tmp_path / "chat").manifest.tokenizer, source_bytes=1)
    data = opened(tmp_path / "chat", train=[str(tmp_path / "text"), str(tmp_path / "chat")])
    samples = range(sum(source.sequences for source in data.sources))
    ids, documents = data.sequences(samples), data.documents(samples)
    is_text = ids[:, 0] == 130
    assert is_text.sum() == 20
    assert not documents[is_text].any()
    assert sorted(conversations_in(data, np.flatnonzero(~is_text).tolist())) == list(range(4, 24))
    assert data.documents([int(np.flatnonzero(is_text)[0])]) is None or not is_text.all()
    assert data.packed_key == "data.train[1]"


def test_packing_is_another_mixture_and_begins_anew(tmp_path):
    write_conversations(tmp_path / "p", many(30))
    packed, plain = opened(tmp_path / "p"), opened(tmp_path / "p", packing=False)
    assert packed.fingerprint != plain.fingerprint
    assert plain.documents(range(4)) is None
    mixture = next_mixture(plain.mixture_at(10), packed.identities, first_sample=10)
    after = packed.continued(mixture)
    epoch = packed.sources[0].sequences
    assert sorted(conversations_in(after, range(10, 10 + epoch))) == list(range(4, 34))


def test_a_run_that_ends_packing_begins_anew_too(tmp_path):
    spans = [[[4 + i], [200] * 7] for i in range(3)] + [[[7], [201] * 3], [[8], [202] * 3]]  # the last two share one
    write_conversations(tmp_path / "p", spans)
    packed, plain = opened(tmp_path / "p"), opened(tmp_path / "p", packing=False)
    assert (len(packed.sources[0].division), len(plain.sources[0].division)) == (4, 5)
    mixture = next_mixture(packed.mixture_at(3), plain.identities, first_sample=3)
    assert not mixture.sources[0].parts
    assert sorted(row[0] for row in plain.continued(mixture).sequences(range(3, 8))) == [4, 5, 6, 7, 8]


def test_a_file_that_has_grown_goes_on_with_what_is_new(tmp_path):
    spans = many(120)
    write_conversations(tmp_path / "old", spans[:60])
    write_conversations(tmp_path / "new", spans)
    before, new = opened(tmp_path / "old"), opened(tmp_path / "new")
    drawn = conversations_in(before, range(5))
    mixture = next_mixture(before.mixture_at(5), new.identities, first_sample=5)
    assert mixture.sources[0].parts
    after = new.continued(mixture)
    rest = conversations_in(after, range(5, new.sources[0].sequences))
    assert set(drawn) | set(rest) >= set(range(4, 64))
    late = set(range(64, 124)) - set(rest)  # they filled up sequences that had been drawn
    assert len(late) <= 5
    assert len(set(rest) & set(drawn)) == 0


def test_the_start_of_a_run_tells_what_is_packed(tmp_path):
    write_conversations(tmp_path / "p", SPANS)
    data = opened(tmp_path / "p", valid=[str(tmp_path / "p")])
    wanted = "packing           data.train[0] (p): 7 conversations in 4 sequences, 1.75 in each; 18.75% of their tokens"
    assert any(line.startswith(wanted) for line in describe_sources(data, now=0, end=4))
    config = DataConfig(train=["p"], tokenizer="byte", padding="pad", packing=True)
    found = [str(one) for one in advice(data, config, end=9, length="", eval_sequences=4)]
    assert any("of 8 conversations 1 are cut at model.seq_length = 8, and 1 are left out" in line for line in found)
    assert any("is the same text as data.train[0]" in line for line in found)
    valid = data.valid[0]
    assert len(valid) == 4
    assert valid.documents(range(4)).tolist() == [
        [0] * 5 + [1] * 3,
        [0] * 4 + [1] * 2 + [2] * 2,
        [0] * 8,
        [0] * 2 + [1] * 6,
    ]


def test_packing_of_text_alone_is_warned_of(tmp_path):
    with IndexedWriter(tmp_path / "text", vocab_size=260, mask_id=3) as writer:
        writer.add_document(np.full(160, 130))
        writer.finish(
            tokenizer=IndexedReader(write_conversations(tmp_path / "p", SPANS).prefix).manifest.tokenizer,
            source_bytes=1,
        )
    data = opened(tmp_path / "text")
    config = DataConfig(train=["p"], tokenizer="byte", padding="pad", packing=True)
    found = [str(one) for one in advice(data, config, end=9, length="", eval_sequences=4)]
    assert sum(line.startswith("data.packing is true, but no source holds conversations") for line in found) == 1
    assert data.documents(range(4)) is None


def test_a_step_shows_the_borders_of_packed_conversations(tmp_path):
    write_conversations(tmp_path / "p", SPANS)
    config = toy_config(
        tmp_path / "p",
        tmp_path,
        model__seq_length=8,
        data__padding="pad",
        data__packing=True,
        data__valid=[],
        noise__shift="masked",
    )
    found = step_sequences(config, 1, sequences=4)
    shown = {sequence.origin.document: sequence for sequence in found.sequences}
    assert set(shown) == {0, 2, 4, 7}
    assert [token.document for token in shown[2].tokens] == [2] * 4 + [5] * 2 + [6] * 2
    assert [token.begins_document for token in shown[2].tokens] == [place in (0, 4, 6) for place in range(8)]
    assert [token.document for token in shown[7].tokens] == [7] * 2 + [None] * 6
    assert sum(token.begins_document for token in shown[7].tokens) == 1
    assert all(token.state == "given" for token in shown[7].tokens[2:])
    given = "".join(".x"[token.state != "given"] for token in shown[0].tokens)
    assert given == "..xxx..x"
    lines = describe_sequence(shown[2], is_shifted=False, with_table=True)
    assert any(line.split()[:5] == ["documents", "3,", "of", "which", "3"] for line in lines)
    assert [sum(f" ¶{document} " in line for line in lines) for document in (2, 5, 6)] == [1, 1, 1]
    fill = describe_sequence(shown[7], is_shifted=False, with_table=True)
    assert any(line.split()[:5] == ["documents", "1,", "of", "which", "1"] for line in fill)


def test_next_tokens_are_predicted_within_their_document():
    clean = np.array([[10, 11, 12, 20, 21, 30]])
    documents = np.array([[0, 0, 0, 1, 1, 2]])
    batch = next_token_batch(clean, start_id=9, predicted=np.ones((1, 6), dtype=bool), documents=documents)
    assert batch.noised.tolist() == [[9, 10, 11, 9, 20, 9]]
    assert batch.clean.tolist() == clean.tolist()
    assert batch.documents.tolist() == documents.tolist()


def test_what_packing_cannot_do_is_refused(tmp_path):
    with pytest.raises(
        ValidationError, match=r"data.padding is predicted_eos, which fills each conversation up to model"
    ):
        DataConfig(train=["p"], tokenizer="byte", padding="predicted_eos", packing=True)
    write_conversations(tmp_path / "p", SPANS)
    settings = {"model__seq_length": 8, "data__padding": "eos", "data__packing": True, "data__valid": []}
    prompts = {"conditioning__prompt": 0.25, "conditioning__prompt_attention": "causal"}
    with pytest.raises(
        ValidationError, match=r"conditioning.prompt is 0.25 with prompt_attention causal, but data.packing"
    ):
        toy_config(tmp_path / "p", tmp_path, **settings, **prompts)
    assert "packing           data.train[0] (p)" in check(toy_config(tmp_path / "p", tmp_path, **settings))

    class OneDocument(Gidd):
        def batch(self, clean, sample_index, step_batch, predicted=None):
            raise NotImplementedError

    sentence = (
        r"data.packing puts several conversations of data.train\[0\] in a sequence, but the method OneDocument has no"
    )
    with pytest.raises(ConfigError, match=sentence):
        refuse_packing(OneDocument.__new__(OneDocument), "data.train[0]")
    for known in (Gidd, NextToken):
        refuse_packing(known.__new__(known), "data.train[0]")
    assert padding_of("eos", ByteTokenizer(), packing=True) == (EOS, False, True)
