"""Timing of the output head and its objective on one GPU: fused in torch and in Triton, plain, and bare products."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_environment import add_platform, device_of, milliseconds, product_ceiling
from torch import Tensor
from torch.nn import functional

from megadiff.config.command_line import CommandParser
from megadiff.diffusion.mixing import HybridMixing
from megadiff.errors import MegadiffError, run_command
from megadiff.loss.fused_lm_head import add_product, choose_loss_kernel
from megadiff.loss.lm_head import LossInputs, LossSpec, VocabShard, loss_token_indices

_EPILOG = """example:
  python tools/benchmarks/gpu_head.py --output results

Forward and backward passes are in bf16, the weight gradient in float32. Figures are medians of event-timed runs; the
variants take turns. FLOPs are those of the three products, 6 d V per computed token: nothing is computed twice. "of
ceiling" is relative to a large bf16 product in the same process. Under masked noise half the tokens are masks, and the
others are not computed. Extra memory is the allocator's peak beyond the inputs, both gradients included. The plain head
gets fewer tokens, because it holds the whole logits in float32 several times. The bytes of a pass are those of the
logits it reads and writes.
"""
MASK, CHUNK = 3, 4096
NOISES = {"masked": -1000.0, "balanced": 0.0, "uniform": 1000.0}


class Question(NamedTuple):
    """Hidden states, output weights and clean ids on the device."""

    hidden: Tensor
    weight: Tensor
    clean: Tensor


class TableRow(NamedTuple):
    """One line of the table."""

    name: str
    computed: int
    """Number of tokens whose logits are computed."""
    run: Callable[[], object]
    question: Question
    """Inputs for which `run` computes gradients."""


def main() -> None:
    """Time every variant at every hidden size, then the passes alone."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--plain-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    add_platform(parser)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for head.json (default: here)")
    arguments = parser.parse_args()
    device = device_of(arguments)
    ceiling = product_ceiling(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"  # noqa: TID251
    print(f"device {name}, torch {torch.__version__}")
    print(f"ceiling {ceiling:.0f} TFLOP/s (large product); V = {arguments.vocab_size}, {arguments.tokens} tokens\n")
    found: dict[str, Any] = {"ceiling_tflops": ceiling, "rows": [], "passes": []}
    print("| d | what | tokens computed | ms | TFLOP/s | of ceiling | extra GiB |\n|---:|---|---:|---:|---:|---:|---:|")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for width in arguments.hidden:
        for row in _timed(_rows(arguments, width, device), rounds=arguments.rounds, device=device):
            found["rows"].append({"hidden": width, **_print_row(row, width, arguments.vocab_size, ceiling)})
        _write(found, arguments.output)
    print("\n| pass | kernels | bytes a logit | ms | TB/s |\n|---|---|---:|---:|---:|")
    for line in _passes(arguments.vocab_size, device):
        found["passes"].append(line)
        rest = line.get("failed") or f"{line['ms']:.3f} | {line['tb_per_s']:.2f}"
        print(f"| {line['pass']} | {line['kernels']} | {line['bytes']} | {rest} |")
    _write(found, arguments.output)
    if lost := sum("failed" in line for line in [*found["rows"], *found["passes"]]):
        raise MegadiffError(f"no figure for {lost} line(s); the lines above give the reasons")


def _write(found: dict[str, Any], folder: Path) -> None:
    (folder / "head.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _heads(device: str) -> tuple[str, ...]:
    return ("plain", "chunked", "triton") if device == "cuda" else ("plain", "chunked")


def _rows(arguments: argparse.Namespace, width: int, device: str) -> list[TableRow]:
    question = _question(arguments.tokens, arguments.vocab_size, width, device)
    small = Question(question.hidden[: arguments.plain_tokens].detach().requires_grad_(), *question[1:])
    small = small._replace(clean=question.clean[: arguments.plain_tokens])
    slope = _softmax_slope(question.clean)
    rows = [
        TableRow(
            "three products", arguments.tokens, lambda: _in_chunks(question, lambda logits, rows: logits), question
        ),
        TableRow("cross-entropy, chunks", arguments.tokens, lambda: _in_chunks(question, slope), question),
        TableRow("cross-entropy, whole", arguments.tokens, lambda: _whole_cross_entropy(question), question),
    ]
    for noise, shift in NOISES.items():
        for head in _heads(device):
            rows.append(_head_row(head, noise, shift, small if head == "plain" else question))
    return rows


def _question(tokens: int, vocab_size: int, width: int, device: str) -> Question:
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, device=device).bfloat16()
    weight = (torch.randn(vocab_size, width, generator=g, device=device) * width**-0.5).bfloat16()
    clean = torch.randint(MASK + 1, vocab_size, (tokens,), generator=g, device=device)
    return Question(hidden.requires_grad_(), weight.requires_grad_(), clean)


def _head_row(name: str, noise: str, shift: float, question: Question) -> TableRow:
    """Measure one head: half masks under masked noise; half x, a quarter masks under balanced; half x under
    uniform."""
    process = HybridMixing(question.weight.shape[0], MASK, shift)
    noised = question.clean.cpu()
    noised[::2] = MASK if noise == "masked" else noised.flip(0)[::2]
    if noise == "balanced":
        noised[::4] = MASK
    computed = loss_token_indices(noised, torch.ones_like(noised, dtype=torch.bool), process)
    device = question.clean.device
    log_snr = torch.linspace(-7, 7, len(noised), device=device)
    places = None if computed is None else computed.to(device)
    tokens = LossInputs(question.clean, noised.to(device), log_snr, places)
    count = len(noised) if computed is None else len(computed)

    def run() -> None:
        _, head = choose_loss_kernel(name, is_cpu=device.type == "cpu")  # type: ignore[arg-type]
        question.hidden.grad = question.weight.grad = None
        head(question.hidden, question.weight, tokens, LossSpec(process)).loss.backward()

    return TableRow(f"{name}, {noise}", count, run, question)


def _softmax_slope(clean: Tensor) -> Callable[[Tensor, slice], Tensor]:
    def slope(logits: Tensor, rows: slice) -> Tensor:
        p = torch.softmax(logits, dim=-1)
        return p.scatter_add_(-1, clean[rows, None], p.new_full((len(p), 1), -1.0))

    return slope


@torch.no_grad()
def _in_chunks(question: Question, slope: Callable[[Tensor, slice], Tensor]) -> None:
    """Compute logits in chunks, transform them by `slope`, and compute the two products that follow.

    Results are kept as in the fused head.
    """
    hidden, weight = question.hidden, question.weight
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
    for first in range(0, len(hidden), CHUNK):
        rows = slice(first, first + CHUNK)
        grad = slope(hidden[rows] @ weight.t(), rows)
        torch.mm(grad, weight, out=grad_hidden[rows])
        add_product(grad_weight, grad.t(), hidden[rows], is_first=first == 0)


def _whole_cross_entropy(question: Question) -> None:
    question.hidden.grad = question.weight.grad = None
    logits = functional.linear(question.hidden, question.weight)
    functional.cross_entropy(logits, question.clean, reduction="sum").backward()


class Timed(NamedTuple):
    """The median time of a row, or the reason why there is none."""

    row: TableRow
    milliseconds: float
    extra_bytes: int
    failure: str | None


def _timed(rows: list[TableRow], *, rounds: int, device: str) -> list[Timed]:
    spent: dict[str, list[float]] = {row.name: [] for row in rows}
    extra: dict[str, int] = {}
    failures: dict[str, str] = {}
    for number in range(rounds + 1):
        for row in rows:
            if row.name in failures:
                continue
            try:
                if number == 0:
                    extra[row.name] = _extra_bytes(row) if device == "cuda" else 0
                else:
                    spent[row.name].append(milliseconds(row.run, device=device, rounds=1, warm_up=0))
            except Exception as error:  # a row that fails is a result too; the others continue
                failures[row.name] = _failure(error)
            if row.name in failures:  # the frames that held its tensors are gone only here
                gc.collect()
                torch.cuda.empty_cache()  # noqa: TID251
    middle = {name: statistics.median(values) if values else 0.0 for name, values in spent.items()}
    return [Timed(row, middle[row.name], extra.get(row.name, 0), failures.get(row.name)) for row in rows]


def _failure(error: Exception) -> str:
    return f"FAILED {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _extra_bytes(row: TableRow) -> int:
    """Return the peak memory of a run beyond what was allocated before; this is also the warm-up that compiles
    kernels."""
    row.question.hidden.grad = row.question.weight.grad = None  # otherwise they would be freed during the measurement
    torch.cuda.synchronize()  # noqa: TID251
    torch.cuda.reset_peak_memory_stats()  # noqa: TID251
    before = torch.cuda.memory_allocated()  # noqa: TID251
    row.run()
    torch.cuda.synchronize()  # noqa: TID251
    return torch.cuda.max_memory_allocated() - before  # noqa: TID251


def _print_row(timed: Timed, width: int, vocab_size: int, ceiling: float) -> dict[str, Any]:
    row, line = timed.row, {"what": timed.row.name, "tokens": timed.row.computed}
    if timed.failure is not None:
        print(f"| {width} | {row.name} | {row.computed} | {timed.failure} | | | |", flush=True)
        return {**line, "failed": timed.failure}
    tflops = 6 * width * vocab_size * row.computed / timed.milliseconds / 1e9
    print(
        f"| {width} | {row.name} | {row.computed} | {timed.milliseconds:.2f} | {tflops:.0f} | {tflops / ceiling:.1%} | "
        f"{timed.extra_bytes / 2**30:.2f} |",
        flush=True,
    )
    return {**line, "ms": timed.milliseconds, "tflops": tflops, "extra_bytes": timed.extra_bytes}


def _passes(vocab_size: int, device: str) -> list[dict[str, Any]]:
    """Time each pass alone, on one chunk of random logits in bf16."""
    from megadiff.loss.fused_lm_head import TorchPasses

    found: list[dict[str, Any]] = []
    for name, wanted in (("sums", 2), ("shares", 2), ("gradient", 4)):
        for kernels in ("triton", "torch") if device == "cuda" else ("torch",):
            line: dict[str, Any] = {"pass": name, "kernels": kernels, "bytes": wanted}
            try:
                if kernels == "triton":
                    from megadiff.loss.triton_passes import TritonPasses as Passes
                else:
                    Passes = TorchPasses  # type: ignore[misc,assignment]
                line["ms"] = _pass_milliseconds(Passes, name, vocab_size, device)
                line["tb_per_s"] = wanted * CHUNK * vocab_size / line["ms"] / 1e9
            except Exception as error:  # as in _timed
                line["failed"] = f"{_failure(error)} | "
            found.append(line)
    return found


def _pass_milliseconds(make: Any, name: str, vocab_size: int, device: str) -> float:
    logits = torch.randn(CHUNK, vocab_size, device=device, dtype=torch.bfloat16)
    ids = torch.randint(MASK + 1, vocab_size, (CHUNK,), device=device)
    passes = make(logits, ids, ids, VocabShard(0, vocab_size, vocab_size, MASK))
    passes.sums()
    row = torch.full((CHUNK,), 1e-3, device=device)
    calls = {
        "sums": passes.sums,
        "shares": lambda: passes.log1p_sums(row),
        "gradient": lambda: passes.gradient(row, row, row, row, row),
    }
    return milliseconds(calls[name], device=device)


if __name__ == "__main__":
    run_command(main)
