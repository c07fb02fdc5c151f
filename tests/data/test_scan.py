"""The full scan and its command: every finding with its place, and no finding where there is none."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

from megadiff.data import indexed_format
from megadiff.data.indexed_format import HEADER, tokenizer_facts
from megadiff.data.scan import MAX_LISTED, scan
from megadiff.data.tokenizers.byte import ByteTokenizer
from tests.data.corpora import random_documents, write_indexed
from tests.data.test_indexed_reader import patched
from tests.support.commands import call
from tests.support.forked_command import call_forked

BYTE = tokenizer_facts(ByteTokenizer())
DOCUMENTS = [[5, 6], [7], [8, 9, 10], [11, 12]]


def said(found):
    return [str(finding) for finding in found.findings]


def without_manifest(prefix):
    os.remove(f"{prefix}.json")
    return prefix


@pytest.mark.parametrize("workers", [1, 3])
def test_good_data_have_no_finding_and_their_numbers(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(indexed_format, "CHUNK", 50)
    documents = random_documents(60)
    prefix = write_indexed(tmp_path / "p", documents)
    done = []
    found = scan(prefix, tokenizer=BYTE, workers=workers, progress=done.append)
    assert said(found) == []
    assert (found.documents, found.tokens, found.dtype) == (60, sum(map(len, documents)), "uint16")
    assert (found.hashes, found.errors, found.empty_documents, found.padding_tokens) == ("match", 0, 0, 0)
    assert found.bytes == sum(os.path.getsize(f"{prefix}{kind}") for kind in (".bin", ".idx"))
    assert done == sorted(done)
    assert done[-1] == os.path.getsize(f"{prefix}.bin")


@pytest.mark.parametrize(
    ("token", "what"), [(300, r"300 \(wanted 0 to 259\)"), (3, r"3 \(the mask id\)"), (65535, r"65535 \(wanted")]
)
def test_a_wrong_token_has_document_position_byte_and_remedy(tmp_path, token, what):
    prefix = write_indexed(tmp_path / "p", DOCUMENTS)
    patched(tmp_path / "p.bin", 2 * 4, token.to_bytes(2, "little"))
    found = scan(prefix)
    place = r"p\.bin: document 2, position 1, byte 8: the token id "
    assert re.search(place + what + r".*; preprocess the corpus with the run's tokenizer", said(found)[0])
    assert re.search(r"p\.bin: changed since it was written: wanted SHA-256 [0-9a-f]{64}, found", said(found)[1])
    assert (found.errors, found.hashes) == (2, "differ")


def test_many_wrong_tokens_are_counted_and_the_first_of_them_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_format, "CHUNK", 7)
    prefix = without_manifest(write_indexed(tmp_path / "p", [[500]] * 100, vocab_size=600))
    found = scan(prefix, tokenizer=BYTE)
    assert len([finding for finding in found.findings if finding.is_error]) == MAX_LISTED
    assert (found.errors, found.wrong_tokens, found.unlisted) == (100, 100, 100 - MAX_LISTED)
    assert [int(re.search(r"document (\d+)", line)[1]) for line in said(found)[1:]] == list(range(MAX_LISTED))


def test_a_changed_token_that_is_a_right_one_is_found_by_the_hash_alone(tmp_path):
    prefix = write_indexed(tmp_path / "p", DOCUMENTS)
    patched(tmp_path / "p.bin", 2, b"\x07")
    found = scan(prefix)
    assert re.fullmatch(r"error: .*p\.bin: changed since .*; copy or preprocess the data again", said(found)[0])
    assert len(said(found)) == 1


def test_consistent_changes_to_lengths_and_pointers_fail_the_index_hash(tmp_path):
    """Nothing else can tell: sizes, sums and order all agree."""
    prefix = write_indexed(tmp_path / "p", DOCUMENTS)
    lengths = np.array([1, 2, 3, 2])
    pointers = 2 * np.array([0, 1, 3, 6])
    content = lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes()
    patched(tmp_path / "p.idx", HEADER.size, content)
    assert re.search(r"p\.idx: changed since it was written", said(scan(prefix))[0])
    manifest = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**manifest, "version": 1, "idx_sha256": None}))
    assert scan(prefix).hashes == "match"


def test_structural_damage_is_a_finding_and_not_an_exception(tmp_path):
    prefix = write_indexed(tmp_path / "p", DOCUMENTS)
    os.truncate(tmp_path / "p.bin", 7)
    found = scan(prefix)
    assert said(found) == [
        f"error: {tmp_path}/p.bin: wanted 16 bytes, found 7; the file is cut short: copy or preprocess the data again"
    ]
    assert scan(tmp_path / "nothing").errors == 1


def test_padding_and_empty_documents_are_notes(tmp_path):
    prefix = without_manifest(write_indexed(tmp_path / "p", [[5, 2, 2], [2], [6]]))
    patched(tmp_path / "p.idx", HEADER.size + 12 * 3 + 8, (2).to_bytes(8, "little"))
    found = scan(prefix, tokenizer=BYTE)
    assert (found.errors, found.empty_documents, found.padding_tokens) == (0, 1, 3)
    lines = said(found)
    assert "there is no manifest, so no hashes to compare" in lines[0]
    assert "p.idx: document 1: no tokens (1 empty document(s) in all)" in lines[1]
    assert "p.bin: document 0, position 1, byte 2: the padding id" in lines[2]
    assert all(line.startswith("note: ") for line in lines)


def test_data_of_another_tokenizer_are_an_error_with_both_hashes(tmp_path):
    prefix = write_indexed(tmp_path / "p", DOCUMENTS)
    other = BYTE.model_copy(update={"fingerprint": "f" * 64, "name": "mine"})
    (line,) = said(scan(prefix, tokenizer=other))
    assert f"made with tokenizer byte ({BYTE.fingerprint[:12]}), not mine ({'f' * 12});" in line


def test_the_command_prints_a_table_findings_and_a_verdict(tmp_path):
    good, bad = write_indexed(tmp_path / "good [red]", DOCUMENTS), write_indexed(tmp_path / "bad", [[5, 6]] * 1000)
    code, out, err = call("tools/check_data.py", good, "--tokenizer", "byte", "--workers", "2")
    assert (code, err) == (0, "")
    assert re.search(r"│ .*good \[red\] +│ +4 │ +0 │ +8 │ +0 │ uint16 │ +138 │ match +│ +0 │", out), out
    assert out.splitlines()[-1] == "ok: 1 prefix(es), 8 tokens, no errors, 0 note(s)"

    patched(tmp_path / "bad.bin", 0, b"\x03\x00" * 100)
    code, out, err = call_forked("tools/check_data.py", good, bad)
    assert code == 2
    assert "error: " + str(bad) + ".bin: document 0, position 0, byte 0: the token id 3 (the mask id)" in out
    assert f"error: {bad}.bin: 90 more wrong tokens are not listed" in out
    assert err == f"error: 101 error(s) in 1 of 2 prefix(es), not to be trained on: {bad}\n"


def test_the_command_refuses_what_it_cannot_read_in_a_sentence(tmp_path):
    code, out, err = call_forked("tools/check_data.py", tmp_path / "nothing")
    assert code == 2
    assert "nothing: no indexed data; wanted" in out
    assert len(err.splitlines()) == 1
    code, out, err = call_forked("tools/check_data.py", "x", "--tokenizer", tmp_path / "no")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
