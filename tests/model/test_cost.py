"""Closed forms against the paper's tables and against hand-worked numbers."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from megadiff.errors import ConfigError
from megadiff.model.cost import (
    Layout,
    Precision,
    Shape,
    bytes_per_rank,
    executed_flops,
    flops_per_token,
    matrix_flops_per_token,
    padded_vocab_size,
    paper_parameters,
    parameters,
)
from tests.support.ranks import on_ranks

PAPER_SIZES = [
    ("L8-D512", 8, 512, 8, 25_223_680, 25_211_392, 159_429_120, 2.5201e8),
    ("L10-D640", 10, 640, 10, 49_242_240, 49_223_040, 216_995_200, 4.5274e8),
    ("L12-D768", 12, 768, 12, 85_064_448, 85_036_800, 286_363_392, 7.3688e8),
    ("L16-D1024", 16, 1024, 16, 201_556_992, 201_507_840, 469_943_296, 1.6120e9),
    ("L20-D1536", 20, 1536, 12, 566_662_656, 566_570_496, 969_223_680, 4.1550e9),
    ("gidd-mask-3b", 18, 3072, 24, 2_039_208_960, 2_039_043_072, 2_844_349_440, 1.3594e10),
    ("gidd-unif-3b", 19, 3072, 24, 2_152_498_176, 2_152_323_072, 2_957_629_440, 1.4349e10),
    ("gidd-unif-10b", 34, 4608, 36, 8_665_532_928, 8_665_062_912, 9_873_022_464, 5.5844e10),
]


def paper_shape(layers: int, hidden: int, heads: int) -> Shape:
    return Shape(layers, hidden, heads, 131_072, 2048, qk_norm="full", sink=True, mlp_bias=True)


@pytest.mark.parametrize(("label", "layers", "hidden", "heads", "p_paper", "p_true", "total", "flops"), PAPER_SIZES)
def test_the_papers_sizes_come_out_exactly(label, layers, hidden, heads, p_paper, p_true, total, flops):
    shape = paper_shape(layers, hidden, heads)
    assert paper_parameters(shape) == p_paper
    assert parameters(shape).non_embedding == p_true
    assert parameters(shape).total == total
    assert float(f"{flops_per_token(shape, 'deepseek'):.4e}") == flops


def test_both_methods_of_counting_flops_equal_the_authors_files():
    """L20-D1536 in the authors' CSVs: total_flops_per_tok and non_emb_flops_per_tok."""
    shape = paper_shape(20, 1536, 12)
    assert flops_per_token(shape, "deepseek") == 4_154_950_656
    assert flops_per_token(shape, "chinchilla") == 3_399_975_936


def test_flops_in_full_count_the_head_and_every_pair_of_positions():
    """L = 2, d = 4, f = 4, V = 10, S = 8: 6 (2 x 12 x 16 + 40) + 12 x 2 x 4 x 8."""
    assert matrix_flops_per_token(Shape(2, 4, 2, 10, 8)) == 6 * (384 + 40) + 768


@pytest.mark.parametrize(
    ("options", "norms", "biases", "sink"),
    [
        ({"qk_norm": "none"}, 2 * 2 * 8 + 8, 0, 0),
        ({"qk_norm": "head"}, 2 * (2 * 8 + 2 * 4) + 8, 0, 0),
        ({"qk_norm": "full"}, 2 * 4 * 8 + 8, 0, 0),
        ({"qk_norm": "none", "mlp_bias": True}, 40, 2 * (32 + 8), 0),
        ({"qk_norm": "none", "sink": True}, 40, 0, 2 * 16),
    ],
)
def test_each_option_adds_its_own_parameters(options, norms, biases, sink):
    """Two layers of width 8 with two heads."""
    counted = parameters(Shape(2, 8, 2, 10, 16, **options))
    assert (counted.norms, counted.biases, counted.sink) == (norms, biases, sink)
    assert (counted.embedding, counted.head, counted.hidden_matrices) == (80, 80, 2 * 12 * 64)
    assert counted.total == 160 + counted.non_embedding


def test_padding_counts_sequences_that_hold_no_token():
    assert padded_vocab_size(50_258) == 50_304
    assert padded_vocab_size(50_258, multiple=256) == 50_432
    assert padded_vocab_size(131_072) == 131_072
    shape = Shape(1, 8, 2, 50_258, 16)
    assert parameters(shape, vocab_entries=50_432).embedding == 50_432 * 8
    assert parameters(shape).embedding == 50_258 * 8


def test_one_rank_holds_what_the_model_has():
    shape = Shape(2, 8, 2, 128, 16, qk_norm="full", sink=True, mlp_bias=True)
    total = parameters(shape).total
    memory = bytes_per_rank(shape, Layout(), Precision())
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * total, 4 * total, 8 * total)
    # 16 tokens, float32. A layer of width 8 with 2 heads: two norms of 3 d and 1 / rms, the copies of q and k and their
    # products, rotated q, copied k and v and the output (8 d), relu and its square (8 d), a float for each softmax, two
    # for the norms of q and k, and four rotary tables.
    layer = 2 * (12 * 8 + 4) + 8 * 4 * 8 + 2 * 4 * 32 + 2 * 4 + 8 + 4 * 4 * 4
    assert memory.activations == memory.activations_per_microbatch == 16 * (2 * layer + 8 * 8 + 4)
    assert memory.logits == 16 * 128 * 12
    assert memory.total == 16 * total + memory.activations + memory.logits


def test_bf16_with_a_master_copy_takes_eighteen_bytes_a_parameter():
    shape = Shape(4, 64, 4, 256, 32)
    total = parameters(shape).total
    memory = bytes_per_rank(shape, Layout(), Precision("bf16", "bf16", master_weights=True))
    assert memory.parameters + memory.gradients + memory.optimizer == 18 * total
    plain = bytes_per_rank(shape, Layout(), Precision("bf16", "bf16", fp32_gradients=False))
    assert plain.parameters + plain.gradients + plain.optimizer == 12 * total


def test_fp8_holds_every_matrix_of_the_layers_twice_more_in_a_byte():
    shape = Shape(4, 64, 4, 256, 32)
    plain, fp8 = (
        bytes_per_rank(shape, Layout(tensor=2), Precision("bf16", "bf16", fp8=fp8)) for fp8 in ("none", "delayed")
    )
    assert fp8.parameters - plain.parameters == 2 * parameters(shape).hidden_matrices // 2
    assert fp8.total - plain.total == parameters(shape).hidden_matrices
    ends = bytes_per_rank(shape, Layout(tensor=2), Precision("bf16", "bf16", fp8="tensorwise", bf16_ends=1))
    assert ends.parameters - plain.parameters == parameters(shape).hidden_matrices // 2


def test_the_distributed_optimizer_shards_over_data_and_context_ranks():
    shape = Shape(4, 64, 4, 256, 32)
    alone = bytes_per_rank(shape, Layout(data=4, context=2), Precision())
    split = bytes_per_rank(shape, Layout(data=4, context=2, distributed_optimizer=True), Precision())
    assert split.optimizer == -(-alone.optimizer // 8)
    assert split.parameters == alone.parameters


def test_tensor_and_pipeline_ranks_hold_their_share():
    """Norm gains stay whole under tensor parallelism; the first and last stage hold a vocabulary table each."""
    shape = Shape(4, 64, 4, 256, 32, qk_norm="none")
    layout = Layout(tensor=2, pipeline=2, fused_loss=True)
    memory = bytes_per_rank(shape, layout, Precision())
    first_stage = 2 * (12 * 64 * 64 // 2 + 2 * 64) + 256 * 64 // 2
    assert memory.parameters == 4 * first_stage
    assert memory.activations == 2 * memory.activations_per_microbatch


def test_activations_shrink_with_sequence_context_and_recomputation():
    """Local layers are counted in `test_saved_tensors`; here, what each setting takes away of Transformer Engine's.

    Bytes of a token in bf16, d = 64: norms 2 (2 + 2) d and two floats; packed q, k, v, rotated q and k, and the output
    6 x 2 d; the MLP's middle twice, 2 x 2 x 4 d; a float for each of 4 heads.
    """
    shape, precision = Shape(4, 64, 4, 256, 32, qk_norm="none"), Precision(compute="bf16")

    def kept(*, last: float = 1, angles: float = 1, **layout: object) -> int:
        """Return the bytes without those of the last norm and the rotary angles."""
        whole = Layout(fused_layers=True, **layout)  # type: ignore[arg-type]
        others = int(32 * last * (2 * 64 + 4) + 32 * angles * 4 * 16)
        return bytes_per_rank(shape, whole, precision).activations_per_microbatch - others

    streams, inner = 8 * 64 + 8, 12 * 64 + 4 * 4
    middle = 16 * 64
    assert kept() == 4 * 32 * (streams + inner + middle)
    assert kept(tensor=2, sequence=True, last=0.5) == 4 * 32 * (streams + inner + middle) / 2
    assert kept(tensor=2) == 4 * 32 * (streams + (inner + middle) / 2)
    assert kept(context=2, last=0.5, angles=0.5) == 4 * 16 * (streams + inner + middle)
    assert kept(micro_batch_size=3, last=3) == 3 * kept()
    assert kept(recompute_layers=4) == 32 * 4 * 128
    assert kept(recompute_layers=1) == 32 * (3 * (streams + inner + middle) + 128)
    assert kept(recompute_modules=("mlp",)) == 4 * 32 * (streams - (128 + 4) + inner), "its norm is recomputed with it"
    attention = 4 * 32 * 4 * 4  # the float for each head
    assert kept(recompute_modules=("mlp", "layernorm", "core_attn")) == kept(recompute_modules=("mlp",)) - attention


def test_fp8_keeps_a_byte_of_what_its_matrices_read():
    """Both norms' outputs and the squared middle take one byte instead of two, by blocks with their scales.

    The attention's output is kept in both under `delayed`, and in bf16 alone by the other recipes.
    """
    shape = Shape(3, 64, 4, 256, 32, qk_norm="none")

    def kept(fp8: str, ends: int = 0) -> int:
        precision = Precision("bf16", "bf16", fp8=fp8, bf16_ends=ends)  # type: ignore[arg-type]
        return bytes_per_rank(shape, Layout(fused_layers=True), precision).activations

    read = 2 * 64 + 4 * 64
    assert kept("none") - kept("delayed") == 3 * 32 * (read - 64)
    assert kept("none") - kept("tensorwise") == 3 * 32 * read
    assert kept("none") - kept("blockwise") == 3 * 32 * (read - read * 4 // 128)
    assert kept("none") - kept("tensorwise", ends=1) == 32 * read


def test_model_and_executed_flops_differ_by_skipped_and_repeated_work():
    """L = 2, d = 4, f = 4, V = 10 padded to 16, S = 8: one sequence."""
    shape = Shape(2, 4, 2, 10, 8)
    layers = 6 * 384 * 8 + 12 * 2 * 4 * 64

    def executed(head_tokens=8.0, pairs=64.0, **options):
        return executed_flops(shape, tokens=8, head_tokens=head_tokens, pairs=pairs, vocab_entries=16, **options)

    assert executed() == layers + 6 * 16 * 4 * 8
    assert matrix_flops_per_token(shape) * 8 == layers + 6 * 10 * 4 * 8
    assert executed(head_tokens=3) == layers + 6 * 16 * 4 * 3
    assert executed(pairs=36) == executed() - 12 * 2 * 4 * (64 - 36)
    assert executed(recompute_layers=2) == executed() + layers / 3
    assert executed(recompute_layers=1) == executed() + layers / 6
    assert executed(recompute_modules=("mlp",)) == executed() + 2 * 2 * (2 * 4 * 16) * 8
    assert executed(recompute_modules=("core_attn", "layernorm")) == executed() + 2 * 4 * 4 * 64


@pytest.mark.parametrize(("layers", "hidden", "ratio"), [(8, 512, 1.44), (34, 4608, 1.03)])
def test_masked_noise_computes_the_head_at_half_the_tokens(layers, hidden, ratio):
    shape = paper_shape(layers, hidden, hidden // 64)
    done = executed_flops(shape, tokens=1, head_tokens=0.5, pairs=2048, vocab_entries=131_072)
    assert matrix_flops_per_token(shape) / done == pytest.approx(ratio, abs=0.01)


def test_a_fused_head_holds_a_chunk_of_logits_and_its_own_gradient():
    shape = Shape(1, 64, 4, vocab_size=2**17, seq_length=4096)
    for compute, size, at_once in (("fp32", 4, 2**25), ("bf16", 2, 2**29)):
        precision = Precision(compute=compute)
        assert bytes_per_rank(shape, Layout(), precision).logits == 2**29 * (size + 8)
        fused = bytes_per_rank(shape, Layout(fused_loss=True), precision).logits
        assert fused == at_once * size + 4 * 2**17 * 64
    small = Shape(1, 64, 4, vocab_size=256, seq_length=32)
    assert bytes_per_rank(small, Layout(fused_loss=True), Precision()).logits == 256 * 32 * 4 + 4 * 256 * 64


def test_interleaving_holds_more_microbatches():
    shape = Shape(8, 64, 4, 256, 32)
    memory = bytes_per_rank(shape, Layout(pipeline=4, virtual_pipeline=2, fused_loss=True), Precision())
    assert memory.activations == memory.activations_per_microbatch * 5.5


IN_FLIGHT = list(product([1, 2, 3, 5], [2, 4], [1, 2, 7]))
"""Chunks of a stage, stages, and microbatches of a step as multiples of the stages."""


def _held_by_the_library():
    """Return the chunks of microbatches that each stage of each case holds at most.

    The library counts those of the warm-up; one more is held when its forward pass has run.
    """
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    found = []
    for chunks, stages, multiple in IN_FLIGHT:
        for stage in range(stages):
            communicator = SimpleNamespace(
                pp_group=SimpleNamespace(size=lambda stages=stages: stages, rank=lambda stage=stage: stage),
                virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            )
            total, is_all, warmup, _ = get_pp_rank_microbatches(
                multiple * stages, chunks, stages, p2p_communicator=communicator
            )
            found.append(total if is_all else warmup + 1)
    return found


def test_microbatches_in_flight_follow_the_library_schedule():
    (wanted,) = on_ranks(1, _held_by_the_library)
    found = []
    for chunks, stages, multiple in IN_FLIGHT:
        layout = Layout(pipeline=stages, virtual_pipeline=chunks, num_microbatches=multiple * stages)
        found += [layout.in_flight(stage) * chunks for stage in range(stages)]
    assert found == pytest.approx(wanted)


def test_a_step_of_few_microbatches_holds_no_more_than_it_has():
    layout = Layout(pipeline=8, num_microbatches=2)
    assert [layout.in_flight(stage) for stage in (0, 5, 6, 7)] == [2, 2, 2, 1]
    assert Layout(pipeline=8).in_flight(0) == 8


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"^hidden 100 must be a multiple of heads 8$"):
        Shape(2, 100, 8, 10, 16)
