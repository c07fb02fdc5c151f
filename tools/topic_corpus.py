"""Write a synthetic corpus that a small model learns within a hundred steps: documents of letters, each with a topic.

    python tools/topic_corpus.py --output runs/topics

A topic is a distribution over 26 letters; a document draws all its letters from one topic. The loss of a model that has
learned only letter frequencies is the entropy of the mixture; that of a model that infers a sequence's topic from its
visible letters is nearly the entropy within a topic. Both are printed. No words, no order and no long training are
needed, so that on a CPU different learning rates end at different losses (on real text all of them end at the letter
frequencies). The files are train.jsonl and valid.jsonl; both have the same topics.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np

from megadiff.config.command_line import CommandParser
from megadiff.errors import DataError, run_command

LETTERS = 26
CONCENTRATION = 0.15
"""Concentration of the Dirichlet distribution of topics; a small one means few letters per topic."""


def topics(count: int, seed: int) -> np.ndarray:
    """Draw topics, [count, LETTERS] distributions."""
    return np.random.default_rng(seed).dirichlet(np.full(LETTERS, CONCENTRATION), size=count)


def entropy(distributions: np.ndarray) -> np.ndarray:
    """Return the entropy in nats, over the last axis."""
    safe = np.where(distributions > 0, distributions, 1.0)
    return -(distributions * np.log(safe)).sum(-1)


def write(path: Path, laws: np.ndarray, *, documents: int, length: int, seed: int) -> None:
    """Write `documents` documents of `length` letters, with topics drawn uniformly."""
    draw = np.random.default_rng(seed)
    letters = np.array(list(string.ascii_lowercase))
    with path.open("w", encoding="utf-8") as file:
        for topic in draw.integers(len(laws), size=documents):
            print(json.dumps({"text": "".join(draw.choice(letters, size=length, p=laws[topic]))}), file=file)


def main() -> None:
    """Parse the command line and write both files."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="output folder, created if missing")
    parser.add_argument("--topics", type=int, default=32)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--length", type=int, default=512, help="letters per document")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    laws = topics(arguments.topics, arguments.seed)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for split, documents, shift in (("train", arguments.documents, 1), ("valid", arguments.documents // 20, 2)):
            path = arguments.output / f"{split}.jsonl"
            write(path, laws, documents=documents, length=arguments.length, seed=arguments.seed + shift)
            print(f"{path}: {documents:,} documents of {arguments.length:,} letters")
    except OSError as error:
        raise DataError(f"{error.filename or arguments.output}: cannot be written: {error.strerror}") from None
    print(f"entropy: {entropy(laws.mean(0)):.3f} nats per letter, {entropy(laws).mean():.3f} given the topic")


if __name__ == "__main__":
    run_command(main)
