"""The real commands on toy models that were really trained: text with its trace, likelihoods as JSON."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from megadiff.platform.quiet import quiet
from tests.support.forked_command import call_forked as call
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank, write_corpus

with quiet():
    from megadiff.export.export import export
    from megadiff.run.load_model import load_model

PAIRS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "", "completion": "q"}, {"prompt": "xy z", "completion": "w"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Step folders of a hybrid model trained with prompts, and of an autoregressive control."""
    folder = tmp_path_factory.mktemp("models")
    corpus = write_corpus(folder / "corpus")
    made = {}
    for name, changes in {
        "hybrid": {"conditioning__prompt": 0.5},
        "ar": {"method__name": "next_token"},
    }.items():
        config = toy_config(
            corpus, folder / name, schedule__steps=6, optimizer__lr=0.02, model__layers=2, data__valid=[], **changes
        )
        on_ranks(1, train_on_rank, config, 1, save=True)
        made[name] = config.folder / "checkpoints/step_00000006"
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "pairs.jsonl"
    path.write_text("".join(json.dumps({**pair, "text": pair["prompt"] + "\u00e9 long text"}) + "\n" for pair in PAIRS))
    return path


def test_text_comes_out_in_blocks_with_its_trace(models, tmp_path):
    trace = tmp_path / "trace.html"
    options = ["--prompt", "ab", "--num-tokens", "12", "--block-length", "4", "--steps", "4", "--trace", trace]
    shown = [
        call("tools/generate.py", "--model", models["hybrid"], "--sampler", sampler, *options)
        for sampler in ("ancestral", "adaptive", "adaptive")
    ]
    assert [code for code, _, _ in shown] == [0, 0, 0], shown[0][2]
    assert shown[0][1].startswith("ab")
    assert shown[1] == shown[2]
    page = trace.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    frames = json.loads(page.split('id="data">')[1].split("</script>")[0])["frames"]
    assert {frame["block"] for frame in frames} == {1, 2, 3}
    code, _, err = call(
        "tools/generate.py",
        "--model",
        models["hybrid"],
        "--sampler",
        "adaptive",
        "--steps",
        "2",
        "--tokens-per-step",
        "1",
    )
    assert code == 2
    assert "does not reach the 16 positions of a block" in err


def _reference(folder: Path) -> list[float]:
    """-log p of each completion under the autoregressive model, token by token."""
    with load_model(folder, platform="cpu") as model:
        import torch

        found = []
        for pair in PAIRS:
            before, after = (model.tokenizer.encode(pair[key]) for key in ("prompt", "completion"))
            sequence = [model.tokenizer.bos_id, *before, *after]
            logits = model.logits(torch.tensor([sequence[:-1]]), torch.zeros(1, dtype=torch.int64))[0].double()
            logits[:, model.process.mask_id] = -torch.inf
            log_p = logits.log_softmax(-1)
            found.append(-sum(float(log_p[i, sequence[i + 1]]) for i in range(len(before), len(sequence) - 1)))
        return found


def test_likelihoods_are_written_as_json_and_do_not_depend_on_the_batch(models, pairs, tmp_path):
    found = []
    for batch in ("1", "8"):
        output = tmp_path / f"{batch}.json"
        code, out, err = call(
            "tools/evaluate.py", "likelihood", "--model", models["hybrid"], "--data", pairs, "--draws", "16",
            "--micro-batch-size", batch, "--score-eos", "--output", output,
        )  # fmt: skip
        assert code == 0, err
        assert "3 completion(s) of 7 tokens" in out
        found.append(json.loads(output.read_text()))
    one, eight = found
    assert [item["tokens"] for item in one["items"]] == [3, 2, 2]
    for mine, other in zip(one["items"], eight["items"], strict=True):
        assert mine["nll"] == pytest.approx(other["nll"], rel=1e-5)
        assert 0 < mine["nll_stderr"] < mine["nll"]
        assert mine["nll"] == pytest.approx(mine["tokens"] * math.log(259), rel=0.4)
    assert one["nll"] == pytest.approx(sum(item["nll"] for item in one["items"]))
    assert one["kind"] == "bound"


def test_an_autoregressive_control_goes_through_the_same_command_exactly(models, pairs, tmp_path):
    output = tmp_path / "ar.json"
    code, _, err = call("tools/evaluate.py", "likelihood", "--model", models["ar"], "--data", pairs, "--output", output)
    assert code == 0, err
    found = json.loads(output.read_text())
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        want = pool.submit(_reference, models["ar"]).result()
    assert [item["nll"] for item in found["items"]] == pytest.approx(want, rel=1e-5)
    assert found["kind"] == "exact"
    assert found["nll_stderr"] == 0


def test_documents_are_measured_window_by_window(models, pairs, tmp_path):
    output = tmp_path / "rolling.json"
    code, out, err = call(
        "tools/evaluate.py", "likelihood", "--model", models["hybrid"], "--data", pairs, "--text-key", "text",
        "--context", "4", "--draws", "8", "--output", output,
    )  # fmt: skip
    assert code == 0, err
    assert "bits per byte" in out
    found = json.loads(output.read_text())
    texts = [pair["prompt"] + "\u00e9 long text" for pair in PAIRS]
    assert found["bytes"] == found["tokens"] == sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / found["bytes"] / math.log(2))
    assert found["word_perplexity"] == pytest.approx(math.exp(found["nll"] / found["words"]))


def test_equal_texts_share_their_error_and_estimates_name_their_levels(models, pairs, tmp_path):
    """Twenty lines of one text, and two documents that are one window repeated, or share windows with each other."""
    line = json.dumps(PAIRS[0] | {"text": "abcdefghijklmnop" * 3})  # three equal windows of sixteen tokens
    other = json.dumps(PAIRS[1] | {"text": "abcdefghijklmnop" + "qrst"})
    files = {"once": [line], "twenty": [line] * 20, "mixed": [line, line, other]}
    found = {}
    for name, lines in files.items():
        path, output = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        path.write_text("\n".join(lines))
        for kind, options in (("pairs", []), ("text", ["--text-key", "text"]), ("levels", ["--estimator", "levels"])):
            ended = call(
                "tools/evaluate.py", "likelihood", "--model", models["hybrid"], "--data", path, "--draws", "16",
                "--output", output, *options,
            )  # fmt: skip
            assert ended.code == 0, ended.err
            found[name, kind] = json.loads(output.read_text()), ended
    for kind in ("pairs", "text", "levels"):
        once, twenty = found["once", kind][0], found["twenty", kind][0]
        assert twenty["nll"] == pytest.approx(20 * once["nll"])
        assert twenty["nll_stderr"] == pytest.approx(20 * once["nll_stderr"])
    assert "measuring 1 distinct text(s), 16 sequences each: 16 sequences" in found["twenty", "text"][1].err
    mixed, (three, _, one) = found["mixed", "text"][0], found["mixed", "text"][0]["documents"]
    window, rest = three["nll_stderr"] / 3, one["nll"] - three["nll"] / 3
    assert rest > 0
    assert mixed["nll_stderr"] > 0.99 * 7 * window  # seven times one window, and a short one that is independent
    counts, levels = found["once", "pairs"], found["once", "levels"]
    assert (counts[0]["kind"], counts[0]["log_snr_range"]) == ("bound", "all")
    assert (levels[0]["kind"], levels[0]["log_snr_range"]) == ("part of the bound", [-9.0, 9.0])
    assert "(bound, all noise levels)" in counts[1].out
    assert "(the bound's part over log-SNR -9 to 9)" in levels[1].out


def test_mistakes_are_named(models, pairs, tmp_path):
    likelihood = ["tools/evaluate.py", "likelihood", "--model", models["hybrid"], "--data"]
    for command, message in [
        ([*likelihood, pairs, "--completion-key", "answer"], "wanted a string under 'answer', found nothing"),
        ([*likelihood, tmp_path / "none.jsonl"], "wanted a .jsonl file, found nothing"),
        (
            [*likelihood, pairs, "--text-key", "text", "--context", "16"],
            "--context 16: the context (16 tokens) must be",
        ),
        ([*likelihood, pairs, "--text-key", "text", "--prompt-key", "prompt"], "give one or the other"),
        ([*likelihood, pairs, "--draws", "5"], "--draws: must be even and at least 4, got 5"),
    ]:
        code, _, err = call(*command)
        assert code == 2
        assert message in err, err
        assert "Traceback" not in err


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    return export(models["hybrid"], tmp_path_factory.mktemp("hf") / "hybrid").folder


def test_a_hugging_face_folder_gives_its_runs_text_and_likelihoods(models, exported, pairs, tmp_path):
    said = {}
    for model in (models["hybrid"], exported):
        options = ("--prompt", "ab", "--num-tokens", "8", "--steps", "4", "--count", "3")
        text = call("tools/generate.py", "--model", model, *options)
        measure = ("--data", pairs, "--draws", "8", "--output", tmp_path / "out.json")
        found = call("tools/evaluate.py", "likelihood", "--model", model, *measure)
        assert (text.code, found.code) == (0, 0), text.err + found.err
        said[model] = text.out, json.loads((tmp_path / "out.json").read_text())["items"]
        assert str(model) in found.out
    assert said[models["hybrid"]] == said[exported]


def test_a_message_to_a_model_of_text_is_warned_of_if_its_data_are_known(models, exported, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    options = ("--message", "ab", "--chat-template", tmp_path / "t.jinja", "--num-tokens", "2", "--steps", "2")
    for model, is_warned in ((models["hybrid"], True), (exported, False)):
        ended = call("tools/generate.py", "--model", model, *options)
        assert (ended.code, "training data name no chat template" in ended.err) == (0, is_warned), ended.err


def test_a_folder_that_is_neither_is_refused_in_one_sentence(exported, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    ended = call("tools/generate.py", "--model", tmp_path)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
    assert f"error: {tmp_path}" in ended.err
    assert "safetensors" in ended.err


def test_what_is_between_prompt_and_suffix_is_filled_in(models, tmp_path):
    options = ("--prompt", "ab", "--suffix", "yz", "--num-tokens", "4", "--steps", "4")
    for more in (("--sampler", "ancestral"), ("--sampler", "adaptive", "--block-length", "2"), ("--count", "2")):
        ended = call(
            "tools/generate.py", "--model", models["hybrid"], *options, *more, "--trace", tmp_path / "trace.html"
        )
        assert ended.code == 0, ended.err
        for line in ended.out.strip("\n").split("\n") if "--count" in more else [ended.out.rstrip("\n")]:
            assert re.search("(^|] )ab", line), line
            assert line.endswith("yz"), line
    assert " tokens per forward pass" in (tmp_path / "trace.html").read_text()
    for wrong, message in (
        (("--num-tokens", "13"), r"--num-tokens must be at most 12, got 13: .* of which --prompt and --suffix take 4$"),
        (("--sampler", "adaptive", "--tokens-per-step", "1"), r"does not reach the 6 positions of a block"),
    ):
        ended = call("tools/generate.py", "--model", models["hybrid"], *options, *wrong)
        assert ended.code == 2
        assert re.search(message, ended.err), ended.err
