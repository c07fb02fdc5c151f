"""Ways to spoil a Hugging Face folder: by hand, each a known trick, and at random."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megadiff.export.folder_files import CHECKSUMS

Spoil = Callable[[Path], object]

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; Python writes NaN and Infinity as other programs do."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def relist(folder: Path) -> None:
    """Write the checksums again, as an attacker would."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / CHECKSUMS).write_text("".join(sums))


def as_another_program_writes(folder: Path) -> None:
    """Leave neither checksums nor our own description, and two weight files with an index."""
    (folder / CHECKSUMS).unlink()
    (folder / "training.json").unlink()
    weights = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names = sorted(weights)
    places = {name: ("a" if place % 2 else "b") + ".safetensors" for place, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _replaced(name: str, put: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        put(folder / name)

    return spoil


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _elsewhere(path: Path) -> None:
    target = path.parent.parent / f"outside-{path.name}"
    target.write_text("{}")
    path.symlink_to(target)


def _config(**changes: Any) -> Spoil:
    return lambda folder: edit(folder / "config.json", **changes)


def _text(name: str, text: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _sums(change: Callable[[str], str | bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        changed = change((folder / CHECKSUMS).read_text())
        (folder / CHECKSUMS).write_bytes(changed if isinstance(changed, bytes) else changed.encode())

    return spoil


def _header(header: Any, *, length: int | None = None) -> Spoil:
    """A weight file of another header."""

    def spoil(folder: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / WHOLE).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64))

    return spoil


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / WHOLE)
        change(weights)
        save_file(weights, folder / WHOLE)

    return spoil


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)


def _index(content: Any) -> Spoil:
    return _text(INDEX, content if isinstance(content, bytes) else json.dumps(content))


_LAYERS = "model.layers.{}.mlp.up_proj.weight"
_DEEP = "[" * 200_000

BY_HAND: dict[str, Spoil] = {
    "a billion layers": _config(num_hidden_layers=10**9),
    "sixty thousand layers": _config(num_hidden_layers=60_000),
    "layers as a float": _config(num_hidden_layers=4.0),
    "an infinite width": _text("config.json", '{"model_type": "gidd", "hidden_size": 1e400}'),
    "a NaN width": _config(hidden_size=float("nan")),
    "a width of no width": _config(hidden_size=None),
    "a negative width": _config(hidden_size=-32),
    "a width as text": _config(hidden_size="32"),
    "a width of 4,000 digits": _text("config.json", '{"model_type": "gidd", "hidden_size": ' + "9" * 4000 + "}"),
    "a width of 5,000 digits": _text("config.json", '{"model_type": "gidd", "hidden_size": ' + "9" * 5000 + "}"),
    "true heads": _config(num_attention_heads=True),
    "heads that do not divide": _config(num_attention_heads=7),
    "a huge vocabulary": _config(vocab_size=2**40),
    "another vocabulary": _config(vocab_size=100_000_000),
    "noise called x": _config(noise_type="x"),
    "noise of null": _config(noise_type=None),
    "noise of NaN": _config(noise_type=float("nan")),
    "noise as a list": _config(noise_type=[0.0]),
    "noise without range": _config(min_log_snr=9, max_log_snr=-9),
    "an endless range": _config(max_log_snr=float("inf")),
    "a share above one": _config(noise_p_uniform=1.5),
    "prompts that attend elsewhere": _config(prompt_attention="sideways"),
    "norms of another kind": _config(qk_norm={"a": 1}),
    "a cap of zero": _config(attn_soft_cap=0),
    "a false epsilon": _config(rms_norm_eps=False),
    "rotations as a list": _config(rope_scaling=[1, 2]),
    "rotations about a text": _config(rope_theta=None, rope_parameters={"rope_theta": "x"}),
    "a model type of 90 MB": _config(model_type="x" * 90_000_000),
    "a value of 5 MB": _config(qk_norm="x" * 5_000_000),
    "a value that writes to the terminal": _config(qk_norm="\x1b[2J\x1b[31m\ud800"),
    "a list as model type": _config(model_type=["gidd"]),
    "a deep config": _text("config.json", '{"a": ' + _DEEP),
    "a config of two megabytes of brackets": _text("config.json", "[" * 2**20 + "]" * 2**20),
    "a config that is a list": _text("config.json", "[]"),
    "an empty config": _text("config.json", ""),
    "a config in UTF-16": _text("config.json", '{"model_type": "gidd"}'.encode("utf-16")),
    "a config that is a FIFO": _replaced("config.json", os.mkfifo),
    "a config that is a socket": _replaced("config.json", _socket),
    "a config that is a folder": _replaced("config.json", Path.mkdir),
    "a config that is a device": _replaced("config.json", lambda path: path.symlink_to("/dev/zero")),
    "a config elsewhere": _replaced("config.json", _elsewhere),
    "a config that links to itself": _replaced("config.json", lambda path: path.symlink_to(path.name)),
    "a config of 64 GB": _replaced("config.json", _sparse),
    "weights that are a FIFO": _replaced(WHOLE, os.mkfifo),
    "weights elsewhere": _replaced(WHOLE, _elsewhere),
    "a description that is a FIFO": _replaced("training.json", os.mkfifo),
    "a deep description": _text("training.json", _DEEP),
    "a description with other noise": lambda f: _set_deep(f / "training.json", ("config", "noise", "shift"), "x"),
    "a description with dead rows without end": lambda f: _set_deep(
        f / "training.json", ("config", "model", "vocab_multiple"), 10**12
    ),
    "a description with an unknown objective": lambda f: _set_deep(
        f / "training.json", ("config", "objective"), {"name": ["ar"]}
    ),
    "a tokenizer's description as a FIFO": _replaced("tokenizer_config.json", os.mkfifo),
    "sums that are not text": _sums(lambda text: b"\xff\xfe" + text.encode()),
    "sums that are a FIFO": _replaced(CHECKSUMS, os.mkfifo),
    "sums that lead out": _sums(lambda text: text + f"{'0' * 64}  ../../etc/passwd\n"),
    "sums without weights": _sums(lambda text: "".join(x for x in text.splitlines(True) if WHOLE not in x)),
    "sums without lines": _sums(lambda text: ""),
    "sums of a file that is gone": lambda f: (f / "README.md").unlink(),
    "a header of 2^62 bytes": _header({}, length=2**62),
    "a deep header": _header(b'{"a":' + b"[" * 100_000),
    "a header with overlapping places": _header(
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}
    ),
    "a header with a huge shape": _header(
        {"lm_head.weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}
    ),
    "a weight of whole numbers": _weights(lambda w: w.update({_LAYERS.format(1): w[_LAYERS.format(1)].long()})),
    "a weight turned": _weights(lambda w: w.update({_LAYERS.format(1): w[_LAYERS.format(1)].T.contiguous()})),
    "a layer too many": _weights(lambda w: w.update({_LAYERS.format(10**12): torch.zeros(1)})),
    "a weight with a name of a megabyte": _weights(lambda w: w.update({"x" * 10**6: torch.zeros(1)})),
    "an index beside the whole": _index({"weight_map": {"lm_head.weight": "other.safetensors"}}),
    "an index of another file": _index({"weight_map": {"lm_head.weight": "/etc/passwd"}}),
    "an index with numbers": _index({"weight_map": {"lm_head.weight": 3}}),
    "an index without map": _index({}),
    "a deep index": _index(b'{"weight_map": ' + b'{"a":' * 200_000),
}
"""By name; every one of them must be refused in one sentence, with checksums, without, and with new ones."""


def _set_deep(path: Path, keys: tuple[str, ...], value: Any) -> None:
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


_VALUES = [None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 10_000, [], {}, [[]], "\0", "\ud800"]


def at_random(folder: Path, draw: random.Random) -> str:
    """Spoil one file, or two, in one of many ways; what was done."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(".py"))
    name = draw.choice(names)
    path = folder / name
    ways = [_flip, _cut, _insert, _double, _swap, _remove, _special]
    ways += [_json_value] * 6 if name.endswith(".json") else []
    way = draw.choice(ways)
    way(path, draw)
    return f"{way.__name__} {name}"


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 3, 20))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def _insert(path: Path, draw: random.Random) -> None:
    data, place = path.read_bytes(), draw.randrange(path.stat().st_size)
    path.write_bytes(data[:place] + draw.randbytes(draw.choice((1, 8, 1000))) + data[place:])


def _double(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() * draw.choice((2, 5)))


def _swap(path: Path, draw: random.Random) -> None:
    other = draw.choice(sorted(one for one in path.parent.iterdir() if one.is_file()))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _special(path: Path, draw: random.Random) -> None:
    path.unlink()
    draw.choice((os.mkfifo, Path.mkdir, _elsewhere, _socket, lambda path: path.symlink_to("/dev/zero")))(path)


def _json_value(path: Path, draw: random.Random) -> None:
    """Replace, remove or add one value at any depth."""
    content = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        inner = waiting.pop()
        for key, value in inner.items() if isinstance(inner, dict) else enumerate(inner):
            places.append((inner, key))
            waiting += [value] if isinstance(value, dict | list) else []
    inner, key = draw.choice(places)
    if draw.random() < 0.2:
        del inner[key]
    else:
        inner[key] = draw.choice(_VALUES)
    path.write_text(json.dumps(content))


def copy_of(folder: Path, target: Path) -> Path:
    """A fresh copy to spoil."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(folder, target)
