"""What a user's environment keeps secret is in no file of a run, in no log and in no message."""

from __future__ import annotations

import pytest

from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree

SECRETS = {
    name: f"canary-{name.lower()}-7f3a9d"
    for name in (
        *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        *("GITHUB_TOKEN", "OPENAI_API_KEY", "MY_OWN_PASSWORD"),
    )
}


def leaks(folder):
    """`file: variable` wherever a value stands."""
    return [
        f"{path.relative_to(folder)}: {name}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for name, value in SECRETS.items()
        if value.encode() in path.read_bytes() or value in str(path)
    ]


@pytest.fixture(scope="module")
def run(toy_corpus, tmp_path_factory):
    """A trained run with everything that writes switched on: (its folder's parent, what the command printed)."""
    folder = tmp_path_factory.mktemp("secrets")
    tree = toy_tree(
        toy_corpus,
        folder / "runs",
        model__layers=1,
        schedule__steps=4,
        checkpoint__every=2,
        eval__every=2,
        log__tensorboard=True,
    )
    ended = call_forked("pretrain_dlm.py", "--config", write_yaml(folder / "run.yaml", tree), env=SECRETS)
    assert ended.code == 0, ended.err
    return folder, ended


def test_no_file_of_a_run_and_no_line_it_printed_holds_a_secret(run):
    folder, ended = run
    files = {path.name for path in (folder / "runs").rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "log.txt", "manifest.json", "common.pt", ".metadata"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert any(name.endswith(".distcp") for name in files)
    assert leaks(folder) == []
    assert not [name for name, value in SECRETS.items() if value in ended.out + ended.err]


def test_the_search_would_see_one(run, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file").write_bytes(b"\x00\xff" + SECRETS["HF_TOKEN"].encode())
    assert leaks(tmp_path) == ["deep/file: HF_TOKEN"]


@pytest.mark.parametrize(
    "command",
    [
        ("pretrain_dlm.py", "--config", "{run}", "optimizer.lr=fast"),
        ("pretrain_dlm.py", "--config", "{run}", "--check"),
        ("tools/evaluate.py", "elbo", "--model", "{model}", "--data", "nowhere"),
        ("tools/inspect_checkpoint.py", "{model}", "--json"),
    ],
    ids=lambda words: " ".join(words[:1] + words[-1:]),
)
def test_no_other_command_says_one(run, command):
    folder, _ = run
    words = [word.format(run=folder / "run.yaml", model=folder / "runs/toy") for word in command]
    ended = call_forked(*words, env=SECRETS)
    assert ended.code in (0, 2), ended.err
    assert not [name for name, value in SECRETS.items() if value in ended.out + ended.err]


def test_neither_an_export_nor_a_report_nor_a_trace_holds_one(run, tmp_path):
    model = run[0] / "runs/toy"
    for command in (
        ("tools/convert_checkpoint.py", "export", "--checkpoint", model, "--output", tmp_path / "hf"),
        ("tools/report.py", model, "--output", tmp_path / "report.html"),
        ("tools/generate.py", "--model", model, "--steps", "2", "--trace", tmp_path / "trace.html"),
    ):
        ended = call_forked(*command, env=SECRETS)
        assert ended.code == 0, ended.err
        assert not [name for name, value in SECRETS.items() if value in ended.out + ended.err]
    assert {"README.md", "training.json", "report.html", "trace.html"} <= {path.name for path in tmp_path.rglob("*")}
    assert leaks(tmp_path) == []
