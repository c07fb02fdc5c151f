"""A SentencePiece `*.model` file, alone or the only one in its folder, and as a `tokenizer.json`.

The `tokenizer.json` follows the model's own settings: character map, extra white space, dummy prefix, byte fallback,
user-defined pieces. Source: `SpmConverter.build_tokenizer_from_spm_proto` of transformers 5.24. Where several
segmentations of a text are equally good (runs of one character), the two libraries may choose differently.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megadiff.data.tokenizers._pipeline import Pipeline
from megadiff.data.tokenizers._special import SpecialIds, find_special_ids, model_behind, split_until_plain
from megadiff.data.transformers_tokenizer import keep_templates, write_transformers_tokenizer
from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, read_bytes

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"


def definition_of(model: bytes, *, mask: int) -> dict[str, Any] | None:
    """Return the content of a `tokenizer.json` with the ids of a model's pieces; None for a model without such a form.

    Args:
        model: content of the `.model` file.
        mask: id of the mask, which text never yields even where the model defines it as a symbol of text.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
        return None
    if not normalizer.escape_whitespaces or len({piece.piece for piece in proto.pieces}) < len(proto.pieces):
        return None
    symbols = [piece.piece for i, piece in enumerate(proto.pieces) if piece.type == _USER_DEFINED and i != mask]
    inner = Tokenizer(_unigram(proto) if trainer.model_type == _UNIGRAM else _bpe(proto, has_symbols=bool(symbols)))
    inner.normalizer = _normalizer(normalizer)  # pyright: ignore[reportAttributeAccessIssue]
    steps: list[Any] = []
    if normalizer.add_dummy_prefix:
        steps.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False))
    if symbols:
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    finds_names = trainer.model_type == _UNIGRAM or bool(symbols)  # merges alone never lead to such a piece
    if finds_names and (pattern := _never_text(proto, mask)):
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if steps:
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = _decoder(trainer.byte_fallback, normalizer.add_dummy_prefix)  # pyright: ignore[reportAttributeAccessIssue]
    hidden = [piece.piece for i, piece in enumerate(proto.pieces) if piece.type in (_UNKNOWN, _CONTROL) or i == mask]
    inner.add_tokens([AddedToken(name, normalized=False, special=True) for name in hidden])
    return json.loads(inner.to_str())


def _unigram(proto: Any) -> models.Unigram:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(pieces, unk_id=_unknown(proto), byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any, *, has_symbols: bool) -> models.BPE:
    normal = {piece.piece: (-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    ranked = sorted(
        (*rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    )
    return models.BPE(
        vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
        merges=[(left, right) for *_, left, right in ranked],
        unk_token=proto.pieces[_unknown(proto)].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        ignore_merges=has_symbols,
    )


def _unknown(proto: Any) -> int:
    return next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # spaces alone count
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix:  # Metaspace would leave the prefix out before a text that begins with the sign
        steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}"), 2 * _SPACE))
    return normalizers.Sequence(steps)


def _decoder(byte_fallback: bool, has_prefix: bool) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(_SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if has_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def _never_text(proto: Any, mask: int) -> str:
    """Return a pattern that cuts the names of pieces which stand for no text of their own where a text spells them."""
    kinds = (_UNKNOWN, _CONTROL, _UNUSED)
    names = [piece.piece for i, piece in enumerate(proto.pieces) if piece.type in kinds or i == mask]
    found = [re.escape(name[0]) + f"(?={re.escape(name[1:])})" for name in sorted(names) if len(name) > 1]
    if any(piece.type == _BYTE for piece in proto.pieces):
        found.append("<(?=0x[0-9A-F]{2}>)")
    return "|".join(found)


_MAX_BYTES = 2**28
_SHIPPED = "tokenizer.model"
"""Name of the model in an exported folder."""


def accepts(path: str) -> bool:
    """Return whether a path means this tokenizer: a `.model` file, or a folder with one.

    Of a folder that also has a `tokenizer.json` this is so only where that file was made from the model by an export.
    """
    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        return model_behind(folder) is not None
    return path.endswith(".model") or any(folder.glob("*.model"))


def build(path: str) -> SentencePieceTokenizer:
    """Return the tokenizer; raise a `DataError` if it is missing, damaged, or not the only one in its folder."""
    if not Path(path).is_dir():
        return SentencePieceTokenizer(Path(path))
    named = model_behind(Path(path))
    found = [named] if named is not None else sorted(Path(path).glob("*.model"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found)
        raise DataError(f"{path}: wanted one .model file, found {len(found)} ({listed}); name the file itself")
    return SentencePieceTokenizer(found[0])


class SentencePieceTokenizer:
    """A SentencePiece model as a `megadiff.data.tokenizers.Tokenizer`.

    A mask that the model lacks gets the first id past its pieces.

    Unigram and BPE models are encoded through their `tokenizer.json` form, which an export ships, so that ids here and
    in transformers are the same by construction; models without such a form by the `sentencepiece` library.
    """

    def __init__(self, path: Path) -> None:
        try:
            model = read_bytes(path, max_bytes=_MAX_BYTES)
        except OSError as error:
            raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror}); check data.tokenizer") from error
        except UnreadableFileError as error:
            raise DataError(f"{path}: the tokenizer {error}; check data.tokenizer") from error
        self._inner = _loaded(path, model)
        self._live = self._inner.vocab_size()
        ids = find_special_ids(self._id_of, self._live, self._declared(), unknown=self._inner.unk_id())
        self._special, self._forbidden = ids.all, ids.never_text
        self._special_names = sorted((self._inner.id_to_piece(i) for i in self._forbidden if i < self._live), key=len)
        try:
            definition = definition_of(model, mask=ids.mask)
            self._pipeline = Pipeline(definition, ids) if definition is not None else None
        except Exception as error:  # of a model that its own library reads and that is put together in some other way
            reason = str(error)[:300]
            raise DataError(f"{path}: not a whole SentencePiece model ({reason}); train or fetch it again") from error
        self._path = path
        self.name = f"sentencepiece_model:{path.parent.name or path.name}"
        self.fingerprint = _fingerprint(model, ids)
        self.vocab_size, self.mask_id = ids.vocab_size, ids.mask
        self.bos_id, self.eos_id, self.pad_id = ids.bos, ids.eos, ids.pad

    @property
    def special_names(self) -> Sequence[str]:
        """Names of the model's control pieces, the unknown one and the mask."""
        return self._pipeline.special_names if self._pipeline is not None else self._special_names

    @property
    def export_limits(self) -> str | None:
        """Reason for a model without a `tokenizer.json` form, which can only be copied."""
        return None if self._pipeline is not None else "an export can only copy it, as transformers has no form of it"

    def export(self, folder: Path, *, seq_length: int | None = None, prepend_bos: bool = False) -> list[str]:
        """Copy the model, and write the `tokenizer.json` that was made from it, if it has such a form."""
        shutil.copyfile(self._path, folder / _SHIPPED)
        source = self._path.parent
        if self._pipeline is None:
            return [*keep_templates(folder, source)[0], _SHIPPED]
        written = write_transformers_tokenizer(
            folder,
            self,
            self._pipeline.definition,
            seq_length=seq_length,
            prepend_bos=prepend_bos,
            source=source,
            made_from=_SHIPPED,
        )
        return [*written[:-3], _SHIPPED, *written[-3:]]

    def with_special_names(self) -> tokenizers.Tokenizer | None:
        """Return the library's tokenizer for texts in which the name of a special token means the token.

        None for a model without a `tokenizer.json` form.
        """
        return None if self._pipeline is None else self._pipeline.with_special_names()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without specials."""
        if self._pipeline is not None:
            return self._pipeline.encode(text)
        return split_until_plain(text, self._encoded, self._forbidden, self._inside_special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text."""
        if self._pipeline is not None:
            return self._pipeline.encode_batch(texts)
        return [self.encode(text) for text in texts]

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text, a long one in windows where the model has a `tokenizer.json` form."""
        if self._pipeline is not None:
            yield from self._pipeline.encode_pieces(text)
        else:
            yield self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids; special ones are left out."""
        return self._inner.decode([int(i) for i in ids if 0 <= int(i) < self._live and int(i) not in self._special])

    def _encoded(self, text: str) -> list[int]:
        try:
            return self._inner.encode(text)
        except (RuntimeError, UnicodeEncodeError) as error:
            raise DataError(f"{text[:40]!r} cannot be tokenized: it is no valid Unicode text") from error

    def _inside_special(self, text: str) -> int | None:
        """Return where to cut the first special name that the text spells."""
        places = [(text.find(name), name) for name in self._special_names if len(name) > 1 and name in text]
        return min(places)[0] + 1 if places else None

    def _id_of(self, piece: str) -> int | None:
        found = self._inner.piece_to_id(piece)
        return found if self._inner.id_to_piece(found) == piece else None  # an unknown piece is given the unk id

    def _declared(self) -> dict[str, str]:
        declared = {"bos": self._inner.bos_id(), "eos": self._inner.eos_id(), "pad": self._inner.pad_id()}
        return {kind: self._inner.id_to_piece(found) for kind, found in declared.items() if found >= 0}


def _loaded(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        inner = sentencepiece.SentencePieceProcessor(model_proto=model)
        num_pieces = inner.vocab_size()
        inner.id_to_piece(list(range(num_pieces)))  # a damaged model may load and fail on its first broken piece
        inner.decode([inner.unk_id()])
    except (RuntimeError, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"{path}: not a whole SentencePiece model ({error}); train or fetch it again") from error
    if num_pieces == 0:
        raise DataError(f"{path}: wanted a SentencePiece model, found one without pieces; train or fetch it again")
    return inner


def _fingerprint(model: bytes, ids: SpecialIds) -> str:
    declared = f"{ids.vocab_size} {ids.mask} {ids.bos} {ids.eos} {ids.pad} ".encode()
    return hashlib.sha256(declared + model).hexdigest()
