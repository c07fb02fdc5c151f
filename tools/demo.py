"""The whole way on real text in a few minutes, on two CPU cores: what `make demo` runs.

Python's own documentation -> byte tokens, indexed -> training on 8 ranks -> held-out ELBO -> sampled text ->
Hugging Face folder, loaded and sampled by transformers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from megadiff.config.command_line import CommandParser
from megadiff.config.load import load_config
from megadiff.errors import MegadiffError, run_command
from megadiff.run_config import RunConfig
from megadiff.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DATA = Path("runs/demo-data")
EXPORTED = Path("runs/demo-hf")
CONFIG = Path("examples/demo.yaml")
RANKS = 8
TARGET = 0.75
"""The held-out bound must end below this share of log N."""

console = Console()


def main() -> None:
    """Run every stage; a stage that fails ends the demo with its own message."""
    CommandParser(description=__doc__).parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    _stage("1/7  real text", "Python's documentation topics and standard-library docstrings (PSF licence)")
    _run("tools/demo_corpus.py", "--output", DATA / "corpus")
    config = load_config(CONFIG, [], RunConfig)
    _stage("2/7  indexed binaries", "the byte tokenizer, Megatron's .bin/.idx, two workers")
    for split in ("train", "valid"):
        _run(
            "tools/preprocess_data.py", "--input", DATA / f"corpus/{split}.jsonl", "--output-prefix", DATA / split,
            "--tokenizer", config.data.tokenizer, "--append-eod", "--workers", 2, "--overwrite",
        )  # fmt: skip
    _stage("3/7  training", f"{RANKS} CPU ranks: tensor 2 x pipeline 2 x data 2, balanced hybrid noise")
    shutil.rmtree(config.folder, ignore_errors=True)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS)
    _run("pretrain_dlm.py", "--config", CONFIG, launcher=launcher)
    _stage("4/7  evaluation", "the same checkpoint, resharded into one process")
    _run(
        "tools/evaluate.py", "elbo", "--model", config.folder, "--data", DATA / "valid", "--rows", config.eval.rows,
        "--noise-levels", config.eval.noise_levels, "--output", config.folder / "elbo.json",
    )  # fmt: skip
    _stage("5/7  samples", "ten rows of text, noise to words in 64 ancestral steps")
    _run("tools/generate.py", "--model", config.folder, "--count", 10, "--num-tokens", 64, "--steps", 64)
    _stage("6/7  Hugging Face", "one folder, its logits compared with the trainer's in a process of its own")
    shutil.rmtree(EXPORTED, ignore_errors=True)
    _run("tools/convert_checkpoint.py", "export", "--checkpoint", config.folder, "--output", EXPORTED, "--verify")
    _stage("7/7  transformers", "the exported model writes by itself, without megadiff")
    _run("examples/sample_exported.py", EXPORTED, "--count", 3)
    _run("tools/report.py", config.folder, "--output", config.folder / "report.html")
    _close(config, time.monotonic() - start)


def _stage(title: str, what: str) -> None:
    console.print(Panel(what, title=title, title_align="left", expand=False))


def _run(tool: str, *arguments: object, launcher: tuple[object, ...] = (sys.executable,)) -> None:
    command = [str(part) for part in (*launcher, tool, *arguments)]
    console.print("$ " + " ".join(command), style="dim", markup=False, soft_wrap=True)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if subprocess.run(command, cwd=ROOT, env=offline, check=False).returncode:
        raise MegadiffError(f"the demo stopped: `{tool}` failed; its message is above")


def _close(config: RunConfig, elapsed_s: float) -> None:
    """The closing table; fails if the model has not learned."""
    found = json.loads((config.folder / "elbo.json").read_text())
    lines = read_metrics(config.folder / "metrics.jsonl")
    before = next(line["eval_elbo"] for line in lines if line.get("eval_elbo") is not None)
    vocab = json.loads((DATA / "train.json").read_text())["tokenizer"]["vocab_size"]
    top = math.log(vocab - 1)
    after = found["eval_elbo"]
    table = Table(title=f"what was made, in {elapsed_s / 60:.1f} minutes", show_header=False)
    for row in (
        ("text", f"{DATA}/corpus/", "train.jsonl, valid.jsonl, LICENSE.txt"),
        ("tokenizer", config.data.tokenizer, f"{vocab} ids: 256 bytes, bos 0, eos 1, pad 2, mask 3"),
        ("data", f"{DATA}/train.bin, .idx, .json", "Megatron's format and a manifest"),
        ("run", f"{config.folder}/", "config.yaml, metrics.jsonl, log.txt, status.json, checkpoints/"),
        ("ELBO before", f"{before:.3f} nats per token", f"log N = {top:.3f}"),
        ("ELBO after", f"{after:.3f} +- {found['eval_elbo_stderr']:.3f}", f"{after / top:.0%} of log N, "
         f"{found['eval_bits_per_byte']:.2f} bits per byte"),
        ("report", f"{config.folder}/report.html", "curves, noise levels, throughput: open it in a browser"),
        ("exported", f"{EXPORTED}/", "safetensors, config.json, tokenizer, model card, code for transformers"),
    ):  # fmt: skip
        table.add_row(*row)
    console.print(table)
    console.print(
        "try next\n"
        f"  python tools/generate.py --model {config.folder} --prompt 'The object' --temperature 0.7\n"
        f"  python pretrain_dlm.py --config {CONFIG} name=masked noise.shift=masked parallel.tensor=1 "
        "parallel.pipeline=1 parallel.sequence=false\n"
        f"  tensorboard --logdir {config.output_dir}",
        markup=False,
        soft_wrap=True,
    )
    if not abs(before / top - 1) < 0.02 or not after < TARGET * top:
        raise MegadiffError(
            f"the demo ran, but the held-out ELBO went from {before:.3f} to {after:.3f} but should start within 2 % "
            f"of log N = {top:.3f} and end below {TARGET:.0%} of it"
        )


if __name__ == "__main__":
    run_command(main)
