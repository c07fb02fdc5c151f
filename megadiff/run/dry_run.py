"""Any rank of any layout, built on this machine without memory for it: what it holds, saves and communicates.

The parts are the run's own (`run.build.build_trainables`), on torch's fake process group and meta device. One
microbatch passes the layers of the rank's stage forward and backward, so what autograd saves and what tensor ranks
exchange is counted and not estimated. Transformer Engine's layers are built where its Python package is there and
megatron-core has been imported after `dry_runs.load_engine`, with their compiled functions by shapes alone
(`platform.engine_on_meta`); else local layers take their place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megadiff.data.loader import microbatch_samples
from megadiff.data.tokenizers import NoTokenizerError, tokenizer_of
from megadiff.errors import ConfigError
from megadiff.model import cost
from megadiff.model.kernels import check_compilation
from megadiff.optim.optimizer import UpdateTraffic
from megadiff.parallel.config import Layout
from megadiff.parallel.topology import Collectives, imagined_process_group, open_topology
from megadiff.platform import engine_on_meta
from megadiff.platform.machine import Platform, detect
from megadiff.run.build import build_trainables
from megadiff.run.config import RunConfig
from megadiff.run.summary import gib, has_fused_layers, lay_out_run, memory_of_stage


def saved_bytes(forward: Callable[[], Any], *, apart_from: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors saved for the backward pass of `forward`, each storage once.

    Storages are looked at after the forward pass, so that what was freed meanwhile (a norm's output that is computed
    again, for example) counts as nothing. They may be on the meta device, where no two share an address either.

    Args:
        apart_from: tensors that are there anyway, such as parameters; an iterator is read after the forward pass.
    """
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    known = {tensor.untyped_storage()._cdata for tensor in apart_from}
    storages = {}
    for tensor in (part for whole in saved for part in engine_on_meta.tensors_in(whole)):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage._cdata not in known:
            storages[storage._cdata] = storage.nbytes()
    del result
    return sum(storages.values())


@dataclass(frozen=True)
class RankReport:
    """Contents and work of one rank of a layout; sizes in bytes."""

    rank: int
    stage: int
    tensor_rank: int
    data_rank: int
    layers: tuple[int, ...]
    """Numbers of its blocks, from 0."""
    built: cost.Memory
    """Bytes of the parts built, FP8 copies of weights among the parameters; the logits are the estimate's, since the
    output head is not run."""
    estimated: cost.Memory
    """Bytes by `model.cost` for the layers that were built."""
    configured: cost.Memory
    """Bytes by `model.cost` for the run as configured: what `--check` reports for its fullest rank."""
    tensor_calls: int
    """Number of collectives between tensor ranks in one microbatch, forward and backward, without those of the loss."""
    tensor_bytes: int
    """Bytes that these collectives reduce or gather."""
    pipeline_bytes: int
    """Bytes sent to other stages for one microbatch, forward and backward."""
    data_bytes: int
    """Bytes of gradients reduced, and of weights gathered, between data ranks in each step."""
    update: UpdateTraffic
    """Communication of the optimizer's update in each step, which puts pieces of matrices together."""
    tensor_group: tuple[int, ...]
    """Ranks of its tensor group, in order."""
    pipeline_group: tuple[int, ...]
    """Ranks that hold the stages of its replica for its tensor rank, in order."""
    data_group: tuple[int, ...]
    """Ranks that hold the same parameters, in order."""
    tokens: range
    """Positions of each sequence whose hidden states it holds between attention and MLP."""
    samples: tuple[range, ...]
    """Indices of the sequences of step 1, by microbatch."""
    vocabulary: range
    """Entries of embedding and head that it holds; empty on a stage without either."""

    @property
    def needed(self) -> int:
        """Bytes of the run as configured: what was built, and what the closed form adds for parts that were not."""
        return self.built.total + self.configured.total - self.estimated.total

    @property
    def not_built(self) -> str:
        """Names of what the run as configured has and was not built; empty if there is nothing."""
        configured, estimated = self.configured, self.estimated
        activations = configured.activations_per_microbatch != estimated.activations_per_microbatch
        named = {
            "FP8 copies of the weights": configured.parameters != estimated.parameters,
            "Transformer Engine's layers": activations,
        }
        return ", ".join(name for name, is_there in named.items() if is_there)


@dataclass(frozen=True)
class DryRun:
    """The ranks that were built, and what all share."""

    layout: Layout
    ranks: tuple[RankReport, ...]
    bubble: float
    """Share of a step in which a pipeline stage waits, for stages of equal time."""
    first_batch: int
    """Number of microbatches of step 1: fewer than the layout's under `batch.rampup`."""
    layers: str
    """The layers that were built, in words."""
    engine_problem: str
    """Reason why Transformer Engine's layers, which the run has, were not built; empty if they were."""


def dry_run(config: RunConfig, *, world_size: int, chosen: Sequence[int] | None, all_stages: bool = False) -> DryRun:
    """Build ranks of a run on `world_size` ranks.

    Args:
        config: the run; its platform and its choice of kernels matter for the kind of layers alone.
        chosen: ranks to build; None for the first tensor rank of the first and the last stage.
        all_stages: build the first and the last tensor rank of every stage instead.

    Raises:
        ConfigError: the layout does not fit, or there is no such rank.
        DataError: the tokenizer is damaged, or is not there and `data.vocab_size` is not set.
        PlatformError: compiled blocks are wanted where they cannot be.
    """
    if config.precision.compile:
        check_compilation(config.parallel, gpu=config.platform if config.platform not in ("auto", "cpu") else None)
    vocab_size = _vocab_size(config)
    layout = lay_out_run(config, world_size=world_size, vocab_size=vocab_size)
    if chosen is None:
        stages = range(layout.pipeline) if all_stages else sorted({0, layout.pipeline - 1})
        tensor_ranks = sorted({0, layout.tensor - 1}) if all_stages else [0]
        chosen = [stage * layout.tensor * layout.data + tensor for stage in stages for tensor in tensor_ranks]
    for rank in chosen:
        if not 0 <= rank < world_size:
            raise ConfigError(f"there is no rank {rank} among {world_size}; give --rank a number below {world_size}")
    platform = detect("cpu")
    platform.prepare_megatron()
    is_fused = has_fused_layers(config)
    problem = engine_on_meta.problem() if is_fused else None
    with platform.on_meta(layers="transformer_engine" if is_fused and problem is None else "local") as imagined:
        reports = tuple(_build(config, layout, rank, vocab_size, imagined) for rank in chosen)
    chunks = layout.virtual_pipeline * layout.num_microbatches
    bubble = (layout.pipeline - 1) / (chunks + layout.pipeline - 1)
    first_batch = _first_batch(config, layout)
    return DryRun(layout, reports, bubble, first_batch, _layers_in_words(config, imagined), problem or "")


def describe(found: DryRun) -> list[str]:
    """Return the lines that the command prints."""
    layout = found.layout
    lines = [
        f"layout            {layout.world_size:,} rank(s): tensor {layout.tensor} x pipeline {layout.pipeline} x data "
        f"{layout.data}, {layout.num_microbatches} microbatch(es) a step"
        + (f", {found.first_batch} in step 1" if found.first_batch != layout.num_microbatches else ""),
        f"pipeline bubble   {found.bubble:.1%} of a step, for stages of equal time",
        f"built             {found.layers}, on the meta device; `estimate` is the closed form for the same",
    ]
    if found.engine_problem:
        lines.append(f"not built         Transformer Engine's layers: {found.engine_problem}")
    for report in found.ranks:
        lines += ["", *_describe_rank(report, layout)]
    return lines


def as_json(found: DryRun) -> str:
    """Return every figure as JSON; ranges are their first and last number, null if empty."""
    tree = asdict(found)
    for counted, rank in zip(tree["ranks"], found.ranks, strict=True):
        for name in ("built", "estimated", "configured"):
            counted[name]["total"] = getattr(rank, name).total
        counted["needed"] = rank.needed
    return json.dumps(tree, indent=1, default=lambda span: [span.start, span.stop - 1] if span else None)


def _describe_rank(report: RankReport, layout: Layout) -> list[str]:
    built, estimated = report.built, report.estimated
    held = f"blocks {_ranges(report.layers)}" if report.layers else "no block"
    rows = [(name, getattr(built, name), getattr(estimated, name)) for name in ("parameters", "gradients", "optimizer")]
    rows += [
        ("activations", built.activations, estimated.activations),
        *([("logits", built.logits, estimated.logits)] if built.logits else []),
        ("total", built.total, estimated.total),
    ]
    lines = [
        f"rank {report.rank:<12,} stage {report.stage} of {layout.pipeline} ({held}), tensor rank {report.tensor_rank} "
        f"of {layout.tensor}, data rank {report.data_rank} of {layout.data}"
    ]
    for name, ours, theirs in rows:
        difference = f" ({ours / theirs - 1:+.1%})" if theirs and ours != theirs else ""
        note = f" ({gib(built.activations_per_microbatch)} a microbatch)" if name == "activations" else ""
        lines.append(f"  {name:<15} {gib(ours)}{note}, estimate {gib(theirs)}{difference}")
    if report.configured != estimated:
        lines.append(
            f"  as configured   {gib(report.needed)} in all, the difference by the closed form ({report.not_built})"
        )
    microbatches = layout.num_microbatches
    lines.append(
        f"  tensor ranks    {gib(report.tensor_bytes * microbatches)} a step in "
        f"{report.tensor_calls * microbatches:,} collectives, those of the loss left out"
    )
    lines.append(f"  other stages    {gib(report.pipeline_bytes * microbatches)} sent a step")
    lines.append(f"  data ranks      {gib(report.data_bytes)} a step")
    update = report.update
    if update.tensor_calls or update.matrices:
        lines.append(
            f"  update          {gib(update.data_bytes)} a step to data ranks, and as much from them, for "
            f"{update.matrices:,} weights of which each has a part ({update.owned:,} updated here for all); "
            f"{gib(update.tensor_bytes)} in {update.tensor_calls:,} collectives of tensor ranks"
        )
    for name in ("tensor", "pipeline", "data"):
        if len(group := getattr(report, f"{name}_group")) > 1:
            lines.append(f"  {name + ' group':<15} {_members(group)}")
    if layout.tensor > 1:
        lines.append(f"  tokens          {_span(report.tokens)} of each sequence between the parts of a block")
    if len(report.vocabulary):
        lines.append(f"  vocabulary      entries {report.vocabulary.start:,} to {report.vocabulary.stop - 1:,}")
    first = ", ".join(_span(samples) for samples in report.samples[:3])
    lines.append(f"  step 1          sequences {first}{', ...' if len(report.samples) > 3 else ''}")
    return lines


def _build(asked: RunConfig, layout: Layout, rank: int, vocab_size: int, platform: Platform) -> RankReport:
    config = _buildable(asked, platform)
    if platform.layers != "local":
        engine_on_meta.forget()
    with imagined_process_group(rank, layout.world_size):
        topology = open_topology(layout)
        chunks, wrapped, optimizer = build_trainables(config, platform, topology, vocab_size=vocab_size)
        shape = config.shape(vocab_size=vocab_size)
        estimated = memory_of_stage(config, layout, shape, stage=topology.stage)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        gradients = {p.main_grad.untyped_storage()._cdata: p.main_grad for p in parameters}  # type: ignore[attr-defined]
        gradient_bytes = sum(gradient.untyped_storage().nbytes() for gradient in gradients.values())
        counted = Collectives(topology.tensor_group)
        saved = _microbatch(config, layout, wrapped, chunks, topology.is_first_stage, counted)
        in_flight = estimated.activations / max(1, estimated.activations_per_microbatch)
        modules = (module for chunk in chunks for module in chunk.modules())
        copies = [copy for module in modules for copy in engine_on_meta.quantised_weights(module)]
        built = cost.Memory(
            parameters=_bytes(parameters) + _bytes(copies),
            gradients=gradient_bytes,
            optimizer=optimizer.state_bytes(),
            activations_per_microbatch=saved,
            activations=round(saved * in_flight),
            logits=estimated.logits,
        )
        entries = config.model.padded_vocab_size(vocab_size) // layout.tensor
        has_table = topology.is_first_stage or topology.is_last_stage
        first = topology.tensor_rank * entries
        return RankReport(
            rank=rank,
            stage=topology.stage,
            tensor_rank=topology.tensor_rank,
            data_rank=topology.data_rank,
            layers=_layers(chunks),
            built=built,
            estimated=estimated,
            configured=memory_of_stage(asked, layout, shape, stage=topology.stage),
            tensor_calls=counted.calls,
            tensor_bytes=counted.bytes,
            pipeline_bytes=_sent(config, layout, topology.stage),
            data_bytes=_exchanged(config, layout, gradient_bytes, _bytes(parameters)),
            update=optimizer.update_traffic(),
            tensor_group=_ranks(topology.tensor_group),
            pipeline_group=_ranks(topology.pipeline_group),
            data_group=_ranks(topology.data_group),
            tokens=_tokens(config, layout, topology.tensor_rank),
            samples=_samples(config, layout, topology.data_rank),
            vocabulary=range(first, first + entries) if has_table else range(0),
        )


def _layers_in_words(config: RunConfig, platform: Platform) -> str:
    if platform.layers == "local":
        return "local layers without FP8"
    precision = "bf16" if config.precision.fp8 == "none" else f"FP8 {config.precision.fp8}"
    return f"Transformer Engine's layers in {precision}, their compiled functions by shapes alone"


def _layers(chunks: Sequence[Any]) -> tuple[int, ...]:
    return tuple(layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers)


def _first_batch(config: RunConfig, layout: Layout) -> int:
    """Return the number of microbatches of step 1."""
    return config.sizes.num_microbatches(0, micro_batch_size=config.batch.micro_batch_size, dp_size=layout.data)


def _tokens(config: RunConfig, layout: Layout, tensor_rank: int) -> range:
    """Return the positions of a sequence whose hidden states a tensor rank holds between attention and MLP."""
    if not config.parallel.sequence:
        return range(config.model.seq_length)
    length = config.model.seq_length // layout.tensor
    return range(length * tensor_rank, length * (tensor_rank + 1))


def _samples(config: RunConfig, layout: Layout, data_rank: int) -> tuple[range, ...]:
    """Return the indices of the sequences of step 1 that a data rank trains on, by microbatch."""
    found = []
    for microbatch in range(_first_batch(config, layout)):
        samples = microbatch_samples(
            0,
            micro_batch_size=config.batch.micro_batch_size,
            dp_rank=data_rank,
            dp_size=layout.data,
            microbatch=microbatch,
        )
        found.append(range(samples[0], samples[-1] + 1))
    return tuple(found)


def _buildable(config: RunConfig, platform: Platform) -> RunConfig:
    """Return the run without compiled blocks and overlapped communication, and on local layers without FP8 too."""
    kernels = {"overlap_grad_reduce": False, "overlap_param_gather": False, "tp_comm_overlap": False}
    parallel = config.parallel.model_copy(update={**kernels, "gradient_accumulation_fusion": False})
    changed: dict[str, Any] = {"parallel": parallel, "precision": {"compile": False}}
    if platform.layers == "local":
        changed["precision"].update(fp8="none", fp8_first_last_bf16=0)
        changed["platform"] = "cpu"
    changed["precision"] = config.precision.model_copy(update=changed["precision"])
    return config.model_copy(update=changed)


def _microbatch(
    config: RunConfig,
    layout: Layout,
    wrapped: Sequence[Any],
    chunks: Sequence[Any],
    has_ids: bool,
    counted: Collectives,
) -> int:
    """Run every chunk of this rank once, forward and backward, and return the bytes saved."""
    model, batch = config.model, config.batch.micro_batch_size
    length = len(_tokens(config, layout, 0))
    saved = 0
    for index, (chunk, inner) in enumerate(zip(wrapped, chunks, strict=True)):
        ids = torch.zeros(batch, model.seq_length, dtype=torch.int64, device="meta")
        if not (has_ids and index == 0):
            states = torch.zeros(length, batch, model.hidden, dtype=inner.config.params_dtype, device="meta")
            inner.set_input_tensor(states.requires_grad_())
        there = [*chunk.parameters(), *inner.buffers(), *(p.main_grad for p in chunk.parameters()), ids]
        results: list[Tensor] = []

        def forward(chunk: Any = chunk, ids: Tensor = ids, results: list[Tensor] = results) -> Tensor:
            results.append(chunk(ids, None, loss_fn=lambda hidden, _: hidden))
            return results[-1]

        with _WithoutScores(), counted, torch.device("meta"):
            # FP8 copies of weights are made by the forward pass, behind which this looks for them.
            copies = chain.from_iterable(engine_on_meta.quantised_weights(module) for module in inner.modules())
            saved += saved_bytes(forward, apart_from=chain(there, copies))
            (result,) = results
            with chunk.no_sync():
                result.backward(torch.zeros_like(result))
    return saved


class _FusedAttention(torch.autograd.Function):
    """A substitute for a fused attention kernel, which saves what that saves.

    These are queries, keys, values, the output, laid out in memory as the queries are, and the log of each softmax's
    sum.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _WithoutScores(TorchFunctionMode):
    """A mode that replaces attention, which on the meta device would save all scores as no fused kernel does.

    Tensors of literal numbers stay on the CPU, since megatron-core reads one where it recomputes attention.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor:
            return func(*args, **{**(kwargs or {}), "device": "cpu"})
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def _sent(config: RunConfig, layout: Layout, stage: int) -> int:
    """Return the bytes that a rank sends for a microbatch: states to the next chunk, their gradient to the last."""
    size = 2 if config.precision.compute == "bf16" else 4
    states = config.batch.micro_batch_size * config.model.seq_length * config.model.hidden * size
    if config.parallel.sequence:
        states //= layout.tensor
    chunks = layout.virtual_pipeline
    forward = chunks - (stage == layout.pipeline - 1) if layout.pipeline > 1 else 0
    backward = chunks - (stage == 0) if layout.pipeline > 1 else 0
    return (forward + backward) * states


def _exchanged(config: RunConfig, layout: Layout, gradients: int, parameters: int) -> int:
    """Return the bytes that data ranks reduce and gather in a step."""
    if layout.data == 1:
        return 0
    return gradients + (parameters if config.parallel.distributed_optimizer else 0)


def _vocab_size(config: RunConfig) -> int:
    """Return the number of ids: the tokenizer's, or `data.vocab_size` where the tokenizer is not there yet."""
    wanted = config.data.vocab_size
    try:
        return tokenizer_of(config.data).vocab_size
    except NoTokenizerError as error:
        if wanted is None:
            raise NoTokenizerError(f"{error}; or set data.vocab_size") from error
        return wanted


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _members(group: Sequence[int]) -> str:
    """Return the ranks of a group, which are evenly spaced, in words: `ranks 0 to 56 by 8`."""
    step = f" by {group[1] - group[0]:,}" if group[1] - group[0] > 1 else ""
    return f"ranks {group[0]:,} to {group[-1]:,}{step}"


def _span(numbers: range) -> str:
    return f"{numbers.start:,} to {numbers.stop - 1:,}" if len(numbers) > 1 else f"{numbers.start:,}"


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers in words, such as `0 to 3 and 8 to 11`."""
    parts: list[range] = []
    for number in numbers:
        if parts and parts[-1].stop == number:
            parts[-1] = range(parts[-1].start, number + 1)
        else:
            parts.append(range(number, number + 1))
    return " and ".join(_span(part) for part in parts)
