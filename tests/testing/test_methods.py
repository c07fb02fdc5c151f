"""Every training method of the package keeps its contract, and the contract sees what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from megadiff.methods import METHODS
from megadiff.platform.quiet import quiet

with quiet():
    from megadiff.methods.gidd import Gidd
    from megadiff.methods.next_token import NextToken
    from megadiff.testing.methods import check_batches, check_method, method_of
    from megadiff.testing.toy_run import LAYOUTS, toy_config, write_corpus

pytestmark = pytest.mark.timeout(900)

HALVES = {name: LAYOUTS[name] for name in ("one rank", "tensor parallel")}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    conditioning = {"prompt": 0.5, "per_token_noise": 0.3, "infilling": 0.2, "pad_insertion": 0.3}
    config = toy_config(write_corpus(folder / "corpus", tokens=500), folder, conditioning=conditioning)
    return method_of(config).context


def test_every_member_is_under_contract():
    assert METHODS.names() == ["adaptation", "gidd", "next_token"]


def test_denoising_keeps_the_contract():
    check_method("gidd", conditioning__prompt=0.5, conditioning__prompt_attention="causal")


def test_next_token_prediction_keeps_the_contract():
    check_method("next_token", layouts=HALVES)


def test_adaptation_keeps_the_contract():
    check_method(
        {"name": "adaptation", "anneal_steps": 3, "next_token_fraction": 0.4, "next_token_weight": 0.5},
        model__alignment="shifted",
        conditioning__prompt=0.3,
        conditioning__prompt_attention="causal",
    )


def test_shifted_outputs_keep_the_contract():
    check_method("gidd", model__alignment="shifted", layouts=HALVES)


class Stateful(Gidd):
    """Noise that depends on the calls before."""

    calls = 0

    def batch(self, clean, sample_index, step_batch):
        self.calls += 1
        return super().batch(clean, [sample + self.calls for sample in sample_index], step_batch)


class Positional(Gidd):
    """Noise that depends on the place within the microbatch."""

    def batch(self, clean, sample_index, step_batch):
        return super().batch(clean, range(len(sample_index)), step_batch)


class BySize(Gidd):
    """Noise that depends on the size of the microbatch, not on the order in it."""

    def batch(self, clean, sample_index, step_batch):
        return super().batch(clean, [sample + len(sample_index) for sample in sample_index], step_batch)


class Narrow(Gidd):
    def batch(self, clean, sample_index, step_batch):
        batch = super().batch(clean, sample_index, step_batch)
        return batch._replace(noised=batch.noised.int())


class Flat(Gidd):
    def batch(self, clean, sample_index, step_batch):
        batch = super().batch(clean, sample_index, step_batch)
        return batch._replace(log_snr=batch.log_snr[:, 0])


class TooLong(Gidd):
    def attention(self, batch):
        pattern = super().attention(batch)
        return replace(pattern, prefix_lengths=torch.full_like(pattern.prefix_lengths, 17))


class OnePrefix(Gidd):
    def attention(self, batch):
        pattern = super().attention(batch)
        return replace(pattern, prefix_lengths=pattern.prefix_lengths[:1])


class OnePrompt(Gidd):
    def batch(self, clean, sample_index, step_batch):
        batch = super().batch(clean, sample_index, step_batch)
        return batch._replace(prompt_length=batch.prompt_length[0])


class Beyond(Gidd):
    def loss_tokens(self, batch):
        return torch.tensor([3, batch.noised.numel()])


class Together(Gidd):
    """Attention across the documents of a sequence."""

    def attention(self, batch):
        return super().attention(batch._replace(documents=None))


class Forgetful(Gidd):
    def batch(self, clean, sample_index, step_batch, predicted=None, documents=None):
        return super().batch(clean, sample_index, step_batch, predicted)


class Unmoved(Gidd):
    """Documents that do not follow the tokens behind an inserted pad."""

    def batch(self, clean, sample_index, step_batch, predicted=None, documents=None):
        batch = super().batch(clean, sample_index, step_batch, predicted)
        return batch if documents is None else batch._replace(documents=torch.from_numpy(documents))


class Twice(Gidd):
    def loss_tokens(self, batch):
        return torch.tensor([3, 3, 5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Stateful, "depends on the order of the sequences"),
        (Positional, "depends on the order of the sequences"),
        (BySize, "noised of a sequence depends on its microbatch"),
        (Narrow, "noised must be torch.int64"),
        (Flat, r"log_snr must have shape \[B, L\]"),
        (TooLong, "a prefix is too long"),
        (OnePrefix, "one prefix length a sequence"),
        (OnePrompt, r"prompt_length must have shape \[B\]"),
        (Beyond, "a position is too large"),
        (Twice, "a position comes twice"),
        (Together, "attention: it does not keep documents apart"),
        (Forgetful, "batch: it does not hand on documents"),
        (Unmoved, "batch: documents do not follow the tokens"),
    ],
)
def test_a_wrong_batch_is_found(context, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_batches(wrong(context))


def test_the_package_s_own_batches_are_pure(context):
    check_batches(Gidd(context))
    check_batches(NextToken(context))


WRONG = {
    "no_build": ("", None, "has a function build|it has none"),
    "no_bound": (
        "from megadiff.methods.gidd import Gidd\n"
        "class Half(Gidd):\n"
        "    def validation(self, *, num_noise_levels):\n"
        "        from dataclasses import replace\n"
        "        task = super().validation(num_noise_levels=num_noise_levels)\n"
        "        class Halved(type(task.objective)):\n"
        "            def loss(self, *inputs):\n"
        "                output = super().loss(*inputs)\n"
        "                return output._replace(terms=output.terms._replace(elbo=output.terms.elbo / 2))\n"
        "        return replace(task, objective=Halved(task.objective.process))\n"
        "def build(settings, context):\n"
        "    return Half(context)\n",
        {"one rank": LAYOUTS["one rank"]},
        "nats per token, below their entropy 5.5568",
    ),
    "by_rank": (
        "from megadiff.methods.gidd import Gidd\n"
        "class ByRank(Gidd):\n"
        "    def loss(self, hidden, weight, batch, shard):\n"
        "        output = super().loss(hidden, weight, batch, shard)\n"
        "        return output._replace(loss=output.loss * (1 + shard.start / 1000))\n"
        "def build(settings, context):\n"
        "    return ByRank(context)\n",
        HALVES,
        "tensor parallel: .* on one rank it is",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_method_is_found(name, tmp_path: Path, monkeypatch):
    text, layouts, message = WRONG[name]
    package = f"wrong_method_{name}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "method.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValidationError if layouts is None else AssertionError, match=message):
        check_method(f"{package}.method", **({"layouts": layouts} if layouts else {}))
