"""The pages hold what works: their commands are run, run descriptions are loaded, names are looked up.

Every page is worked through in its order in a folder of its own, which looks like a checkout: the repository's files
are links. A page that starts with `corpus` finds text in `corpus/`, `my.yaml` (the file that the page on first training
shows) and nothing else; one that starts with `a trained run` also finds what the commands of that page leave behind: a
tokenizer, data, `runs/my`, and beside it `runs/masked` and `runs/uniform`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from megadiff.config.load import load_config
from megadiff.config.suggestions import key_elsewhere
from megadiff.run.config import RunConfig
from megadiff.scaling.laws import read_law_file
from megadiff.scaling.sweep import read_sweep
from tests.docs.pages import REASONS, REPOSITORY, Block, blocks, name_of, pages, prose, start_of
from tests.support.examples import kind_of
from tests.support.forked_shell import ForkedShell

LINKED = ("examples", "megadiff", "pretrain_dlm.py", "slurm", "tests", "tools", "docs", "CHANGELOG.md", "README.md")
STARTS = ("corpus", "a trained run")
SMALL = ("model.layers=2", "model.hidden=32", "model.heads=2", "model.seq_length=64", "batch.global_batch_size=4")
SMALL += ("batch.micro_batch_size=2", "eval.sequences=4", "eval.num_noise_levels=2", "eval.samples=0", "log.every=1")
PREPARATION = """
megadiff train_tokenizer --input corpus/train/*.jsonl --output data/tokenizer --vocab-size 300
for split in train valid; do
    megadiff preprocess_data --input corpus/$split/*.jsonl --output-prefix data/$split \\
        --tokenizer data/tokenizer --append-eod
done
for name in my masked uniform; do
    python pretrain_dlm.py --config my.yaml name=$name noise.shift=${name/my/masked} SMALL \\
        schedule.steps=6 schedule.warmup_steps=1 schedule.decay_steps=2 checkpoint.every=2 eval.every=3
done
""".replace("SMALL", " ".join(SMALL))
PAGES = {name_of(page): page for page in pages()}
ALL = [block for page in PAGES.values() for block in blocks(page)]
CODE = ("bash", "python")
LANGUAGES = {*CODE, "yaml", "json", "text"}
FILES = (".yaml", ".json", ".py", ".txt")
"""Endings of files whose names begin like a key (`data.json`, `log.txt`)."""
_SPAN = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:megadiff|tools|tests|examples|slurm|docs|requirements)/[\w./-]+\.(?:py|yaml|md|sh|txt|sbatch)")
_KEY = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?:=\S*)?(?:: .*)?")


@pytest.fixture(scope="module")
def shell():
    with tempfile.TemporaryDirectory(prefix="md") as folder, ForkedShell(Path(folder)) as opened:
        yield opened


@pytest.fixture(scope="module")
def beginnings(tmp_path_factory, shell) -> dict[str, Path]:
    """Make the folders that pages start with, by name; they are copied, never worked in."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in LINKED:
        (folder / name).symlink_to(REPOSITORY / name)
    write_text(folder / "corpus")
    (folder / "my.yaml").write_text(file_of("my.yaml"), encoding="utf-8")
    trained = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(folder, trained, symlinks=True)
    done = shell.run(PREPARATION, cwd=trained)
    assert done.returncode == 0, done.stdout
    return {"corpus": folder, "a trained run": trained}


def write_text(folder: Path) -> None:
    """Write a few of Python's documentation topics as train/a.jsonl, train/b.jsonl and valid/a.jsonl."""
    from pydoc_data.topics import topics

    texts = [json.dumps({"text": text[:4000]}) + "\n" for _, text in sorted(topics.items())][:40]
    for name, part in {"train/a": texts[:20], "train/b": texts[20:34], "valid/a": texts[34:]}.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(part), encoding="utf-8")


def file_of(name: str) -> str:
    """Return the text of a file that a page shows."""
    (found,) = (block.text for block in ALL if block.file == name)
    return found


def write_files(found: list[Block], folder: Path) -> None:
    """Write the blocks that are the text of a file."""
    for block in found:
        if block.file is not None:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")


def test_the_pages_are_found():
    assert {"README.md", "docs/index.md", "docs/first-training.md", "docs/failures.md"} <= set(PAGES)
    assert sum(block.is_run for block in ALL) > 20


@pytest.mark.parametrize("name", PAGES)
def test_every_block_names_its_language(name):
    assert {block.language for block in blocks(PAGES[name])} <= LANGUAGES


@pytest.mark.parametrize("block", [block for block in ALL if block.language in CODE], ids=lambda block: block.place)
def test_a_block_of_code_is_run_or_states_why_not(block):
    if block.test is not None:
        file, _, name = block.test.partition("::")
        assert re.search(rf"^def {name}\(", (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE), block.mark
    else:
        assert block.is_run or block.file is not None or block.reason in REASONS, f"{block.place}: {block.mark!r}"


@pytest.mark.parametrize("name", [name for name in PAGES if any(block.is_run for block in blocks(PAGES[name]))])
def test_the_commands_of_a_page_work(name, shell, beginnings, tmp_path):
    start = start_of(PAGES[name])
    assert start in STARTS, f"{name} has blocks that are run; its first line must state what it starts with"
    work = tmp_path / "work"
    shutil.copytree(beginnings[start], work, symlinks=True)
    for block in blocks(PAGES[name]):
        write_files([block], work)
        if not block.is_run:
            continue
        text = block.text
        if block.language == "python":
            (work / "block.py").write_text(block.text, encoding="utf-8")
            text = "python block.py"
        done = shell.run(text, cwd=work, cuts=block.cuts)
        assert done.returncode == block.exit_code, f"{block.place} ended with {done.returncode}:\n{done.stdout}"


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=lambda block: block.place)
def test_a_run_description_loads(block, tmp_path, monkeypatch):
    """Read a whole description as it is, and a part of one with `base: my.yaml`; modules of the page can be named.

    A block with laws is a law file.
    """
    if block.reason is not None:
        assert block.reason in REASONS
        return
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "mypkg"]:  # of another page
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "my.yaml").write_text(file_of("my.yaml"), encoding="utf-8")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    write_files(blocks(REPOSITORY / block.page), tmp_path)
    if kind_of(yaml.safe_load(block.text)) == "laws":
        (tmp_path / "laws.yaml").write_text(block.text, encoding="utf-8")
        assert read_law_file(tmp_path / "laws.yaml").laws
        return
    if kind_of(yaml.safe_load(block.text)) == "sweep":
        (tmp_path / "sweep.yaml").write_text(block.text, encoding="utf-8")
        assert read_sweep(tmp_path / "sweep.yaml").noises
        return
    is_whole = not {"name", "base"}.isdisjoint(yaml.safe_load(block.text))
    (tmp_path / "page.yaml").write_text(block.text if is_whole else f"base: my.yaml\n{block.text}", encoding="utf-8")
    load_config(tmp_path / "page.yaml", [], RunConfig)


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name):
    text = PAGES[name].read_text(encoding="utf-8")
    missing = {path for path in _PATH.findall(text) if not (REPOSITORY / path).is_file()}
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", prose(PAGES[name])):
        if "://" not in link and not (PAGES[name].parent / link).exists():
            missing.add(link)
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_keys_that_a_page_names_exist(name):
    """Look up code spans such as `schedule.steps` or `noise.shift=masked`, whose first word is a section."""
    text = prose(PAGES[name])
    if name == "docs/coming-from.md":  # behind the first column are other trainers' keys
        text = re.sub(r"^(\|[^|]*\|).*$", r"\1", text, flags=re.MULTILINE)
    keys = known_keys()
    for span in _SPAN.findall(text):
        for word in span.split():
            match = _KEY.fullmatch(word.rstrip(":,"))
            if match and match[1].partition(".")[0] in RunConfig.model_fields:
                assert match[1] in keys or match[1].endswith(FILES), f"{name}: {word}"


def known_keys() -> set[str]:
    """Return the keys of a run description and its sections, those of families' members too."""
    page = PAGES["docs/configuration.md"].read_text(encoding="utf-8")  # generated; a test of its own keeps it current
    keys = set(re.findall(r"^\| `([\w.]+)(?:\[\])?` \|", page, re.MULTILINE))
    return keys | {key.rpartition(".")[0] for key in keys}


@pytest.mark.parametrize("block", [block for block in ALL if block.reason is not None], ids=lambda block: block.place)
def test_options_of_commands_that_are_not_run_exist(block):
    """Look up the options of commands that need a cluster or the network in their programs."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command = line.partition("#")[0].split()
        if command[:1] == ["megadiff"]:
            command[:2] = [f"megadiff/cli/{command[1]}.py"]
        scripts = [word for word in command if (REPOSITORY / word).is_file()]
        for script in scripts[:1]:
            source = (REPOSITORY / script).read_text(encoding="utf-8", errors="replace")
            shared = re.search(r"^from megadiff\.cli\.(\w+) import main$", source, re.MULTILINE)
            source += (REPOSITORY / f"megadiff/cli/{shared[1]}.py").read_text() if shared else ""
            source += (REPOSITORY / "slurm/slurm_job.py").read_text() if script == "slurm/submit" else ""
            after = command[command.index(script) + 1 :]
            own = after[: after.index("--")] if "--" in after else after
            for word in own:
                if word.startswith("--"):
                    assert word.partition("=")[0] in source, f"{block.place}: {script} has no {word}"


def test_the_names_of_other_trainers_are_those_that_refusals_know():
    """Compare the table with the names that a refusal answers with a key."""
    sequences = re.findall(
        r"^\| `([^`|]+)` \|(.*)\|$", PAGES["docs/coming-from.md"].read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(sequences) > 40
    for key, names in sequences:
        for name in _SPAN.findall(names):
            found = key_elsewhere(name)
            assert found == key or name in (key, key.rpartition(".")[2]), f"{name}: {found}, not {key}"
