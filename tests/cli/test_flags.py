"""Options of the commands that no other test gives, each with what it changes."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadiff.eval.harness import GenerationConfig
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.forked_command import Ended, call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, toy_tree, train_on_rank

PAIRS = [{"question": "ab", "prompt": "xy", "completion": "cd"}, {"question": "", "prompt": "q", "completion": "ef"}]


@pytest.fixture(scope="module")
def model(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step folder of a hybrid model that was trained with prompts."""
    config = toy_config(
        toy_corpus,
        tmp_path_factory.mktemp("flags"),
        model__layers=1,
        conditioning__prompt=0.5,
        schedule__steps=4,
        optimizer__lr=0.02,
        data__valid=[],
    )
    on_ranks(1, train_on_rank, config, 1, save=True)
    return config.folder / "checkpoints/step_00000004"


def said(*command: str | Path) -> str:
    """Return what a command prints that ends well."""
    ended = call_forked(*command)
    assert ended.code == 0, ended.out + ended.err
    return ended.out


@pytest.fixture(scope="module")
def likelihood(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    folder = tmp_path_factory.mktemp("likelihood")

    def measured(*options: str, pairs: list[dict[str, str]] = PAIRS) -> list[float]:
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        said(
            *("tools/evaluate.py", "likelihood", "--model", model, "--data", folder / "pairs.jsonl"),
            *("--draws", "8", "--output", folder / "out.json", *options),
        )
        return [item["nll"] for item in json.loads((folder / "out.json").read_text())["items"]]

    return measured


def test_evaluate_takes_prompts_from_the_key_that_is_named(likelihood: Callable[..., list[float]]) -> None:
    renamed = [{"prompt": pair["question"], "completion": pair["completion"]} for pair in PAIRS]
    assert likelihood("--prompt-key", "question") == likelihood(pairs=renamed) != likelihood()


def test_evaluate_draws_other_noise_with_another_seed(likelihood: Callable[..., list[float]]) -> None:
    first, again, other = likelihood("--seed", "0"), likelihood(), likelihood("--seed", "1")
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert sum(other) == pytest.approx(sum(first), rel=0.5)


def test_evaluate_measures_in_a_whole_sequence_of_noise(likelihood: Callable[..., list[float]]) -> None:
    filled, alone = likelihood("--fill-context"), likelihood()
    assert all(one != two for one, two in zip(filled, alone, strict=True))
    assert sum(filled) == pytest.approx(sum(alone), rel=0.5)


def test_generate_draws_another_text_with_another_seed(model: Path) -> None:
    command = ("tools/generate.py", "--model", model, "--steps", "4", "--seed")
    first, again, other = (said(*command, seed) for seed in ("0", "0", "1"))
    assert first == again != other


def test_generate_follows_the_prompt_more_with_guidance(model: Path) -> None:
    command = ("tools/generate.py", "--model", model, "--prompt", "abcd", "--steps", "6", "--guidance-scale")
    plain, guided = (said(*command, scale) for scale in ("1", "8"))
    assert plain.startswith("abcd")
    assert guided.startswith("abcd")
    assert plain != guided
    assert plain == said(*command[:-1])


def test_generate_ends_texts_at_their_first_end_token(model: Path) -> None:
    """A model of four steps writes an end token here and there; a text is cut there and is the same before it."""
    command = ("tools/generate.py", "--model", model, "--count", "48", "--steps", "4")
    whole, ended = (said(*command, *options).splitlines() for options in ((), ("--stop-at-end",)))
    assert len(whole) == len(ended) == 48
    assert all(one.startswith(other.rstrip("\ufffd")) for one, other in zip(whole, ended, strict=True))
    assert any(len(one) > len(other) + 1 for one, other in zip(whole, ended, strict=True))


def test_an_import_may_train_on_longer_sequences(model: Path, tmp_path: Path) -> None:
    said("tools/convert_checkpoint.py", "export", "--checkpoint", model, "--output", tmp_path / "hf")
    found = {}
    for name, options in (("same", ()), ("longer", ("--seq-length", "40"))):
        said("tools/convert_checkpoint.py", "import", "--input", tmp_path / "hf", "--output", tmp_path / name, *options)
        manifest = json.loads(next((tmp_path / name).rglob("manifest.json")).read_text())
        found[name] = manifest["config"]["model"]["seq_length"]
    assert found == {"same": 16, "longer": 40}


def _harness_on_a_fork(commands: list[list[str]], env: dict[str, str]) -> list[Ended]:
    """Run the command several times in processes that have lm-eval imported already."""
    os.environ.update(env)
    import lm_eval.evaluator
    import lm_eval.tasks  # noqa: F401

    return [call_forked("tools/harness.py", *command) for command in commands]


def test_harness_options_reach_the_tasks_and_the_model(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[eval]')")
    common = ["--model", str(model), "--include-path", "tests/eval/harness_tasks", "--noise-levels", "4"]
    common += ["--steps", "16", "--bootstrap-iters", "10", "--limit", "1", "--skip-greedy", "--tasks", "toy_choices"]
    commands = [
        [*common, "--num-fewshot", "1", "--platform", "cpu", "--tokenizer", "byte", "--output", str(tmp_path / "out")],
        [*common, "--tokenizer", str(tmp_path / "nowhere")],
        [*common, "--platform", "cuda"],
    ]
    env = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        good, *refused = pool.submit(_harness_on_a_fork, commands, env).result()
    assert good.code == 0, good.err
    assert json.loads((tmp_path / "out").read_text())["n-shot"] == {"toy_choices": 1}
    assert [ended.code for ended in refused] == [2, 2]
    assert str(tmp_path / "nowhere") in refused[0].err
    assert "--platform cuda" in refused[1].err


def test_harness_options_become_its_settings() -> None:
    """What comes of a task under each setting is tested with the harness; here, that each option sets its own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[eval]')")
    command = importlib.import_module("megadiff.cli.harness")

    def settings(*options: str) -> Any:
        return command._settings(command._parser().parse_args(["--model", "m", "--tasks", "t", *options]))

    plain = settings()
    assert plain.config == GenerationConfig(steps=128, block_length=None, sampler="adaptive", seed=0, batch_size=8)
    assert (plain.bound.draws, plain.bound.seed, plain.bound.batch_size) == (128, 0, 8)
    assert (plain.prepend_bos, plain.context, plain.check_greedy) == (None, 0, True)
    other = settings(
        *("--seed", "5", "--batch-size", "3", "--noise-levels", "6", "--steps", "7", "--block-length", "2"),
        *("--sampler", "ancestral", "--prepend-bos", "--context", "9", "--skip-greedy"),
    )
    assert other.config == GenerationConfig(steps=7, block_length=2, sampler="ancestral", seed=5, batch_size=3)
    assert (other.bound.draws, other.bound.seed, other.bound.batch_size) == (6, 5, 3)
    assert (other.prepend_bos, other.context, other.check_greedy) == (True, 9, False)
    assert settings("--no-prepend-bos").prepend_bos is False


def test_both_commands_that_read_documents_cut_and_bound_them(tmp_path: Path) -> None:
    """Three lines in two paragraphs; and a line of more than a megabyte beside a short one."""
    (tmp_path / "a.txt").write_text("one fish\ntwo fish\n\nred fish\n")
    documents = {}
    for split in ("line", "blank-line", "none"):
        prefix = tmp_path / split
        options = () if split == "none" else ("--text-split", split)
        said(
            *("tools/preprocess_data.py", "--input", tmp_path / "a.txt", "--output-prefix", prefix),
            *("--tokenizer", "byte", *options),
        )
        documents[split] = json.loads(prefix.with_suffix(".json").read_text())["documents"]
    assert documents == {"line": 3, "blank-line": 2, "none": 1}
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 1_100_000}) + '\n{"text": "short"}\n')
    for mb, code in (("1", 2), ("2", 0)):
        ended = call_forked(
            *("tools/preprocess_data.py", "--input", tmp_path / "long.jsonl", "--output-prefix", tmp_path / mb),
            *("--tokenizer", "byte", "--max-document-mb", mb),
        )
        assert ended.code == code, ended.err
    train = ("tools/train_tokenizer.py", "--vocab-size", "270", "--input")
    out = said(*train, tmp_path / "a.txt", "--text-split", "line", "--output", tmp_path / "bpe")
    assert "3 document(s) read" in out
    ended = call_forked(*train, tmp_path / "long.jsonl", "--max-document-mb", "1", "--output", tmp_path / "none")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err


def test_a_report_runs_over_steps_where_asked(model: Path, tmp_path: Path) -> None:
    for x, other in (("tokens", "optimizer steps"), ("steps", "tokens seen")):
        said("tools/report.py", model.parent.parent, "--output", tmp_path / f"{x}.html", "--x", x)
        assert other not in (tmp_path / f"{x}.html").read_text()


def test_branches_start_under_the_launcher_that_is_given(toy_corpus: Path, tmp_path: Path) -> None:
    config = toy_config(
        *(toy_corpus, tmp_path),
        model__layers=1,
        data__valid=[],
        schedule={"steps": 4, "warmup_steps": 1, "decay_steps": 2},
        checkpoint__every=2,
    )
    on_ranks(1, train_on_rank, config, 1, save=True)
    out = said(
        *("tools/branch_cooldowns.py", "--trunk", config.folder, "--lengths", "3", "--dry-run"),
        *("--launcher", "torchrun --nproc-per-node 2", "--set", f"output_dir={tmp_path}/branches"),
    )
    (command,) = (shlex.split(line[2:]) for line in out.splitlines() if line.startswith("$ "))
    assert command[:4] == ["torchrun", "--nproc-per-node", "2", str(REPOSITORY / "pretrain_dlm.py")]


def test_a_topic_corpus_has_the_sizes_that_are_asked_for(tmp_path: Path) -> None:
    entropies = {}

    def written(name: str, *options: str) -> list[str]:
        out = said("tools/topic_corpus.py", "--output", tmp_path / name, *options)
        entropies[name] = out.splitlines()[-1]
        lines = (tmp_path / name / "train.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]

    sizes = ("--topics", "2", "--documents", "40", "--length", "30")
    texts = written("a", *sizes)
    assert (len(texts), {len(text) for text in texts}) == (40, {30})
    assert len((tmp_path / "a/valid.jsonl").read_text().splitlines()) == 2
    assert texts == written("b", *sizes, "--seed", "0") != written("c", *sizes, "--seed", "1")
    assert entropies["a"] == entropies["b"] != entropies["c"], "topics are drawn by the seed too"
    assert texts != written("d", "--topics", "3", *sizes[2:])


def test_runs_are_drawn_side_by_side_by_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for size in (2, 4):
        run = tmp_path / f"b{size}"
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump({"batch": {"global_batch_size": size}}))
        lines = [{"step": 1, "tokens": size * 100}, {"step": 1, "eval_elbo": 5.0 - size / 2, "eval_elbo_stderr": 0.1}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("tools/plot_experiment.py", tmp_path / "b2", tmp_path / "b4", "--by", "batch.global_batch_size")
    out = said(*command, "--targets", "3.5", "--output", tmp_path / "f.png")
    assert "tokens to 3.5" in out
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_trains_each_rate_and_seed_at_each_size(toy_corpus: Path, tmp_path: Path) -> None:
    tree = toy_tree(toy_corpus, tmp_path / "runs", schedule__steps=2, eval__sequences=2, schedule__warmup_steps=0)
    tree["schedule"]["decay_steps"] = 0
    config = write_yaml(tmp_path / "sweep.yaml", tree)
    out = said(
        *(
            "tools/learning_rate_sweep.py",
            "--config",
            config,
            "checkpoint.every=100",
            "--sizes",
            "32x1",
            "--first",
            "0.01",
            "--count",
            "2",
        ),
        *("--seeds", "2", "--parametrisations", "standard"),
    )
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    rates = ("0.01", "0.02")
    assert names == sorted(f"standard-d32-L1-lr{rate}{seed}" for rate in rates for seed in ("", "-seed1"))
    assert "standard: held-out ELBO" in out
    resolved = yaml.safe_load((tmp_path / "runs" / "standard-d32-L1-lr0.02-seed1" / "config.yaml").read_text())
    assert (resolved["seed"], resolved["optimizer"]["lr"], resolved["checkpoint"]["every"]) == (1, 0.02, 100)


def test_a_coordinate_check_measures_the_grid_that_is_asked_for(tmp_path: Path) -> None:
    """Tiny sizes and a missing rule: a table of three models, on the screen and in a file, and exit code 1."""
    tables = {}
    for grid in ("cross", "full"):
        ended = call_forked(
            *("tools/coordinate_check.py", "--widths", "32", "64", "--depths", "1", "2", "--grid", grid),
            *(
                "--without",
                "zero_head",
                "--output",
                tmp_path / grid,
                "--config",
                REPOSITORY / "examples/presets/gidd.yaml",
            ),
        )
        assert ended.code == 1, ended.err
        assert "logits before the first step have size" in ended.out
        tables[grid] = (tmp_path / grid).read_text()
    heads = {grid: re.findall(r"d\d+ L\d+", text) for grid, text in tables.items()}
    assert heads == {"cross": ["d32 L1", "d32 L2", "d64 L1"], "full": ["d32 L1", "d32 L2", "d64 L1", "d64 L2"]}
