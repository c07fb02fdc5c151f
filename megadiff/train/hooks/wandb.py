"""Weights & Biases: a metric sink for the curves of a run.

    hooks:
      - {name: wandb, project: my-project, mode: offline}

Every finite number of a line becomes a curve under the same name as in TensorBoard. A run that resumes continues the
same W&B run, whose id is kept in the run folder as `wandb.json`. W&B's own counter cannot go back, so the horizontal
axis of every curve is `step`, the number of optimizer steps, which is right also after a resume from an older
checkpoint; steps that are taken again are then in the history twice, with different `train/attempts`.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megadiff.config.section import Section
from megadiff.errors import PlatformError
from megadiff.files import UnreadableFileError, parse_json, read_bytes, write_atomically
from megadiff.train.hooks import HookContext, MetricSink, curves

log = logging.getLogger("megadiff")

RUN_FILE = "wandb.json"
"""File of the run folder that holds the id of the W&B run."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_BYTES = 2**16


class Settings(Section):
    """Keys of `{name: wandb, ...}`."""

    project: str = Field(min_length=1, max_length=128)
    """W&B project."""
    entity: str | None = None
    """W&B user or team; unset, the default of the account."""
    group: str | None = None
    """Name under which W&B groups runs, such as those of a sweep."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to the run folder alone; `wandb sync` uploads it later."""

    @model_validator(mode="after")
    def _is_installed(self) -> Settings:
        if find_spec("wandb") is None:
            raise ValueError(
                "`wandb` is not installed; run `pip install wandb`, or take the entry out of `hooks` "
                "(tensorboard and metrics.jsonl need no account)"
            )
        return self


def build(settings: Any, context: HookContext) -> WandbSink:
    """Return the sink of this run."""
    return WandbSink(settings, context)


class WandbSink(MetricSink):
    """One W&B run for all attempts of a run.

    Args:
        settings: keys of the entry in `hooks`.
        context: the run.
    """

    def __init__(self, settings: Any, context: HookContext) -> None:
        self._settings, self._context = settings, context
        self._run: Any = None

    def open(self) -> None:
        """Start the W&B run, or continue it.

        Raises:
            PlatformError: W&B refuses, for example without a login or a connection.
        """
        wandb: Any = import_module("wandb")
        settings, config = self._settings, self._context.config
        try:
            self._run = wandb.init(
                id=_run_id(self._context.folder / RUN_FILE),
                resume="allow" if settings.mode == "online" else None,
                name=config.name,
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=settings.tags,
                mode=settings.mode,
                dir=str(self._context.folder),
                config=config.model_dump(mode="json", by_alias=True),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise PlatformError(
                f"W&B cannot be used ({first}); run `wandb login`, or set `mode: offline` in its entry"
            ) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, line: dict[str, Any], step: int) -> None:
        """Add a point to the curve of every finite number of the line."""
        self._run.log({"step": step, **curves(line)})

    def close(self) -> None:
        """Write what is left; online, wait for the upload."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


def _run_id(path: Path) -> str:
    """Return the id of the run's W&B run, the same for all its attempts; kept in `path`."""
    try:
        found = parse_json(read_bytes(path, max_bytes=_MAX_BYTES))
        if isinstance(found, dict) and isinstance(found.get("id"), str) and _ID.fullmatch(found["id"]):
            return found["id"]
        log.warning(f"{path} holds no id of a W&B run; a new W&B run is started")
    except FileNotFoundError:
        pass
    except (OSError, UnreadableFileError) as error:
        log.warning(f"{path} cannot be read ({error}); a new W&B run is started")
    new = secrets.token_hex(8)
    write_atomically(path, json.dumps({"id": new}) + "\n")
    return new
