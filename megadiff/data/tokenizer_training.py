"""Training of a tokenizer on a corpus: byte-level BPE or SentencePiece, special tokens at ids 0 to 3.

Both reproduce every text they encode: BPE in Unicode's NFC form, SentencePiece except for U+2581, its symbol for a
space. The BPE follows the GIDD tokenizer of arXiv:2512.10858 (NFC, GPT-4-like split with numbers cut into 1 to 3
digits) except that it puts no space before a pre-token, which is why the released one needs a repair after decoding.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megadiff.data.tokenizers import Tokenizer, load_tokenizer
from megadiff.data.tokenizers._special import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_TOKENS
from megadiff.errors import DataError

MIN_BPE_VOCABULARY = len(SPECIAL_TOKENS) + 256
"""Number of special tokens and bytes; merges come on top."""

MIN_SENTENCEPIECE_VOCABULARY = len(SPECIAL_TOKENS) + 1 + 256
"""Number of special tokens, the unknown piece and bytes; the corpus's pieces come on top."""

TYPES = ("bpe", "sentencepiece", "sentencepiece-bpe")
"""Types that `train_tokenizer` can train; `sentencepiece` is its unigram model."""

_UNKNOWN_ID = 4  # SentencePiece requires an unknown piece; with byte fallback no text yields it
_UNKNOWN_PIECE = "<|unknown|>"
_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_SENTENCE_BYTES = 4192  # SentencePiece's own limit: it ignores longer ones, so they are cut before


def train_tokenizer(
    documents: Iterable[str], output: Path, *, kind: str, vocab_size: int, progress: bool = False
) -> Tokenizer:
    """Train, write into the new folder `output` by one rename, and load the result.

    Args:
        documents: texts, read once.
        output: a folder that does not exist or is empty.
        kind: one of `TYPES`.
        vocab_size: V to reach exactly, including the four special tokens.
        progress: show the BPE trainer's progress bars on stderr.

    Raises:
        DataError: the folder is not empty, or this corpus cannot yield this vocabulary.
    """
    _refuse_output(output)
    if kind == "bpe":
        files = _train_bpe(documents, vocab_size, progress)
    elif kind in TYPES:
        model_type = "bpe" if kind.endswith("bpe") else "unigram"
        files = _train_sentencepiece(documents, vocab_size, model_type)
    else:
        raise DataError(f"--type must be one of {', '.join(TYPES)}; found `{kind}`")
    _write_folder(output, files)
    return load_tokenizer(output)


def _train_bpe(documents: Iterable[str], vocab_size: int, progress: bool) -> dict[str, bytes]:
    _refuse_small(vocab_size, MIN_BPE_VOCABULARY, "four special tokens and 256 bytes")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    inner.train_from_iterator(_counted(documents), trainer)
    reached = inner.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"the corpus gives a vocabulary of {reached} at most, wanted {vocab_size}; "
            f"give more text or --vocab-size {reached}"
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for kind, token in zip(("bos", "eos", "pad", "mask"), SPECIAL_TOKENS, strict=True):
        config[f"{kind}_token"] = token
    return {
        "tokenizer.json": inner.to_str(pretty=True).encode("utf-8"),
        "tokenizer_config.json": json.dumps(config, indent=2).encode("utf-8"),
    }


def _train_sentencepiece(documents: Iterable[str], vocab_size: int, model_type: str) -> dict[str, bytes]:
    _refuse_small(vocab_size, MIN_SENTENCEPIECE_VOCABULARY, "four special tokens, the unknown piece and 256 bytes")
    bos, eos, pad, mask = SPECIAL_TOKENS
    model = io.BytesIO()
    failures: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_remembering(_sentences(_counted(documents)), failures),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            unk_id=_UNKNOWN_ID,
            bos_piece=bos,
            eos_piece=eos,
            pad_piece=pad,
            unk_piece=_UNKNOWN_PIECE,
            control_symbols=[mask],  # control: no text yields it; it takes the one free id below the unknown's
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=1,  # several threads give a different model each time
            minloglevel=2,
        )
    except RuntimeError as error:
        raise (failures[0] if failures else _sentencepiece_refusal(error, vocab_size)) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert processor.piece_to_id(mask) == MASK_ID, "SentencePiece no longer fills free ids with control symbols"
    return {"tokenizer.model": model.getvalue()}


def _sentencepiece_refusal(error: RuntimeError, vocab_size: int) -> DataError:
    """Return the error for a failed training; only the bound is kept of SentencePiece's own message."""
    text = str(error)
    if high := re.search(r"value <= (\d+)", text):
        bound = high.group(1)
        ending = f"give more text or --vocab-size {bound}"
        return DataError(f"the corpus gives a vocabulary of {bound} at most, wanted {vocab_size}; {ending}")
    if low := re.search(r"required_chars\. \d+ vs (\d+)", text):
        bound = low.group(1)
        ending = f"give --vocab-size {bound} or more"
        return DataError(f"the corpus's characters alone need a vocabulary of {bound}, wanted {vocab_size}; {ending}")
    return DataError(f"SentencePiece could not train on this corpus ({text.strip()}); give other text or --type bpe")


def _counted(documents: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in documents:
        empty = False
        yield text
    if empty:
        raise DataError("the corpus holds no text to train a tokenizer on; check --input and --json-key")


def _remembering(sentences: Iterator[str], failures: list[BaseException]) -> Iterator[str]:
    """Record the corpus's exception: the C++ library passes on only its text, in an error of its own."""
    try:
        yield from sentences
    except (Exception, KeyboardInterrupt) as error:
        failures.append(error)
        raise


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Yield lines, cut if they are too long; the newline itself is left to byte fallback."""
    longest = _MAX_SENTENCE_BYTES // 4  # characters; UTF-8 takes at most 4 bytes each
    for text in documents:
        for line in text.split("\n"):
            for start in range(0, len(line), longest):
                yield line[start : start + longest]


def _refuse_small(vocab_size: int, minimum: int, what: str) -> None:
    if vocab_size < minimum:
        raise DataError(f"--vocab-size must be at least {minimum} ({what}), found {vocab_size}; give a larger one")


def _refuse_output(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise DataError(f"{output}: wanted a new or empty folder, found something there; choose another --output")


def _write_folder(output: Path, files: dict[str, bytes]) -> None:
    """Write under a temporary name beside the folder, then rename: a reader finds all of it or nothing."""
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        temporary.mkdir(parents=True)
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, output)  # replaces an empty folder too
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
