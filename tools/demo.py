"""Run the whole pipeline on real text in a few minutes, on two CPU cores (`make demo`).

Python's own documentation -> a tokenizer of 2,048 entries, indexed data -> training on 8 ranks, stopped, and resumed on
2 ranks -> held-out ELBO beside unigram and bigram figures -> sampled text -> Hugging Face folder, loaded and sampled by
transformers.

It deletes the files of an earlier demo in runs/demo, runs/demo-data and runs/demo-hf.
"""

from __future__ import annotations

import json
import math
import os
import re
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
from megadiff.metric_lines import read_metrics
from megadiff.run.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = Path("runs/demo-data")
EXPORTED = Path("runs/demo-hf")
CONFIG = Path("examples/demo.yaml")
VOCAB_SIZE = 2048
FIRST_RANKS, RANKS = 8, 2
FIRST_LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")
FIRST_STEPS = 10
"""Number of steps after which the first launch is stopped by a stop file."""
TARGET = 0.9
"""Fraction of the unigram entropy below which the held-out bound must end."""
SAMPLES, SAMPLE_TOKENS = 10, 64

console = Console()


def main() -> None:
    """Run every stage; if one fails, the demo ends with that stage's message."""
    CommandParser(description=__doc__).parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    config = load_config(CONFIG, [], RunConfig)
    for folder in (config.folder, DATA, EXPORTED):
        shutil.rmtree(folder, ignore_errors=True)
    _stage("1/7  real text", "Python's documentation topics and standard-library docstrings (PSF licence)")
    _run("tools/demo_corpus.py", "--output", DATA / "corpus")
    _stage("2/7  tokenizer and indexed data", f"byte-level BPE of {VOCAB_SIZE:,} entries; Megatron's .bin/.idx")
    corpus = DATA / "corpus/train.jsonl"
    _run(
        "tools/train_tokenizer.py", "--input", corpus, "--output", config.data.tokenizer, "--vocab-size", VOCAB_SIZE
    )  # fmt: skip
    for split in ("train", "valid"):
        _run(
            "tools/preprocess_data.py", "--input", DATA / f"corpus/{split}.jsonl", "--output-prefix", DATA / split,
            "--tokenizer", config.data.tokenizer, "--append-eod", "--workers", 2,
        )  # fmt: skip
    _stage("3/7  training", f"{FIRST_RANKS} CPU ranks, tensor 2 x pipeline 2 x data 2, stopped after some steps")
    _train(FIRST_RANKS, *FIRST_LAYOUT, stop_after=FIRST_STEPS)
    _stage("", f"the same run, resumed from its checkpoint on {RANKS} data-parallel ranks: same data, same noise")
    _train(RANKS)
    _stage("4/7  evaluation", "the same checkpoint in one process")
    _run(
        "tools/evaluate.py", "elbo", "--model", config.folder, "--data", DATA / "valid",
        "--sequences", config.eval.sequences, "--noise-levels", config.eval.num_noise_levels,
        "--output", config.folder / "elbo.json",
    )  # fmt: skip
    _stage("5/7  samples", f"{SAMPLES} sequences of {SAMPLE_TOKENS} tokens, denoised from masks")
    texts = _run(
        "tools/generate.py", "--model", config.folder, "--count", SAMPLES, "--num-tokens", SAMPLE_TOKENS,
        "--steps", SAMPLE_TOKENS, "--temperature", 0.6, is_kept=True,
    )  # fmt: skip
    _stage("6/7  Hugging Face", "one folder; its logits are compared with the trainer's in a separate process")
    _run("tools/convert_checkpoint.py", "export", "--checkpoint", config.folder, "--output", EXPORTED, "--verify")
    _stage("7/7  transformers", "the exported model generates text without megadiff")
    _run("examples/sample_exported.py", EXPORTED, "--count", 3)
    _run("tools/report.py", config.folder, "--output", config.folder / "report.html")
    _close(config, word_share(texts, corpus), time.monotonic() - start)


def word_share(texts: str, corpus: Path) -> float:
    """Return the share of the words in `texts` that occur in a corpus, 0 to 1.

    A word is a maximal run of two or more letters; upper and lower case are not distinguished.

    Args:
        texts: lines of generated text, each preceded by its number in brackets.
        corpus: a .jsonl file with the key `text`.
    """
    known: set[str] = set()
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            known.update(_words(json.loads(line)["text"]))
    written = _words(re.sub(r"(?m)^\[\d+\]", "", texts))
    return sum(word in known for word in written) / max(len(written), 1)


def _words(text: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[^\W\d_]{2,}", text)]


def _stage(title: str, what: str) -> None:
    console.print(Panel(what, title=title, title_align="left", expand=False))


def _command(tool: str, arguments: tuple[object, ...], launcher: tuple[object, ...] = (sys.executable,)) -> list[str]:
    """Return a command line, after printing it."""
    command = [str(part) for part in (*launcher, tool, *arguments)]
    console.print("$ " + " ".join(command), style="dim", markup=False, soft_wrap=True)
    return command


def _run(tool: str, *arguments: object, is_kept: bool = False) -> str:
    """Run a tool to its end; return its output if `is_kept`, after printing it."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    output = subprocess.PIPE if is_kept else None
    done = subprocess.run(_command(tool, arguments), cwd=ROOT, env=offline, check=False, stdout=output, text=True)
    if is_kept:
        print(done.stdout, end="", flush=True)
    _refuse_failure(tool, done.returncode)
    return done.stdout or ""


def _train(ranks: int, *settings: str, stop_after: int | None = None) -> None:
    """Train on some ranks to the end of the run, or until it has been stopped after a number of steps."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    command = _command("pretrain_dlm.py", ("--config", CONFIG, *settings), launcher)
    folder = load_config(CONFIG, [], RunConfig).folder
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while stop_after is not None and process.poll() is None:
            time.sleep(0.2)
            if any(line["step"] >= stop_after for line in read_metrics(folder / "metrics.jsonl")):
                console.print(f"$ touch {folder / 'STOP'}", style="dim", markup=False)
                (folder / "STOP").touch()
                break
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    _refuse_failure("pretrain_dlm.py", code)


def _refuse_failure(tool: str, code: int) -> None:
    if code:
        raise MegadiffError(f"the demo stopped: `{tool}` failed; its message is above")


def _close(config: RunConfig, words: float, elapsed_s: float) -> None:
    """Print the closing table; fail if the model has not learned."""
    found = json.loads((config.folder / "elbo.json").read_text())
    lines = [line for line in read_metrics(config.folder / "metrics.jsonl") if line.get("eval_elbo") is not None]
    before, unigram, bigram = (lines[0][key] for key in ("eval_elbo", "eval_unigram", "eval_bigram"))
    bits = found["eval_bits_per_byte"] / found["eval_elbo"]
    log_n, after = math.log(VOCAB_SIZE - 1), found["eval_elbo"]

    def both(nats: float) -> str:
        return f"{nats:.3f} nats per token, {nats * bits:.3f} bits per byte"

    table = Table(title=f"results, after {elapsed_s / 60:.1f} minutes", show_header=False)
    for sequence in (
        ("text", f"{DATA}/corpus/", "train.jsonl, valid.jsonl, LICENSE.txt"),
        ("tokenizer", config.data.tokenizer, f"{VOCAB_SIZE:,} entries: 4 special ones, bytes, pieces of words"),
        ("data", f"{DATA}/train.bin, .idx, .json", "Megatron's format and a manifest"),
        ("run", f"{config.folder}/", f"{FIRST_RANKS} ranks, then {RANKS}; metrics.jsonl, log.txt, checkpoints/, ..."),
        ("log N", both(log_n), "every token equally likely"),
        ("ELBO before", both(before), "the untrained model"),
        ("unigram", both(unigram), "the best value of a model without context"),
        ("ELBO after", both(after), f"+- {found['eval_elbo_stderr']:.3f}; {1 - after / unigram:.0%} below unigram"),
        ("bigram", both(bigram), "a model that knows the previous token, counted on the training data"),
        ("words", f"{words:.0%} of the sampled words", "occur in the training text"),
        ("report", f"{config.folder}/report.html", "curves, noise levels, throughput: open it in a browser"),
        ("exported", f"{EXPORTED}/", "safetensors, config.json, tokenizer, model card, code for transformers"),
    ):  # fmt: skip
        table.add_row(*sequence)
    console.print(table)
    activate = "" if sys.prefix == sys.base_prefix else f"  . {os.path.relpath(sys.prefix)}/bin/activate\n"
    console.print(
        f"try next\n{activate}"
        f"  megadiff generate --model {config.folder} --prompt 'The object' --temperature 0.7\n"
        f"  python pretrain_dlm.py --config {CONFIG} name=balanced noise.shift=balanced\n"
        f"  tensorboard --logdir {config.output_dir}",
        markup=False,
        soft_wrap=True,
    )
    if not abs(before / log_n - 1) < 0.02 or not after < TARGET * unigram:
        raise MegadiffError(
            f"the demo ran, but the held-out ELBO went from {before:.3f} to {after:.3f}; it should start within 2 % of "
            f"log N = {log_n:.3f} and end below {TARGET:.0%} of the unigram entropy of {unigram:.3f}"
        )


if __name__ == "__main__":
    run_command(main)
