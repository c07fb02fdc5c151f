"""Generate text with a trained model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.config.command_line import CommandParser
from megadiff.errors import SHOWN_DIGITS, ConfigError

if TYPE_CHECKING:
    from megadiff.run.load_model import InferenceModel
    from megadiff.sampling.sampler import Sampler
    from megadiff.sampling.standalone import Generated, Settings

_EPILOG = """examples:
  megadiff generate --model runs/demo --num-tokens 64 --steps 64 --count 4
  megadiff generate --model runs/demo --prompt "A list is" --temperature 0.8 --top-p 0.95
  megadiff generate --model runs/demo --prompt "A list" --suffix "is returned." --num-tokens 12
  megadiff generate --model runs/chat --message "What is a list?" --temperature 0 --stop-at-end
  megadiff generate --model runs/demo --sampler adaptive --block-length 32 --trace denoising.html
"""


def main() -> None:
    """Read the command line, sample, and print each text."""
    arguments = _parser().parse_args()
    if arguments.trace and not arguments.trace.parent.is_dir():
        raise ConfigError(f"--trace {arguments.trace}: there is no folder {arguments.trace.parent}; make it first")

    if arguments.trace and arguments.trace.is_dir():
        raise ConfigError(f"--trace {arguments.trace} is a folder; give the name of a file in it")
    _check(arguments)

    from megadiff.export.opened import open_model

    with open_model(arguments.model, platform=arguments.platform, tokenizer=arguments.tokenizer) as trained:
        sampler = trained.sampler()
        ids, new = _given(arguments, trained)
        _sample(trained, sampler, ids, _settings(arguments, trained, sampler, ids, new), arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse invalid numbers before anything is loaded."""
    for name in ("steps", "count", "num_tokens", "top_k", "block_length", "tokens_per_step"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.message is not None and arguments.prompt:
        raise ConfigError("--message makes a prompt, and --prompt is one already; give one of them")
    if arguments.message is None and arguments.chat_template is not None:
        raise ConfigError("--chat-template has no meaning without --message; give that too")
    if not 0 <= arguments.temperature < math.inf:
        raise ConfigError(f"--temperature must be at least 0 and finite, got {arguments.temperature}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p must lie in (0, 1], got {arguments.top_p}")


def _given(arguments: argparse.Namespace, trained: InferenceModel) -> tuple[list[int], int]:
    """Return the prompt, with holes (-1) before the suffix if there is one, and the number of new tokens."""
    from megadiff.eval.texts_likelihood import SpecialTokens

    start, _ = SpecialTokens.like_the_data(trained, prepend_bos=arguments.prepend_bos).ids(trained.tokenizer)
    before, after = (trained.tokenizer.encode(text) for text in (arguments.prompt, arguments.suffix))
    if arguments.message is not None:
        before = _chat_prompt(arguments, trained)
    before = before if start and before[: len(start)] == start else [*start, *before]
    taken, holds = len(before) + len(after), trained.model.seq_length
    prompt = "--prompt" if arguments.message is None else "--message"
    given = [name for name, ids in ((prompt, before), ("--suffix", after)) if ids]
    what = " and ".join(given) + (" takes" if len(given) == 1 else " take") + f" {taken}" if given else ""
    room = holds - taken
    if room < 1:
        raise ConfigError(
            f"{what} tokens and the model was trained on sequences of {holds}, so none can be generated; shorten it"
        )
    new = room if arguments.num_tokens is None else arguments.num_tokens
    if new > room:
        of_them = f", of which {what}" if given else ""
        raise ConfigError(
            f"--num-tokens must be at most {room}, got {new}: the model was trained on sequences of {holds} "
            f"tokens{of_them}"
        )
    return (before + [-1] * new + after, new) if after else (before, new)


def _chat_prompt(arguments: argparse.Namespace, trained: InferenceModel) -> list[int]:
    """Return the prompt that the chat template makes of a message."""
    from megadiff.data.conversations import chat_options, chat_prompt

    path = arguments.tokenizer or trained.manifest.config["data"]["tokenizer"]
    options = chat_options(path, "messages", template=arguments.chat_template, instead="a text with --prompt")
    is_from_data = trained.manifest.data_fingerprint != ""  # an imported model's data are unknown
    doubt = template_doubt(options.template_sha256, trained.manifest.chat_templates, is_from_data=is_from_data)
    if doubt is not None:
        print(f"warning: {doubt}", file=sys.stderr)
    return chat_prompt(trained.tokenizer, options, arguments.message)


def template_doubt(given: str | None, trained: Sequence[str], *, is_from_data: bool) -> str | None:
    """Return a warning if a model may not have been trained on messages of a chat template; None if it may.

    Args:
        given: SHA-256 (hex) of the template of the message.
        trained: those of the templates of the training data that are known.
        is_from_data: whether the model's training data are known, so that they would name their templates.
    """
    if given is None or given in trained or not (trained or is_from_data):
        return None
    if not trained:
        return (
            "the model's training data name no chat template, so the prompt may be of a form that the model has not "
            "seen; --prompt takes a text as it is"
        )
    known = ", ".join(template[:SHOWN_DIGITS] for template in trained)
    return (
        f"the chat template {given[:SHOWN_DIGITS]} is not that of the training data ({known}), so the prompt is of a "
        "form that the model has not seen; give the file of that template with --chat-template"
    )


def _sample(
    trained: InferenceModel, sampler: Sampler, ids: list[int], settings: Settings, arguments: argparse.Namespace
) -> None:
    import torch

    from megadiff.data.tokenizers import token_text
    from megadiff.sampling.trace import LiveDenoising, Trace, printable, trace_page

    look = token_text(trained.tokenizer)
    prompt = torch.tensor([ids] * arguments.count, dtype=torch.int64).reshape(arguments.count, len(ids))
    with LiveDenoising(look, mask_id=trained.process.mask_id) as live:
        trace = Trace(ids, trained.process.mask_id, on_frame=live)
        found = sampler.generate(
            trained.denoise,
            prompt.to(trained.platform.device),
            settings,
            seed=arguments.seed,
            on_step=trace if arguments.trace or live.is_drawn else None,
        )
    for number, sequence in enumerate(found.sequences.tolist(), start=1):
        text = printable(trained.tokenizer.decode(sequence))
        print(text if arguments.count == 1 else f"[{number}] {' '.join(text.split())}")
    if arguments.trace:
        about = (
            f"{trained.folder}, {settings.sampler}, {settings.max_denoising_steps} steps, seed {arguments.seed}, "
            f"{_new_tokens(found, ids) / max(found.forwards, 1):.2f} tokens per forward pass"
        )
        page = trace_page(trace.frames, token_text=look, about=about)
        arguments.trace.write_text(page, encoding="utf-8")


def _new_tokens(found: Generated, ids: list[int]) -> int:
    """Count the new tokens of the first sequence: those after the prompt and those in its holes."""
    return int(found.new_tokens[0]) + ids.count(-1)


def _settings(
    arguments: argparse.Namespace, trained: InferenceModel, sampler: Sampler, ids: list[int], new: int
) -> Settings:
    behind = 0 if -1 in ids else new
    width = behind or len(ids) - ids.index(-1)
    try:
        found = sampler.settings(
            behind,
            max_denoising_steps=arguments.steps,
            block_length=arguments.block_length,
            sampler=arguments.sampler,
            tokens_per_step=arguments.tokens_per_step,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            guidance_scale=arguments.guidance_scale,
            eos_token_id=trained.tokenizer.eos_id if arguments.stop_at_end else None,
            pad_token_id=trained.tokenizer.pad_id,
        )
        found.check_reach(min(width, arguments.block_length or width))
    except ValueError as error:
        raise ConfigError(f"these options do not go together: {error}") from error
    return found


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--model", required=True, help="a run folder, one checkpoints/step_* folder of it, or a Hugging Face folder"
    )
    parser.add_argument("--prompt", default="", help="text at the start of the sequence; it is never changed")
    parser.add_argument("--message", metavar="TEXT", help="user's message, of which the chat template makes the prompt")
    parser.add_argument(
        "--chat-template", metavar="FILE", help="Transformers chat template in the place of the tokenizer's own"
    )
    parser.add_argument("--suffix", default="", help="text after the new tokens, which fill the gap")
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="start the sequence with bos (default: as in the training data)",
    )
    parser.add_argument("--sampler", choices=["ancestral", "adaptive"], default="ancestral")
    parser.add_argument("--steps", type=int, default=128, help="denoising steps of a block (default 128)")
    parser.add_argument("--block-length", type=int, help="number of tokens denoised at a time (default: all)")
    parser.add_argument("--tokens-per-step", type=int, help="adaptive: tokens written in a step (default: as needed)")
    parser.add_argument("--num-tokens", type=int, help="new tokens (default: fill the model's sequence)")
    parser.add_argument("--count", type=int, default=1, help="sequences of text (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-k", type=int, help="keep only the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="keep only the fewest tokens that together reach p")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="above 1: follow the prompt more closely")
    parser.add_argument("--stop-at-end", action="store_true", help="end a sequence at its first end-of-text token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="also write the denoising of the first sequence as one HTML page")
    parser.add_argument("--tokenizer", help="tokenizer path, if the run's own was moved")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto")
    return parser
