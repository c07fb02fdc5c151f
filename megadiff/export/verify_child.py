"""Script that `verify` runs as a separate process, isolated from megadiff: a folder's logits of sequences and ids of
texts.

It imports the folder's modeling file as a package, as a person who has read it would, instead of letting transformers
do it with `trust_remote_code`. A folder without one is of a class of transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def main(words: str) -> None:
    """Load, compute, write.

    Args:
        words: JSON with `folder`, `asked` (ids, prompt lengths, perhaps heads), `answered` (the file to write),
            `compute`, a list of `fp32` and `bf16`, and `texts`, a file with a JSON list that is replaced by their ids.
    """
    socket.socket.connect = _refuse  # type: ignore[method-assign,assignment]
    given = json.loads(words)
    kind, asked = _model_class(Path(given["folder"])), load_file(given["asked"])
    answers: dict[str, Tensor] = {}
    for compute in given["compute"]:
        dtype = torch.bfloat16 if compute == "bf16" else torch.float32
        model = kind.from_pretrained(given["folder"], dtype=dtype, local_files_only=True).eval()
        found = _logits(model, asked, asked.get(f"{compute}.head"))
        answers |= {f"{compute}.logits.{number}": logits for number, logits in enumerate(found)}
    _replace_by_ids(Path(given["texts"]), given["folder"])
    assert "megadiff" not in sys.modules, "an exported folder must stand alone"
    save_file(answers, given["answered"])


def _replace_by_ids(file: Path, folder: str) -> None:
    """Encode texts as the model card does."""
    texts = json.loads(file.read_text(encoding="utf-8"))
    found: list[list[int]] = []
    if texts:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        found = [tokenizer(text).input_ids for text in texts]
    file.write_text(json.dumps(found), encoding="utf-8")


@torch.no_grad()
def _logits(model: Any, asked: dict[str, Tensor], head: Tensor | None) -> list[Tensor]:
    if head is not None:
        model.lm_head.weight.copy_(head)
    found = []
    for number in range(sum(name.startswith("ids.") for name in asked)):
        lengths = asked[f"prompt.{number}"]
        prompts = {"prompt_lengths": lengths} if bool(lengths.any()) and model.config.model_type == "gidd" else {}
        out = model(asked[f"ids.{number}"], **prompts)
        found.append(out.logits.float().contiguous())
    return found


def _model_class(folder: Path) -> Any:
    if not (folder / "modeling_gidd.py").exists():
        return importlib.import_module("transformers").AutoModelForCausalLM
    spec = importlib.util.spec_from_loader("exported", loader=None, is_package=True)
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    sys.modules["exported"] = package
    return importlib.import_module("exported.modeling_gidd").GiddForDiffusionLM


def _refuse(*_: object) -> NoReturn:
    raise ConnectionError("the verification of an export has no network")


if __name__ == "__main__":
    main(sys.argv[1])
