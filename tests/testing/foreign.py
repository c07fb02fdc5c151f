"""Optimizers and tokenizers as a user would write them, one file each, outside the package."""

from __future__ import annotations

import textwrap
from pathlib import Path

LION = '''
"""Lion: the sign of an interpolated gradient, with one moment."""

import torch
from pydantic import Field

from megadiff.config.section import Section

STATE_KEYS = ("exp_avg",)


class Settings(Section):
    """Settings of Lion."""

    beta1: float = Field(default=0.95, ge=0, lt=1)
    """Weight of the moment in the direction of an update."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the moment."""


class Lion(torch.optim.Optimizer):
    def __init__(self, groups, betas):
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                moment, gradient = state["exp_avg"], parameter.grad
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.sign(beta1 * moment + (1 - beta1) * gradient), alpha=-group["lr"])
                moment.mul_(beta2).add_(gradient, alpha=1 - beta2)


def build(groups, settings):
    return Lion(groups, (settings.beta1, settings.beta2))
'''

MOMENTUM = '''
"""Stochastic gradient descent with momentum, by torch."""

import torch
from pydantic import Field

from megadiff.config.section import Section

STATE_KEYS = ("momentum_buffer",)


class Settings(Section):
    """Settings of momentum SGD."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the sum of gradients."""


def build(groups, settings):
    return torch.optim.SGD(groups, momentum=settings.momentum)


def kernel(optimizer):
    return "torch SGD"
'''

PLAIN = """
import torch


def build(groups, settings):
    return torch.optim.SGD(groups)
"""
"""An optimizer without settings or state of its own."""


def write_package(folder: Path, **modules: str) -> None:
    """Write a package `theirs` with these modules into a folder, which is to be put on the path."""
    package = folder / "theirs"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    for name, text in modules.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text).lstrip())


WORDS = '''
"""Words between blanks, looked up in a list in a file; one token for all others."""

import hashlib
import json
from pathlib import Path

import tokenizers

from megadiff.data.transformers_tokenizer import write_transformers_tokenizer


class Words:
    def __init__(self, path):
        self._words = ["<unk>", *Path(path).read_text().split()]
        self._ids = {word: number for number, word in enumerate(self._words)}
        self.mask_id = len(self._words)
        self.vocab_size = len(self._words) + 1
        self.fingerprint = hashlib.sha256(json.dumps(self._words).encode()).hexdigest()
        self.special_names = ["<|mask|>"]

    def encode(self, text):
        return [self._ids.get(word, 0) for word in text.split()]

    def decode(self, ids):
        return " ".join(self._words[i] for i in ids)

    def export(self, folder, *, seq_length, prepend_bos):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(self._ids, unk_token="<unk>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        definition = json.loads(inner.to_str())
        return write_transformers_tokenizer(folder, self, definition, seq_length=seq_length, prepend_bos=prepend_bos)


def build(argument):
    return Words(argument)
'''
"""A tokenizer without bos, eos and padding, which exports itself."""
