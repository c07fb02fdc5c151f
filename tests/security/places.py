"""Where a hostile file could lie: each place with the file that runs code, the naive reader, and the real one."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from megadiff.config.load import load_config
from megadiff.data.documents import Corpus
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.scan import scan
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import DataError
from megadiff.run.config import RunConfig
from tests.data.corpora import write_indexed
from tests.support.runs import toy_tree

Put = Callable[[Path, str], Path]
"""(an empty folder, a shell command) -> the path that is read."""


class Canary:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@dataclass(frozen=True)
class Place:
    """One place."""

    put: Put
    naive: Callable[[Path], object] | None
    """Runs the command: the control. None where no reader of another project is at hand."""
    real: Callable[[Path], object]
    message: str | None
    """Of the one-sentence error, as a pattern; None where the file is not looked at and reading goes well."""


def pickled(command: str) -> bytes:
    """A pickle that runs it."""
    return pickle.dumps(Canary(command))


def torch_saved(command: str) -> bytes:
    """A `.pt` file that runs it."""
    buffer = io.BytesIO()
    torch.save(Canary(command), buffer)
    return buffer.getvalue()


def object_array(command: str) -> bytes:
    """A `.npy` file of objects that runs it."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(command)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def file_of(name: str, content: Callable[[str], bytes]) -> Put:
    """One file of that content."""

    def put(folder: Path, command: str) -> Path:
        (folder / name).write_bytes(content(command))
        return folder / name

    return put


def folder_of(name: str, content: Callable[[str], bytes]) -> Put:
    """The folder that holds the file."""

    def put(folder: Path, command: str) -> Path:
        return file_of(name, content)(folder, command).parent

    return put


def _python_beside_a_tokenizer(folder: Path, command: str) -> Path:
    train_tokenizer(["some text to learn from"] * 20, folder, kind="bpe", vocab_size=270)
    (folder / "tokenization_evil.py").write_text(f"import os\nos.system({command!r})\nclass Evil: pass\n")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.pkl").write_bytes(pickled(command))
    return folder


def _run_python_beside(folder: Path) -> None:
    exec((folder / "tokenization_evil.py").read_text())  # noqa: S102  the control


def _indexed(suffix: str, content: Callable[[str], bytes]) -> Put:
    def put(folder: Path, command: str) -> Path:
        write_indexed(folder / "p", [[5, 6, 7]])
        (folder / f"p{suffix}").write_bytes(content(command))
        return folder / "p"

    return put


def _tag(command: str) -> str:
    return f"!!python/object/apply:os.system [{json.dumps(command)}]"


def _description(folder: Path, command: str, *, base: bool) -> Path:
    tree = yaml.safe_dump(toy_tree(folder / "p", folder))
    hostile = f"{tree}note: {_tag(command)}\n"
    (folder / "base.yaml").write_text(hostile if base else tree)
    (folder / "run.yaml").write_text("base: base.yaml\n" + ("" if base else hostile))
    return folder / ("base.yaml" if base else "run.yaml")


def _load_run(path: Path) -> RunConfig:
    return load_config(path.with_name("run.yaml"), [], RunConfig)


def _override(folder: Path, command: str) -> Path:
    path = _description(folder, "true", base=False)
    path.write_text("base: base.yaml\n")
    (folder / "override").write_text(f"data.train=[{_tag(command)}]")
    return path


def _load_overridden(path: Path) -> RunConfig:
    return load_config(path, [path.with_name("override").read_text()], RunConfig)


def _scan_or_raise(path: Path) -> None:
    found = scan(path)
    if found.errors:
        finding = found.findings[0]
        raise DataError(f"{finding.where}: {finding.what}")


def _unpickle(path: Path) -> None:
    pickle.loads(path.read_bytes())  # noqa: S301  the control


def _unpickle_within(name: str) -> Callable[[Path], None]:
    return lambda folder: _unpickle(folder / name)


def _unsafe_torch(path: Path) -> object:
    return torch.load(path, weights_only=False)


def _unsafe_numpy(path: Path) -> object:
    return np.load(path, allow_pickle=True)


def _corpus(path: Path) -> list[str]:
    return list(Corpus([path]).documents())


def _zip_of_pickles(command: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(command))
    return buffer.getvalue()


_NO_TOKENIZER = r"wanted the word `byte`, .* found (another file|a folder without them); check the path"
_TAG = r"\.yaml:\d+: the tag `!!python/object/apply:os\.system` is not allowed; write a plain value"

PLACES: dict[str, Place] = {
    "a .pt file as tokenizer": Place(
        file_of("tokenizer.pt", torch_saved), _unsafe_torch, load_tokenizer, _NO_TOKENIZER
    ),
    "a folder with a pickled tokenizer": Place(
        folder_of("tokenizer.pkl", pickled), _unpickle_within("tokenizer.pkl"), load_tokenizer, _NO_TOKENIZER
    ),
    "a pickle called tokenizer.json": Place(
        folder_of("tokenizer.json", pickled),
        _unpickle_within("tokenizer.json"),
        load_tokenizer,
        r"not a whole tokenizer\.json",
    ),
    "a .pt file called spm.model": Place(
        file_of("spm.model", torch_saved), _unsafe_torch, load_tokenizer, r"not a whole SentencePiece model"
    ),
    "Python code beside a tokenizer": Place(_python_beside_a_tokenizer, _run_python_beside, load_tokenizer, None),
    "an object array as index": Place(
        _indexed(".idx", object_array),
        lambda path: _unsafe_numpy(path.with_suffix(".idx")),
        IndexedReader,
        r"p\.idx: wanted the magic b'MMIDIDX",
    ),
    "an object array as tokens": Place(
        _indexed(".bin", object_array),
        lambda path: _unsafe_numpy(path.with_suffix(".bin")),
        _scan_or_raise,
        r"p\.bin: wanted 6 bytes, found \d+",
    ),
    "a pickle as data manifest": Place(
        _indexed(".json", pickled),
        lambda path: _unpickle(path.with_suffix(".json")),
        IndexedReader,
        r"p\.json: the manifest is not JSON",
    ),
    "a pickle as corpus": Place(
        file_of("corpus.jsonl", pickled),
        _unpickle,
        _corpus,
        r"corpus\.jsonl:1: .*; (correct the line|convert the file .*) or raise",
    ),
    "an object array as corpus": Place(
        file_of("corpus.json", object_array),
        _unsafe_numpy,
        _corpus,
        r"corpus\.json:1: .*; (correct the line|convert the file .*) or raise",
    ),
    "a .pt file as parquet": Place(
        file_of("corpus.parquet", torch_saved), _unsafe_torch, _corpus, r"needs pyarrow|is cut or damaged"
    ),
    "an archive of pickles as compressed corpus": Place(
        file_of("corpus.jsonl.gz", _zip_of_pickles), None, _corpus, r"corpus\.jsonl\.gz: not a whole \.gz file"
    ),
    "a tag in a run description": Place(
        lambda folder, command: _description(folder, command, base=False),
        lambda path: yaml.unsafe_load(path.read_text()),
        _load_run,
        _TAG,
    ),
    "a tag in a base file": Place(
        lambda folder, command: _description(folder, command, base=True),
        lambda path: yaml.unsafe_load(path.read_text()),
        _load_run,
        _TAG,
    ),
    "a tag in an override": Place(
        _override,
        lambda path: yaml.unsafe_load(path.with_name("override").read_text().partition("=")[2]),
        _load_overridden,
        r"command line: the value of `data\.train`: the tag `!!python/object/apply:os\.system` is not allowed",
    ),
}


def emptied(folder: Path) -> Path:
    """The folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
