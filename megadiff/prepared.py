"""All of a run that can be known, and refused, before any process group exists."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from megadiff.data.baselines import Baselines, count_baselines
from megadiff.data.open import OpenData, open_data
from megadiff.data.tokenizer_files import load_tokenizer
from megadiff.data.tokenizers import Tokenizer
from megadiff.derived import memory_shortage
from megadiff.errors import ConfigError, DataError, ShortageError
from megadiff.model import cost
from megadiff.model.kernels import check_kernels
from megadiff.parallel.config import Layout
from megadiff.platform.launch_order import order_launches
from megadiff.platform.machine import Platform, detect
from megadiff.run_config import RunConfig

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class Prepared:
    """A run description with its tokenizer, data and layout."""

    config: RunConfig
    tokenizer: Tokenizer
    data: OpenData
    layout: Layout

    @property
    def shape(self) -> cost.Shape:
        """The model's size for closed-form costs."""
        return self.config.shape(vocab_size=self.tokenizer.vocab_size)

    def shortage(self, error: BaseException) -> ShortageError | None:
        """What to say of an allocation that failed (`derived.memory_shortage`); None of any other error."""
        return memory_shortage(error, self.config, self.layout, self.shape)


def prepare(config: RunConfig, *, world_size: int) -> Prepared:
    """Open tokenizer and data and check the layout.

    Raises:
        ConfigError, DataError: what cannot be, in one sentence.
    """
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except DataError as error:
        raise DataError(f"data.tokenizer: {error}") from error
    if config.data.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"data.vocab_size is {config.data.vocab_size}, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids with its mask; set it to that or leave it out"
        )
    layout = config.layout(world_size=world_size, vocab_size=tokenizer.vocab_size)
    data = open_data(
        config.data, tokenizer, seq_length=config.model.seq_length, seed=config.seed, valid_rows=config.eval.rows
    )
    return Prepared(config, tokenizer, data, layout)


def baselines_of(prepared: Prepared) -> Baselines | None:
    """Return what unigram and bigram models reach on the validation data; None where there are none.

    Raises:
        DataError: tokens cannot be read.
    """
    train, valid = prepared.data.train, prepared.data.valid
    if not valid:
        return None
    return count_baselines(
        [source.reader for source in train.sources],
        train.blend.counts,
        [source.reader for source in valid],
        [len(source) for source in valid],
        vocab_size=prepared.tokenizer.vocab_size,
    )


def machine_for(config: RunConfig) -> Platform:
    """Find the machine the run asks for.

    Raises:
        PlatformError: it, or a kernel the run insists on, is not there.
    """
    launches = order_launches(tensor_ranks=config.parallel.tensor) if config.platform != "cpu" else None
    platform = detect(config.platform, layers=config.wanted_layers)
    check_kernels(config.parallel, config.precision, platform)
    if launches is not None and not platform.is_cpu:
        log.info(launches)
    return platform


def describe_data(prepared: Prepared) -> list[str]:
    """Lines about tokenizer and data."""
    trained, held = prepared.config.tokens_before(prepared.config.steps), prepared.data.train_tokens
    return [
        f"tokenizer         {prepared.tokenizer.name}, mask id {prepared.tokenizer.mask_id}",
        f"data              {held:,} tokens to train on: {trained / held:.2f} epochs",
    ]


def describe_baselines(baselines: Baselines | None) -> list[str]:
    """Return the line about the baselines, or none without validation data."""
    return [] if baselines is None else [f"baselines         {baselines.describe()}"]
