"""The contract of a tokenizer: text never yields a special id, and an export gives the ids of training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers

from megadiff.data.tokenizers import Tokenizer, WrongIdsError, load_tokenizer
from megadiff.errors import DataError

TEXTS = (
    "",
    "Once upon a time, there were 12345 cats.",
    "lines\n\n\n\tand tabs\n",
    "née über naïve e\u0301 \ufb01 \U0001f600\u200d\U0001f525 日本語 العربية",
    "def f(x):\n    return x[3] - {'a': 1.5e-3}  # -------- ========",
    "a" * 300,
    "<s></s><pad><unk><mask> [MASK][CLS][SEP][PAD][UNK] <|endoftext|> <|mask|>",
)
"""Texts in which tokenizers differ; the names of a tokenizer's own special tokens come on top."""


def check_tokenizer(path: str | Path, *, texts: Sequence[str] = (), is_lossless: bool = False) -> None:
    """Check a tokenizer of the family, or of the user's own.

    Checked are: it is the same each time it is loaded; ids lie in [0, V), and no text yields a special id, not even
    one that spells a special token's name; batches and pieces give the ids of `encode`; any ids decode, special ones
    to nothing; and what it exports gives the same ids, read by the `tokenizers` library and, if it is installed, by
    Transformers, with bos before a text exactly where training had it. A tokenizer that cannot be exported must refuse
    before it writes anything.

    Args:
        path: a value of `data.tokenizer`.
        texts: further texts.
        is_lossless: whether every text decodes to itself, apart from Unicode normalisation in the tokenizer.

    Raises:
        DataError: it cannot be loaded, or gives a text a wrong id.
        AssertionError: another part of the contract does not hold; the sentence names the text.
    """
    tokenizer, again = load_tokenizer(path), load_tokenizer(path)
    name = tokenizer.name
    assert re.fullmatch("[0-9a-f]{64}", tokenizer.fingerprint), (
        f"{name}: `fingerprint` must be a SHA-256 in hexadecimal"
    )
    assert tokenizer.fingerprint == again.fingerprint, f"{name}: another fingerprint each time it is loaded"
    specials = _specials(tokenizer)
    assert all(0 <= i < tokenizer.vocab_size for i in specials), f"{name}: a special id is not below vocab_size"
    assert tokenizer.mask_id not in specials[1:], f"{name}: the mask's id is another special token's as well"
    names = list(tokenizer.special_names)
    tried = dict.fromkeys([*TEXTS, *texts, *names, *(f"The {name} cat{name}{name} sat" for name in names)])
    ids = dict(_encoded(tokenizer, again, tried, is_lossless=is_lossless))
    _check_decoding(tokenizer)
    for prepend_bos in (False, True) if tokenizer.bos_id is not None else (False,):
        _check_export(tokenizer, ids, prepend_bos=prepend_bos)


def _specials(tokenizer: Tokenizer) -> list[int]:
    """Return the special ids, the mask's first."""
    return [i for i in (tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if i is not None]


def _encoded(
    tokenizer: Tokenizer, again: Tokenizer, texts: Iterable[str], *, is_lossless: bool
) -> Iterable[tuple[str, list[int]]]:
    """Yield each text with its ids, leaving out texts that the tokenizer refuses."""
    forbidden = {tokenizer.mask_id}  # bos, eos and pad may be the unknown token's id too
    for text in texts:
        try:
            ids = tokenizer.encode(text)
        except WrongIdsError:
            raise
        except DataError:
            continue  # such a text cannot be in the training data either
        what = f"{tokenizer.name}: {text[:60]!r}"
        assert all(0 <= i < tokenizer.vocab_size for i in ids), f"{what} has ids that are not below vocab_size: {ids}"
        assert forbidden.isdisjoint(ids), f"{what} yields the mask: {ids}"
        assert ids == again.encode(text), f"{what} has other ids when the tokenizer is loaded again"
        assert [ids, ids] == tokenizer.encode_batch([text, text]), f"{what} has other ids in a batch"
        pieces = [i for piece in tokenizer.encode_pieces(text) for i in piece]
        assert ids == pieces, f"{what} has other ids in pieces"
        decoded = tokenizer.decode(ids)
        assert isinstance(decoded, str), f"{what} decodes to a {type(decoded).__name__}"
        assert not is_lossless or decoded == text, f"{what} decodes to {decoded[:60]!r}"
        yield text, ids


def _check_decoding(tokenizer: Tokenizer) -> None:
    everything = list(range(tokenizer.vocab_size))[:1000]
    assert isinstance(tokenizer.decode(everything), str), f"{tokenizer.name}: ids do not decode to text"
    assert tokenizer.decode(_specials(tokenizer)) == "", f"{tokenizer.name}: special ids decode to text"


def _check_export(tokenizer: Tokenizer, ids: dict[str, list[int]], *, prepend_bos: bool) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            written = tokenizer.export(folder, seq_length=512, prepend_bos=prepend_bos)
        except DataError:
            left = [path.name for path in folder.iterdir()]
            assert not left, f"{tokenizer.name}: `export` refuses and has written {', '.join(left)}"
            assert tokenizer.export_limits is not None, f"{tokenizer.name}: `export` refuses; say so in `export_limits`"
            return
        there = sorted(path.name for path in folder.iterdir())
        assert sorted(written) == there, f"{tokenizer.name}: `export` returns {sorted(written)} and writes {there}"
        if tokenizer.export_limits is not None:
            return
        assert "tokenizer.json" in there, (
            f"{tokenizer.name}: `export` writes no tokenizer.json; say so in `export_limits`"
        )
        start = [tokenizer.bos_id] if prepend_bos else []
        wanted = {text: [*start, *found] for text, found in ids.items()}
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.encode_special_tokens = True
        _compare(tokenizer, "the tokenizers library", wanted, {text: library.encode(text).ids for text in wanted})
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config.get("split_special_tokens") is True, f"{tokenizer.name}: split_special_tokens must be true"
        if find_spec("transformers") is None:
            return
        from transformers import PreTrainedTokenizerFast

        theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        _compare(tokenizer, "Transformers", wanted, {text: theirs(text).input_ids for text in wanted})
        for kind in ("mask", "bos", "eos", "pad"):
            ours, found = getattr(tokenizer, f"{kind}_id"), getattr(theirs, f"{kind}_token_id")
            assert ours == found, f"{tokenizer.name}: the id of {kind} is {ours}, and {found} in Transformers"


def _compare(tokenizer: Tokenizer, reader: str, wanted: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    for text, ids in wanted.items():
        what = f"{tokenizer.name}: {text[:60]!r} has the ids {ids[:12]}"
        assert found[text] == ids, f"{what}, and {found[text][:12]} from its export in {reader}"
