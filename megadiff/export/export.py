"""Export of a training checkpoint of any layout to a Hugging Face folder, tensor by tensor in one CPU process.

The folder's `README.md` is a card of the model: its training data, its scores, and how to load it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadiff.checkpoint.folder import chosen, verify_files
from megadiff.checkpoint.manifest import Manifest
from megadiff.errors import CheckpointError, ConfigError
from megadiff.export import huggingface
from megadiff.export.architectures import Architecture, architecture_for_export
from megadiff.export.folder_files import CONFIG, TRAINING, write_checksums
from megadiff.export.released_config import config_of
from megadiff.export.weight_files import (
    Planned,
    StoredTensors,
    TrainingTensor,
    is_gain,
    training_tensors,
    write_weights,
)
from megadiff.files import UnreadableFileError, sync
from megadiff.metric_lines import Line, number, read_lines
from megadiff.model import rope
from megadiff.model.config import ModelConfig
from megadiff.run.recorded_parts import method_of, tokenizer_of
from megadiff.sampling import standalone

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


CODE = ("configuration_gidd.py", "modeling_gidd.py", "generation_gidd.py")
"""Files of `megadiff.export.huggingface` that are shipped."""
COPIES = {"sampling_gidd.py": standalone, "rope_gidd.py": rope}
"""Modules of the package that are shipped, by the names of their copies."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    folder: Path
    checkpoint: Path
    """The step folder that was exported."""
    tensors: int
    parameters: int
    bytes: int
    """Size of the weights."""


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: str | None = None,
    architecture: str | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
    on_file: Callable[[Path], None] = lambda path: None,
) -> Exported:
    """Write `output`, completely or not at all.

    Args:
        checkpoint: a step folder, or a run folder, whose newest complete checkpoint is taken.
        output: must not exist, or be empty.
        dtype: `bf16` or `fp32`; None keeps the checkpoint's type.
        max_shard_bytes: maximal size of a weight file.
        tokenizer: path to use instead of the one the run was configured with.
        architecture: a public architecture (`architectures.ARCHITECTURES`) whose names and `config.json` the folder is
            to have, so that other programs read it as any model of that kind; None for the package's own class, whose
            code is in the folder.
        on_tensor: called with each tensor's name before it is read.
        on_file: called with each weight file when it is written.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
        ConfigError: `output` is not empty, models of this training method cannot be exported, or the architecture
            cannot represent the model.
        DataError: the tokenizer is missing, is not the one that the model was trained with, or cannot be exported.
    """
    folder = chosen(checkpoint)
    manifest = verify_files(folder, hashes=True)
    text = tokenizer_of(manifest, tokenizer, where=folder)
    method = method_of(manifest, text, where=folder)
    use = method.export_config()
    kind = None
    if architecture is not None:
        model = ModelConfig.model_validate(manifest.config["model"])
        kind = architecture_for_export(architecture, model, manifest.config, is_causal=bool(use.get("is_causal")))
    weights = _Weights(folder, manifest, DTYPES[dtype] if dtype else None, kind)
    with staged(output) as staging:
        # First, since it may be refused, and weights take long.
        names = text.export(staging, seq_length=weights.model.seq_length, prepend_bos=bool(manifest.prepended_bos))
        entries = write_weights(
            staging, weights.planned, weights.fetch(on_tensor), max_bytes=max_shard_bytes, on_file=on_file
        )
        parameters = sum(torch.Size(tensor.shape).numel() for tensor in weights.planned)
        stored = str(weights.planned[0].dtype).removeprefix("torch.")
        special = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id, "pad_token_id": text.pad_id}
        if kind is None:
            _write_code(staging)
            _write_json(staging / CONFIG, config_of(manifest, text, use, dtype=stored))
            _write_json(staging / "generation_config.json", {**special, **_generation_config(manifest)})
        else:
            if kind.method != "next_token":
                special["mask_token_id"] = manifest.mask_id
            config = kind.config(weights.model, vocab_size=manifest.vocab_size, dtype=stored, special=special)
            _write_json(staging / CONFIG, config)
        _write_json(staging / TRAINING, _training(manifest))
        card = model_card(
            manifest,
            name=output.name,
            description=method.description,
            parameters=parameters,
            dtype=stored,
            metrics=_metrics_of(folder),
            tokenizer_files=names,
            architecture=kind,
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
        write_checksums(staging, entries)
    return Exported(output, folder, len(weights.planned), parameters, sum(tensor.bytes for tensor in weights.planned))


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `output` if the block succeeds and is deleted if it fails.

    Raises:
        ConfigError: `output` is a file or a non-empty folder, or cannot be created.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ConfigError(f"{output} exists and is not an empty folder; give another --output, or move it away")
    staging = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed conversion
        staging.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}); give another --output") from None
    try:
        yield staging
        sync(staging)
        staging.replace(output)  # replaces an empty folder
        sync(output.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass
class _Weights:
    """The released tensors of a training checkpoint."""

    folder: Path
    manifest: Manifest
    dtype: torch.dtype | None
    kind: Architecture | None
    model: ModelConfig = field(init=False)
    planned: list[Planned] = field(init=False)
    _made_of: dict[str, tuple[TrainingTensor, int]] = field(init=False, default_factory=dict)
    _packed: tuple[TrainingTensor | None, Tensor] = field(init=False, default=(None, torch.empty(0)))

    def __post_init__(self) -> None:
        self.model = ModelConfig.model_validate(self.manifest.config["model"])
        self._stored = StoredTensors(self.folder)
        self.planned = []
        for tensor in training_tensors(self.model, vocab_size=self.manifest.vocab_size):
            stack = () if tensor.layer is None else (self.model.layers,)
            if self._stored.shape(tensor.key) != (*stack, *tensor.shape):
                raise CheckpointError(
                    f"{self.folder}: {tensor.key} has shape {self._stored.shape(tensor.key)}, but its manifest "
                    f"describes a model with {(*stack, *tensor.shape)}; take another checkpoint of the run"
                )
            dtype = self.dtype or self._stored.dtype(tensor.key)
            if self.kind is not None and is_gain(tensor.released[0]):  # an import keeps offsets of gains in float32
                dtype = self.planned[0].dtype
            for released, shape in zip(tensor.released, tensor.released_shapes, strict=True):
                name = released if self.kind is None else self.kind.stored(released)
                self.planned.append(Planned(name, shape, dtype))
                self._made_of[name] = (tensor, tensor.released.index(released))

    def fetch(self, on_tensor: Callable[[str], None]) -> Callable[[Planned], Iterator[Tensor]]:
        """Return the function with which `write_weights` reads the tensors."""

        def blocks(planned: Planned) -> Iterator[Tensor]:
            on_tensor(planned.name)
            tensor, part = self._made_of[planned.name]
            if tensor.packed_rows:
                yield self._part(tensor, part, planned.dtype)
                return
            if self.kind is not None and is_gain(tensor.released[0]):
                yield (1.0 + self._read(tensor, 0, planned.shape[0], torch.float32)).to(planned.dtype)
                return
            for start in range(0, planned.shape[0], planned.rows_at_once):
                rows = min(planned.rows_at_once, planned.shape[0] - start)
                yield self._read(tensor, start, rows, planned.dtype)

        return blocks

    def _read(self, tensor: TrainingTensor, start: int, rows: int, dtype: torch.dtype) -> Tensor:
        one = () if tensor.layer is None else (1,)
        offset = (*tensor.offset[: len(one)], start, *tensor.offset[len(one) + 1 :])
        found = self._stored.read(tensor.key, offset, (*one, rows, *tensor.shape[1:]), dtype=dtype)
        return found.view(rows, *tensor.shape[1:])

    def _part(self, tensor: TrainingTensor, part: int, dtype: torch.dtype) -> Tensor:
        """Return one of several tensors that are packed in one, which is read once for all of them."""
        if self._packed[0] != tensor:
            self._packed = (None, torch.empty(0))
            self._packed = (tensor, self._read(tensor, 0, tensor.shape[0], dtype))
        return tensor.part(self._packed[1], part)


def _write_code(folder: Path) -> None:
    source = Path(huggingface.__file__).parent
    for name in CODE:
        shutil.copyfile(source / name, folder / name)
    for name, module in COPIES.items():
        assert module.__file__ is not None
        shutil.copyfile(module.__file__, folder / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _generation_config(manifest: Manifest) -> dict[str, Any]:
    length = manifest.config["model"]["seq_length"]
    return {"max_new_tokens": min(128, max(1, length // 2)), "max_denoising_steps": 128, "temperature": 1.0}


def _training(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest's record of the training, without paths of one machine."""
    found = manifest.model_dump(mode="json", exclude={"files", "health"})
    found["config"].pop("output_dir", None)
    return found


def _metrics_of(folder: Path) -> Path | None:
    found = folder.resolve().parent.parent / "metrics.jsonl"
    return found if folder.resolve().parent.name == "checkpoints" and found.is_file() else None
