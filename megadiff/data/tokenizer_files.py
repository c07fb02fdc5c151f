"""Which tokenizer a path means."""

from __future__ import annotations

from pathlib import Path

from megadiff.config import registry
from megadiff.config.suggestions import similar_path
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError

_FAMILY = "megadiff.data.tokenizers"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer behind `data.tokenizer`: the first member of the family that accepts the path.

    Args:
        path: the word `byte`; a `tokenizer.json` or its folder; a SentencePiece `.model` or its folder.

    Raises:
        DataError: nothing is there, no member knows it, or the file is damaged.
    """
    said = str(path)
    for name in registry.names(_FAMILY):
        module = registry.member(_FAMILY, name)
        if module.accepts(said):
            return module.build(said)
    wanted = "the word `byte`, a tokenizer.json, a SentencePiece .model file, or a folder with one of them"
    found = "a folder without them" if Path(said).is_dir() else "another file" if Path(said).exists() else "nothing"
    near = similar_path(said) if found == "nothing" else None
    remedy = f"did you mean {near}?" if near else "check the path or run tools/train_tokenizer.py"
    raise DataError(f"{said}: wanted {wanted}, found {found}; {remedy}")
