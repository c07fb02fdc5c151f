"""The README.md of an exported folder: what the model is, what it was trained on, how well it does, how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadiff.checkpoint.manifest import Manifest
from megadiff.diffusion.config import NoiseConfig
from megadiff.model.config import ModelConfig
from megadiff.train.metric_lines import Line, number, read_lines
from megadiff.untrusted_files import UnreadableFileError

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
text = model.generate(ids, max_new_tokens=64, max_denoising_steps=64)
print(tokenizer.decode(text[0], skip_special_tokens=True))
```

`trust_remote_code=True` runs `configuration_gidd.py`, `modeling_gidd.py` and the two files they import, all in this
folder and short enough to read first. `sha256sum -c checksums.sha256` checks every file."""

_LOAD_SENTENCEPIECE = """The tokenizer is a SentencePiece model (`tokenizer.model`), to be read with the
`sentencepiece` library; the mask's id is {mask_id}."""


def model_card(
    manifest: Manifest, *, name: str, parameters: int, dtype: str, metrics: Path | None, has_fast_tokenizer: bool
) -> str:
    """The card's text.

    Args:
        parameters: number of weights.
        metrics: the run's `metrics.jsonl`, if there is one.
    """
    load = _LOAD.format(folder=name)
    if not has_fast_tokenizer:
        load += "\n\n" + _LOAD_SENTENCEPIECE.format(mask_id=manifest.mask_id)
    table = "\n".join(f"| {key} | {value} |" for key, value in _facts(manifest, parameters, dtype).items())
    scores = "\n".join(f"| {key} | {value} |" for key, value in _scores(metrics, manifest.step).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- diffusion
- gidd
- text-diffusion
---

# {name}

{_kind(manifest)}
It was pretrained with megadiff and has not been tuned to follow instructions.

| | |
|---|---|
{table}

## Scores

{"| | |" if scores else "The checkpoint came without a run's measurements."}
{"|---|---|" if scores else ""}
{scores}

The evidence lower bound (ELBO) is an upper bound on the negative log likelihood, in nats per token, held-out where it
says so.

## Use

{load}
""".replace("\n\n\n", "\n\n")


def _kind(manifest: Manifest) -> str:
    if manifest.config["objective"]["name"] == "ar":
        return "An autoregressive language model, the control of a diffusion model of the same shape and data."
    noise = NoiseConfig.model_validate(manifest.config["noise"])
    name = noise.shift_name if noise.form == "snr" else f"time-parametrised, p_uniform={noise.p_uniform:g}"
    return (
        f"A discrete diffusion language model ({name} noise): it predicts clean tokens from noised ones, with "
        "attention in both directions, and writes by taking noise back step by step (arXiv:2512.10858)."
    )


def _facts(manifest: Manifest, parameters: int, dtype: str) -> dict[str, Any]:
    model = ModelConfig.model_validate(manifest.config["model"])
    data = manifest.config.get("data", {})
    sources = [Path(source["path"]).name for source in data.get("train", [])]
    optimizer = manifest.config.get("optimizer", {})
    facts = {
        "parameters": f"{parameters:,} ({dtype})",
        "blocks, width, heads": f"{model.layers}, {model.hidden}, {model.heads}",
        "tokens in a row": model.seq_length,
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
    """The last measurements up to the checkpoint's step; one that is no finite number is told as such."""
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
    """The run's lines; a card is written without them where the file cannot be read."""
    try:
        yield from read_lines(metrics)
    except (OSError, UnreadableFileError):
        return


def _nats(found: dict[str, Any], key: str, unit: str) -> str:
    value, error = number(found, key), number(found, f"{key}_stderr")
    if value is None:
        return "not a finite number"
    return f"{value:.4f}{'' if error is None else f' ± {error:.4f}'} {unit}"
