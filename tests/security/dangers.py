"""What in a Python file could run what another file says, read from its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SERIALISERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
RUNS_CODE = {
    *("eval", "exec", "__import__", "builtins.eval", "builtins.exec", "code.interact", "pty.spawn"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.utils.cpp_extension.load_inline"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("pandas.read_pickle", "shutil.unpack_archive", "tempfile.mktemp"),
}
"""Calls refused whatever their arguments."""

MUST_SAY = {"torch.load": ("weights_only", True)}
"""A call, and the keyword it must be given with this very value."""

MUST_NOT_SAY = {"shell": True, "allow_pickle": True, "trust_remote_code": True}
"""Keywords, and keys of a literal mapping, that may not be anything but the constant False."""

NOT_SAFE_LOADERS = {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "CUnsafeLoader", "CFullLoader"}


def dangers(source: str) -> list[str]:
    """`line: what` of every danger in a file's text."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [(node.lineno, f"import of {module}") for module in sorted(_modules(node) & SERIALISERS)]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in _of_call(node, names)]
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in MUST_NOT_SAY and not _is(value, False):
                    found.append((node.lineno, f"{key.value} in a mapping"))
        elif isinstance(node, ast.Attribute | ast.Name):
            full = _full_name(node, names)
            if full in {f"yaml.{name}" for name in NOT_SAFE_LOADERS}:
                found.append((node.lineno, full))
    return [f"{line}: {what}" for line, what in sorted(found)]


def python_files(root: Path) -> list[Path]:
    """The project's own code: the package, the tools, the job scripts, the command."""
    found = [path for folder in ("megadiff", "tools", "slurm") for path in (root / folder).rglob("*") if path.is_file()]
    is_python = [path for path in found if path.suffix == ".py" or (not path.suffix and _first_line_is_python(path))]
    return sorted([*is_python, root / "pretrain_dlm.py"])


def _of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    called = _full_name(node.func, names)
    if called in RUNS_CODE:
        yield called
    if isinstance(node.func, ast.Attribute) and node.func.attr == "extractall":
        yield "extractall, which may write outside its folder"
    if called in MUST_SAY:
        keyword, wanted = MUST_SAY[called]
        if not any(given.arg == keyword and _is(given.value, wanted) for given in node.keywords):
            yield f"{called} without {keyword}={wanted}"
    for given in node.keywords:
        if given.arg in MUST_NOT_SAY and not _is(given.value, False):
            yield f"{given.arg} in a call"


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """What names mean: {"np": "numpy", "load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _modules(node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {(node.module or "").partition(".")[0], *(f"{alias.name}" for alias in node.names)}


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        inner = _full_name(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is(node: ast.AST, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _first_line_is_python(path: Path) -> bool:
    first = path.read_bytes()[:100].splitlines()[:1]
    return bool(first) and first[0].startswith(b"#!") and b"python" in first[0]
