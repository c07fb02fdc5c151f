"""Score a trained model on lm-evaluation-harness tasks."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError, DataError, PlatformError

if TYPE_CHECKING:
    from megadiff.eval.harness import HarnessModel, HarnessSettings
    from megadiff.run.load_model import InferenceModel

_KEPT = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better", "config", "lm_eval_version")

_EPILOG = """examples:
  megadiff harness --model runs/demo --tasks arc_easy,hellaswag --batch-size 32 --output scores.json
  megadiff harness --model runs/demo --tasks wikitext --noise-levels 32 --context 128
  megadiff harness --model runs/demo --tasks my_task --include-path my_tasks --limit 100 --steps 64

This needs lm-eval: pip install '.[eval]'. The harness downloads tasks from the hub; --include-path adds a folder with
your own task files. A diffusion model's likelihoods are lower bounds; their standard errors are in the JSON file.
"""


def main() -> None:
    """Read the command line, open the model, run the tasks, print the table, write JSON."""
    arguments = _parser().parse_args()
    _check(arguments)

    from megadiff.export.opened import open_model
    from megadiff.platform.quiet import quiet

    with quiet():
        try:
            from megadiff.eval.harness import HarnessModel
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "lm_eval":
                raise
            raise PlatformError("the evaluation harness (lm-eval) is not installed: pip install '.[eval]'") from error

    tasks = _Tasks(arguments.tasks, arguments.include_path)
    with open_model(arguments.model, platform=arguments.platform, tokenizer=arguments.tokenizer) as trained:
        model = HarnessModel(trained, _settings(arguments), say=lambda sentence: print(sentence, file=sys.stderr))
        results = tasks.run(model, arguments)
        results["config"]["model"] = str(trained.folder)
        print(f"{trained.folder}, step {trained.manifest.step}")
        tasks.show(results)
        for name, found in model.estimates().items():
            print(
                f"{name}: {found['log_likelihood']:.4f} +- {found['log_likelihood_stderr']:.4f} nats in "
                f"{found['requests']} requests of {found['tokens']} tokens (+- is the estimate's standard error)"
            )
        if arguments.output:
            arguments.output.write_text(json.dumps(_report(trained, model, results), indent=1, default=str) + "\n")


class _Tasks:
    """Tasks of the harness, selected by name."""

    def __init__(self, names: str, include_path: Path | None) -> None:
        from lm_eval.tasks import TaskManager

        wanted = [name.strip() for name in names.split(",") if name.strip()]
        own = None if include_path is None else TaskManager(include_path=str(include_path), include_defaults=False)
        if own is not None and wanted and all(name in own.all_subtasks for name in wanted):
            self._manager, self._names = own, wanted  # without reading the harness's own tasks, thousands of files
            return
        self._manager = TaskManager(include_path=None if include_path is None else str(include_path))
        missing = [name for name in wanted if not self._manager.match_tasks([name])]
        if missing or not wanted:
            raise ConfigError(
                f"--tasks {names}: the harness knows no {', '.join(missing) or 'task without a name'}; "
                "`lm-eval ls tasks` lists its tasks, --include-path FOLDER adds your own"
            )
        self._names = self._manager.match_tasks(wanted)

    def run(self, model: HarnessModel, arguments: argparse.Namespace) -> dict[str, Any]:
        """Run the tasks and return the harness's results."""
        from lm_eval.evaluator import simple_evaluate

        try:
            results = simple_evaluate(  # pyright: ignore[reportCallIssue]  its decorator hides its own parameters
                model=model,
                tasks=list(self._names),
                task_manager=self._manager,
                batch_size=arguments.batch_size,
                limit=arguments.limit,
                num_fewshot=arguments.num_fewshot,
                bootstrap_iters=arguments.bootstrap_iters,
                log_samples=False,
            )
        except OSError as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"--tasks {arguments.tasks}: a task's data cannot be read ({what})") from error
        assert results is not None
        return dict(results)

    def show(self, results: dict[str, Any]) -> None:
        """Print the harness's own tables."""
        from lm_eval.utils import make_table

        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))


def _report(trained: InferenceModel, model: HarnessModel, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": trained.manifest.step,
        **{key: results[key] for key in _KEPT if key in results},
        "estimates": model.estimates(),
        "likelihoods": [asdict(answer) for answer in model.answers],
        "continuations": [asdict(text) for text in model.continued],
    }


def _settings(arguments: argparse.Namespace) -> HarnessSettings:
    from megadiff.eval.harness import GenerationConfig, HarnessSettings
    from megadiff.eval.likelihood import BoundSettings

    sequences, seed = arguments.batch_size, arguments.seed
    return HarnessSettings(
        bound=BoundSettings(draws=arguments.noise_levels, seed=seed, batch_size=sequences),
        config=GenerationConfig(arguments.steps, arguments.block_length, arguments.sampler, seed, sequences),
        context=arguments.context,
        prepend_bos=arguments.prepend_bos,
        check_greedy=not arguments.skip_greedy,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse invalid arguments before anything is loaded."""
    output, folder = arguments.output, arguments.include_path
    if output and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output and output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give the name of a file in it")
    if folder and not folder.is_dir():
        raise ConfigError(f"--include-path {folder}: wanted a folder of task files (.yaml), found no folder")
    if arguments.noise_levels < 4 or arguments.noise_levels % 2:
        raise ConfigError(f"--noise-levels must be even and at least 4, got {arguments.noise_levels}")
    for name, least in {"batch_size": 1, "steps": 1, "block_length": 1, "limit": 1, "context": 0}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--model", required=True, help="a run folder, one checkpoints/step_* folder of it, or a Hugging Face folder"
    )
    parser.add_argument("--tasks", required=True, help="names of tasks or groups, comma-separated")
    parser.add_argument("--include-path", type=Path, help="a folder with task files of your own")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences for each forward pass (default 8)")
    parser.add_argument("--limit", type=int, help="number of documents used of each task, from the first")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's own)")
    parser.add_argument("--output", type=Path, help="also write scores, likelihoods and texts here as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="tokenizer path, if the run's own was moved")
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="put bos before each prompt, context or document (default: as in the training data)",
    )
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto")
    likelihood = parser.add_argument_group("likelihoods")
    likelihood.add_argument(
        "--noise-levels", type=int, default=128, help="noised copies of each completion; even (default 128)"
    )
    likelihood.add_argument("--context", type=int, default=0, help="rolling: tokens of context before each window")
    likelihood.add_argument(
        "--skip-greedy", action="store_true", help="do not check which completions are greedy (lambada counts them)"
    )
    likelihood.add_argument(
        "--bootstrap-iters",
        type=int,
        default=10000,
        help="bootstrap samples for the harness's standard errors over documents",
    )
    texts = parser.add_argument_group("generate_until")
    texts.add_argument("--steps", type=int, default=128, help="denoising steps of a block (default 128)")
    texts.add_argument("--block-length", type=int, help="number of tokens denoised at a time (default: all)")
    texts.add_argument("--sampler", choices=["adaptive", "ancestral"], default="adaptive")
    return parser
