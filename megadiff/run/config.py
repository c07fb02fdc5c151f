"""The configuration of a whole run: composes all sections and checks constraints between them.

A section whose settings a package works with is in that package's `config`; those that only a run as a whole needs,
`checkpoint` and `eval`, are here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megadiff.config.section import Section
from megadiff.data.config import BatchConfig, BatchSizes, DataConfig
from megadiff.diffusion.config import (
    PROCESSES,
    WEIGHTINGS,
    ConditioningConfig,
    NoiseConfig,
    ObjectiveConfig,
    check_noise_and_objective,
)
from megadiff.errors import ConfigError, shown
from megadiff.methods import METHODS, MethodConfig, check_method_of
from megadiff.model import cost
from megadiff.model.config import ModelConfig, PrecisionConfig, check_shapes
from megadiff.optim.config import (
    OPTIMIZERS,
    OptimizerConfig,
    Scale,
    ScheduleConfig,
    WarmupStableDecay,
    resolve_decay_steps,
)
from megadiff.parallel.config import Layout, ParallelConfig, lay_out
from megadiff.supervision.config import StopConfig, WatchdogConfig
from megadiff.train.config import HOOKS, GoodputConfig, HealthConfig, HookConfig, LogConfig

_LONGEST_NAME = 200
"""Maximal length of a run's name, in bytes; file systems allow 255, some of which temporary files and the scheduler's
files need.
"""

_ROUNDING = 1e-12
"""Relative error that is allowed to a budget of FLOPs, since products of large numbers are rounded."""


class CheckpointConfig(Section):
    """Frequency of checkpoints and number of those kept (section `checkpoint:`). The last step is always saved."""

    every: int = Field(default=1000, gt=0)
    """Number of steps between checkpoints."""
    start_from: str | None = None
    """Step folder of another run to begin with, including weights, optimizer state and step count; this is how a
    cooldown branches from a trunk. Ignored once the run has checkpoints of its own."""
    weights_only: bool = False
    """Whether the run takes only the weights of `start_from`, with a new optimizer and schedule, from step 0 on; this
    is how a model is adapted or fine-tuned. Imported weights are always taken so."""
    keep: int = Field(default=2, ge=0)
    """Number of newest complete checkpoints to keep, at least two (1 is refused); 0 keeps all. The last one before the
    cooldown is kept as well, so that other cooldowns can branch from it."""
    in_background: bool = Field(default=True, alias="async")
    """Whether files are written while training continues; training then pauses only for the copy to host memory."""

    @property
    def branches_from(self) -> str | None:
        """Step folder whose run this one continues; None for a run from step 0, with the weights of another or not."""
        return None if self.weights_only else self.start_from

    @field_validator("keep")
    @classmethod
    def _one_is_none(cls, keep: int) -> int:
        if keep == 1:
            raise ValueError("keep must be 0 (all) or at least 2: a single checkpoint may prove damaged when needed")
        return keep

    @model_validator(mode="after")
    def _weights_have_an_origin(self) -> CheckpointConfig:
        if self.weights_only and self.start_from is None:
            raise ValueError("weights_only is true, but start_from names no checkpoint to take weights from")
        return self


class EvalConfig(Section):
    """Section `eval:` the ELBO of fixed validation sequences with fixed noise, and text samples to look at."""

    every: int = Field(default=1000, ge=0)
    """Number of steps between evaluations; 0 evaluates only before the first step and after the last, and at the steps
    that `at_steps` and `at_flops` name."""
    at_steps: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Further steps with an evaluation, at most the run's last."""
    at_flops: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """Budgets with an evaluation each: at the first step after which the run's training FLOPs reach them, by
    `schedule.flop_count` and counted as `flops` in `metrics.jsonl`; at most what the whole run takes."""
    sequences: int = Field(default=64, gt=1)
    """Number of validation sequences, spread evenly over the validation data."""
    num_noise_levels: int = Field(default=4, gt=0)
    """Number of noise levels per sequence, stratified over the schedule."""
    samples: int = Field(default=0, ge=0, le=64)
    """Number of text samples per evaluation, written to `samples/step_XXXXXXXX.txt` of the run folder; 0 for none."""
    sample_steps: int = Field(default=64, gt=0)
    """Number of denoising steps of a text sample; each is one pass of `samples` sequences through the model."""


class RunConfig(Section):
    """The resolved configuration of one training run."""

    name: str = Field(min_length=1)
    """Name of the run folder inside `output_dir`."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the data order and the noise."""
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    """The machine; `auto` takes CUDA when there is one."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers of a bf16 model on CUDA: Transformer Engine's fused ones, or megatron-core's own on
    torch's kernels. `auto` takes the first if it can be imported; the log's first line shows the choice.
    """
    model: ModelConfig
    noise: Annotated[NoiseConfig, PROCESSES] = PROCESSES.default(NoiseConfig)
    objective: Annotated[ObjectiveConfig, WEIGHTINGS] = WEIGHTINGS.default(ObjectiveConfig)
    method: Annotated[MethodConfig, METHODS] = METHODS.default(MethodConfig)
    conditioning: ConditioningConfig = ConditioningConfig()
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: Annotated[OptimizerConfig, OPTIMIZERS]
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    hooks: tuple[Annotated[HookConfig, HOOKS], ...] = ()
    """Hooks and metric sinks that the run has besides its own, called in this order."""
    health: HealthConfig = HealthConfig()
    stop: StopConfig = StopConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    goodput: GoodputConfig = GoodputConfig()

    @classmethod
    def other_kind(cls, keys: Collection[str]) -> str | None:
        """Return that a file is the description of a sweep, and which commands take one, if it plainly is one."""
        if "model" in keys or len({"sizes", "budgets", "grid"} & set(keys)) < 2:
            return None
        return (
            "this is the description of a sweep, not of a run; `megadiff sweep write` makes the descriptions of its "
            "runs, with --dry-run it shows them, and `megadiff sweep run --local` trains them"
        )

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if Path(name).name != name or name.startswith(".") or any(ord(c) < 32 for c in name):
            raise ValueError(
                f"name must be a plain folder name without `/`, leading dot or control characters, got {name!r}"
            )
        if (size := len(name.encode())) > _LONGEST_NAME:
            raise ValueError(f"name must have at most {_LONGEST_NAME} bytes, got {size}: {shown(name)}")
        return name

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        try:
            check_noise_and_objective(self.noise, self.objective)
            check_method_of(self)
            self.lr_schedule()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _evaluations_are_reached(self) -> RunConfig:
        if late := [step for step in self.eval.at_steps if step > self.steps]:
            raise ValueError(
                f"eval.at_steps has {late[0]:,}, but the run ends after {self.steps:,} steps ({self.length_setting}); "
                "leave it out, or train longer"
            )
        try:
            late = [flops for flops in self.eval.at_flops if self.step_of_flops(flops) > self.steps]
            end = self.tokens_before(self.steps) * self._flops_per_token() if late else 0.0
        except ConfigError as error:
            raise ValueError(str(error).replace("schedule.", "eval.at_flops with schedule.", 1)) from None
        if late:
            raise ValueError(
                f"eval.at_flops has {late[0]:g} FLOPs, but the run reaches {end:.13g} ({self.length_setting}, counted "
                f"as {self.schedule.flop_count}); leave it out, or train longer"
            )
        return self

    @model_validator(mode="after")
    def _phases_are_reached(self) -> RunConfig:
        if self.data.phases and (last := self.data.phases[-1].from_step) >= self.steps:
            raise ValueError(
                f"data.phases[{len(self.data.phases) - 1}].from_step is {last:,}, but the run ends after "
                f"{self.steps:,} steps ({self.length_setting}); leave the phase out, begin it earlier, or train longer"
            )
        return self

    @model_validator(mode="after")
    def _quirks_fit(self) -> RunConfig:
        if self.precision.master_weights:
            return self
        wanted = {
            "precision.compute": (self.precision.compute, "bf16"),
            "optimizer.name": (self.optimizer.name, "laprop"),
            "optimizer.clip_grad": (self.optimizer.clip_grad, 0),
            "parallel.distributed_optimizer": (self.parallel.distributed_optimizer, False),
        }
        wrong = [f"{key}={value} (found {found})" for key, (found, value) in wanted.items() if found != value]
        if wrong:
            raise ValueError(f"precision.master_weights=false needs {', '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _kernels_fit(self) -> RunConfig:
        wanted = {
            "transformer_impl=transformer_engine": self.transformer_impl == "transformer_engine",
            f"precision.fp8={self.precision.fp8}": self.precision.fp8 != "none",
            "parallel.tp_comm_overlap=true": self.parallel.tp_comm_overlap,
        }
        refused = {
            "transformer_impl=local": self.transformer_impl == "local",
            "platform=cpu": self.platform == "cpu",
            "precision.compute=fp32": self.precision.compute == "fp32",
        }
        asked = [setting for setting, is_set in wanted.items() if is_set]
        against = [setting for setting, is_set in refused.items() if is_set]
        if asked and against:
            raise ValueError(
                f"{' and '.join(asked)} needs Transformer Engine's layers, which are for GPUs and bf16; found "
                f"{' and '.join(against)}"
            )
        if self.precision.fp8 == "delayed" and "layernorm" in self.parallel.recomputed_modules:
            raise ValueError(
                "parallel.recompute_modules has layernorm, which precision.fp8=delayed cannot recompute; leave it out"
            )
        return self

    @property
    def wanted_transformer_impl(self) -> Literal["auto", "local", "transformer_engine"]:
        """The value of `transformer_impl`, or the local layers if `auto` has no choice: Transformer Engine's need
        bf16."""
        return (
            "local" if self.transformer_impl == "auto" and self.precision.compute == "fp32" else self.transformer_impl
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name

    @property
    def sizes(self) -> BatchSizes:
        """Number of sequences in every step."""
        return BatchSizes(self.batch.global_batch_size, self.batch.rampup)

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in one optimizer step over all ranks, once a rampup is over."""
        return self.batch.global_batch_size * self.model.seq_length

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens in the first `step` steps."""
        return self.sizes.samples_before(step) * self.model.seq_length

    @property
    def steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        if self.schedule.steps is not None:
            return self.schedule.steps
        per_token = 1.0 if self.schedule.flops is None else self._flops_per_token()
        wanted = self.schedule.wanted_tokens(per_token)
        assert wanted is not None
        return self.sizes.steps_for_samples(math.ceil(wanted / self.model.seq_length))

    @property
    def samples(self) -> int:
        """Number of sequences in the whole run."""
        return self.sizes.samples_before(self.steps)

    @property
    def length_setting(self) -> str:
        """The setting that determines the run's length, with its value."""
        schedule = self.schedule
        given = {"steps": schedule.steps, "tokens": schedule.tokens, "flops": schedule.flops}
        key, value = next((key, value) for key, value in given.items() if value is not None)
        return f"schedule.{key} = {value:,}" if isinstance(value, int) else f"schedule.{key} = {value:g}"

    def step_of_flops(self, flops: float) -> int:
        """Return the first step after which the training FLOPs, by `schedule.flop_count`, reach a budget.

        A budget that is itself the FLOPs of a step, printed or computed in another order, is reached by that step.

        Raises:
            ConfigError: the count includes the head, and the vocabulary is not known.
        """
        tokens = flops / self._flops_per_token()
        return self.sizes.steps_for_samples(math.ceil(tokens * (1 - _ROUNDING) / self.model.seq_length))

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """The steps that `eval.at_steps` and `eval.at_flops` name."""
        return frozenset(self.eval.at_steps) | {self.step_of_flops(flops) for flops in self.eval.at_flops}

    def _flops_per_token(self) -> float:
        """Return the FLOPs of a token by the schedule's count.

        Raises:
            ConfigError: the count includes the head, and the vocabulary is not known.
        """
        count, vocab_size = self.schedule.flop_count, self.data.vocab_size
        if count == "full" and vocab_size is None:
            raise ConfigError("schedule.flop_count=full counts the head, whose size needs data.vocab_size; set that")
        return cost.flops_per_token(self.shape(vocab_size=vocab_size or 2), count)

    def shape(self, *, vocab_size: int) -> cost.Shape:
        """Return the model's size for closed-form costs."""
        return self.model.shape(vocab_size=vocab_size)

    @property
    def optimizer_scale(self) -> Scale:
        """The sizes on which the effective learning rates, decays and epsilon depend."""
        return Scale(
            hidden=self.model.hidden,
            layers=self.model.layers,
            tokens_per_step=self.tokens_per_step,
            reduction=self.objective.reduction,
        )

    def lr_schedule(self) -> WarmupStableDecay:
        """Return the schedule of the learning rate, as a factor of `optimizer.lr`."""
        steps = self.steps
        return WarmupStableDecay(
            steps=steps,
            warmup_steps=self.schedule.warmup_steps,
            decay_steps=resolve_decay_steps(self.schedule.decay_steps, steps),
            decay_shape=self.schedule.decay_shape,
        )

    def layout(self, *, world_size: int, vocab_size: int) -> Layout:
        """Return the layout on `world_size` ranks; every division is checked before any process group exists.

        Raises:
            ConfigError: something does not divide.
        """
        layouts = [self._layout(sequences, world_size, vocab_size) for sequences in self.sizes.distinct]
        return layouts[-1]

    def _layout(self, global_batch_size: int, world_size: int, vocab_size: int) -> Layout:
        layout = lay_out(
            self.parallel,
            world_size=world_size,
            layers=self.model.layers,
            heads=self.model.heads,
            kv_heads=self.model.key_heads,
            hidden=self.model.hidden,
            mlp_width=self.model.mlp_width,
            padded_vocab_size=self.model.padded_vocab_size(vocab_size),
            seq_length=self.model.seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=self.batch.micro_batch_size,
        )
        check_shapes(self.precision, self.model, self.parallel, micro_batch_size=self.batch.micro_batch_size)
        return layout
