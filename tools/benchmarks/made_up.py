"""A run on random token ids of any vocabulary, for timing, and a substitute for their tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.open import open_data
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig

with quiet():
    from megadiff.run.context import RunContext

_DOCUMENTS = 100


@dataclass(frozen=True)
class Numbers:
    """A substitute for a tokenizer whose text is any ids below the vocabulary's size. It never encodes anything."""

    vocab_size: int
    """Number of ids including the mask, which is the last one."""
    name: str = "numbers"
    fingerprint: str = "0" * 64
    bos_id: int | None = 0
    eos_id: int | None = None
    pad_id: int | None = None
    special_names: tuple[str, ...] = ()
    export_limits: str | None = None

    @property
    def mask_id(self) -> int:
        """Id of the mask, the last one."""
        return self.vocab_size - 1


def describe_made_up(folder: Path, tree: dict[str, Any], *, vocab_size: int) -> RunConfig:
    """Return the run description `tree` (without name, output and data) on random ids, which are written to
    `folder`."""
    tokenizer: Any = Numbers(vocab_size)
    length = tree["model"]["seq_length"]
    with IndexedWriter(folder / "sequences", vocab_size=vocab_size) as writer:
        draw = np.random.default_rng(0)
        for _ in range(_DOCUMENTS):
            writer.add_document(draw.integers(1, vocab_size - 1, size=4 * length))
        writer.finish(tokenizer=tokenizer_facts(tokenizer), source_bytes=writer.num_tokens)
    data = {"train": [str(folder / "sequences")], "tokenizer": "byte"}
    return RunConfig.model_validate({"name": "run", "output_dir": str(folder), "data": data, **tree})


def prepare_made_up(config: RunConfig, *, vocab_size: int) -> RunContext:
    """Create the run folder and return the argument of `megadiff.run.build.build_trainer`, for one rank."""
    tokenizer: Any = Numbers(vocab_size)
    data = open_data(config.data, tokenizer, seq_length=config.model.seq_length, seed=config.seed, valid_sequences=1)
    config.folder.mkdir(exist_ok=True)
    return RunContext(config, tokenizer, data, config.layout(world_size=1, vocab_size=vocab_size))
