"""Every optimizer of the family, and optimizers written outside of it, under the contract test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadiff.config import registry
from megadiff.errors import ConfigError
from megadiff.optim.config import OPTIMIZERS
from megadiff.testing import check_optimizer
from tests.testing.foreign import LION, MOMENTUM, PLAIN, write_package

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_package(tmp_path, lion=LION, momentum=MOMENTUM, plain=PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "theirs"]:
        del sys.modules[name]


def test_every_member_of_the_family() -> None:
    """With the distributed optimizer; `tests/distributed` resumes them in the other ways."""
    check_optimizer(*registry.names(OPTIMIZERS.package), kinds=["distributed"])


def test_an_optimizer_of_whole_matrices_in_the_other_ways() -> None:
    check_optimizer("muon", settings={"newton_schulz_precision": "bf16"}, kinds=["fp32", "bf16"])


def test_one_moment_from_outside(theirs: Path) -> None:
    check_optimizer("theirs.lion", settings={"beta1": 0.9, "parametrisation": "completep"})


def test_another_buffer_or_no_state_from_outside(theirs: Path) -> None:
    check_optimizer("theirs.momentum", "theirs.plain", kinds=["fp32", "distributed"])


def changed(old: str, new: str, text: str = LION) -> str:
    """Return the text of an optimizer with one place changed."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


DECLARED, STEP, BETAS = 'STATE_KEYS = ("exp_avg",)', "    def step(self, closure=None):", "beta1, beta2 = group["
COUNTS_ITSELF = f"{STEP}\n        self.n = getattr(self, 'n', 0) + 1"
OTHER_SHAPE = "state['n'] = parameter.sum(0); moment, gradient ="
NOT_ELEMENTWISE = changed(
    "torch.sign(beta1 * moment + (1 - beta1) * gradient)", "torch.nn.functional.normalize(gradient, dim=-1)"
)
SABOTAGE = {
    "undeclared": (
        changed(DECLARED, ""),
        r"keeps `exp_avg` for each parameter, which its module does not declare, .*; write STATE_KEYS = \('exp_avg',\)",
    ),
    "attribute": (
        changed('group["weight_decay"]', "self.n", changed(STEP, COUNTS_ITSELF)),
        r"does not continue from its saved state: after a resume its updates differ",
    ),
    "group": (
        changed(BETAS, f"group['n'] = group.get('n', 0) + 1; {BETAS}"),
        r"changes `n` of its parameter groups in a step, .*; write GROUP_STATE_KEYS = \('n',\)",
    ),
    "other_shape": (
        changed(DECLARED, 'STATE_KEYS = ("exp_avg", "n")', changed("moment, gradient =", OTHER_SHAPE)),
        r"keeps `n` for a parameter of shape \[4, 6\] as float32 of shape \[6\]",
    ),
    "begins_elsewhere": (
        changed("torch.zeros_like", "torch.ones_like"),
        r"does not begin with zeros as its state, .*; let `initial_state\(parameter, group\)` in theirs\.bad return",
    ),
    "not_elementwise": (
        NOT_ELEMENTWISE,
        r".* so it needs whole tensors, .*; set parallel\.distributed_optimizer=false and parallel\.tensor=1",
    ),
    "no_build": ("STATE_KEYS = ()\n", r"has no function `build\(groups, settings\)` in theirs\.bad"),
}


@pytest.mark.parametrize("kind", SABOTAGE)
def test_what_could_not_be_resumed_is_refused_in_a_sentence(theirs: Path, kind: str) -> None:
    text, sentence = SABOTAGE[kind]
    write_package(theirs, bad=text)
    with pytest.raises(ConfigError, match=rf"^the optimizer `theirs\.bad` {sentence}"):
        check_optimizer("theirs.bad")


def test_a_member_that_says_so_needs_no_elementwise_updates(theirs: Path) -> None:
    write_package(theirs, whole=f"{NOT_ELEMENTWISE}\nELEMENTWISE = False\n")
    check_optimizer("theirs.whole", kinds=["fp32", "distributed"])
