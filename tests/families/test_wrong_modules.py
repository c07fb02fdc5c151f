"""Modules of the user's own that fail, or that are meant for another key: one sentence with their name, exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree
from tests.testing.foreign import LION

WORDS = '''
"""A tokenizer that reads its words from a file."""

from pathlib import Path


def build(argument):
    return Path(argument).read_text().split()
'''
FAILS = LION.replace('            beta1, beta2 = group["betas"]\n', '            beta1, beta2 = group["no such key"]\n')
NOISE = "def build(settings):\n    return 1 / 0\n"
LAW = """
from dataclasses import dataclass

from megadiff.diffusion.config import ScheduledNoise as Settings
from megadiff.diffusion.processes import NoiseLaw


@dataclass(frozen=True)
class Law(NoiseLaw):
    def logit_u(self, log_snr, functions):
        return {}

    def dlogit_u(self, log_snr, functions):
        return 1.0


def build(settings):
    return Law()
"""
WEIGHTING = "def loss(terms, settings):\n    return {}\n"
MODULES = {
    **{"words": WORDS, "lion": LION, "fails": FAILS, "noise": NOISE, "__init__": ""},
    **{"raises": LAW.format("1 / 0"), "nan": LAW.format("log_snr * float('nan')"), "flat": LAW.format("0.0")},
    **{"typo": WEIGHTING.format("terms.klx"), "sums": WEIGHTING.format("terms.kl.sum()")},
    "detached": WEIGHTING.format("terms.kl.detach()"),
    "alone": "def loss(terms):\n    return terms.kl\n",
}

ANOTHER_KEY = "is the module meant for another key?"
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    # changes, options, parts of the sentence
    "a file that a tokenizer lacks": (
        {"data__tokenizer": "wrongs.words:nowhere.txt"},
        ("--check",),
        "data.tokenizer: `build` of the module wrongs.words failed: FileNotFoundError: ",
    ),
    "an optimizer as tokenizer": ({"data__tokenizer": "wrongs.lion:x"}, ("--check",), ANOTHER_KEY),
    "an optimizer as noise": ({"noise": {"process": "wrongs.lion"}}, ("--check",), ANOTHER_KEY),
    "noise that fails": (
        {"noise": {"process": "wrongs.noise"}},
        ("--check",),
        "`build` of the module wrongs.noise failed: ZeroDivisionError: division by zero (noise.py, line 2)",
    ),
    "a law that fails": (
        {"noise": {"process": "wrongs.raises"}},
        ("--check",),
        "`logit_u` of the module wrongs.raises failed: ZeroDivisionError: division by zero (raises.py, line 11)",
    ),
    "a law that is not finite": (
        {"noise": {"process": "wrongs.nan"}},
        ("--check",),
        "must return finite numbers in the shape of `log_snr`, here (9,) from -9 to 9, found nan; correct it",
    ),
    "a law of another shape": ({"noise": {"process": "wrongs.flat"}}, ("--check",), "found shape (); correct it"),
    "a weighting that takes less": (
        {"objective": {"weighting": "wrongs.alone"}},
        ("--check",),
        "`loss` of the module wrongs.alone is called with 2 argument(s) here, which it does not take",
    ),
    "a weighting that fails": (
        {"objective": {"weighting": "wrongs.typo"}},
        (),
        "`loss` of the module wrongs.typo failed: AttributeError: 'TokenTerms' object has no attribute 'klx'",
    ),
    "a weighting of another shape": (
        {"objective": {"weighting": "wrongs.sums"}},
        (),
        "what `loss` of the module wrongs.sums returns must have the shape of the tokens: wanted a tensor of shape (",
    ),
    "a weighting without a gradient": (
        {"objective": {"weighting": "wrongs.detached"}},
        (),
        "`loss` of the module wrongs.detached must be a differentiable function of kl, itakura_saito or cross_entropy",
    ),
    "a tokenizer as optimizer": ({"optimizer": {"name": "wrongs.words", "lr": 0.1}}, ("--check",), ANOTHER_KEY),
    "a tokenizer as method": ({"method": {"name": "wrongs.words"}}, ("--check",), ANOTHER_KEY),
    "an optimizer that fails": (
        {"optimizer": {"name": "wrongs.fails", "lr": 0.1}},
        ("--check",),
        "`step` of the module wrongs.fails failed: KeyError: 'no such key' (fails.py, line ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_that_cannot_be_used_is_named(toy_corpus: Path, tmp_path: Path, case: str) -> None:
    changes, options, sentence = CASES[case]
    package = tmp_path / "wrongs"
    package.mkdir()
    for name, text in MODULES.items():
        (package / f"{name}.py").write_text(text)
    assert FAILS != LION
    tree = toy_tree(toy_corpus, tmp_path / "runs", **changes)
    description = write_yaml(tmp_path / "run.yaml", tree)
    command = ("pretrain_dlm.py", "--config", description, *options)
    ended = call_forked(*command, before=lambda: sys.path.insert(0, str(tmp_path)))
    assert ended.code == 2, ended.err
    assert sentence in ended.err
    assert "Traceback" not in ended.err
