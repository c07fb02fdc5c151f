"""Check of the parallel layout: all sizes are divisible, and the node has a device for each of its ranks."""

from __future__ import annotations

from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.errors import ConfigError
from megadiff.run.summary import lay_out_run


def check(subject: Subject) -> Iterable[Finding]:
    """Check the divisibility that a start requires, then compare the number of devices with that of ranks."""
    config, vocab_size = subject.config, subject.vocab_size
    if config is None:
        return
    if vocab_size is None:
        yield warn("not checked: the vocabulary is unknown", "fix data.tokenizer, or set data.vocab_size")
        return
    try:
        layout = lay_out_run(config, world_size=subject.ranks, vocab_size=vocab_size)
    except ConfigError as error:
        yield fail(
            f"{subject.ranks} rank(s): {error}",
            "change the layout, or give the run's number of ranks with --ranks",
        )
        return
    yield ok(
        f"{layout.world_size} rank(s): tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}, "
        f"{layout.num_microbatches} microbatch(es) a step"
    )
    here, devices, platform = subject.local_ranks, subject.platform.local_devices(), subject.platform
    if here <= devices:
        return
    if platform.is_cpu:
        yield warn(f"{here} ranks share {devices} core(s)", "fine for a trial, but the ranks take turns")
    else:
        yield fail(f"{here} ranks on this node, which has {devices} GPU(s)", f"start at most {devices} ranks a node")
