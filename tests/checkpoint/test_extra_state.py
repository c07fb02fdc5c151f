"""What a layer keeps beside its parameters, such as the scales of delayed FP8: plain tensors, back where they were."""

from __future__ import annotations

from unittest.mock import patch

import torch

from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank, wire_on_rank


def _keeping(found):
    """A linear layer whose extra state, in the form `fused_layers` gives it, follows from its weight."""
    from megadiff.model.layers import ColumnLinear

    class Keeps(ColumnLinear):
        def get_extra_state(self):
            scale = self.weight.detach().double().abs().sum()
            return {"scaling_fwd.scale": torch.stack([scale, -scale]), "scaling_fwd.amax_history": torch.ones(4, 3)}

        def set_extra_state(self, state):
            own = self.get_extra_state()  # torch loads a module's parameters first
            found.append(state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own))

    return patch("megadiff.model.layers.ColumnLinear", Keeps)


def _save(config):
    with _keeping([]):
        train_on_rank(config, 2, save=True)


def _load(config):
    """(whether each layer got its own state back, the step that layers without any go on from)."""
    from megadiff.run.resume import ResumeOptions

    found: list[bool] = []
    with _keeping(found):
        wire_on_rank(config, 1, ResumeOptions()).close()
    plain = wire_on_rank(config, 1, ResumeOptions())
    plain.close()
    return found, plain.first_step


def test_a_layers_state_saved_on_two_stages_loads_in_one_process(toy_corpus, tmp_path):
    """Under the loader that unpickles plain data only; local layers, which keep nothing, load the checkpoint too."""
    keys = {"data__valid": [], "schedule__steps": 2, "schedule__warmup_steps": 0, "schedule__decay_steps": 0}
    on_ranks(2, _save, toy_config(toy_corpus, tmp_path, parallel__pipeline=2, **keys))
    found, first_step = on_ranks(1, _load, toy_config(toy_corpus, tmp_path, **keys))[0]
    assert found == [True] * 8  # two matrices of each layer
    assert first_step == 2
