"""The very sequences of one training step as its model reads them, with their origin, noise and weights. Read-only.

The run's own data, order and training method make them in this process, on whatever layout the run has: data order and
noise are functions of the seed and the sample index alone. No model is built.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from megadiff.checkpoint.folder import is_complete, newest_complete, step_folders, step_of
from megadiff.checkpoint.manifest import check_same_run, read_manifest
from megadiff.data.facts import read_data_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.loader import DataShard, Microbatch, SequenceLoader
from megadiff.data.mixture import next_mixture
from megadiff.data.sequences import Origin
from megadiff.data.tokenizers import Tokenizer, token_text, token_texts
from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.noising import NoisedBatch
from megadiff.errors import SHOWN_DIGITS, CheckpointError, ConfigError
from megadiff.loss.fused_lm_head import choose_loss_kernel
from megadiff.methods import Method
from megadiff.parallel.config import ParallelConfig
from megadiff.run.config import RunConfig
from megadiff.run.context import RunContext, validate_run
from megadiff.run.resume import ResumeOptions, ResumeState, foresee_resumption, manifest_of, saved_mixture


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


State = Literal["given", "kept", "masked", "changed"]
"""The effect of the noise on a token: none, since the position is noise-free; the token was kept; it became the mask;
it became another token."""


class ShownToken(NamedTuple):
    """One position of a sequence."""

    clean: int
    """Id of the target."""
    clean_text: str
    noised: int
    """Id that the model reads."""
    noised_text: str
    state: State
    log_snr: float
    weight: float | None
    """Loss weight (`Method.loss_weights`); None if the method has none."""
    document: int | None
    """Index of the target's document in its source; of an inserted pad, that of the next token; None behind the last of
    several conversations in a sequence."""
    begins_document: bool
    """Whether it is the first token of its document."""
    is_inserted: bool
    """Whether it is a pad that `conditioning.pad_insertion` put there."""

    @property
    def has_loss(self) -> bool:
        """Whether the token can have a loss."""
        return self.state != "given" and self.weight != 0


@dataclass(frozen=True)
class ShownSequence:
    """One sequence of a step."""

    sample: int
    """Global sample index."""
    key: str
    """Entries of the configuration that name its source."""
    source: str
    """Label of the source."""
    number: int
    """Number of sequences that the source gives in the run before this one."""
    epoch: int
    """Number of the source's epochs before it."""
    origin: Origin
    """Place of its first token in the data."""
    pattern: str
    """Pattern of noise levels: isotropic, per token or linear."""
    prompt_length: int
    """Number of leading tokens that are a clean prompt."""
    tokens: list[ShownToken]

    def count(self, state: State) -> int:
        """Return the number of tokens in a state."""
        return sum(token.state == state for token in self.tokens)

    @property
    def log_snr_range(self) -> tuple[float, float] | None:
        """Lowest and highest log-SNR of the positions that are not noise-free; None if all of them are."""
        levels = [token.log_snr for token in self.tokens if token.state != "given"]
        return (min(levels), max(levels)) if levels else None


@dataclass(frozen=True)
class StepSequences:
    """Some sequences of one step."""

    step: int
    steps: int
    first_sample: int
    in_step: int
    """Number of sequences in the step, over all ranks."""
    method: str
    is_shifted: bool
    """Whether the model reads the tokens before the targets in place of noised ones."""
    remarks: list[str]
    """Lines about the checkpoint that gives the positions of the sources, if one does."""
    sequences: list[ShownSequence]


def step_sequences(
    config: RunConfig, step: int, *, sequences: int, options: ResumeOptions | None = None
) -> StepSequences:
    """Return sequences of a step as a run of this description reads them, in the order of their samples.

    A run that has checkpoints reads the step as its sources had got there: as it did if the step lies behind it, and
    else as it will when it resumes from its newest checkpoint.

    Args:
        config: the run.
        step: the step, from 1.
        sequences: number of sequences to return, or 0 for all.
        options: what the user allows if the run is resumed.

    Raises:
        ConfigError: the run has no such step.
        DataError: data or tokenizer are missing or damaged.
        CheckpointError: the description is not that of the run in its folder.
    """
    if not 1 <= step <= config.steps:
        raise ConfigError(
            f"--step {step}: the run {config.name} has the steps 1 to {config.steps:,} ({config.length_setting}); give "
            "one of them"
        )
    options = options or ResumeOptions()
    options.check(config)
    train_only = config.data.model_copy(update={"valid": ()})
    alone = config.model_copy(update={"parallel": ParallelConfig(), "data": train_only})
    prepared, remarks = _at_step(validate_run(alone, world_size=1), step, options)
    method = prepared.method(choose_loss_kernel("plain", is_cpu=True)[1])
    sizes, micro = config.sizes, config.batch.micro_batch_size
    wanted = min(sequences or sizes.sequences(step - 1), sizes.sequences(step - 1))
    loader = SequenceLoader(
        prepared.data,
        method.batch,
        sizes=sizes,
        shard=DataShard(micro),
        first_step=step - 1,
        predicted=prepared.data.predicted,
        documents=prepared.data.documents,
        prefetch=1,
    )
    with loader:
        microbatches = list(islice(loader, -(-wanted // micro)))
    found = [shown for microbatch in microbatches for shown in _shown(microbatch, prepared, method)]
    return StepSequences(
        step=step,
        steps=config.steps,
        first_sample=sizes.samples_before(step - 1),
        in_step=sizes.sequences(step - 1),
        method=config.method.name,
        is_shifted=method.adds_start_token,
        remarks=remarks,
        sequences=found[:wanted],
    )


def _at_step(prepared: RunContext, step: int, options: ResumeOptions) -> tuple[RunContext, list[str]]:
    """Return the run with its data at the positions before a step, and remarks about them."""
    config = prepared.config
    newest = newest_complete(config.folder)
    if newest is None or step_of(newest) < step:
        prepared, done, remarks = foresee_resumption(prepared, options)
        if step <= done:
            raise _of_another_run(config, step)
        return prepared, remarks
    complete = [folder for folder in step_folders(config.folder) if is_complete(folder)]
    following = next(folder for folder in reversed(complete) if step_of(folder) >= step)
    saved = read_manifest(following)
    wanted = manifest_of(prepared, ResumeState(), step)
    check_same_run(saved, wanted, following, allowed=options.allowed, allow_data=True)
    before = next((folder for folder in complete if step_of(folder) < step), None)
    if before is None and (origin := config.checkpoint.branches_from) is not None:
        branched = read_manifest(Path(origin))
        before = Path(origin) if branched.has_optimizer else None
        if before is not None and branched.step >= step:
            raise _of_another_run(config, step)
    remarks = [f"data of step {step}  as recorded in {following}, from {before or 'the beginning'} on"]
    changes = [change for change in saved.changes if change.after_step >= step and change.key != "data_fingerprint"]
    remarks += [f"changed afterwards {change.describe()}" for change in changes]
    return with_data_of_step(config.folder, step, prepared, before), remarks


def _of_another_run(config: RunConfig, step: int) -> CheckpointError:
    return CheckpointError(
        f"--step {step}: the run {config.name} branches from {config.checkpoint.start_from}, which was saved after "
        "that step; give a later step, or the description of the run that it branches from"
    )


def _shown(microbatch: Microbatch[NoisedBatch], prepared: RunContext, method: Method) -> list[ShownSequence]:
    weights = method.loss_weights(microbatch.content)
    return [
        _shown_sequence(
            prepared,
            sample,
            microbatch.content.part(place),
            weights[place].tolist() if weights is not None else None,
            is_shifted=method.adds_start_token,
        )
        for place, sample in enumerate(microbatch.samples)
    ]


def _shown_sequence(
    prepared: RunContext, sample: int, batch: NoisedBatch, weights: list[float] | None, *, is_shifted: bool
) -> ShownSequence:
    """Return one sequence; the columns of `batch` have no batch axis."""
    tokenizer, data = prepared.tokenizer, prepared.data.at(sample)
    place, origin = data.train.place(sample), data.train.origin(sample)
    source, stream = data.sources[place.source], data.train.sources[place.source]
    clean, noised, noisy = batch.clean.tolist(), batch.noised.tolist(), batch.is_noisy.tolist()
    at = batch.source.tolist()
    borders: Sequence[tuple[int, int | None]] = [(0, origin.document)]  # a conversation with what fills it up
    if not source.reader.has_spans:
        borders = document_borders(source.reader, origin.token, len(clean))
    elif (numbers := data.train.documents([sample])) is not None:
        held = data.train.held(sample) or []
        borders = [*held, (int((numbers[0] < len(held)).sum()), None)]
    starts = [start for start, _ in borders]
    documents = [borders[bisect_right(starts, position) - 1][1] for position in at]
    inserted = [after == here for here, after in pairwise(at)]
    inserted.append(clean[-1] == tokenizer.pad_id and prepared.config.conditioning.pad_insertion > 0 and not is_shifted)
    first = {start for start, document in borders if document is not None and (start or not origin.within)}
    states: list[State] = [
        _state(*token, is_noisy=is_noisy, mask_id=tokenizer.mask_id, is_shifted=is_shifted)
        for *token, is_noisy in zip(clean, noised, noisy, strict=True)
    ]
    clean_texts = token_texts(tokenizer, clean)
    noised_texts = (
        token_texts(tokenizer, noised) if is_shifted else _noised_texts(tokenizer, noised, states, clean_texts)
    )
    tokens = [
        ShownToken(
            clean=clean[i],
            clean_text=clean_texts[i],
            noised=noised[i],
            noised_text=noised_texts[i],
            state=states[i],
            log_snr=float(batch.log_snr[i]),
            weight=weights[i] if weights is not None else None,
            document=documents[i],
            begins_document=at[i] in first and not inserted[i],
            is_inserted=inserted[i],
        )
        for i in range(len(clean))
    ]
    return ShownSequence(
        sample=sample,
        key=", ".join(source.keys),
        source=source.label,
        number=place.index,
        epoch=place.index // stream.len_epoch,
        origin=origin,
        pattern=NoisePattern(int(batch.pattern)).name.lower().replace("_", " "),
        prompt_length=0 if is_shifted else int(batch.prompt_length),
        tokens=tokens,
    )


def _state(clean: int, noised: int, *, is_noisy: bool, mask_id: int, is_shifted: bool) -> State:
    if not is_noisy:
        return "given"
    if noised == clean or is_shifted:
        return "kept"
    return "masked" if noised == mask_id else "changed"


def _noised_texts(
    tokenizer: Tokenizer, noised: Sequence[int], states: Sequence[State], clean_texts: Sequence[str]
) -> list[str]:
    """Return the text of every noised token: that of the clean one, unless noise changed a part of its character."""
    alone, texts, start = token_text(tokenizer), [], 0
    for place, text in enumerate(clean_texts):
        if not text and place + 1 < len(clean_texts):
            continue  # the following tokens complete the character
        whole = range(start, place + 1)
        is_kept = all(states[i] in ("given", "kept") for i in whole)
        texts += [clean_texts[i] if is_kept else alone(noised[i]) for i in whole]
        start = place + 1
    return texts


def document_borders(reader: IndexedReader, token: int, count: int) -> Sequence[tuple[int, int]]:
    """Return the documents in a span of a source's tokens.

    Args:
        reader: the source.
        token: first token of the span in the source's stream.
        count: number of tokens, at least 1.

    Returns:
        A pair for each document in ascending order: its first position within the span, and its index. Documents
        without tokens are left out.
    """
    found, position = [], count - 1
    while position >= 0:
        document, within = reader.locate(token + position)
        found.append((max(0, position - within), document))
        position -= within + 1
    return found[::-1]
