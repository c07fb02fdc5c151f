"""Scaling laws as data: law files read and written, and the optima that their laws predict.

`law_format` describes the files. `published/` holds the laws of arXiv:2512.10858; a user's own are looked at before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megadiff.config.load import dump_value
from megadiff.config.messages import validated
from megadiff.config.nodes import Place, parse_yaml
from megadiff.config.suggestions import did_you_mean
from megadiff.diffusion.processes.gidd_snr import SHIFTS
from megadiff.errors import ConfigError
from megadiff.files import write_atomically
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.law_format import Estimate, Excluded, Form, Law, LawFile, Quantity, UnseenPoint
from megadiff.untrusted_files import UnreadableFileError, read_text, why

__all__ = [
    "NOISES",
    "PUBLISHED",
    "Estimate",
    "Excluded",
    "Law",
    "LawBook",
    "LawFile",
    "Optimum",
    "UnseenPoint",
    "compute_optimal",
    "extrapolations",
    "known_noise",
    "law_book",
    "needed",
    "optimal_batch_tokens",
    "optimal_learning_rate",
    "published",
    "read_law_file",
    "write_law_file",
]

PUBLISHED = Path(__file__).with_name("published")
"""Folder of the published laws."""

NOISES = tuple(SHIFTS)
"""Noises that the published laws cover, by the names of `noise.shift`."""

_MAX_BYTES = 16 * 2**20
_NEXT_BEST = {"power": ("best_run",), "surface": ("lse", "varpro")}


def read_law_file(path: str | Path) -> LawFile:
    """Return the laws of a file, each with the file's ranges under its own.

    Raises:
        ConfigError: the file is missing, damaged, of another format, or has an unknown key; file and key are named.
    """
    try:
        text = read_text(Path(path), max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path}: the law file does not exist; check the path") from None
    except (OSError, UnreadableFileError) as error:
        raise ConfigError(f"{path}: the law file {why(error)}; give a YAML file in UTF-8") from None
    place = Place(str(path))
    tree = parse_yaml(text, place)
    if tree is None or not isinstance(tree.value, dict):
        raise ConfigError(f"{place}: a law file is a mapping with the keys format, name, source and laws")
    version = tree.child("format")
    if version is None or version.value != "1":
        found = "none" if version is None else version
        raise ConfigError(f"{place}: `format` must be 1, the law file format of this version, found {found}")
    file = validated(tree, LawFile)
    laws = tuple(law.model_copy(update={"valid": {**file.valid, **law.valid}}) for law in file.laws)
    return file.model_copy(update={"laws": laws})


def write_law_file(path: str | Path, file: LawFile) -> None:
    """Write a law file that `read_law_file` reads as an equal one; what has its default is left out.

    Ranges that a law shares with the file are written once, at the top.

    Raises:
        OSError: the disk refuses.
    """
    tree = file.model_dump(mode="json", exclude_defaults=True)
    shared = tree.get("valid", {})
    lines = ["format: 1"]
    lines += [f"{key}: {dump_value(value)}" for key, value in tree.items() if key not in ("format", "laws")]
    lines.append("laws:")
    for law in tree["laws"]:
        own = {key: ends for key, ends in law.pop("valid", {}).items() if shared.get(key) != ends}
        law["parameters"] = {
            name: found.get("value") if set(found) == {"value"} else found for name, found in law["parameters"].items()
        }
        law |= {"valid": own} if own else {}
        (first, value), *rest = law.items()
        lines.append(f"  - {first}: {dump_value(value)}")
        lines += [f"    {key}: {dump_value(value)}" for key, value in rest]
    write_atomically(Path(path), "\n".join(lines) + "\n")


@dataclass(frozen=True)
class LawBook:
    """Law files in the order in which they are looked through: a user's own before the published ones."""

    files: tuple[LawFile, ...]

    def law(
        self,
        quantity: Quantity,
        *,
        noise: str,
        flop_count: FlopCount | None = None,
        form: Form = "power",
        estimator: str = "vertex",
    ) -> Law | None:
        """Return the first law of a kind, of this noise before one of all noises; None if there is none.

        The estimator `vertex` is the main one: a file without it answers with its next best, `best_run` for power laws
        and `lse` for surfaces.
        """
        estimators = (estimator, *_NEXT_BEST.get(form, ())) if estimator == "vertex" else (estimator,)
        for file in self.files:
            for named in (noise, "all"):
                kind = (quantity, form, named, "all")
                laws = [law for law in file.laws if (law.quantity, law.form, law.noise, law.size) == kind]
                for wanted in estimators:
                    for law in laws:
                        if law.estimator == wanted and flop_count in (None, law.flop_count):
                            return law
        return None

    def file_of(self, law: Law) -> LawFile:
        """Return the file that a law comes from."""
        return next(file for file in self.files if any(own is law for own in file.laws))

    @property
    def noises(self) -> list[str]:
        """Noises of whose loss the first file has a law."""
        return list(dict.fromkeys(law.noise for law in self.files[0].laws if law.quantity == "loss"))

    @property
    def plannable(self) -> list[str]:
        """Noises that can be planned for: those of the first file, and any if it has a law of all noises."""
        return list(dict.fromkeys([*self.noises, *(NOISES if "all" in self.noises else ())]))


@functools.cache
def published() -> LawBook:
    """Return the laws of arXiv:2512.10858: the main fits first, then the other fits of the same runs."""
    return LawBook(tuple(read_law_file(PUBLISHED / f"{name}.yaml") for name in ("gidd", "gidd_variants")))


def law_book(path: str | Path | None) -> LawBook:
    """Return the laws of a file with the published ones behind it, or the published ones alone."""
    return published() if path is None else LawBook((read_law_file(path), *published().files))


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal run of a budget, by the laws and before any rounding."""

    loss: float
    """ELBO in nats per token, without a cooldown."""
    tokens: float
    """Number of training tokens."""
    flops_per_token: float
    """Training FLOPs of a token, by the count of the budget."""
    params: float
    """Number of parameters without embedding and head."""
    batch_tokens: float
    """Number of tokens in a batch."""
    learning_rate: float
    """Base learning rate of CompleteP."""


def known_noise(noise: str, noises: Sequence[str] = NOISES) -> str:
    """Return a noise's name as in `noise.shift`.

    Raises:
        ConfigError: the laws have no such noise.
    """
    name = noise.replace("-", "_")
    if name not in noises:
        near = did_you_mean(name, noises)
        raise ConfigError(f"no law is known for the noise `{noise}`{near or ';'} there are {', '.join(noises)}")
    return name


def compute_optimal(
    flops: float, noise: str, *, method: FlopCount = "deepseek", laws: LawBook | None = None
) -> Optimum:
    """Return what the laws predict to be best for a budget of training FLOPs.

    Args:
        flops: the budget, by the count `method`.
        noise: `masked`, `low_uniform`, `balanced`, `high_uniform` or `uniform`, also with dashes.
        method: the count of FLOPs, of which there must be laws: `deepseek` or `chinchilla`.
        laws: laws to read; by default the published ones.

    Raises:
        ConfigError: the budget is no positive number, or there is no law for the noise or the count.
    """
    book = laws or published()
    name = known_noise(noise, book.plannable)
    if not (math.isfinite(flops) and flops > 0):
        raise ConfigError(f"a budget is a positive number of FLOPs, found {flops:g}")
    quantities: tuple[Quantity, ...] = ("loss", "tokens", "flops_per_token", "params")
    loss, tokens, size, params = (needed(book, quantity, name, method).value(flops) for quantity in quantities)
    batch = optimal_batch_tokens(tokens, noise=name, laws=book)
    return Optimum(loss, tokens, size, params, batch, optimal_learning_rate(batch, noise=name, laws=book))


def needed(
    book: LawBook, quantity: Quantity, noise: str, flop_count: FlopCount | None = None, *, estimator: str = "vertex"
) -> Law:
    """Return the power law of a quantity.

    Raises:
        ConfigError: the files have none.
    """
    law = book.law(quantity, noise=noise, flop_count=flop_count, estimator=estimator)
    if law is not None:
        return law
    counted, named = f" by the count {flop_count}" if flop_count else "", ", ".join(file.name for file in book.files)
    raise ConfigError(f"no law of {quantity} for {noise} noise{counted} ({estimator}) is in the law files {named}")


def optimal_batch_tokens(
    tokens: float, *, noise: str = "all", laws: LawBook | None = None, estimator: str = "vertex"
) -> float:
    """Return the batch, in tokens, that is best for a run of this number of tokens (the pooled law by default)."""
    return needed(laws or published(), "batch_tokens", noise, estimator=estimator).value(tokens)


def optimal_learning_rate(batch_tokens: float, *, noise: str = "all", laws: LawBook | None = None) -> float:
    """Return the base learning rate that is best for a batch of this number of tokens (the pooled law by default)."""
    return needed(laws or published(), "learning_rate", noise).value(batch_tokens)


def extrapolations(laws: Iterable[Law], values: Mapping[str, float]) -> dict[str, str]:
    """Return a phrase for each value, by its name, that lies outside the range of a law that speaks of it."""
    found: dict[str, str] = {}
    for law in laws:
        for name, value in values.items():
            limits = law.valid.get(name)
            if limits is not None and not limits[0] * (1 - 1e-6) <= value <= limits[1] * (1 + 1e-6):
                side = "above" if value > limits[1] else "below"
                end = limits[1] if value > limits[1] else limits[0]
                at, to = (f"{each:,.0f}" if 100 <= each < 1e6 else f"{each:.3g}" for each in (value, end))
                found[name] = f"{name} {at} is {side} {to}, the end of what was measured"
    return found
