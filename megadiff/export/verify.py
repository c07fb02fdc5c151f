"""Comparison of an exported folder with the trainer's model: logits at several noise levels, and ids of sample texts.

The folder is loaded in another process, which imports the folder's code, has no network and none of this process's
state, and has no information on the model except the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.errors import CheckpointError, DataError, PlatformError

FP32_BOUND = 1e-5
"""Maximal difference of two logits in float32, times the largest logit if that is above 1."""

BF16_BOUND = 0.03
"""Maximal root mean square difference of logits in bf16, relative to their root mean square. bf16 has 8 bits, so one
rounding is up to 0.4 %, and two programs round in different places, block after block.
"""

LEVELS = (-6.0, -2.0, 0.0, 2.0, 6.0)
"""Log signal-to-noise ratios of the sequences that are compared."""

_MAX_NAMES = 64
_CHILD = Path(__file__).with_name("verify_child.py")


SAMPLE_TEXTS = (
    "",
    " ",
    "\n",
    "Once upon a time, there were 12345 cats.",
    "  leading, trailing and   inner spaces  ",
    "lines\n\n\n\tand tabs\r\n",
    "née über na\u00efve e\u0301 \ufb01 \uff1c\uff53\uff1e \U0001f600\u200d\U0001f525 \u65e5\u672c\u8a9e \u0627\u0644",
    "def f(x):\n    return x[3] - {'a': 1.5e-3}  # -------- ========",
    "aaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 33,
    "\u2581a \u2581\u2581 \u00a0 \x00 \x7f",
    "<s></s><pad><unk><mask> [MASK][CLS][SEP][PAD][UNK] <|endoftext|> <|im_start|>user<|im_end|>",
)
"""Texts in which tokenizers differ; the names of a tokenizer's own special tokens are added."""


@dataclass(frozen=True)
class Case:
    """A sequence of tokens at one noise level."""

    log_snr: float
    ids: Tensor
    """Token ids, [1, L] int64."""
    prompt_length: int


@dataclass(frozen=True)
class Trainer:
    """The trainer's model, opened."""

    logits: Callable[[Case], Tensor]
    """Function that returns logits [1, L, V]."""
    head: Tensor
    """Weight of the head, [V or more, hidden]."""


OpenTrainer = Callable[[str], AbstractContextManager[Trainer]]
"""Function that opens it to compute in `fp32` or `bf16`."""


@dataclass(frozen=True)
class Verified:
    """Result of the comparison in one precision."""

    compute: str
    largest: float
    """Largest absolute difference of two logits."""
    relative: float
    """Root mean square of differences over that of logits."""
    scale: float
    """Largest absolute logit."""
    head_was_zero: bool
    """Whether a random head replaced one that is still zero, with which all logits would agree."""

    @property
    def is_equal(self) -> bool:
        """Whether the differences are within the bound."""
        if self.compute == "fp32":
            return self.largest <= FP32_BOUND * max(1.0, self.scale)
        return self.relative <= BF16_BOUND

    def describe(self) -> str:
        """Return one line for the console."""
        bound = f"at most {FP32_BOUND:g} (times the largest logit above 1)"
        if self.compute == "bf16":
            bound = f"at most {BF16_BOUND:g} relative"
        head = "; the head is still zero, a random one replaced it" if self.head_was_zero else ""
        verdict = "equal" if self.is_equal else "NOT EQUAL"
        return (
            f"{self.compute}: {verdict}, largest difference {self.largest:.2e} of logits up to {self.scale:.3g}, "
            f"relative {self.relative:.2e} (wanted {bound}){head}"
        )


def noised_cases(process: NoiseProcess, *, length: int, knows_prompts: bool, seed: int = 0) -> list[Case]:
    """Return a sequence at each level of `LEVELS`, and one with a clean prompt where the model knows prompts."""
    draw = torch.Generator().manual_seed(seed)

    def real() -> Tensor:
        ids = torch.randint(process.num_real, (1, length), generator=draw)
        return ids + (ids >= process.mask_id).long()

    def sequence(log_snr: float, prompt_length: int) -> Case:
        clean, replaced = real(), real()
        level = torch.tensor(log_snr, dtype=torch.float64)
        is_mask = torch.rand(1, length, generator=draw) >= process.uniform_prob(level)
        keeps = torch.rand(1, length, generator=draw) < torch.sigmoid(level)
        keeps |= torch.arange(length) < prompt_length
        return Case(log_snr, torch.where(keeps, clean, torch.where(is_mask, process.mask_id, replaced)), prompt_length)

    sequences = [sequence(log_snr, 0) for log_snr in LEVELS]
    return sequences + ([sequence(0.0, length // 3)] if knows_prompts else [])


def sample_ids(tokenizer: Tokenizer, *, prepend_bos: bool) -> dict[str, list[int]]:
    """Return the training ids of sample texts, framed as prompts are; none if Transformers cannot produce them.

    Args:
        tokenizer: the trainer's tokenizer.
        prepend_bos: whether the documents of the training data began with bos.
    """
    if tokenizer.export_limits is not None:
        return {}
    start = [tokenizer.bos_id] if prepend_bos and tokenizer.bos_id is not None else []
    names = tokenizer.special_names[:_MAX_NAMES]
    texts = dict.fromkeys([*SAMPLE_TEXTS, *names, *(f"The {name} cat{name}{name} sat" for name in names)])
    found: dict[str, list[int]] = {}
    for text in texts:
        with suppress(DataError):  # a text that cannot occur in the training data either
            found[text] = [*start, *tokenizer.encode(text)]
    return found


def verify(
    folder: Path, open_trainer: OpenTrainer, cases: Sequence[Case], *, texts: Mapping[str, Sequence[int]] | None = None
) -> list[Verified]:
    """Compare logits in float32 and in bf16, and the ids of texts.

    Args:
        folder: the exported folder.
        open_trainer: opens the trainer's model.
        cases: sequences whose logits are compared.
        texts: expected ids of texts under the folder's tokenizer in transformers.

    Raises:
        CheckpointError: the folder does not load, its logits differ by more than the bounds, or ids differ.
        PlatformError: transformers is not installed.
    """
    require_transformers()
    asked = {compute: _asked(open_trainer, cases, compute) for compute in ("fp32", "bf16")}
    heads = {compute: one.drawn_head for compute, one in asked.items()}
    answers, ids = _of_the_folder(folder, cases, heads, list(texts or {}))
    for (text, wanted), got in zip((texts or {}).items(), ids, strict=True):
        if list(wanted) != got:
            raise CheckpointError(
                f"{folder}: transformers reads other ids than the trainer: {text!r} gives {_few(got)}, wanted "
                f"{_few(wanted)}"
            )
    found = [_compared(compute, one, answers) for compute, one in asked.items()]
    wrong = [one for one in found if not one.is_equal]
    if wrong:
        raise CheckpointError(f"{folder} does not compute what the trainer does: {wrong[0].describe()}")
    return found


def require_transformers() -> None:
    """Raise early if the library is missing.

    Raises:
        PlatformError: transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise PlatformError("--verify loads the folder in transformers, which is not installed: pip install '.[hf]'")


@dataclass(frozen=True)
class _Asked:
    """The trainer's logits in one precision."""

    logits: list[Tensor]
    drawn_head: Tensor | None


def _asked(open_trainer: OpenTrainer, cases: Sequence[Case], compute: str) -> _Asked:
    with open_trainer(compute) as trainer:
        was_zero = not bool(trainer.head.any())
        if was_zero:
            drawn = torch.randn(trainer.head.shape, generator=torch.Generator().manual_seed(0))
            trainer.head.copy_((drawn * trainer.head.shape[1] ** -0.5).to(torch.bfloat16))
        logits = [trainer.logits(case).float() for case in cases]
        return _Asked(logits, trainer.head[: logits[0].shape[-1]].clone() if was_zero else None)


def _compared(compute: str, asked: _Asked, answers: dict[str, Tensor]) -> Verified:
    theirs = [answers[f"{compute}.logits.{number}"] for number in range(len(asked.logits))]
    differences = torch.cat([(a - b).flatten() for a, b in zip(asked.logits, theirs, strict=True)])
    logits = torch.cat([one.flatten() for one in asked.logits])
    return Verified(
        compute=compute,
        largest=float(differences.abs().max()),
        relative=float(differences.square().mean().sqrt() / logits.square().mean().sqrt().clamp(min=1e-30)),
        scale=float(logits.abs().max()),
        head_was_zero=asked.drawn_head is not None,
    )


def _few(ids: Sequence[int]) -> str:
    """Return the ids as text, or only the first of many."""
    return f"{list(ids[:12])}" + (" and more" if len(ids) > 12 else "")


def _of_the_folder(
    folder: Path, cases: Sequence[Case], heads: dict[str, Tensor | None], texts: list[str]
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Return `{precision.logits.number: [1, L, V]}` and each text's ids, both computed in the clean process."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "asked.safetensors", Path(scratch) / "answered.safetensors"
        tensors = {f"ids.{number}": case.ids for number, case in enumerate(cases)}
        tensors |= {f"prompt.{number}": torch.tensor([case.prompt_length]) for number, case in enumerate(cases)}
        tensors |= {f"{compute}.head": head.contiguous() for compute, head in heads.items() if head is not None}
        save_file(tensors, asked)
        text_file = Path(scratch) / "texts.json"
        text_file.write_text(json.dumps(texts), encoding="utf-8")
        words = {"folder": str(folder.resolve()), "asked": str(asked), "answered": str(answered), "compute": [*heads]}
        words["texts"] = str(text_file)
        process = subprocess.run(
            [*_without_network(), sys.executable, "-I", "-B", str(_CHILD), json.dumps(words)],
            env=_clean_environment(scratch),
            capture_output=True,
            text=True,
        )
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or ["no message"]
            raise CheckpointError(f"{folder} does not load in transformers: {last[0]}")
        return load_file(answered), json.loads(text_file.read_text(encoding="utf-8"))


def _without_network() -> list[str]:
    """Return a command prefix that disables the network, if this user may do so; the child blocks sockets as well."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], capture_output=True).returncode:
        return []
    return [unshare, "-n"]


def _clean_environment(scratch: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": scratch, "HOME": scratch}
