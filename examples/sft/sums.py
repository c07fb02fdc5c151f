"""Write a small corpus of questions and answers: sums of three numbers from 0 to 4, 105 to train on and 20 held out."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path


def main() -> None:
    """Write `train.jsonl` and `valid.jsonl`, with each sum as a prompt and a completion, and as chat messages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    every = list(itertools.product(range(5), repeat=3))
    random.Random(1).shuffle(every)
    for name, part in (("train", every[20:]), ("valid", every[:20])):
        lines = (json.dumps(record(numbers)) + "\n" for numbers in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def record(numbers: tuple[int, ...]) -> dict[str, object]:
    """Return a line of the corpus."""
    question, answer = f"{'+'.join(map(str, numbers))}=", str(sum(numbers))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"prompt": question, "completion": answer, "messages": messages}


if __name__ == "__main__":
    main()
