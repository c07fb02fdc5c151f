"""The tokenizer's files of an exported folder, such that transformers and megadiff read the same ids from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from megadiff.data.tokenizers import Tokenizer
from megadiff.data.tokenizers._special import MASK_ID, MAX_CONFIG_BYTES, SENTENCEPIECE_KEY, SPECIAL_TOKENS, model_behind
from megadiff.errors import DataError
from megadiff.untrusted_files import UnreadableFileError, read_json_object, read_text, why

T = TypeVar("T")

_KINDS = ("bos", "eos", "pad", "mask")
_KEPT_NAMES = ("unk_token", "sep_token", "cls_token")
_KEPT_SETTINGS = ("chat_template", "truncation_side")
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
"""The file and the folder in which transformers keeps chat templates."""


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, source: str, *, row_length: int, prepend_bos: bool = False
) -> list[str]:
    """Write the tokenizer's files and return their names.

    The `tokenizer.json` gives the ids that training had: nothing of a template of the source's is applied, a text that
    spells a special token's name is text (`split_special_tokens`), and bos is put before a text where the training data
    have it. A mask that the file lacks is named in `tokenizer_config.json` alone, from where transformers adds it as
    the next id, which is the mask's. Chat templates are kept. A SentencePiece model ships beside the `tokenizer.json`
    that was made from it; one without such a form ships alone, to be read by the `sentencepiece` library.

    Args:
        folder: an empty or new folder, or one without such files.
        tokenizer: the tokenizer that was trained with.
        source: name that the run gives its tokenizer (`data.tokenizer`).
        row_length: number of tokens of a sequence.
        prepend_bos: whether the training data begin each document with bos.
    """
    path = Path(source)
    written, templates = (
        _kept_templates(folder, path if path.is_dir() else path.parent) if source != "byte" else ([], {})
    )
    model = _sentencepiece_model(path) if source != "byte" else None
    if model is not None:
        shutil.copyfile(model, folder / "tokenizer.model")
        written.append("tokenizer.model")
    definition = tokenizer.definition
    if definition is None:
        return written
    inner = _write_definition(folder / "tokenizer.json", definition, tokenizer, prepend_bos)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}
    names = {f"{kind}_token": _name(inner, ids[kind], tokenizer) for kind in _KINDS if ids[kind] is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",  # as `generate` of an exported model takes prompts of several lengths
        **(_kept_settings(path, definition, inner) if source != "byte" else {}),
        **({SENTENCEPIECE_KEY: "tokenizer.model"} if model is not None else {}),
        **templates,
        **names,
        "model_max_length": row_length,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*written, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def _write_definition(
    path: Path, definition: dict[str, Any], tokenizer: Tokenizer, prepend_bos: bool
) -> tokenizers.Tokenizer:
    """Write `tokenizer.json` with nothing applied to a text but bos where it is due; return the library's reading."""
    shipped = {**definition, "truncation": None, "padding": None, "post_processor": None}
    if prepend_bos:
        plain = tokenizers.Tokenizer.from_str(json.dumps(shipped))
        bos = _name(plain, tokenizer.bos_id, tokenizer)
        begin = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
        shipped["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
    text = json.dumps(shipped, ensure_ascii=False, indent=2)
    path.write_text(text, encoding="utf-8")
    return tokenizers.Tokenizer.from_str(text)


def _kept_templates(folder: Path, source: Path) -> tuple[list[str], dict[str, Any]]:
    """Keep the chat templates that lie beside the tokenizer.

    Returns:
        Names of copied files, and what `tokenizer_config.json` has to hold: several templates go there, under their
        names, so that the exported folder has no folders inside.
    """
    default = source / _TEMPLATE
    others = sorted((source / _TEMPLATES).glob("*.jinja"))
    if others:
        named = [("default", default)] if default.is_file() else []
        named += [(path.stem, path) for path in others]
        return [], {"chat_template": [{"name": name, "template": _template(path)} for name, path in named]}
    if default.exists():
        (folder / _TEMPLATE).write_text(_template(default), encoding="utf-8")
        return [_TEMPLATE], {}
    return [], {}


def _template(path: Path) -> str:
    return _checked(path, lambda: read_text(path, max_bytes=MAX_CONFIG_BYTES))


def _checked(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; correct or remove it") from error


def _sentencepiece_model(path: Path) -> Path | None:
    """Return the SentencePiece model that a run's tokenizer is."""
    if path.suffix == ".json":
        return None
    if path.is_file():
        return path
    has_json = (path / "tokenizer.json").is_file()
    return model_behind(path) if has_json else next(iter(sorted(path.glob("*.model"))), None)


def _kept_settings(path: Path, definition: dict[str, Any], inner: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return what the source's `tokenizer_config.json` sets that changes no id."""
    beside = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
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


def _name(inner: tokenizers.Tokenizer, token: int | None, tokenizer: Tokenizer) -> str:
    """Return a special token's name; one that no token has yet for a mask that the file lacks."""
    assert token is not None
    name = inner.id_to_token(token)
    if name is not None:
        return name
    assert token == inner.get_vocab_size(with_added_tokens=True), f"{tokenizer.name}: the ids have holes"
    tried = (SPECIAL_TOKENS[MASK_ID], *(f"<|mask_{number}|>" for number in range(inner.get_vocab_size() + 1)))
    return next(name for name in tried if inner.token_to_id(name) is None)
