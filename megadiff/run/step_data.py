"""The data of one step of a run as that step draws them, wherever the sources of the run had got to."""

from __future__ import annotations

from pathlib import Path

from megadiff.checkpoint.folder import is_complete, step_folders, step_of
from megadiff.checkpoint.manifest import read_manifest
from megadiff.data.facts import read_data_facts
from megadiff.data.mixture import next_mixture
from megadiff.errors import SHOWN_DIGITS, CheckpointError
from megadiff.run.context import RunContext
from megadiff.run.resume import saved_mixture


def with_data_of_step(run_folder: Path, step: int, prepared: RunContext, folder: Path | None) -> RunContext:
    """Return the run with its data as they were drawn in a step, even if the run changed them before or after it.

    Args:
        folder: checkpoint from which the steps up to this one are repeated; None for the initial weights.

    Raises:
        CheckpointError: other data are given, or the data change between the checkpoint and the step.
    """
    saved = read_manifest(folder) if folder is not None else None
    done = saved.step if saved is not None else 0
    recorded_in, then, then_after, changed_after = _trained_on(run_folder, step)
    now = prepared.data.at(prepared.config.sizes.samples_before(then_after)).fingerprint
    if then not in (None, now):
        if folder is not None and saved is not None and saved.data_fingerprint == then:
            raise trained_with(folder, "training data", then, now)
        raise trained_with(recorded_in, f"training data in step {step}", then, now)
    if between := [change for change in changed_after if done < change < step]:
        raise CheckpointError(
            f"{run_folder} changed its data after step {between[0]}, and has no checkpoint from then to before step "
            f"{step}; give a step up to {between[0]}"
        )
    if saved is None or folder is None:
        return prepared
    mixture, data = saved_mixture(prepared, saved, folder), prepared.data.at(saved.samples)
    if saved.data_fingerprint != data.fingerprint:
        if then is None:
            raise trained_with(folder, "training data", saved.data_fingerprint, data.fingerprint)
        mixture = next_mixture(mixture, data.identities, first_sample=saved.samples)
    return prepared.at(mixture, saved.samples)


def _trained_on(run_folder: Path, step: int) -> tuple[Path, str | None, int, list[int]]:
    """Return the place that records the data of a step, their fingerprint after a number of steps, and that number.

    The last value is the steps of all changes. The run's next checkpoint records every change until then; without one,
    the step was taken by the last attempt, whose data are in `data.json`. The fingerprint is None if neither exists.
    """
    later = [path for path in step_folders(run_folder) if step_of(path) >= step and is_complete(path)]
    if not later:
        facts = read_data_facts(run_folder)
        return (run_folder, None, 0, []) if facts is None else (run_folder, facts.fingerprint, facts.step, [])
    following = read_manifest(later[-1])
    changes = [change for change in following.changes if change.key == "data_fingerprint"]
    then = [(str(change.before), change.after_step) for change in changes if change.after_step >= step]
    found, after = then[0] if then else (following.data_fingerprint, following.step)
    return later[-1], found, after, [change.after_step for change in changes]


def trained_with(folder: Path, what: str, then: str | None, now: str) -> CheckpointError:
    """Return the refusal of data or a tokenizer other than those that a run was trained with."""
    return CheckpointError(
        f"{folder} was trained with {what} of fingerprint {(then or 'unknown')[:SHOWN_DIGITS]}, but the present one "
        f"has {now[:SHOWN_DIGITS]}; give the first one's path as data.train or data.tokenizer"
    )
