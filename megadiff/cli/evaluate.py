"""Evaluate a trained model: its held-out ELBO, or the likelihoods of texts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError

_EPILOG = """examples:
  megadiff evaluate elbo --model runs/demo --data data/valid --sequences 128 --noise-levels 8 --output elbo.json
  megadiff evaluate likelihood --model runs/demo --data pairs.jsonl --prompt-key question --completion-key answer
  megadiff evaluate likelihood --model runs/demo --data texts.jsonl --text-key text --output rolling.json
"""


def main() -> None:
    """Read the command line, evaluate, print, write JSON."""
    arguments = _parser().parse_args()
    if arguments.output and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output {arguments.output}: there is no folder {arguments.output.parent}; make it first")
    if arguments.output and arguments.output.is_dir():
        raise ConfigError(f"--output {arguments.output} is a folder; give the name of a file in it")
    if arguments.text_key and (arguments.prompt_key or arguments.completion_key):
        raise ConfigError(
            "--text-key names whole documents, --prompt-key and --completion-key two parts of a text; give one or the "
            "other"
        )

    from megadiff.export.opened import open_model

    with open_model(arguments.model, platform=arguments.platform, tokenizer=arguments.tokenizer) as trained:
        measure = _elbo if arguments.measure == "elbo" else _likelihood
        found = measure(trained, arguments)
        if arguments.output:
            line = {"model": str(trained.folder), "step": trained.manifest.step, **found}
            arguments.output.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")


def _elbo(trained: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    found = trained.held_out_elbo(
        arguments.data,
        key="--data",
        sequences=arguments.sequences,
        num_noise_levels=arguments.noise_levels,
        micro_batch_size=arguments.micro_batch_size,
    )
    from megadiff.data.baselines import unigram_entropy
    from megadiff.data.indexed_reader import IndexedReader

    print(f"{trained.folder}: {found.describe()}")
    reader = IndexedReader(arguments.data)
    unigram = None if reader.has_spans else unigram_entropy(reader, vocab_size=trained.tokenizer.vocab_size)
    if unigram is not None:
        print(
            f"  unigram entropy of the data: {unigram:.4f} nats per token (the best value of a model without context)"
        )
    for low, high, value in found.by_log_snr:
        print(f"  log-SNR {low:+.0f} to {high:+.0f}: {value:.4f} nats")
    return found.as_metrics() | ({} if unigram is None else {"eval_unigram": unigram})


def _likelihood(trained: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from megadiff.eval.likelihood import BoundSettings
    from megadiff.eval.texts_likelihood import SpecialTokens, pairs_likelihood, rolling_likelihood

    settings = BoundSettings(
        draws=arguments.draws,
        estimator=arguments.estimator,
        seed=arguments.seed,
        batch_size=arguments.micro_batch_size,
        context_length=trained.model.seq_length if arguments.fill_context else None,
    )
    framing = SpecialTokens.like_the_data(trained, prepend_bos=arguments.prepend_bos, score_eos=arguments.score_eos)
    data = Path(arguments.data)
    if arguments.text_key:
        found = rolling_likelihood(
            trained, data, text_key=arguments.text_key, context=arguments.context, settings=settings, framing=framing
        )
    else:
        keys = arguments.prompt_key or "prompt", arguments.completion_key or "completion"
        found = pairs_likelihood(trained, data, keys=keys, settings=settings, framing=framing)
    print(f"{trained.folder}: {found['summary']}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "measure",
        choices=["elbo", "likelihood"],
        metavar="{elbo,likelihood}",  # as a refusal names it, too
        help="the held-out evidence bound, or the likelihood of given texts",
    )
    parser.add_argument(
        "--model", required=True, help="a run folder, one checkpoints/step_* folder of it, or a Hugging Face folder"
    )
    parser.add_argument("--data", required=True, help="elbo: prefix of indexed data; likelihood: a .jsonl file")
    parser.add_argument("--micro-batch-size", type=_positive, default=8, help="sequences per forward pass (default 8)")
    parser.add_argument("--tokenizer", help="tokenizer path, if the run's own was moved")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--output", type=Path, help="also write the result here as JSON")
    elbo = parser.add_argument_group("elbo")
    elbo.add_argument("--sequences", type=_at_least_two, default=256, help="held-out sequences (default 256)")
    elbo.add_argument("--noise-levels", type=_positive, default=8, help="noise levels per sequence (default 8)")
    texts = parser.add_argument_group("likelihood")
    texts.add_argument("--prompt-key", help="key of the given text (default prompt)")
    texts.add_argument("--completion-key", help="key of the scored text (default completion)")
    texts.add_argument("--text-key", help="score whole documents under this key instead, window by window")
    texts.add_argument("--context", type=int, default=0, help="tokens of context before each window (default 0)")
    texts.add_argument("--draws", type=_draws, default=128, help="noised copies of each text; even (default 128)")
    texts.add_argument("--estimator", choices=["counts", "levels"], default="counts", help="see docs/evaluation.md")
    texts.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="put bos before each prompt or document (default: as in the training data)",
    )
    texts.add_argument("--score-eos", action="store_true", help="put eos after each completion or document")
    texts.add_argument("--fill-context", action="store_true", help="fill the model's sequence up with pure noise")
    texts.add_argument("--seed", type=int, default=0)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _draws(text: str) -> int:
    value = int(text)
    if value < 4 or value % 2:
        raise argparse.ArgumentTypeError(f"must be even and at least 4, got {value}")
    return value


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 for a standard error, got {value}")
    return value
