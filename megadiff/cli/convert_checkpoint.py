"""Convert a training checkpoint to a Hugging Face folder, or back, in one CPU process."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError

_EPILOG = """examples:
  megadiff convert_checkpoint export --checkpoint runs/demo --output demo-hf --verify
  megadiff convert_checkpoint export --checkpoint runs/control --output control-hf --architecture llama
  megadiff convert_checkpoint import --input gidd-unif-3b --output checkpoints/gidd-unif-3b

Checkpoints of any layout can be read; an imported one can be loaded on any layout. It has only weights: a run that
begins with it (checkpoint.start_from) starts at step 0 with new optimizer moments. --verify needs transformers
('.[hf]') and memory for the whole model twice.
"""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main() -> None:
    """Read the command line, convert, and print what was written."""
    from megadiff.export.architectures import ARCHITECTURES

    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a run's checkpoint as a Hugging Face folder")
    out.add_argument("--checkpoint", type=Path, required=True, help="a run folder, or one checkpoints/step_* of it")
    out.add_argument("--output", type=Path, required=True, help="folder to create")
    out.add_argument("--dtype", choices=["bf16", "fp32"], help="type of the weights (default: as stored)")
    out.add_argument("--max-shard-size", type=_bytes, default="5GB", help="size of one weight file (default 5GB)")
    out.add_argument("--verify", action="store_true", help="compare its logits and token ids with the trainer's")
    out.add_argument(
        "--architecture",
        choices=list(ARCHITECTURES),
        help="names and config.json of this public architecture, for programs that read it (default: the package's "
        "own class, whose code is in the folder)",
    )
    back = commands.add_parser("import", help="a Hugging Face folder as a checkpoint to train from")
    back.add_argument("--input", type=Path, required=True, help="folder of GIDD or of a public architecture")
    back.add_argument("--output", type=Path, required=True, help="checkpoint folder to create")
    back.add_argument("--seq-length", type=_positive, help="sequence length to train with (default: the folder's)")
    back.add_argument(
        "--mask-row",
        type=_row,
        metavar="mean|ID",
        help="row of the tables for the mask of a model that had none: the mean of all, or a copy of this token's "
        "(default: as stored, or the mean where the tables end before it)",
    )
    for command in (out, back):
        command.add_argument(
            "--tokenizer", help="tokenizer path, if it is not the one recorded in the run or the folder"
        )
    arguments = parser.parse_args()
    (_export if arguments.command == "export" else _import)(arguments)


def _export(arguments: argparse.Namespace) -> None:
    from megadiff.checkpoint.folder import chosen

    chosen(arguments.checkpoint)  # a wrong path is refused before torch is loaded
    from megadiff.export.architectures import ARCHITECTURES
    from megadiff.export.export import export
    from megadiff.export.verify import require_transformers

    if arguments.verify:
        require_transformers()
        if arguments.architecture and ARCHITECTURES[arguments.architecture].needs_own_code:
            raise ConfigError(
                f"--verify loads the folder in transformers, which has no class of {arguments.architecture}; leave out "
                "--verify, or verify an export without --architecture"
            )
    with _progress("exporting") as show:
        found = export(
            arguments.checkpoint,
            arguments.output,
            dtype=arguments.dtype,
            max_shard_bytes=arguments.max_shard_size,
            tokenizer=arguments.tokenizer,
            architecture=arguments.architecture,
            on_tensor=show,
        )
    print(f"{found.folder}: {found.tensors} tensors, {found.parameters:,} parameters, {found.bytes:,} bytes")
    if arguments.verify:
        _verify(arguments, found.checkpoint)


def _verify(arguments: argparse.Namespace, checkpoint: Path) -> None:
    import torch

    from megadiff.checkpoint.manifest import read_manifest
    from megadiff.data.tokenizers import load_tokenizer
    from megadiff.diffusion.config import noise_config
    from megadiff.diffusion.noise_process import build_process
    from megadiff.export import verify
    from megadiff.export.export import DTYPES
    from megadiff.platform.quiet import quiet

    with quiet():
        from megadiff.run.load_model import load_model

    @contextmanager
    def open_trainer(compute: str) -> Iterator[verify.Trainer]:
        with load_model(checkpoint, platform="cpu", compute=compute, tokenizer=arguments.tokenizer) as trained:  # type: ignore[arg-type]
            chunk = trained.chunks[0]
            for weight in chunk.parameters() if arguments.dtype else ():
                weight.data.copy_(weight.data.to(DTYPES[arguments.dtype]))

            @torch.no_grad()
            def logits(case: verify.Case) -> torch.Tensor:
                return trained.denoise(case.ids, case.prompt_length)

            yield verify.Trainer(logits, chunk.head_weight.data)  # type: ignore[attr-defined]  a bare Denoiser

    manifest = read_manifest(checkpoint)
    conditioning = manifest.config["conditioning"]
    noise = noise_config(**manifest.config["noise"])
    process = build_process(noise, vocab_size=manifest.vocab_size, mask_id=manifest.mask_id)
    length = min(manifest.config["model"]["seq_length"], 256)
    cases = verify.noised_cases(process, length=length, knows_prompts=conditioning["prompt"] > 0)
    tokenizer = load_tokenizer(arguments.tokenizer or manifest.config["data"]["tokenizer"])
    texts = verify.sample_ids(tokenizer, prepend_bos=manifest.prepended_bos)
    for found in verify.verify(arguments.output, open_trainer, cases, texts=texts):
        print(f"verified {found.describe()}")
    if texts:
        print(f"verified tokenizer: equal ids of {len(texts)} sample texts in transformers")
    else:
        print("not verified: the tokenizer, which has no format that transformers reads")


def _import(arguments: argparse.Namespace) -> None:
    from megadiff.export.folder_files import check_folder

    check_folder(arguments.input)  # a wrong path is refused before torch is loaded
    from megadiff.export.importing import import_folder

    with _progress("importing") as show:
        found = import_folder(
            arguments.input,
            arguments.output,
            tokenizer=arguments.tokenizer,
            seq_length=arguments.seq_length,
            mask_row=arguments.mask_row,
            on_tensor=show,
        )
    if not found.is_checked:
        print(f"{arguments.input} has no checksums.sha256, so its files were taken as they are")
    print(
        f"{found.folder}: {found.parameters:,} parameters, ready for checkpoint.start_from and `megadiff evaluate`; "
        "the optimizer's moments are not in such a folder, so a run begins at step 0 with new ones"
    )


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show the name of the current tensor on a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda name: status.update(f"{what} {name}")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--max-shard-size must be a size such as 5GB or 500MiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _row(text: str) -> int | Literal["mean"]:
    if text == "mean":
        return "mean"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be `mean` or the id of a token, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
