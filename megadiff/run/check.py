"""The check of a run before it is started: it reads the data, and builds no model and loads no megatron-core."""

from __future__ import annotations

from megadiff.config.load import dump_config
from megadiff.errors import ConfigError, DataError
from megadiff.parallel.topology import launched_world_size
from megadiff.run.config import RunConfig
from megadiff.run.context import (
    RunContext,
    baselines_of,
    data_advice,
    describe_baselines,
    describe_data,
    validate_run,
)
from megadiff.run.resume import ResumeOptions, foresee_resumption
from megadiff.run.summary import description_advice, lay_out_run, ranks_to_check, run_summary


def check(config: RunConfig, *, ranks: int | None = None, resume_options: ResumeOptions | None = None) -> str:
    """Return what `--check` prints: the resolved configuration, the numbers derived from it, and where the run starts.

    With `data.vocab_size` set, the numbers are available before tokenizer and data exist; the output names what is
    missing. Without `ranks` and without a launcher, the run is laid out on the smallest number of ranks that fits.

    Raises:
        NoLayoutError: the run does not fit on this number of ranks, or on any.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {ranks}")
    resume_options = resume_options or ResumeOptions()
    resume_options.check(config)
    world_size, remarks = ranks_to_check(config, ranks, launched=launched_world_size())
    try:
        prepared = validate_run(config, world_size=world_size)
        _try_own_modules(prepared)
        prepared, step, origin = foresee_resumption(prepared, resume_options)
        lines = run_summary(config, prepared.layout, prepared.shape) + describe_data(prepared, step=step)
        lines += describe_baselines(baselines_of(prepared))
        lines += [f"warning           {found}" for found in data_advice(prepared)]
        lines += [*_warnings(config), *origin]
    except DataError as error:
        if config.data.vocab_size is None:
            raise
        layout = lay_out_run(config, world_size=world_size, vocab_size=config.data.vocab_size)
        lines = run_summary(config, layout, config.shape(vocab_size=config.data.vocab_size))
        lines += [*_warnings(config), f"not there yet     {error}"]
    return dump_config(config) + "\n" + "\n".join([*remarks, *lines])


def _try_own_modules(prepared: RunContext) -> None:
    """Use modules of the user's own, and the method of conversations, as a run would at its start.

    Raises:
        ConfigError: one of them cannot be used.
    """
    config = prepared.config
    if "." in config.noise.process:
        _ = prepared.process
    if prepared.data.conversations_key is not None:
        from megadiff.loss.fused_lm_head import fused_objective

        prepared.method(fused_objective)
    if "." in config.optimizer.name:
        import torch

        from megadiff.optim.members import load_member
        from megadiff.optim.probe import refuse_unsavable

        refuse_unsavable(
            load_member(config.optimizer.name),
            config.optimizer,
            config.optimizer_scale,
            device=torch.device("cpu"),
            is_cut=config.parallel.distributed_optimizer or config.parallel.tensor > 1,
        )


def _warnings(config: RunConfig) -> list[str]:
    return [f"warning           {found}" for found in description_advice(config)]
