"""Training FLOPs of a token, forward and backward, by three counts that are always named. No torch.

Symbols: P parameters without embedding and head, V vocabulary entries, d width, L layers, S sequence length. Heads that
are together wider or narrower than the model, by a setting, count in 12 L d S with their own width.

| count | FLOPs per token | used for |
|---|---|---|
| `deepseek` | 6 P + 12 L d S | the laws of arXiv:2512.10858 (its method 1); the default |
| `chinchilla` | 6 P | that paper's method 2 |
| `full` | 6 (P + V d) + 12 L d S | time and utilisation of hardware |

Attention is bidirectional, so each token meets all S tokens of its sequence and nothing is halved. Recomputation is not
counted. Counts differ most for small models, where the head is most of the work, and a law of one count must not be
read with a budget of another.
"""

from __future__ import annotations

from typing import Literal, get_args

FlopCount = Literal["deepseek", "chinchilla", "full"]
"""Name of a count."""

FLOP_COUNTS: tuple[FlopCount, ...] = get_args(FlopCount)


def paper_params(layers: int, hidden: int) -> int:
    """Return P of the paper's model as its notebooks count it: 12 L d^2 + 14 L d + d."""
    return 12 * layers * hidden**2 + 14 * layers * hidden + hidden


def flops_per_token(
    layers: int,
    hidden: int,
    seq_length: int,
    *,
    method: FlopCount = "deepseek",
    vocab_size: int | None = None,
    params: float | None = None,
    attention_width: int | None = None,
) -> float:
    """Return the training FLOPs of a token.

    Args:
        layers: L.
        hidden: d.
        seq_length: S.
        method: the count.
        vocab_size: V, which `full` needs.
        params: P; by default that of the paper's model (`paper_params`).
        attention_width: width of all heads of queries together, by default d.

    Raises:
        ValueError: an unknown count, or `full` without a vocabulary.
    """
    if method not in FLOP_COUNTS:
        raise ValueError(f"{method!r} is no count of FLOPs; there are {', '.join(FLOP_COUNTS)}")
    counted = 6.0 * (paper_params(layers, hidden) if params is None else params)
    if method == "chinchilla":
        return counted
    counted += 12.0 * layers * (attention_width or hidden) * seq_length
    if method == "deepseek":
        return counted
    if vocab_size is None:
        raise ValueError("the count `full` needs vocab_size: the head is part of it")
    return counted + 6.0 * vocab_size * hidden
