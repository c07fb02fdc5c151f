"""No code of the project runs what a file says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.security.dangers import dangers, python_files

ROOT = Path(__file__).resolve().parents[2]
FILES = python_files(ROOT)
UNPICKLER = ROOT / "megadiff/checkpoint/safe_metadata.py"
"""The one place that unpickles, with an allow-list of classes; see tests/checkpoint/test_safe_metadata.py."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_kind_of_place_is_looked_at():
    names = set(map(name_of, FILES))
    assert {"pretrain_dlm.py", "megadiff/checkpoint/safe_metadata.py", "tools/preprocess_data.py"} <= names
    assert len(names) > 80


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_runs_what_a_file_says(path):
    found = dangers(path.read_text(encoding="utf-8"))
    if path == UNPICKLER:
        assert [re.sub(r"^\d+: ", "", what) for what in found] == ["import of pickle"]
    else:
        assert found == []


def test_the_unpickler_uses_pickle_for_its_base_class_alone():
    used = {
        node.attr
        for node in ast.walk(ast.parse(UNPICKLER.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
    }
    assert used == {"Unpickler"}


BAD = [
    *("import pickle", "import pickle as p", "from pickle import loads", "import dill", "from joblib import load"),
    *("eval(text)", "exec(text)", "import os\nos.system(text)", "from os import system as run\nrun(text)"),
    *("import builtins as b\nb.exec(text)", "__import__(name)", "import os\nos.popen(text)"),
    *("import torch\ntorch.load(f)", "import torch\ntorch.load(f, weights_only=False)"),
    *("from torch import load\nload(f, weights_only=flag)", "import torch\ntorch.hub.load(r, m)"),
    *("import numpy as np\nnp.load(f, allow_pickle=True)", "import numpy as np\nnp.load(f, allow_pickle=flag)"),
    *(
        "import yaml\nyaml.load(f, yaml.SafeLoader)",
        "import yaml\nyaml.full_load(f)",
    ),
    *("from yaml import unsafe_load as safe\nsafe(f)", "import yaml\nclass L(yaml.FullLoader): pass"),
    *("import subprocess as s\ns.run(text, shell=True)", "run(text, shell=flag)", "run(text, **{'shell': True})"),
    *("AutoModel.from_pretrained(p, trust_remote_code=True)", "options = {'trust_remote_code': flag}"),
    *("archive.extractall(folder)", "import tempfile\ntempfile.mktemp()"),
]
GOOD = [
    *(
        "model.eval()",
        "re.compile(p)",
        "import torch\ntorch.load(f, weights_only=True)",
        "import yaml\nyaml.safe_load(f)",
    ),
    *("import numpy as np\nnp.load(f)", "np.load(f, allow_pickle=False)", "run([a], shell=False)", "executor.exec_(x)"),
    *("'''pickle and eval(x) in a docstring'''", "from_pretrained(p, trust_remote_code=False)", "import tempfile"),
]


@pytest.mark.parametrize("source", BAD)
def test_the_rule_sees_what_it_is_for(source):
    assert dangers(source)


@pytest.mark.parametrize("source", GOOD)
def test_the_rule_lets_pass_what_is_harmless(source):
    assert dangers(source) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_temporary_files_are_the_library_s_private_ones(path):
    """`mkdtemp` and its kin make folders of mode 0700 and files of 0600; a fixed name in a shared /tmp is a trap."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    fixed = [
        f"{node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
        if re.match(r"/(var/)?tmp(/|$)|/dev/shm/\w", node.value)
    ]
    wide = re.findall(r"(?:chmod|mkdir|makedirs)\([^)]*0o\d*[2367]\b|umask\(0\)", source)
    assert not fixed + wide


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in ("data", "checkpoint")], ids=name_of)
def test_no_file_that_others_may_cut_is_mapped(path):
    """Reading a mapped file that has shrunk is a SIGBUS, and a view of a closed map a SIGSEGV."""
    assert not re.search(r"\bmemmap\b|\bmmap\b", path.read_text(encoding="utf-8"))
