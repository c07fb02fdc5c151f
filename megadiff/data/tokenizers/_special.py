"""Special tokens: the ids our own tokenizers pin, and the names to look for in those of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, read_json_object

BOS_ID, EOS_ID, PAD_ID, MASK_ID = 0, 1, 2, 3
"""Ids of every tokenizer trained here and of the byte tokenizer, as in the released GIDD checkpoints."""

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|padding|>", "<|mask|>")
"""Their names, in the order of those ids."""

MASK_NAMES = ("<|mask|>", "[MASK]", "<mask>", "<|mdm_mask|>", "<|MASK|>")
BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[CLS]")
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")
PAD_NAMES = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")

MAX_CONFIG_BYTES = 2**28
"""Size of a `tokenizer_config.json` that is read at most."""

SENTENCEPIECE_KEY = "made_from_sentencepiece"
"""Key of an exported `tokenizer_config.json` that names the SentencePiece model its `tokenizer.json` was made from."""


@dataclass(frozen=True)
class SpecialIds:
    """Special ids of a tokenizer and its V, the mask included."""

    vocab_size: int
    mask: int
    bos: int | None
    eos: int | None
    pad: int | None
    unknown: int | None = None
    """Id of text outside the vocabulary, where there is one; some files name this token for other jobs as well."""

    @property
    def all(self) -> frozenset[int]:
        """Every special id there is."""
        return frozenset(i for i in (self.mask, self.bos, self.eos, self.pad) if i is not None)

    @property
    def never_text(self) -> frozenset[int]:
        """Special ids that text must never yield: all but one that is the unknown token too."""
        return self.all - {self.unknown}


def find_special_ids(
    id_of: Callable[[str], int | None], num_live: int, declared: dict[str, str], *, unknown: int | None
) -> SpecialIds:
    """Look special tokens up by what the tokenizer's files say and by well-known names.

    Without a mask token the mask gets the first id past every live one, so it never takes a token from the text.

    Args:
        id_of: returns the id of a token's name; None where there is no such token.
        num_live: number one above the largest id.
        declared: names that the files give, such as `mask` -> `<mask>`.
        unknown: id of text outside the vocabulary, where there is one.
    """

    def first(kind: str, names: tuple[str, ...]) -> int | None:
        tried = (declared[kind], *names) if kind in declared else names
        return next((found for name in tried if (found := id_of(name)) is not None), None)

    mask = first("mask", MASK_NAMES)
    ids = {"bos": first("bos", BOS_NAMES), "eos": first("eos", EOS_NAMES), "pad": first("pad", PAD_NAMES)}
    if mask in (*ids.values(), unknown):  # some files name one token for several jobs; a mask must be nothing else
        mask = None
    if mask is None:
        return SpecialIds(vocab_size=num_live + 1, mask=num_live, unknown=unknown, **ids)
    return SpecialIds(vocab_size=num_live, mask=mask, unknown=unknown, **ids)


def split_until_plain(
    text: str, encode: Callable[[str], list[int]], special: frozenset[int], where: Callable[[str], int | None]
) -> list[int]:
    """Encode a text that spells a special token's name, in pieces cut inside that name, so that it stays text.

    Few tokenizers need this: those that hold `<mask>` or the like as an ordinary piece of their vocabulary.

    Args:
        where: the offset inside `text` to cut at, or None when the special id comes from no name that can be cut.

    Raises:
        DataError: there is nowhere to cut.
    """
    ids = encode(text)
    if special.isdisjoint(ids):
        return ids
    cut = where(text)
    if cut is None or not 0 < cut < len(text):
        raise DataError(
            f"the tokenizer turns the ordinary text {text[:40]!r} into a special token (one of {sorted(special)}); "
            "a diffusion model cannot tell it from a real one: use another tokenizer"
        )
    head = split_until_plain(text[:cut], encode, special, where)
    return head + split_until_plain(text[cut:], encode, special, where)


def model_behind(folder: Path) -> Path | None:
    """Return the SentencePiece model that a folder's `tokenizer.json` was made from, if it names one and has it."""
    try:
        named = read_json_object(folder / "tokenizer_config.json", max_bytes=MAX_CONFIG_BYTES).get(SENTENCEPIECE_KEY)
    except (OSError, UnreadableFileError):
        return None  # the fault of the file is reported where it is read for more than this
    model = folder / named if isinstance(named, str) and Path(named).name == named else None
    return model if model is not None and model.is_file() else None
