"""The README.md of an exported folder: the model, its training data, its scores, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megadiff.checkpoint.manifest import Manifest
from megadiff.export.architectures import Architecture
from megadiff.metric_lines import Line, number, read_lines
from megadiff.model.config import ModelConfig
from megadiff.untrusted_files import UnreadableFileError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .-]*(_[A-Za-z0-9 .-]+)*")
_LOAD = """```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder = {folder}
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # AutoTokenizer would first prompt to run the model's code
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("A list is", return_tensors="pt").input_ids
text = model.generate(ids, max_new_tokens={new_tokens}, max_denoising_steps=64, seed=0)
print(tokenizer.decode(text[0], skip_special_tokens=True))
```

`trust_remote_code=True` runs `configuration_gidd.py`, `modeling_gidd.py` and the two files they import, all in this
folder: read them first. `sha256sum -c checksums.sha256`, run in the folder, compares the files that it lists.

The tokenizer gives the ids that the model was trained with: a special token's name in a text is read as text, and
{framing}. `tokenizer(text, split_special_tokens=False)` reads such names as the tokens they name."""

_LOAD_SENTENCEPIECE = """The tokenizer is a SentencePiece model (`tokenizer.model`), to be read with the
`sentencepiece` library; the mask's id is {mask_id}."""

_LOAD_OTHER = """The tokenizer is not one that Transformers reads ({files}); the mask's id is {mask_id}."""


_LOAD_PLAIN = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("A list is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0], skip_special_tokens=True))
```

The folder has the layout of `{model_class}` of Transformers and needs no code of its own. Training with megadiff puts a
start token before every sequence."""

_LOAD_WITH_OTHER_CODE = """The folder has the names of tensors and the `config.json` of `{model_class}`, for
programs that read such models. Transformers itself has no such class: for it, put the public model's own Python files
beside the weights and its `auto_map` into `config.json`."""


def model_card(
    manifest: Manifest,
    *,
    name: str,
    description: str,
    parameters: int,
    dtype: str,
    metrics: Path | None,
    tokenizer_files: Sequence[str],
    architecture: Architecture | None = None,
) -> str:
    """Return the text of the card.

    Args:
        manifest: the checkpoint's manifest.
        name: name of the model.
        description: sentence about what kind of model it is (`Method.description`).
        parameters: number of weights.
        dtype: type of the weights.
        metrics: the run's `metrics.jsonl`, if there is one.
        tokenizer_files: names of the files that the tokenizer has in the folder.
        architecture: the public architecture in whose layout the folder is; None for the package's own.
    """
    files = ", ".join(f"`{name}`" for name in tokenizer_files) or "no files of it are here"
    load = _LOAD_SENTENCEPIECE if "tokenizer.model" in tokenizer_files else _LOAD_OTHER
    load = load.format(mask_id=manifest.mask_id, files=files)
    if "tokenizer.json" in tokenizer_files:
        framing = (
            "bos comes before it, as before each document in training"
            if manifest.prepended_bos
            else ("neither bos nor eos is added, since no document began with bos in training")
        )
        new_tokens = min(64, max(1, manifest.config["model"]["seq_length"] // 2))
        load = _LOAD.format(folder=python_text(name), framing=framing, new_tokens=new_tokens)
    if architecture is not None:
        form = _LOAD_WITH_OTHER_CODE if architecture.needs_own_code else _LOAD_PLAIN
        load = form.format(folder=python_text(name), model_class=architecture.model_class)
    table = "\n".join(f"| {key} | {value} |" for key, value in _facts(manifest, parameters, dtype).items())
    scores = "\n".join(f"| {key} | {value} |" for key, value in _scores(metrics, manifest.step).items())
    is_own = architecture is None
    levels = " under the noise\nlevels that `config.json` names" if is_own else ""
    tags = "- diffusion\n- gidd\n- text-diffusion" if is_own else f"- {architecture.model_class}"  # type: ignore[union-attr]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {markdown_text(name)}

{description}
It was trained with megadiff on the data named below.

| | |
|---|---|
{table}

## Scores

{"| | |" if scores else "The checkpoint came without a run's measurements."}
{"|---|---|" if scores else ""}
{scores}

ELBO figures are estimates, in nats per token, of an upper bound on the negative log likelihood{levels}; they
are held-out where it says so.

## Use

{load}
""".replace("\n\n\n", "\n\n")


def python_text(text: str) -> str:
    """Return a Python literal of a text, as one line of printable ASCII that cannot end a block of code."""
    return ascii(text).replace("`", "\\x60")


def markdown_text(text: str) -> str:
    """Return a text as one line of Markdown in which nothing is markup."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~-])", r"\\\1", line) if not _PLAIN_NAME.fullmatch(line) else line


def _facts(manifest: Manifest, parameters: int, dtype: str) -> dict[str, Any]:
    model = ModelConfig.model_validate(manifest.config["model"])
    data = manifest.config.get("data", {})
    sources = [markdown_text(Path(source["path"]).name) for source in data.get("train", [])]
    optimizer = manifest.config.get("optimizer", {})
    facts = {
        "parameters": f"{parameters:,} ({dtype})",
        "blocks, width, heads": f"{model.layers}, {model.hidden}, {model.heads}",
        "tokens in a sequence": model.seq_length,
        "vocabulary": f"{manifest.vocab_size:,} ids, the mask is {manifest.mask_id}",
        "trained for": f"{manifest.step:,} steps, {manifest.tokens:,} tokens",
        "data": ", ".join(sources),
        "fingerprint of the data": manifest.data_fingerprint,
        "fingerprint of the tokenizer": manifest.tokenizer_fingerprint,
        "optimizer": f"{optimizer['name']}, learning rate {optimizer['lr']:g}" if optimizer else "",
        "versions": ", ".join(f"{library} {version}" for library, version in manifest.versions.items()),
        "training settings": "`training.json`",
    }
    return {key: value for key, value in facts.items() if value}


def _scores(metrics: Path | None, step: int) -> dict[str, str]:
    """Return the last metrics up to the checkpoint's step; one that is not a finite number is reported as such."""
    found: dict[str, Any] = {}
    for line in _lines(metrics) if metrics is not None else []:
        if line["step"] <= step:
            found.update(line)
    scores = {}
    if "elbo" in found:
        scores["ELBO of the last training step logged"] = _nats(found, "elbo", "nats per noisy token")
    if "eval_elbo" in found:
        scores["held-out ELBO"] = _nats(found, "eval_elbo", "nats per token")
    if (bits := number(found, "eval_bits_per_byte")) is not None:
        scores["held-out bits per byte"] = f"{bits:.4f}"
    return scores


def _lines(metrics: Path) -> Iterator[Line]:
    """Yield the run's lines; none if the file cannot be read, so that the card is still written."""
    try:
        yield from read_lines(metrics)
    except (OSError, UnreadableFileError):
        return


def _nats(found: dict[str, Any], key: str, unit: str) -> str:
    value, error = number(found, key), number(found, f"{key}_stderr")
    if value is None:
        return "not a finite number"
    return f"{value:.4f}{'' if error is None else f' ± {error:.4f}'} {unit}"
