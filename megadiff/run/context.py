"""Everything about a run that can be determined, and refused, before a process group exists."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megadiff.data.baselines import Baselines, baselines_of_data
from megadiff.data.facts import DataFacts
from megadiff.data.mixture import Mixture
from megadiff.data.open import OpenData, open_data
from megadiff.data.review import (
    Advice,
    advice,
    describe_sources,
    describe_validation,
    source_facts,
    validation_facts,
)
from megadiff.data.tokenizers import Tokenizer, tokenizer_of
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.errors import ShortageError
from megadiff.loss.fused_lm_head import LossKernel
from megadiff.methods import Method, MethodContext, build_method, refuse_conversations, refuse_packing
from megadiff.model import cost
from megadiff.model.kernels import check_kernels
from megadiff.parallel.config import Layout
from megadiff.platform.machine import Platform, detect, order_launches
from megadiff.run.config import RunConfig
from megadiff.run.summary import lay_out_run, memory_shortage

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class RunContext:
    """A run's configuration with its tokenizer, data and layout."""

    config: RunConfig
    tokenizer: Tokenizer
    data: OpenData
    layout: Layout

    def at(self, mixture: Mixture, sample: int) -> RunContext:
        """Return the same run with its data from a sample on, at the positions of a mixture of its phase's sources."""
        return replace(self, data=self.data.at(sample).continued(mixture))

    @property
    def shape(self) -> cost.Shape:
        """The model's size for closed-form costs."""
        return self.config.shape(vocab_size=self.tokenizer.vocab_size)

    @cached_property
    def process(self) -> NoiseProcess:
        """Noise process over the tokenizer's vocabulary."""
        return build_process(self.config.noise, vocab_size=self.tokenizer.vocab_size, mask_id=self.tokenizer.mask_id)

    def method(self, loss_kernel: LossKernel) -> Method:
        """Return the run's training method, with the chosen implementation of LM head and loss."""
        config = self.config
        context = MethodContext(
            process=self.process,
            tokenizer=self.tokenizer,
            noise=config.noise,
            objective=config.objective,
            conditioning=config.conditioning,
            loss_kernel=loss_kernel,
            seed=config.seed,
        )
        method = build_method(config.method, context)
        if (key := self.data.conversations_key) is not None:
            refuse_conversations(method, key)
        if (key := self.data.packed_key) is not None:
            refuse_packing(method, key)
        return method

    def shortage(self, error: BaseException) -> ShortageError | None:
        """Return the error to raise for a failed allocation (`summary.memory_shortage`); None for any other error."""
        return memory_shortage(error, self.config, self.layout, self.shape)


def validate_run(config: RunConfig, *, world_size: int) -> RunContext:
    """Open tokenizer and data and check the layout.

    Raises:
        ConfigError, DataError: something is invalid; the message names it in one sentence.
    """
    tokenizer = tokenizer_of(config.data)
    layout = lay_out_run(config, world_size=world_size, vocab_size=tokenizer.vocab_size)
    data = open_data(
        config.data,
        tokenizer,
        seq_length=config.model.seq_length,
        seed=config.seed,
        valid_sequences=config.eval.sequences,
        samples_before=config.sizes.samples_before,
        samples=config.samples,
    )
    return RunContext(config, tokenizer, data, layout)


def baselines_of(prepared: RunContext) -> Baselines | None:
    """Return the losses of unigram and bigram models on the validation data; None without validation data.

    Of conversations there are none: the bound counts answers alone, and these models all tokens.

    Raises:
        DataError: tokens cannot be read.
    """
    data, valid = prepared.data, prepared.data.valid
    if not valid or any(source.reader.has_spans for source in valid):
        return None
    drawn = data.drawn_at(prepared.config.samples)
    return baselines_of_data(
        [source.reader for source, _ in drawn],
        [number for _, number in drawn] if data.following is not None else data.train.blend.shares,
        [source.reader for source in valid],
        [len(source) for source in valid],
        vocab_size=prepared.tokenizer.vocab_size,
    )


def machine_for(config: RunConfig) -> Platform:
    """Detect the machine that the run needs.

    Raises:
        PlatformError: the machine, or a kernel that the run requires, is not available.
    """
    launches = order_launches(tensor_ranks=config.parallel.tensor) if config.platform != "cpu" else None
    platform = detect(config.platform, layers=config.wanted_transformer_impl)
    check_kernels(config.parallel, config.precision, platform)
    if launches is not None and not platform.is_cpu:
        log.info(launches)
    return platform


def _describe_framing(prepended_bos: bool | None) -> list[str]:
    """Return a line about what the model's prompts will begin with, unless they are just their text."""
    if prepended_bos is None:
        return [
            "documents         begin with bos in some training sources and not in others; prompts will begin without "
            "(--prepend-bos of the tools puts it there)"
        ]
    return ["documents         begin with bos, and so will prompts"] if prepended_bos else []


def describe_data(prepared: RunContext, *, step: int = 0) -> list[str]:
    """Return lines about the tokenizer and each data source of a run that has taken `step` steps."""
    config, tokenizer = prepared.config, prepared.tokenizer
    limits = f", {tokenizer.export_limits}" if tokenizer.export_limits is not None else ""
    return [
        *_describe_framing(prepared.data.prepended_bos),
        f"tokenizer         {tokenizer.name}, mask id {tokenizer.mask_id}{limits}",
        *describe_sources(prepared.data, now=config.sizes.samples_before(step), end=config.samples),
        *describe_validation(prepared.data),
    ]


def data_advice(prepared: RunContext) -> list[Advice]:
    """Return warnings about likely mistakes in the data. Reads parts of the sources to find text that two share."""
    config = prepared.config
    return advice(
        prepared.data,
        config.data,
        end=config.samples,
        length=config.length_setting,
        eval_sequences=config.eval.sequences,
    )


def data_facts(prepared: RunContext, *, step: int, advice: Sequence[Advice]) -> DataFacts:
    """Return the content of the run folder's `data.json` after `step` steps."""
    config, data = prepared.config, prepared.data
    return DataFacts(
        step=step,
        fingerprint=data.at(config.sizes.samples_before(step)).fingerprint,
        train=source_facts(data, now=config.sizes.samples_before(step), end=config.samples),
        valid=validation_facts(data),
        advice=[str(found) for found in advice],
        vocab_size=prepared.tokenizer.vocab_size,
    )


def describe_baselines(baselines: Baselines | None) -> list[str]:
    """Return the line about the baselines; none without validation data."""
    return [] if baselines is None else [f"baselines         {baselines.describe()}"]
