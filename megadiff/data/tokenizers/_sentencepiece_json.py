"""A SentencePiece model as a `tokenizer.json`, which the `tokenizers` library and transformers read.

Follows the model's own settings: character map, extra white space, dummy prefix, byte fallback, user-defined pieces.
Source: `SpmConverter.build_tokenizer_from_spm_proto` of transformers 5.24. Where several segmentations of a text are
equally good (runs of one character), the two libraries may choose differently.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

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
