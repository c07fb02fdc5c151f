"""Hooks and metric sinks: what happens between optimizer steps, and where figures are written; a module each.

A *hook* is called after every step on every rank, in the order of the run's list. A *metric sink* gets every line of
figures on the main rank. Lines come from hooks: `log` makes the training line, `validation` the evaluation line, and a
hook of your own writes lines with `context.write`. The modules of this package that a run always has (`log`,
`metrics_file`, `tensorboard`, `stragglers`, `replicas`, `validation`, `checkpoint`) are
configured by the sections of their own; the others, and modules of your own by dotted path, are listed in the YAML:

    hooks:
      - {name: wandb, project: my-project, mode: offline}
      - {name: my_package.weight_norms, every: 100, prefix: rms}

Such a module is one file. It provides `build`, and `Settings` if it has keys of its own beside `name` and `every`:

    class Settings(Section):
        prefix: str = "rms"
        '''Beginning of the names of the curves.'''

    class WeightNorms(Hook):
        def __init__(self, settings, context):
            self._settings, self._context = settings, context

        def __call__(self, info):
            ...
            self._context.write({f"{self._settings.prefix}/{name}": rms}, info.step)

    def build(settings, context):
        return WeightNorms(settings, context)

`build` runs on every rank and returns a `Hook`, a `MetricSink`, or an object that is both, whose `open` and `close` are
called once and must not communicate between ranks. A `ListedHook` or `ListedSink` calls it when it is due, and names it
in the sentence when it fails.
`megadiff.testing.check_hook` and `check_sink` are the contract test of this family.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megadiff.config.registry import account_of
from megadiff.errors import HookError, MegadiffError, StorageError
from megadiff.files import is_storage_failure
from megadiff.train.config import HOOKS, HookConfig

if TYPE_CHECKING:  # a run description is checked without torch
    from torch import Tensor

    from megadiff.data.tokenizers import Tokenizer
    from megadiff.methods import Method
    from megadiff.parallel.pipeline import ModelChunk
    from megadiff.parallel.topology import Topology
    from megadiff.platform.machine import Platform
    from megadiff.run.config import RunConfig
    from megadiff.train.gradients import SequenceGradients

logger = logging.getLogger("megadiff")

Part = Literal["step", "eval", "save"]
"""Parts of a run that have a time limit of their own (section `watchdog`)."""


@dataclass(frozen=True)
class StepInfo:
    """The step just taken; the same on every rank, except for `seconds`."""

    step: int
    """Number of steps taken so far, this one included."""
    sums: Tensor
    """Sums over the tokens of the whole batch (`parallel.step_metrics`), [SIZE] float64 on the device."""
    lr: float
    """Learning rate of the step, as `optimizer.lr` times the schedule."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping."""
    seconds: float
    """Wall time of the step on this rank in seconds, its batch included, hooks not included."""
    skipped: str | None = None
    """Reason why the step made no update (`non_finite`, `spike`); None if it made one."""

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Figures of the step as in its line of `metrics.jsonl`: `loss`, `elbo`, ... in nats per noisy token.

        Reading them waits for the device, so a hook on a GPU should do so only when it needs them.
        """
        from megadiff.parallel.step_metrics import metrics_of

        return metrics_of(self.sums.tolist())


class Hook:
    """Base class of everything that is called between steps.

    Every rank calls every hook after every step, so that a hook may run collectives. A hook of the YAML's list is
    called only at multiples of its `every` and at the last step. It reads the run and never changes it: weights,
    optimizer and data belong to the run, and noise does not depend on any random state that a hook could disturb.

    An exception that a hook of the list raises on any rank ends the run with one sentence that names the hook.
    """

    section: ClassVar[Part] = "step"
    """Part of the run whose time limit (section `watchdog`) bounds one call."""
    collectives: ClassVar[bool] = False
    """Whether a call communicates between ranks. If so, no rank may leave a call early for a reason of its own."""

    def open(self) -> None:
        """Prepare for the run; called on every rank before the first step of this process."""

    def __call__(self, info: StepInfo) -> None:
        """Use the step just taken; called after each."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps for the hook, as JSON with finite numbers.

        Every rank calls it when a checkpoint begins; the main rank's value is stored, and a resumed run gives it to
        `restore` on every rank.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; called before `open`, and only if the checkpoint holds something."""

    def close(self) -> None:
        """Release what the hook holds; also called when the run fails, so it must not communicate between ranks."""


class MetricSink:
    """Base class of everything that keeps lines of figures. Only the main rank opens, writes and closes sinks.

    A sink of the YAML's list gets the lines of steps that are multiples of its `every`, and of the last step.
    """

    def open(self) -> None:
        """Prepare for the run; called once, before the first line."""

    def write(self, line: dict[str, Any], step: int) -> None:
        """Keep one line of figures.

        Args:
            line: keys and values as in `metrics.jsonl`, `step` included. A training line has the key `loss`, an
                evaluation line `eval_elbo`. A number may be NaN or infinite.
            step: number of steps taken when the line was made. After a resume from an older checkpoint the steps
                behind it come again.
        """
        raise NotImplementedError

    def sync(self) -> None:
        """Make the lines so far durable; called before a checkpoint relies on them.

        Raises:
            OSError: the disk refuses.
        """

    def close(self) -> None:
        """Write what is left and release what the sink holds; also called when the run fails."""


class MetricSinks:
    """All sinks of a run behind one `write`; empty, and false, on ranks other than the main one."""

    def __init__(self, sinks: Sequence[MetricSink] = ()) -> None:
        self._sinks = list(sinks)

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def add(self, sink: MetricSink) -> None:
        """Open a sink and give it the lines from now on."""
        sink.open()
        self._sinks.append(sink)

    def write(self, line: dict[str, Any], step: int) -> None:
        """Give one line to every sink."""
        for sink in self._sinks:
            sink.write(line, step)

    def sync(self) -> None:
        """Make the lines so far durable.

        Raises:
            OSError: the disk refuses.
        """
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


@dataclass(frozen=True)
class HookContext:
    """Everything of a run that a hook or a sink may use, on this rank. To be read, not changed."""

    config: RunConfig
    """The resolved run description."""
    folder: Path
    """The run folder, shared by all ranks; only the main rank should write there."""
    first_step: int
    """Number of steps taken before this process began: 0, or the step of the checkpoint it resumed from."""
    topology: Topology
    """This rank's place in the layout, and the collectives over the run (`is_main`, `gather_to_main`, ...)."""
    platform: Platform
    """The machine: its device, its peak FLOP/s, its memory in use."""
    tokenizer: Tokenizer
    """The run's tokenizer."""
    method: Method
    """The training method, which also knows the noise, the sampler and the evaluation."""
    chunks: Sequence[ModelChunk]
    """This rank's model chunks, without their data-parallel wrappers."""
    wrapped: Sequence[Any]
    """The data-parallel wrappers of `chunks`."""
    sinks: MetricSinks
    """All metric sinks of the run; `write` is the way to use them."""
    gradients: SequenceGradients
    """Gradients of sequences that a hook chooses, computed without touching the run's own."""

    def write(self, figures: Mapping[str, Any], step: int) -> None:
        """Write a line with these figures to every sink; does nothing on ranks other than the main one.

        Args:
            figures: names and values. Names with a `/`, such as `rms/embedding`, become curves of their own; the keys
                by which lines are recognised (`step`, `tokens`, `loss`, `eval_elbo`) are not for hooks.
            step: number of steps taken.

        Raises:
            ValueError: the figures have one of these keys.
        """
        if reserved := sorted({"step", "tokens", "loss", "eval_elbo"} & set(figures)):
            raise ValueError(f"figures of a hook cannot be called {', '.join(reserved)}; put a prefix before the name")
        if self.sinks:
            self.sinks.write({"step": step, **figures}, step)

    @contextmanager
    def weights(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's parameters by name as of the last update, each the rank's own shard, detached.

        Collective over the data-parallel ranks where the run gathers parameters while it computes. The names of
        several chunks of a rank (virtual pipeline) begin with `chunk N `.
        """
        from megadiff.model.denoiser import gathered_weights

        with gathered_weights(self.wrapped):
            yield {name: parameter.detach() for name, parameter in named_weights(self.chunks).items()}


def named_weights(chunks: Sequence[ModelChunk]) -> dict[str, Tensor]:
    """Return the parameters of a rank's chunks by name; with several chunks a name begins with `chunk N `."""
    return {
        f"chunk {index} {name}" if len(chunks) > 1 else name: parameter
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


def curves(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a line by the name of their curve, for sinks that draw curves.

    The names are `train/KEY`, `epochs/SOURCE`, `flops/COUNT`, `eval/KEY` without `eval_`, and the key itself for lines
    of other hooks.
    """
    begin = "train/" if "loss" in line else "eval/" if "eval_elbo" in line else ""
    found: dict[str, float] = {}
    for key, value in line.items():
        if key == "step":
            continue
        if isinstance(value, Mapping):
            found |= {f"{key}/{part}": number for part, number in value.items()}
        else:
            found[begin + (key.removeprefix("eval_") if begin == "eval/" else key)] = value
    return {name: float(value) for name, value in found.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and float("-inf") < value < float("inf")


def build_listed(configs: Sequence[HookConfig], context: HookContext) -> list[ListedHook]:
    """Return the hooks of the list, and open its sinks on the main rank.

    Raises:
        HookError: one of them cannot be built.
    """
    hooks: list[ListedHook] = []
    count: Counter[str] = Counter()
    for config in configs:
        count[config.name] += 1
        name = config.name if count[config.name] == 1 else f"{config.name} ({count[config.name]})"
        member = HOOKS.member(config.name)
        caller = _Caller(name, member.__file__ or "", config.every, context)
        with caller.naming("could not be built"):
            made = member.build(config, context)
        if not isinstance(made, Hook | MetricSink):
            raise HookError(
                f"hook `{name}`: build must return a megadiff.train.hooks.Hook or MetricSink, found "
                f"{type(made).__name__}"
            )
        if isinstance(made, MetricSink) and context.topology.is_main:
            context.sinks.add(ListedSink(made, caller))
        if isinstance(made, Hook):
            hooks.append(ListedHook(made, caller))
    return hooks


def states(hooks: Sequence[Hook]) -> dict[str, Any]:
    """Return what a checkpoint keeps for hooks of the list, by name."""
    found = {hook.name: hook.state() for hook in hooks if isinstance(hook, ListedHook)}
    return {name: state for name, state in found.items() if state}


def restore(hooks: Sequence[Hook], saved: Mapping[str, Any]) -> None:
    """Give hooks of the list what a checkpoint has kept for them."""
    for hook in hooks:
        if isinstance(hook, ListedHook) and hook.name in saved:
            hook.restore(saved[hook.name])


class _Caller:
    """Name and schedule of one entry of the list, and the sentence for what it raises."""

    def __init__(self, name: str, file: str, every: int, context: HookContext) -> None:
        self.name, self.file, self.every, self.context = name, file, every, context
        self._last_step = context.config.steps
        self._is_open = self._is_closed = False

    def is_due(self, step: int) -> bool:
        """Return whether the entry is called after this step."""
        return step % self.every == 0 or step == self._last_step

    @contextmanager
    def naming(self, event: str) -> Iterator[None]:
        """Turn an exception into a sentence with the entry's name and the line that raised it.

        Raises:
            HookError, or the class of the MegadiffError that was raised. Lack of memory passes through: the run has
                its own sentence for that.
        """
        try:
            yield
        except HookError:
            raise
        except MegadiffError as error:
            raise type(error)(f"hook `{self.name}` {event}: {error}") from error
        except Exception as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            kind = StorageError if isinstance(error, OSError) and is_storage_failure(error) else HookError
            raise kind(
                f"hook `{self.name}` {event}: {account_of(error, self.file)}; correct it or take it out of `hooks`, "
                "then run the same command again"
            ) from error

    def open(self, part: Hook | MetricSink) -> None:
        """Open the entry, once: as a sink, if it is both a hook and a sink."""
        if not self._is_open:
            self._is_open = True
            with self.naming("could not be opened"):
                part.open()

    def close(self, part: Hook | MetricSink) -> None:
        """Close the entry, once; a failure is logged, since the run is over."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            part.close()
        except Exception as error:
            logger.warning(f"hook `{self.name}` could not be closed: {type(error).__name__}: {error}")


class ListedHook(Hook):
    """A hook of the list: called when due, and held to leaving the weights alone."""

    def __init__(self, hook: Hook, caller: _Caller) -> None:
        self.hook, self._caller = hook, caller
        self.name = caller.name
        self.section = hook.section  # pyright: ignore[reportAttributeAccessIssue]  that of the hook inside
        self.collectives = hook.collectives  # pyright: ignore[reportAttributeAccessIssue]

    def open(self) -> None:
        """Open the hook."""
        self._caller.open(self.hook)

    def __call__(self, info: Any) -> None:
        """Call the hook if it is due.

        Raises:
            HookError: it raised, or it changed a weight in place.
        """
        if not self._caller.is_due(info.step):
            return
        before = self._versions()
        with self._caller.naming(f"failed after step {info.step}"):
            self.hook(info)
        if self._versions() != before:
            raise HookError(
                f"hook `{self.name}` changed weights of the model after step {info.step}; hooks read a run and never "
                "change it: let it work on copies (`tensor.clone()`)"
            )

    def state(self) -> dict[str, Any]:
        """Return the hook's state.

        Raises:
            HookError: it is not a mapping that JSON can hold.
        """
        with self._caller.naming("could not give its state"):
            state = self.hook.state()
            return dict(json.loads(json.dumps(state, allow_nan=False))) if state else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give the hook its state."""
        with self._caller.naming("could not take its state back"):
            self.hook.restore(state)

    def close(self) -> None:
        """Close the hook."""
        self._caller.close(self.hook)

    def _versions(self) -> list[int]:
        """Return torch's counters of in-place changes of this rank's parameters."""
        return [parameter._version for chunk in self._caller.context.chunks for parameter in chunk.parameters()]


class ListedSink(MetricSink):
    """A sink of the list: given a copy of each line that is due."""

    def __init__(self, sink: MetricSink, caller: _Caller) -> None:
        self.sink, self._caller = sink, caller

    def open(self) -> None:
        """Open the sink."""
        self._caller.open(self.sink)

    def write(self, line: dict[str, Any], step: int) -> None:
        """Give the sink a line if it is due."""
        if self._caller.is_due(step):
            with self._caller.naming(f"could not write its line of step {step}"):
                self.sink.write(copy.deepcopy(line), step)

    def sync(self) -> None:
        """Make the sink's lines durable."""
        with self._caller.naming("could not be synced"):
            self.sink.sync()

    def close(self) -> None:
        """Close the sink."""
        self._caller.close(self.sink)
