"""Transformer Engine's layers against the local ones, FP8 against bf16, and checkpoints of each in the other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.gpu import needs

pytestmark = needs.engine

BLOCKS = ("plain", "gidd")
RECIPES = ("delayed", "tensorwise", "blockwise")


def _built(block, layers, **kwargs):
    from tests.gpu import one_gpu

    return one_gpu.trainee({"plain": one_gpu.PLAIN, "gidd": one_gpu.GIDD}[block], layers, **kwargs)


def _scales(trained):
    """Every number of every layer's extra state."""
    states = [module.get_extra_state() for module in trained.chunks[0].decoder.modules() if hasattr(module, "fp8_meta")]
    return [tensor.tolist() for state in states if state for tensor in state.values()]


@pytest.mark.parametrize("block", BLOCKS)
def test_both_kinds_of_layers_share_checkpoint_names_shapes_and_weights(block):
    local, fused = _built(block, "local").weights(), _built(block, "transformer_engine").weights()
    assert {name: weight.shape for name, weight in fused.items()} == {n: w.shape for n, w in local.items()}
    for name, weight in local.items():
        assert torch.equal(fused[name], weight), name


@pytest.mark.parametrize("block", BLOCKS)
def test_both_kinds_of_layers_learn_alike(block):
    """bf16 rounds at other places: close losses and norms over several updates, not equal ones."""
    local = _built(block, "local").train(range(8))
    fused = _built(block, "transformer_engine").train(range(8))
    assert local[-1][0] < local[0][0] - 0.05
    for (loss, norm), (other_loss, other_norm) in zip(local, fused, strict=True):
        assert other_loss == pytest.approx(loss, rel=5e-3)
        assert other_norm == pytest.approx(norm, rel=5e-2)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("saved", "loaded"), [("local", "transformer_engine"), ("transformer_engine", "local")])
def test_a_checkpoint_of_either_kind_loads_in_the_other(block, saved, loaded, tmp_path):
    from tests.gpu import checkpoints

    trained = _built(block, saved)
    trained.train(range(3))
    checkpoints.save(trained, tmp_path / "step")
    other = _built(block, loaded)
    checkpoints.load(other, tmp_path / "step")
    found = other.weights()
    for name, weight in trained.weights().items():
        assert torch.equal(found[name], weight), name
    one, two = trained.logits(), other.logits()
    assert ((one - two).norm() / one.norm()).item() < 2e-2
    for (loss, _), (other_loss, _) in zip(trained.train(range(3, 6)), other.train(range(3, 6)), strict=True):
        assert other_loss == pytest.approx(loss, rel=5e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_learns_what_bf16_learns(recipe):
    bf16 = _built("plain", "transformer_engine").train(range(40))
    fp8 = _built("plain", "transformer_engine", precision={"fp8": recipe}).train(range(40))
    assert fp8 != bf16
    assert bf16[-1][0] < bf16[0][0] - 0.1
    for (loss, _), (other_loss, other_norm) in zip(bf16, fp8, strict=True):
        assert math.isfinite(other_norm)
        assert other_loss == pytest.approx(loss, rel=3e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_computes_in_bf16_and_leaves_the_scales_alone(recipe):
    trained = _built("plain", "transformer_engine", precision={"fp8": recipe})
    assert torch.equal(trained.logits(), _built("plain", "transformer_engine").logits())
    trained.train(range(3))
    before = _scales(trained)
    trained.logits(7)
    assert _scales(trained) == before
    assert (len(before) > 0) == (recipe == "delayed")
    trained.train(range(3, 5))
    assert recipe != "delayed" or _scales(trained) != before


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_goes_on_after_a_resume_as_if_it_had_not_stopped(recipe, tmp_path):
    """The scales of `delayed` are part of the checkpoint."""
    from tests.gpu import checkpoints

    whole = _built("plain", "transformer_engine", precision={"fp8": recipe})
    whole.train(range(6))
    checkpoints.save(whole, tmp_path / "step")
    resumed = _built("plain", "transformer_engine", precision={"fp8": recipe})
    checkpoints.load(resumed, tmp_path / "step")
    assert _scales(resumed) == _scales(whole)
    for (loss, norm), (other_loss, other_norm) in zip(
        whole.train(range(6, 12)), resumed.train(range(6, 12)), strict=True
    ):
        assert other_loss == pytest.approx(loss, rel=1e-3)
        assert other_norm == pytest.approx(norm, rel=1e-2)


def test_delayed_fp8_starts_without_scales_and_keeps_plain_tensors():
    trained = _built("plain", "transformer_engine", precision={"fp8": "delayed"})
    layer = trained.chunks[0].decoder.layers[0].mlp.linear_fc1
    assert layer.get_extra_state() is None
    trained.train(range(2))
    state = layer.get_extra_state()
    assert sorted(state) == [f"scaling_{way}.{what}" for way in ("bwd", "fwd") for what in ("amax_history", "scale")]
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    assert bool((state["scaling_fwd.scale"][:2] != 1.0).all())


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_blocks_kept_in_bf16_at_both_ends_do_not_compute_in_fp8(recipe):
    precision = {"fp8": recipe, "fp8_first_last_bf16": 1}
    trained = _built("plain", "transformer_engine", precision=precision)
    trained.train(range(1))
    used = [layer.mlp.linear_fc1.fp8 for layer in trained.chunks[0].decoder.layers]
    assert used == [False, True, True, False]


@pytest.mark.parametrize("fp8", ["none", *RECIPES])
@pytest.mark.parametrize("block", BLOCKS)
def test_layers_save_what_the_estimate_counts(block, fp8):
    """The estimate is held to the library's own Python code on the meta device; here its kernels run."""
    dry_run = pytest.importorskip("megadiff.run.dry_run", exc_type=ImportError)
    from megadiff.model import cost
    from megadiff.platform import engine_on_meta
    from tests.gpu import one_gpu

    trained = _built(block, "transformer_engine", precision={"fp8": fp8})
    (chunk,) = trained.chunks
    ids = one_gpu.sequences_of(0, trained.model.seq_length, trained.platform.device)[0][0]
    known = [*chunk.parameters(), *chunk.buffers(), ids, *(parameter.main_grad for parameter in chunk.parameters())]
    copies = (part for module in chunk.modules() for part in engine_on_meta.quantised_weights(module))
    saved = dry_run.saved_bytes(
        lambda: trained.wrapped[0](ids, loss_fn=lambda hidden, _: hidden), apart_from=itertools.chain(known, copies)
    )
    estimated = cost.stage_memory(
        trained.model.shape(vocab_size=one_gpu.VOCAB),
        cost.Layout(fused_layers=True, micro_batch_size=one_gpu.ROWS),
        cost.Precision(params="bf16", compute="bf16", fp8=fp8),
        stage=0,
    )
    assert saved == pytest.approx(estimated.activations_per_microbatch, rel=0.1)


@pytest.mark.parametrize("precision", [{}, {"fp8": "delayed"}, {"fp8": "tensorwise"}])
@pytest.mark.parametrize("recompute", [{"recompute": "full"}, {"recompute": "selective"}])
def test_recomputing_fused_layers_changes_nothing(precision, recompute):
    plain = _built("gidd", "transformer_engine", precision=precision).train(range(4))
    again = _built("gidd", "transformer_engine", precision=precision, parallel=recompute).train(range(4))
    for (loss, norm), (other_loss, other_norm) in zip(plain, again, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-3)
        assert other_norm == pytest.approx(norm, rel=1e-2)


def test_transformer_engines_adam_updates_as_torchs():
    from transformer_engine.pytorch.optimizers import FusedAdam  # type: ignore[import-not-found]

    draw = torch.Generator("cuda").manual_seed(0)
    start = torch.randn(64, 32, generator=draw, device="cuda")
    one, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    fused, plain = FusedAdam([one], adam_w_mode=True, **settings), torch.optim.AdamW([other], **settings)
    for _ in range(20):
        gradient = torch.randn(64, 32, generator=draw, device="cuda")
        one.grad, other.grad = gradient.clone(), gradient.clone()
        fused.step()
        plain.step()
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
