"""Connection of text sampling during training to the run."""

from __future__ import annotations

from collections.abc import Sequence

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.eval.drawn_text import DrawnText
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.prepared import Prepared
from megadiff.train import hooks
from megadiff.train.goodput import Goodput


def sample_hooks(
    prepared: Prepared,
    process: NoiseProcess,
    chunks: Sequence[ModelChunk],
    topology: Topology,
    platform: Platform,
    goodput: Goodput,
) -> list[hooks.WriteSamples]:
    """Return the hook that samples text; none if no samples are configured."""
    config = prepared.config
    if not config.eval.samples:
        return []
    drawn = DrawnText(
        rows=config.eval.samples,
        steps=config.eval.sample_steps,
        seq_length=config.model.seq_length,
        process=process,
        tokenizer=prepared.tokenizer,
        start=_start(prepared),
        chunks=chunks,
        topology=topology,
        device=platform.device,
    )
    folder = config.folder if topology.is_main else None
    return [hooks.WriteSamples(config.eval.every, config.steps, drawn, folder, goodput)]


def _start(prepared: Prepared) -> list[int]:
    """Return the tokens that every sequence begins with, if all documents of the training data do."""
    bos = prepared.tokenizer.bos_id
    return [bos] if prepared.data.prepended_bos and bos is not None else []
