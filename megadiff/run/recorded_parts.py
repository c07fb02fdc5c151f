"""The parts of a run that a checkpoint's manifest records, without its weights: its tokenizer and its training method.

No Megatron is loaded, so that whatever needs these parts alone, such as an export, starts without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megadiff.checkpoint.manifest import Manifest
from megadiff.config.registry import Family
from megadiff.data.tokenizers import Tokenizer, load_tokenizer
from megadiff.diffusion.config import PROCESSES, ConditioningConfig, ObjectiveConfig, noise_config
from megadiff.diffusion.noise_process import build_process
from megadiff.errors import SHOWN_DIGITS, CheckpointError, ConfigError, DataError
from megadiff.files import first_fault
from megadiff.loss.fused_lm_head import choose_loss_kernel
from megadiff.methods import METHODS, Method, MethodConfig, MethodContext, build_method
from megadiff.platform.machine import Platform


def tokenizer_of(manifest: Manifest, given: str | None, *, where: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint.

    Args:
        manifest: the checkpoint's manifest.
        given: path in place of the one that the manifest records.
        where: the checkpoint's folder, for messages.

    Raises:
        CheckpointError: it is not the one that the model was trained with.
        DataError: it is missing or damaged.
    """
    with naming_the_manifest(where):
        named = str(manifest.config["data"]["tokenizer"])
    try:
        found = load_tokenizer(given or named)
    except DataError as error:
        if given:
            raise
        is_file = not isinstance(error.__cause__, ConfigError)  # which a missing module raises
        moved = "; --tokenizer gives the path of one that was moved" if is_file else ""
        raise DataError(f"{where / 'manifest.json'}: `data.tokenizer`: {error}{moved}") from error
    if found.fingerprint != manifest.tokenizer_fingerprint:
        raise CheckpointError(
            f"{where} was trained with another tokenizer ({named}, {manifest.tokenizer_fingerprint[:SHOWN_DIGITS]}) "
            f"than {given or found.name} ({found.fingerprint[:SHOWN_DIGITS]}); "
            + ("leave --tokenizer out, or give that one's path" if given else "give that one's path with --tokenizer")
        )
    return found


def method_of(manifest: Manifest, tokenizer: Tokenizer, *, where: Path, platform: Platform | None = None) -> Method:
    """Return the training method recorded in a checkpoint's manifest.

    Args:
        manifest: the checkpoint's manifest.
        tokenizer: its tokenizer.
        where: the checkpoint's folder, for messages.
        platform: the machine whose loss kernel is taken; None for the CPU's.

    Raises:
        CheckpointError: the manifest describes none of this version.
        ConfigError: the module of the method or of the noise process is missing on this machine.
    """
    config = manifest.config
    with naming_the_manifest(where):
        _check_member(METHODS, config, "method", where)
        _check_member(PROCESSES, config, "noise", where)
        noise = noise_config(**config["noise"])
        # A weighting of the user's own is not needed here, and may be missing on this machine.
        shared = {key: value for key, value in config["objective"].items() if key in ObjectiveConfig.model_fields}
        objective = ObjectiveConfig.model_validate(shared)
        wanted = "auto" if objective.loss_kernel == "triton" else objective.loss_kernel  # it may be missing here
        _, loss_kernel = choose_loss_kernel(wanted, is_cpu=platform is None or platform.is_cpu)
        context = MethodContext(
            process=build_process(noise, vocab_size=manifest.vocab_size, mask_id=manifest.mask_id),
            tokenizer=tokenizer,
            noise=noise,
            objective=objective,
            conditioning=ConditioningConfig.model_validate(config["conditioning"]),
            loss_kernel=loss_kernel,
            seed=config.get("seed", 0),
        )
        settings = METHODS.build(MethodConfig, **config["method"])
    return build_method(settings, context)


def _check_member(family: Family, config: Mapping[str, Any], section: str, where: Path) -> None:
    """Import the member of a family that a manifest's section names, if it names one.

    Raises:
        ConfigError: it is missing on this machine; the message names manifest and key.
    """
    if family.key not in config[section]:
        return
    try:
        family.member(config[section][family.key])
    except ConfigError as error:
        raise ConfigError(f"{where / 'manifest.json'}: `{section}.{family.key}`: {error}") from error


@contextmanager
def naming_the_manifest(folder: Path) -> Iterator[None]:
    """Raise CheckpointError for what is missing or wrong in a manifest."""
    try:
        yield
    except (KeyError, TypeError, ValidationError) as error:
        what = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            what = ": ".join(first_fault(error, whole=""))
        raise CheckpointError(
            f"{folder / 'manifest.json'} describes no model of this version ({what}); use another checkpoint of the run"
        ) from None
