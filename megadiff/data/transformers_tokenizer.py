"""Writer of a tokenizer's files for Transformers, which reads the same ids from them as megadiff.

Members of the tokenizer family call this in their `export`; a tokenizer of the user's own may do so as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from megadiff.data.chat_template import TEMPLATE_FILE
from megadiff.data.tokenizers._special import MASK_ID, MAX_CONFIG_BYTES, SENTENCEPIECE_KEY, SPECIAL_TOKENS
from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, read_json_object, read_text, why

T = TypeVar("T")

_KINDS = ("bos", "eos", "pad", "mask")
_KEPT_NAMES = ("unk_token", "sep_token", "cls_token")
_KEPT_SETTINGS = ("chat_template", "truncation_side")
_TEMPLATES = "additional_chat_templates"
"""Name of the folder in which Transformers keeps further chat templates."""


def write_transformers_tokenizer(
    folder: Path,
    tokenizer: object,
    definition: Mapping[str, Any],
    *,
    seq_length: int | None = None,
    prepend_bos: bool = False,
    source: Path | None = None,
    made_from: str | None = None,
) -> list[str]:
    """Write a tokenizer for Transformers' `PreTrainedTokenizerFast`, and return the names of the files.

    The `tokenizer.json` yields the same ids as in training: no template of the definition is applied, a special token's
    name in a text is read as text (`split_special_tokens`), and bos is put before a text if the training data have it.
    A mask that the definition lacks is named only in `tokenizer_config.json`, from which Transformers adds it as the
    next id, which is the mask's.

    Args:
        folder: folder to write into, which has none of these files.
        tokenizer: tokenizer that the model was trained with, for its `mask_id`, and for its `bos_id`, `eos_id` and
            `pad_id` if it has them.
        definition: content of a `tokenizer.json` that gives its ids.
        seq_length: number of tokens of a sequence.
        prepend_bos: whether the training data begin each document with bos.
        source: folder from which chat templates, and settings that change no id, are kept.
        made_from: name of a SentencePiece model in `folder` from which the definition was made.
    """
    written, templates = keep_templates(folder, source) if source is not None else ([], {})
    ids = {kind: found for kind in _KINDS if (found := getattr(tokenizer, f"{kind}_id", None)) is not None}
    inner = _write_definition(folder / "tokenizer.json", definition, ids["bos"] if prepend_bos else None)
    names = {f"{kind}_token": _name(inner, token) for kind, token in ids.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",  # as `generate` needs for prompts of different lengths
        **(_kept_settings(source, definition, inner) if source is not None else {}),
        **({SENTENCEPIECE_KEY: made_from} if made_from is not None else {}),
        **templates,
        **names,
        **({} if seq_length is None else {"model_max_length": seq_length}),
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*written, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def _write_definition(path: Path, definition: Mapping[str, Any], bos_id: int | None) -> tokenizers.Tokenizer:
    """Write a `tokenizer.json` that adds nothing to a text except bos if requested; return the library's object."""
    shipped = {**definition, "truncation": None, "padding": None, "post_processor": None}
    if bos_id is not None:
        bos = _name(tokenizers.Tokenizer.from_str(json.dumps(shipped)), bos_id)
        begin = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
        shipped["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        }
    text = json.dumps(shipped, ensure_ascii=False, indent=2)
    path.write_text(text, encoding="utf-8")
    return tokenizers.Tokenizer.from_str(text)


def keep_templates(folder: Path, source: Path) -> tuple[list[str], dict[str, Any]]:
    """Keep the chat templates beside the tokenizer.

    Returns:
        Names of copied files, and additions to `tokenizer_config.json`: several templates go there, under their names,
        so that the exported folder has no subfolders.
    """
    default = source / TEMPLATE_FILE
    others = sorted((source / _TEMPLATES).glob("*.jinja"))
    if others:
        named = [("default", default)] if default.is_file() else []
        named += [(path.stem, path) for path in others]
        return [], {"chat_template": [{"name": name, "template": _template(path)} for name, path in named]}
    if default.exists():
        (folder / TEMPLATE_FILE).write_text(_template(default), encoding="utf-8")
        return [TEMPLATE_FILE], {}
    return [], {}


def _template(path: Path) -> str:
    return _checked(path, lambda: read_text(path, max_bytes=MAX_CONFIG_BYTES))


def _checked(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; correct or remove it") from error


def _kept_settings(source: Path, definition: Mapping[str, Any], inner: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return the settings of the source's `tokenizer_config.json` that change no id."""
    beside = source / "tokenizer_config.json"
    config = _checked(beside, lambda: read_json_object(beside, max_bytes=MAX_CONFIG_BYTES)) if beside.exists() else {}
    kept = {key: config[key] for key in _KEPT_SETTINGS if key in config}
    for key in _KEPT_NAMES:
        name = _content(config.get(key))
        if name is not None and inner.token_to_id(name) is not None:
            kept[key] = name
    special = {token["content"] for token in definition.get("added_tokens", []) if token["special"]}
    others = [*_listed(config.get("additional_special_tokens")), *_listed(config.get("extra_special_tokens"))]
    if names := [name for other in others if (name := _content(other)) in special]:
        kept["additional_special_tokens"] = list(dict.fromkeys(names))
    return kept


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _name(inner: tokenizers.Tokenizer, token: int) -> str:
    """Return a special token's name; an unused one for a mask that the file lacks."""
    name = inner.id_to_token(token)
    if name is not None:
        return name
    if token != inner.get_vocab_size(with_added_tokens=True):
        raise DataError(
            f"the special id {token} has no token in the definition, whose ids end at "
            f"{inner.get_vocab_size(with_added_tokens=True) - 1}; give the token a name there"
        )
    tried = (SPECIAL_TOKENS[MASK_ID], *(f"<|mask_{number}|>" for number in range(inner.get_vocab_size() + 1)))
    return next(name for name in tried if inner.token_to_id(name) is None)
