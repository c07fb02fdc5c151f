"""Draw text from a trained model: `tools/generate.py --model RUN --prompt TEXT`."""

from __future__ import annotations

import argparse
from functools import partial

from megadiff.errors import ConfigError, run_command

_EPILOG = """examples:
  python tools/generate.py --model runs/demo --num-tokens 64 --steps 64 --count 4
  python tools/generate.py --model runs/demo --prompt "A list is" --temperature 0.8 --top-p 0.95
"""


def main() -> None:
    """Read the command line, sample, print a row of text each."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a run folder, or one checkpoints/step_* folder of it")
    parser.add_argument("--prompt", default="", help="text the row starts with; it is never changed")
    parser.add_argument("--sampler", choices=["ancestral"], default="ancestral")
    parser.add_argument("--steps", type=int, default=128, help="denoising steps (default 128)")
    parser.add_argument("--num-tokens", type=int, help="new tokens (default: fill the model's row)")
    parser.add_argument("--count", type=int, default=1, help="rows of text (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-k", type=int, help="keep only the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="keep only the fewest tokens that together reach p")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="tokenizer path, where the run's own has moved")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    if arguments.temperature < 0 or _given(arguments.top_k) < 1 or not 0 < _given(arguments.top_p) <= 1:
        raise ConfigError(
            "--temperature must be at least 0, --top-k at least 1 and --top-p in (0, 1], got "
            f"{arguments.temperature}, {arguments.top_k} and {arguments.top_p}"
        )

    from megadiff.platform.quiet import quiet

    with quiet():
        import torch

        from megadiff.sampling.ancestral import sample
        from megadiff.trained import open_trained

    with open_trained(arguments.model, platform=arguments.platform, tokenizer=arguments.tokenizer) as trained:
        if trained.is_autoregressive:
            raise ConfigError(f"{trained.folder} is an autoregressive control; this tool samples diffusion models only")
        ids = trained.tokenizer.encode(arguments.prompt)
        room = trained.model.seq_length - len(ids)
        new = room if arguments.num_tokens is None else arguments.num_tokens
        if not 1 <= new <= room or arguments.count < 1 or arguments.steps < 1:
            raise ConfigError(
                f"the model's row holds {trained.model.seq_length} tokens, the prompt takes {len(ids)}: --num-tokens "
                f"must lie in 1 to {room}, got {new}; --count ({arguments.count}) and --steps ({arguments.steps}) must "
                "be at least 1"
            )
        rows = sample(
            partial(trained.denoise, prompt_length=len(ids)),
            rows=arguments.count,
            length=len(ids) + new,
            steps=arguments.steps,
            mixing=trained.mixing,
            seed=arguments.seed,
            min_log_snr=trained.rate.min_log_snr,
            # The time form ends at a level that still holds noise; sampling goes on to where next to none is left.
            max_log_snr=max(9.0, trained.rate.max_log_snr),
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            prompt=torch.tensor([ids] * arguments.count, dtype=torch.int64) if ids else None,
            device=trained.platform.device,
        )
        for number, row in enumerate(rows.tolist(), start=1):
            text = _for_a_terminal(trained.tokenizer.decode(row))
            print(text if arguments.count == 1 else f"[{number}] {' '.join(text.split())}")


def _given(value: float | None) -> float:
    """The value, or 1, which passes every bound, where there is none."""
    return 1 if value is None else value


def _for_a_terminal(text: str) -> str:
    """A sampled control character must not reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


if __name__ == "__main__":
    run_command(main)
