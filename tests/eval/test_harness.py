"""The evaluation harness on models that were really trained: its three kinds of request, alone and in batches."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import ConfigError
from megadiff.eval.harness import GenerationConfig, GenerationRequest, continuations, room
from megadiff.eval.likelihood import BoundSettings, Item, greedy
from megadiff.eval.texts_likelihood import is_cut, item_of, split_to_fit
from megadiff.platform.quiet import quiet
from tests.support.commands import REPOSITORY
from tests.support.forked_command import Ended, call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank, write_corpus

with quiet():
    from megadiff.run.load_model import load_model

TASKS = "tests/eval/harness_tasks"
DRAWS = 16
LONG = "a context much longer than a sequence"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Step folders of a hybrid model trained with prompts, and of an autoregressive control; sequences of 16 tokens."""
    folder = tmp_path_factory.mktemp("models")
    corpus = write_corpus(folder / "corpus")
    made = {}
    for name, changes in {"hybrid": {"conditioning__prompt": 0.5}, "ar": {"method__name": "next_token"}}.items():
        config = toy_config(
            corpus, folder / name, schedule__steps=20, optimizer__lr=0.02, model__layers=2, data__valid=[], **changes
        )
        on_ranks(1, train_on_rank, config, 1, save=True)
        made[name] = config.folder / "checkpoints/step_00000020"
    return made


@pytest.fixture(scope="module")
def harness_home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the harness's data library is told: no network, and a cache of its own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[eval]')")
    return {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}


def harness(model: Path, tasks: str, home: dict[str, str], *options: str | Path) -> Ended:
    """The real command with few draws and steps."""
    few = ("--noise-levels", str(DRAWS), "--steps", "4", "--bootstrap-iters", "100", "--include-path", TASKS)
    return call_forked("tools/harness.py", "--model", model, "--tasks", tasks, *few, *options, env=home)


def assert_same(one, other) -> None:
    """Two parts of a report: numbers to seven digits, the order of summation in a batch is all that may differ."""
    if isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-6)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_same(mine, yours)
    else:
        assert one == other


def in_a_fork(fn, *args):
    """The parent stays without a process group."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(fn, *args).result()


@pytest.fixture(scope="module")
def reports(models, harness_home, tmp_path_factory) -> dict[str, dict]:
    """All tasks at batch sizes 1 and 8."""
    found = {}
    for batch in ("1", "8"):
        output = tmp_path_factory.mktemp("reports") / f"{batch}.json"
        ended = harness(
            models["hybrid"], "toy_choices,toy_rolling,toy_until", harness_home,
            "--batch-size", batch, "--output", output,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        for shown in ("toy_choices", "bits_per_byte", "exact_match", "+-"):
            assert shown in ended.out
        assert ended.err.count("long contexts lose their first ones") == 1
        assert ended.err.count("long contexts lose their first tokens") == 1
        found[batch] = json.loads(output.read_text())
    return found


def test_the_numbers_are_the_same_at_batch_sizes_1_and_8(reports):
    one, eight = reports["1"], reports["8"]
    assert one["n-samples"]["toy_choices"]["effective"] == 4
    assert one["continuations"] == eight["continuations"]
    assert_same(one["results"], eight["results"])
    assert_same(one["likelihoods"], eight["likelihoods"])
    assert len(one["likelihoods"]) == 9 + 3
    assert all(0 < answer["stderr"] < -answer["log_likelihood"] for answer in one["likelihoods"])
    estimate = one["estimates"]["toy_choices"]
    own = [answer for answer in one["likelihoods"] if answer["task"] == "toy_choices"]
    assert estimate["log_likelihood"] == pytest.approx(sum(answer["log_likelihood"] for answer in own))
    # Each answer's own error is widened for its few draws, more than that of their sum.
    together = math.hypot(*(answer["stderr"] for answer in own))
    assert 0.3 * together < estimate["log_likelihood_stderr"] < together


def _own_likelihoods(folder: Path, pairs: list[tuple[str, str]]) -> list[tuple[float, float]]:
    with load_model(folder, platform="cpu") as model:
        items = [item_of(prompt, completion, model.tokenizer) for prompt, completion in pairs]
        settings = BoundSettings(draws=DRAWS, batch_size=5)
        return [(one.nll, one.stderr) for one in model.estimator(settings).likelihoods(model, items)]


def test_likelihoods_are_the_projects_and_the_largest_is_the_best_choice(reports, models):
    documents = [json.loads(line) for line in (REPOSITORY / TASKS / "choices.jsonl").read_text().splitlines()]
    # The third question does not fit into a sequence with its choices: it loses its first tokens.
    pairs = []
    for document in documents:
        for choice in document["choices"]:
            left = 16 - len(f" {choice}".encode())
            pairs.append((document["question"][-left:], f" {choice}"))
    wanted = in_a_fork(_own_likelihoods, models["hybrid"], pairs)
    found = [answer for answer in reports["8"]["likelihoods"] if answer["task"] == "toy_choices"]
    assert [-answer["log_likelihood"] for answer in found] == pytest.approx([nll for nll, _ in wanted], rel=1e-6)
    assert [answer["stderr"] for answer in found] == pytest.approx([error for _, error in wanted], rel=1e-5)
    right, values = 0, iter(nll for nll, _ in wanted)
    for document in documents:
        own = [next(values) for _ in document["choices"]]
        right += own.index(min(own)) == document["answer"]
    assert reports["8"]["results"]["toy_choices"]["acc,none"] == right / 4


def test_a_part_of_a_task_gives_the_same_answers(reports, models, harness_home, tmp_path):
    output = tmp_path / "part.json"
    ended = harness(
        models["hybrid"], "toy_until,toy_choices", harness_home,
        "--limit", "2", "--output", output, "--skip-greedy",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    part = json.loads(output.read_text())
    whole = [answer for answer in reports["8"]["likelihoods"] if answer["task"] == "toy_choices"][:4]
    assert_same(part["likelihoods"], [{**answer, "is_greedy": None} for answer in whole])
    assert part["continuations"] == reports["8"]["continuations"][:2]
    assert "greedy completions are not determined" in ended.err


def _by_hand(folder: Path, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """log p of each completion, and whether it is the greedy one, token by token."""
    import torch

    with load_model(folder, platform="cpu") as model:
        found = []
        for prompt, completion in pairs:
            sequence, total, agrees = [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)], 0.0, True
            for token in model.tokenizer.encode(completion):
                logits = model.logits(torch.tensor([sequence]), torch.zeros(1, dtype=torch.int64))[0, -1].double()
                logits[model.process.mask_id] = -torch.inf
                total += float(logits.log_softmax(-1)[token])
                agrees &= int(logits.argmax()) == token
                sequence.append(token)
            found.append((total, agrees))
        return found


def _asked(folder: Path, pairs: list[tuple[str, str]]) -> tuple[list[tuple[float, bool]], list[float], str]:
    from megadiff.eval.harness import HarnessModel

    with load_model(folder, platform="cpu") as opened:
        model = HarnessModel(opened, batch_size=4)
        choices = model.loglikelihood([request(*pair) for pair in pairs])
        rolling = model.loglikelihood_rolling([request(prompt + completion) for prompt, completion in pairs])
        with pytest.raises(ConfigError) as refused:
            model.generate_until([request("a", {})])
        assert {answer.stderr for answer in model.answers} == {0.0}
        return choices, rolling, str(refused.value)


def _repeated(folder: Path) -> tuple[list, dict]:
    from megadiff.eval.harness import HarnessModel, HarnessSettings

    settings = HarnessSettings(bound=BoundSettings(draws=DRAWS), check_greedy=False)
    with load_model(folder, platform="cpu") as opened:
        model = HarnessModel(opened, settings, say=lambda _: None)
        model.loglikelihood([request("ab", "cd")] * 5)
        model.loglikelihood([request("ab", "cd")] * 2)
        return model.answers, model.estimates()


def test_equal_requests_share_one_estimate_and_its_error(models):
    answers, estimates = in_a_fork(_repeated, models["hybrid"])
    assert len(answers) == 7
    assert len({(answer.log_likelihood, answer.stderr) for answer in answers}) == 1
    assert estimates["task"]["requests"] == 7
    assert estimates["task"]["log_likelihood"] == pytest.approx(7 * answers[0].log_likelihood)
    assert estimates["task"]["log_likelihood_stderr"] == pytest.approx(7 * answers[0].stderr)


def request(*args):
    """One of the harness's requests, as far as a model reads it."""
    return SimpleNamespace(args=args, task_name="task", doc_id=0, idx=0)


def _greedy_text(folder: Path, prompt: str, length: int) -> str:
    """What the autoregressive model writes with the most probable letters."""
    letters = [chr(code) for code in range(32, 127)]
    for _ in range(length):
        scores = _by_hand(folder, [(prompt, letter) for letter in letters])
        prompt += letters[max(range(len(letters)), key=lambda i: scores[i][0])]
    return prompt


def test_an_autoregressive_control_is_exact_and_finds_greedy_completions(models, harness_home):
    folder = models["ar"]
    best = in_a_fork(_greedy_text, folder, "ab", 3)
    pairs = [("ab", best[2:]), ("ab", best[2:-1] + "~"), ("", "q"), ("xyz", "no"), ("ab", best[2:4]), ("ab", "")]
    wanted = in_a_fork(_by_hand, folder, pairs)
    choices, rolling, refused = in_a_fork(_asked, folder, pairs)
    assert [value for value, _ in choices] == pytest.approx([value for value, _ in wanted], rel=1e-5)
    assert [same for _, same in choices] == [same for _, same in wanted]
    whole = in_a_fork(_by_hand, folder, [("", prompt + completion) for prompt, completion in pairs])
    assert rolling == pytest.approx([value for value, _ in whole], rel=1e-5)
    assert "is an autoregressive control (method.name is next_token), which is measured but not sampled" in refused
    assert "\n" not in refused


def _texts(folder: Path) -> dict[str, list]:
    """Continuations of the same requests in two orders and two batch sizes, and what is said of them."""
    said: list[str] = []
    requests = [
        ("ab", {"max_gen_toks": 5}),
        ("", {"max_gen_toks": 5, "do_sample": True, "temperature": 2.0}),
        (LONG, {"max_gen_toks": 100, "until": ["~"]}),
        ("cd", {"max_gen_toks": 5, "do_sample": True, "temperature": 2.0}),
        ("cd", {"max_gen_toks": 5, "do_sample": True, "temperature": 2.0}),
        ("cd", {"max_gen_toks": 5, "temperature": 2.0, "top_k": 1}),
        ("cd", {"max_gen_toks": 5}),
        ("ef", {"max_gen_toks": 5, "do_sample": True, "temperature": 2.0}),
        ("gh", {"max_gen_toks": 5, "do_sample": True, "temperature": 2.0}),
    ]
    named = requests
    requests = [(context, GenerationRequest.from_names(names)) for context, names in named]
    with load_model(folder, platform="cpu") as model:

        def written(asked, sequences):
            config = GenerationConfig(steps=8, batch_size=sequences, seed=3)
            return continuations(model, asked, config, progress=lambda _count: None, say=said.append)

        first = written(requests, 8)
        spaced = next(c for c in first[1] if c not in " ")
        cut = written([("", GenerationRequest.from_names({**named[1][1], "until": spaced}))], 1)
        return {
            "texts": first,
            "backwards": written(requests[::-1], 2)[::-1],
            "cut": [first[1].split(spaced)[0], *cut],
            "said": said,
        }


def test_continuations_depend_on_the_request_alone(models):
    found = in_a_fork(_texts, models["hybrid"])
    texts, backwards = found["texts"], found["backwards"]
    repeated = slice(3, 5)  # equal requests are told apart by their order
    assert [*texts[:3], *texts[5:]] == [*backwards[:3], *backwards[5:]]
    assert texts[repeated] == backwards[repeated][::-1]
    assert texts[3] != texts[4]
    assert texts[5] == texts[6]  # the one most probable token, either way
    assert len(texts[2].encode()) > 5
    assert found["cut"][0] == found["cut"][1]
    assert {sentence.split(";")[1] for sentence in found["said"]} == {
        " long contexts lose their first tokens",
        " continuations end where it ends",
    }


def _greedy_of(folder: Path) -> list[bool]:
    """What a diffusion model writes itself, the same with one token changed, and an empty completion."""
    import torch

    from megadiff.eval.likelihood import seed_of
    from megadiff.sampling.standalone import Settings, generate

    with load_model(folder, platform="cpu") as model:
        prompt = tuple(model.tokenizer.encode("abc"))
        settings = Settings(4, 4, sampler="adaptive", tokens_per_step=1, temperature=0.0)
        seed = seed_of(0, Item(prompt, ()))
        written = generate(model.denoise, torch.tensor([prompt]), settings, model.process, seed=[seed]).sequences[0]
        own = tuple(written[len(prompt) :].tolist())
        changed = (*own[:-1], own[-1] + 1)
        items = [Item(prompt, own), Item(prompt, changed), Item(prompt, ())]
        return greedy(model, model.estimator(BoundSettings(batch_size=2)), items, progress=lambda _count: None)


def test_a_completion_the_sampler_writes_itself_is_greedy(models):
    assert in_a_fork(_greedy_of, models["hybrid"]) == [True, False, True]


@pytest.mark.parametrize(("prompt", "completion"), [(0, 5), (3, 5), (30, 5), (5, 15), (5, 16), (5, 17), (40, 50)])
@pytest.mark.parametrize("start", [(), (1,)])
def test_every_completion_token_is_scored_once_after_its_prompt(prompt, completion, start):
    item = Item(tuple(range(100, 100 + prompt)), tuple(range(200, 200 + completion)))
    pieces = split_to_fit(item, length=16, start=start)
    assert sum((piece.completion for piece in pieces), ()) == item.completion
    assert all(len(piece.ids) <= 16 and piece.completion for piece in pieces)
    assert (pieces == [Item((*start, *item.prompt), item.completion)]) == (not is_cut(item, length=16, start=start))
    assert pieces[0].prompt[: len(start)] == start
    kept = pieces[0].prompt[len(start) :]
    assert kept == item.prompt[prompt - len(kept) :]
    assert not prompt or len(kept) >= min(prompt, 1 if completion < 16 else 16 // 2 - 1)
    before = item.completion[: len(pieces[0].completion)]
    for piece in pieces[1:]:
        assert piece.prompt == before[-8:]
        before += piece.completion


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({}, GenerationRequest()),
        ({"until": "\n", "max_new_tokens": 7}, GenerationRequest(until=("\n",), max_new_tokens=7)),
        ({"until": ["a", "b"], "do_sample": False, "temperature": 0.7}, GenerationRequest(until=("a", "b"))),
        ({"do_sample": True}, GenerationRequest(temperature=1.0)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 0}, GenerationRequest(temperature=0.7, top_p=0.9)),
        ({"num_beams": 4}, GenerationRequest(unknown=("num_beams",))),
    ],
)
def test_a_task_s_names_are_understood(names, wanted):
    assert GenerationRequest.from_names(names) == wanted


@pytest.mark.parametrize("names", [{"temperature": -1}, {"max_gen_toks": "many"}, {"max_gen_toks": 0}, {"until": 3}])
def test_what_cannot_be_met_is_refused(names):
    with pytest.raises(ConfigError, match="generation_kwargs cannot be met"):
        GenerationRequest.from_names(names)


def test_text_ends_before_the_first_stop_string():
    assert GenerationRequest(until=("\n", "ab", "")).cut("xx ab\n yy") == "xx "


def test_a_long_prompt_gives_way_to_half_a_sequence_of_new_tokens():
    assert room(4, 5, length=16) == (4, 5)
    assert room(14, 5, length=16) == (11, 5)
    assert room(14, 50, length=16) == (8, 8)
    assert room(3, 50, length=16) == (3, 13)
    assert room(0, 50, length=16) == (0, 16)


def _without_lm_eval() -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:  # a test before may have imported parts
        del sys.modules[name]
    sys.modules["lm_eval"] = None  # type: ignore[assignment]
    sys.modules.pop("megadiff.eval.harness", None)


def test_without_the_harness_one_sentence_says_what_to_install(tmp_path):
    ended = call_forked("tools/harness.py", "--model", tmp_path, "--tasks", "arc_easy", before=_without_lm_eval)
    assert ended.code == 2
    assert ended.err == "error: the evaluation harness (lm-eval) is not installed: pip install '.[eval]'\n"


def _own_tasks_alone() -> None:
    """The harness's own tasks are thousands of files, half a minute on a busy machine."""
    import functools

    import lm_eval.tasks

    lm_eval.tasks.TaskManager.__init__ = functools.partialmethod(  # type: ignore[method-assign]
        lm_eval.tasks.TaskManager.__init__, include_defaults=False
    )


def test_mistakes_are_named(models, harness_home, tmp_path):
    for options, message in [
        (("--noise-levels", "5"), "--noise-levels must be even and at least 4, got 5"),
        (("--include-path", tmp_path / "none"), "wanted a folder of task files"),
        (("--output", tmp_path / "none" / "x.json"), "make it first"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--context", "16"), "the context (16 tokens) must be shorter than a sequence (16)"),
    ]:
        ended = harness(models["hybrid"], "toy_rolling", harness_home, *options)
        assert ended.code == 2, ended.err
        assert message in ended.err
        assert "Traceback" not in ended.err
    wrong = ("--model", models["hybrid"], "--tasks", "toy_choices,no_such_task", "--include-path", TASKS)
    (tmp_path / "lost.yaml").write_text(
        (REPOSITORY / TASKS / "toy_rolling.yaml").read_text().replace("texts.jsonl", "lost.jsonl"), encoding="utf-8"
    )
    ended = harness(models["hybrid"], "toy_rolling", harness_home, "--include-path", tmp_path)
    assert ended.code == 2, ended.err
    assert "--tasks toy_rolling: a task's data cannot be read (Unable to find" in ended.err
    ended = call_forked("tools/harness.py", *wrong, env=harness_home, before=_own_tasks_alone)
    assert ended.code == 2
    assert ended.err.startswith("error: --tasks toy_choices,no_such_task: the harness knows no no_such_task; ")


def test_a_path_in_place_of_a_model_is_refused(harness_home):
    assert in_a_fork(_given_a_path).startswith("wanted an opened model, found the path 'runs/demo'; open it with")


def _given_a_path() -> str:
    import lm_eval.api.registry

    import megadiff.eval.harness  # noqa: F401

    with pytest.raises(ConfigError) as refused:
        lm_eval.api.registry.get_model("megadiff").create_from_arg_string("model=runs/demo", {"batch_size": 2})
    return str(refused.value)


def test_white_space_at_a_seam_belongs_to_the_continuation():
    context = "Answer: "
    item = item_of(context.rstrip(), " " + "yes", ByteTokenizer())
    assert item.completion == tuple(ByteTokenizer().encode(" yes"))
