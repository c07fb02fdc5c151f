"""A sweep's folder: its manifest, a description and the state of each run, rows for `slurm/submit sweep`. No torch.

    FOLDER/sweep.json             the runs, with the budgets that each serves
    FOLDER/base.yaml              the settings that all runs share
    FOLDER/rows.txt               a line of settings for each run, which `slurm/submit sweep` takes with base.yaml
    FOLDER/branches.txt           the same for cooldowns, which start from checkpoints of the runs above
    FOLDER/descriptions/RUN.yaml  the whole description of a run
    FOLDER/runs/RUN/              the run folder

All but the run folders follow from the description of the sweep, to the byte.

A run is `finished`, `running`, `stopped` (on request), `interrupted` (its process is gone), `failed`, `diverged` (it
ended itself because of its loss), or `missing` (it never began).
"""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from megadiff.config.load import dump_config, load_config
from megadiff.config.section import Section
from megadiff.data import indexed_format
from megadiff.data.config import SourceConfig, given_weights
from megadiff.errors import ConfigError, StorageError, TrainingError
from megadiff.files import UnreadableFileError, open_plain, read_json_object, why, write_atomically
from megadiff.metric_lines import number, parsed
from megadiff.model import cost
from megadiff.run.config import RunConfig
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.laws import LawBook, law_book
from megadiff.scaling.sweep import Shape, Sweep, read_sweep
from megadiff.scaling.sweep_runs import BaseRun, Expansion, SweepRun, expand
from megadiff.supervision.launch import Holder
from megadiff.supervision.status import FINISHED, RUNNING, STOPPED, read_status

FORMAT = 1
"""Version of the manifest's format."""
_MANIFEST, _MAX_BYTES = "sweep.json", 2**26
_OWN_LENGTH = ("schedule.tokens=", "schedule.flops=", "schedule.decay_steps=0")
"""Settings that leave the length of a run to its own `schedule.steps`, without a cooldown."""


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with everything that follows from its description."""

    path: Path
    """Path of the description."""
    sweep: Sweep
    base: RunConfig
    """The settings that all runs share."""
    book: LawBook
    expansion: Expansion
    folder: Path
    """The sweep's folder."""

    @property
    def runs(self) -> tuple[SweepRun, ...]:
        """The runs, trunks before their branches."""
        return self.expansion.runs


def plan_sweep(path: Path, overrides: Sequence[str] = (), *, output: Path | None = None) -> SweepPlan:
    """Read the description of a sweep and return its runs; nothing is written.

    Args:
        path: the description.
        overrides: settings of the description, as `key=value`.
        output: the sweep's folder; by default `output_dir/name`.

    Raises:
        ConfigError: a file is missing or wrong, or no run is left.
    """
    sweep = read_sweep(path, overrides)
    folder = output or Path(sweep.output_dir) / sweep.name
    fixed = _fixed(sweep, str(folder / "runs"))
    base = load_config(sweep.run, [*sweep.settings, *fixed], RunConfig)
    book = law_book(sweep.laws)
    expansion = expand(sweep, _facts(base, sweep.run), book)
    longest = max(run.steps for run in expansion.runs)
    base = load_config(sweep.run, [*sweep.settings, *fixed, *_OWN_LENGTH, f"schedule.steps={longest}"], RunConfig)
    return SweepPlan(path, sweep, base, book, expansion, folder)


def _fixed(sweep: Sweep, output_dir: str) -> list[str]:
    """Return the settings that a sweep decides for every run."""
    return [f"output_dir={json.dumps(output_dir)}", f"schedule.flop_count={sweep.budgets.flop_count}"]


def _facts(base: RunConfig, path: str) -> BaseRun:
    vocab_size = base.data.vocab_size
    if vocab_size is None:
        from megadiff.data.tokenizers import load_tokenizer
        from megadiff.errors import DataError

        try:
            vocab_size = load_tokenizer(base.data.tokenizer).vocab_size
        except DataError as error:
            raise ConfigError(f"{path}: FLOPs need data.vocab_size, or the tokenizer itself: {error}") from None
    shape = base.shape(vocab_size=vocab_size)

    def flops_per_token(at: Shape, count: FlopCount) -> float:
        return cost.flops_per_token(replace(shape, **at._asdict()), count)

    return BaseRun(
        seq_length=base.model.seq_length,
        warmup_steps=base.schedule.warmup_steps,
        micro_batch_size=base.batch.micro_batch_size,
        save_every=base.checkpoint.every,
        flops_per_token=flops_per_token,
        different_tokens=_different_tokens(base.data.train),
    )


def _different_tokens(sources: Sequence[SourceConfig]) -> Callable[[float], float] | None:
    """Return the number of different tokens among the first ones of a mixture; None if a source lacks a manifest."""
    found = [indexed_format.read_manifest(Path(f"{source.path}.json")) for source in sources]
    held = [manifest.tokens for manifest in found if manifest is not None]
    if len(held) < len(sources) or not all(held) or any(source.has_budget for source in sources):
        return None
    weights = given_weights(sources) or held

    def different(tokens: float) -> float:
        shares = [weight / sum(weights) for weight in weights]
        return sum(min(tokens * share, size) for share, size in zip(shares, held, strict=True))

    return different


def own_settings(plan: SweepPlan, run: SweepRun) -> list[str]:
    """Return all settings of a run over `base.yaml`, as `key=value`."""
    found = [f"name={run.name}", *run.settings]
    if run.trunk is not None:
        trunk = plan.folder / "runs" / run.trunk / "checkpoints" / f"step_{run.first_step:08d}"
        found.append(f"checkpoint.start_from={json.dumps(str(trunk))}")
        if plan.base.checkpoint.weights_only:  # as trunks take them, and branches do not
            found.append("checkpoint.weights_only=false")
    return found


def write_sweep(plan: SweepPlan) -> list[str]:
    """Write the folder, unless it holds this sweep already; return the names of runs that are new.

    Runs may be added to a sweep that has begun, but none may change or go.

    Raises:
        ConfigError: the folder holds another sweep, or a setting is wrong for a run.
        StorageError: the disk refuses.
    """
    manifest = _manifest(plan)
    text = json.dumps(manifest, indent=1) + "\n"
    before = _known_runs(plan, manifest)
    if (plan.folder / _MANIFEST).exists() and (plan.folder / _MANIFEST).read_text(encoding="utf-8") == text:
        return []
    files = _files(plan)
    try:
        (plan.folder / "descriptions").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(plan.folder / name, content, is_durable=False)
        write_atomically(plan.folder / _MANIFEST, text)
    except OSError as error:
        raise StorageError(f"{plan.folder} cannot be written ({error.strerror or error})") from None
    return [run.name for run in plan.runs if run.name not in before]


def _manifest(plan: SweepPlan) -> dict[str, Any]:
    base = plan.base.model_dump(mode="json", by_alias=True)
    del base["schedule"]["steps"]  # of the longest run, which may be added later
    runs = [{**asdict(run), "shape": str(run.shape), "settings": own_settings(plan, run)} for run in plan.runs]
    count = plan.sweep.budgets.flop_count
    return {"format": FORMAT, "name": plan.sweep.name, "flop_count": count, "base": base, "runs": runs}


def _known_runs(plan: SweepPlan, manifest: dict[str, Any]) -> set[str]:
    """Return the names of the runs that the folder has already.

    Raises:
        ConfigError: one of them is another one now, or has gone.
    """
    if not (plan.folder / _MANIFEST).exists():
        return set()
    before = read_manifest(plan.folder)
    remedy = "give another --output, or the description that the folder was written from"
    written = {"schedule": manifest["base"]["schedule"], **before["base"]}  # which older manifests do not have
    written = _with_defaults(written, manifest["base"], plan.base)
    if (changed := _difference(written, manifest["base"])) is not None:
        raise ConfigError(f"{plan.folder} holds a sweep whose base run has {changed.describe(plan.path)}; {remedy}")
    now = {run["name"]: run for run in json.loads(json.dumps(manifest["runs"]))}
    for run in before["runs"]:
        if run["name"] not in now:
            raise ConfigError(f"{plan.folder} holds the run {run['name']}, which {plan.path} does not have; {remedy}")
        if (changed := _difference(_comparable(run), _comparable(now[run["name"]]))) is not None:
            raise ConfigError(f"{plan.folder} holds the run {run['name']} with {changed.describe(plan.path)}; {remedy}")
    return {run["name"] for run in before["runs"]}


class _Difference(NamedTuple):
    """A value that differs between the written sweep and its description."""

    key: str
    written: Any
    described: Any

    def describe(self, path: Path) -> str:
        """Return key and values, such as `steps` 15, while sweep.yaml has 17."""
        written, described = (
            value if isinstance(value, str) else json.dumps(value) for value in (self.written, self.described)
        )
        return f"`{self.key}` {written}, while {path} has {described}"


def _difference(written: dict[str, Any], described: dict[str, Any]) -> _Difference | None:
    """Return the first value, by its dotted key, that differs between two trees; None if they are equal."""
    for key in dict.fromkeys([*described, *written]):
        one, other = written.get(key), described.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            if (inner := _difference(one, other)) is not None:
                return inner._replace(key=f"{key}.{inner.key}")
        elif one != other:
            return _Difference(key, one, other)
    return None


def _with_defaults(written: dict[str, Any], described: dict[str, Any], section: Section) -> dict[str, Any]:
    """Return settings of a manifest with the defaults of keys that came after the version which wrote it."""
    found = dict(written)
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if key in found and isinstance(value, Section) and isinstance(found[key], dict):
            found[key] = _with_defaults(found[key], described[key], value)
        elif key in described and key not in found and value == field.get_default(call_default_factory=True):
            found[key] = described[key]
    return found


def _comparable(run: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a run with its settings by key."""
    settings = run.get("settings")
    pairs = [str(each).partition("=") for each in settings] if isinstance(settings, list) else []
    return {**run, "settings": {key: value for key, _, value in pairs}}


def _files(plan: SweepPlan) -> dict[str, str]:
    """Return the content of every file but the manifest, each description read and checked."""
    described = _described(plan)
    folder = shlex.quote(str(plan.folder))
    command = f"slurm/submit sweep --config {folder}/base.yaml --rows {folder}/{{}} --gpus-per-node 8 --time 4:00:00"
    rows = {"rows.txt": [run for run in plan.runs if run.trunk is None]}
    if branches := [run for run in plan.runs if run.trunk is not None]:
        rows["branches.txt"] = branches
    found = {"base.yaml": dump_config(plan.base)}
    for name, runs in rows.items():
        after = "" if name == "rows.txt" else " --dependency=afterany:JOB-OF-ROWS"
        lines = [f"# {command.format(name)}{after}", *(shlex.join(own_settings(plan, run)) for run in runs)]
        found[name] = "\n".join(lines) + "\n"
    return found | {f"descriptions/{name}.yaml": dump_config(config) for name, config in described.items()}


def _described(plan: SweepPlan) -> dict[str, RunConfig]:
    """Return the configuration of each run.

    Raises:
        ConfigError: the settings of a run do not fit; the message begins with its name.
    """
    found = {}
    for run in plan.runs:
        fixed = _fixed(plan.sweep, plan.base.output_dir)
        settings = [*plan.sweep.settings, *fixed, *_OWN_LENGTH, *own_settings(plan, run)]
        try:
            config = load_config(plan.sweep.run, settings, RunConfig)
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from None
        if config.name != run.name or config.output_dir != plan.base.output_dir:
            raise ConfigError(f"{run.name}: name and output_dir are the sweep's; leave them out of `settings`")
        found[run.name] = config
    return found


def sweep_of(path: Path) -> Path | None:
    """Return the folder of the sweep that a path names, by itself or by its folder `runs`; None if it names none."""
    if (path / _MANIFEST).exists():
        return path
    return path.parent if path.name == "runs" and (path.parent / _MANIFEST).exists() else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sweep's folder, its runs with their entries checked.

    Raises:
        ConfigError: the folder is none of a sweep, or its manifest is damaged.
    """
    path = folder / _MANIFEST
    try:
        found = read_json_object(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is no folder of a sweep: it has no {_MANIFEST}; give one that `megadiff sweep write` has written"
        ) from None
    except (OSError, UnreadableFileError) as error:
        raise ConfigError(f"{path} {why(error)}; write the sweep again") from None
    runs = found.get("runs")
    is_sound = isinstance(runs, list) and isinstance(found.get("base"), dict) and all(map(_is_run, runs))
    if found.get("format") != FORMAT or not is_sound:
        raise ConfigError(f"{path} is not the manifest of a sweep in format {FORMAT}; write the sweep again")
    return found


def _is_run(entry: Any) -> bool:
    is_named = isinstance(entry, dict) and isinstance(entry.get("name"), str) and "/" not in entry["name"]
    return is_named and isinstance(entry.get("steps"), int) and isinstance(entry.get("trunk"), str | None)


STATES = ("finished", "running", "stopped", "interrupted", "failed", "diverged", "missing")
_TAIL_BYTES = 2**16


@dataclass(frozen=True)
class RunState:
    """One run of a sweep."""

    name: str
    noise: str
    state: str
    """State, one of `STATES`."""
    step: int
    steps: int
    loss: float | None
    """Newest validation ELBO in nats per token; of a run without one, the newest training ELBO."""
    reason: str
    """Reason why the run failed or stopped."""
    trunk: str | None = None
    """Name of the run that this one branches from."""


def states(folder: Path) -> list[RunState]:
    """Return the states of all runs of a sweep's folder, in the order of its manifest.

    Raises:
        ConfigError: it is no folder of a sweep.
    """
    return [state_of(folder, entry) for entry in read_manifest(folder)["runs"]]


def state_of(folder: Path, entry: dict[str, Any]) -> RunState:
    """Return the state of the run that an entry of the manifest describes."""
    run = folder / "runs" / entry["name"]
    name, steps, noise, trunk = entry["name"], entry["steps"], str(entry.get("noise", "")), entry.get("trunk")
    status, holder = read_status(run), Holder.read(run)
    is_alive = holder is not None and holder.is_here and not holder.is_leaving
    if status is None:
        begun = "interrupted" if (run / "config.yaml").exists() else "missing"
        return RunState(name, noise, "running" if is_alive else begun, 0, steps, None, "", trunk)
    state = status.state
    if state == FINISHED:
        state = "finished" if status.step >= steps else "stopped"
    elif is_alive:
        state = "running"
    elif state == RUNNING:
        state = "interrupted" if holder is None or holder.is_leaving else "running"  # perhaps on another machine
    elif state != STOPPED:
        state = "diverged" if status.exit_code == TrainingError.exit_code else "failed"
    step, loss = _newest(run)
    step = max(step, status.step) if state == "running" else status.step
    return RunState(name, noise, state, step, steps, loss, status.reason, trunk)


def _newest(run: Path) -> tuple[int, float | None]:
    """Return the last step in the metrics, and the newest loss, from the end of the file alone."""
    try:
        with open_plain(run / "metrics.jsonl") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
    except (OSError, UnreadableFileError):
        return 0, None
    lines = [line for raw in tail.splitlines() if (line := parsed(raw)) is not None]
    step = max((line["step"] for line in lines), default=0)
    for key in ("eval_elbo", "elbo"):
        found = [value for line in lines if (value := number(line, key)) is not None]
        if found:
            return step, found[-1]
    return step, None


def counts(found: Iterable[RunState]) -> str:
    """Return the number of runs in each state, such as `3 finished, 1 missing`."""
    number_of = Counter(each.state for each in found)
    return ", ".join(f"{number_of[state]} {state}" for state in STATES if number_of[state])
