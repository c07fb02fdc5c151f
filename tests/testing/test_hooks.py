"""The contract of hooks and sinks: the package's members keep it (breaches: tests/train/hooks/test_listed.py)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from megadiff.config import registry
from megadiff.platform.quiet import quiet
from megadiff.train.config import HOOKS

with quiet():
    from megadiff.testing.hooks import check_hook, check_sink
    from megadiff.testing.toy_run import LAYOUTS

pytestmark = pytest.mark.timeout(900)

ENTRIES = {
    "gradient_noise": {"name": "gradient_noise", "every": 2},
    "parameter_rms": {"name": "parameter_rms", "every": 2},
    "wandb": {"name": "wandb", "project": "test", "mode": "offline"},
}
"""Members that a run description can list."""


def test_every_member_that_can_be_listed_is_under_contract():
    assert HOOKS.names() == sorted(ENTRIES)
    others = set(registry.names(HOOKS.package)) - set(ENTRIES)
    assert not any(hasattr(registry.member(HOOKS.package, name), "build") for name in others)


def test_a_hook_with_collectives_keeps_the_contract():
    """On the layouts that divide a model; tests/train/hooks/test_listed.py has the others."""
    check_hook(ENTRIES["parameter_rms"], layouts={name: LAYOUTS[name] for name in ("tensor parallel", "pipeline")})


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)")
def test_the_wandb_sink_keeps_the_contract():
    check_sink(ENTRIES["wandb"], layouts={"data parallel": LAYOUTS["data parallel"]})
