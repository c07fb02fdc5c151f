"""A record of all that a user of the commands sees: figures, files, keys and names.

The test is a black box: it runs the real commands and reads the files they write. Three layers are used because with
four CompleteP's residual factor 4 / L is one, which would hide its loss. Rewrite `frozen.json` only for a deliberate
change, in the commit that makes it: `python -m tests.golden.test_frozen`.
"""

from __future__ import annotations

import ast
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.forked_command import REPOSITORY, call_forked

FILE = Path(__file__).with_name("frozen.json")
BLOCK = {"qk_norm": "full", "sink": True, "softcap": 30.0, "mlp_bias": True}
BLOCK |= {"resid_scale": "completep", "head_scale": "completep"}
SMALL = {"layers": 3, "hidden": 32, "heads": 4, "seq_length": 32, "head_init": 0.02}
CASES: dict[str, dict[str, Any]] = {
    "paper": {
        "seed": 3,
        "model": {**SMALL, **BLOCK, "rope_base": 500},
        "noise": {"shift": "low_uniform", "scale": 0.5},
        "objective": {"reduction": "sum"},
        "conditioning": {
            "preset": "as_described",
            "linear_noise": 0.2,
            "infilling": 0.3,
            "prompt": 0.5,
            "prompt_attention": "causal",
            "max_fraction": 0.7,
        },
        "batch": {
            "global_batch_size": 12,
            "micro_batch_size": 2,
            "rampup": {"start": 4, "increment": 4, "every_steps": 2},
        },
        "optimizer": {
            "name": "laprop",
            "lr": 0.3,
            "eps": 0.5,
            "eps_calibration": "mean",
            "weight_decay": 0.01,
            "parametrisation": "completep",
        },
    },
    "other": {
        "seed": 4,
        "model": {**SMALL, "qk_norm": "head"},
        "noise": {"shift": 1.0, "schedule": "cosine", "min_log_snr": -7, "max_log_snr": 6},
        "objective": {"weighting": "elbo", "itakura_saito_weight": 0.25, "stratified": False},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "optimizer": {"name": "adamw", "lr": 0.003, "clip_grad": 0.05, "weight_decay": 0.1},
    },
    "time": {
        "model": SMALL,
        "noise": {"process": "gidd_time", "p_uniform": 0.2, "gamma": 0.8},
        "objective": {"weighting": "dynamic"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "optimizer": {"name": "adamw", "lr": 0.003},
    },
    "ar": {
        "model": SMALL,
        "method": {"name": "next_token"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "optimizer": {"name": "adamw", "lr": 0.003},
    },
}
VARYING = re.compile(r"_per_s$|_s$|tflops|peak_bytes|goodput")


def corpus(folder: Path) -> list[str]:
    """Write two sources with the byte tokenizer, by the command."""
    prefixes = []
    for source, step in (("a", 7), ("b", 11)):
        lines = [{"text": "".join(chr(97 + (i * step + j * j) % 26) for j in range(20 + i % 50))} for i in range(120)]
        (folder / f"{source}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        ended = call_forked(
            "tools/preprocess_data.py",
            "--input",
            folder / f"{source}.jsonl",
            "--output-prefix",
            folder / source,
            "--tokenizer",
            "byte",
        )
        assert ended.code == 0, ended.err
        prefixes.append(str(folder / source))
    return prefixes


def tree(case: str, prefixes: list[str], folder: Path) -> dict[str, Any]:
    a, b = prefixes
    return {
        "name": case,
        "output_dir": str(folder),
        "platform": "cpu",
        "precision": {"compute": "fp32"},
        "data": {"train": [{"path": a, "weight": 2}, b], "valid": [a, b], "tokenizer": "byte"},
        "schedule": {"steps": 6, "warmup_steps": 2, "decay_steps": 0.34},
        "checkpoint": {"every": 3},
        "eval": {"every": 3, "sequences": 5, "num_noise_levels": 3},
        "log": {"every": 1},
        **CASES[case],
    }


def figures(line: dict[str, Any]) -> dict[str, Any]:
    """Return a metrics line in which figures that a clock measured are None."""
    return {key: None if VARYING.search(key) else value for key, value in line.items()}


def shape_of(value: Any) -> Any:
    """Return the keys at every depth, without values."""
    return {key: shape_of(part) for key, part in sorted(value.items())} if isinstance(value, dict) else None


def files_in(folder: Path) -> list[str]:
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(re.sub(r"tfevents.*", "tfevents", name) for name in found)


def observed(folder: Path) -> dict[str, Any]:
    prefixes = corpus(folder)
    seen: dict[str, Any] = {"lines": {}, "files": {}}
    for case in CASES:
        path = folder / f"{case}.yaml"
        path.write_text(yaml.safe_dump(tree(case, prefixes, folder)))
        ended = call_forked("pretrain_dlm.py", "--config", path)
        assert ended.code == 0, ended.out + ended.err
        run = folder / case
        seen["lines"][case] = [figures(json.loads(x)) for x in (run / "metrics.jsonl").read_text().splitlines()]
        seen["files"][case] = files_in(run)
    run = folder / "paper"
    step = run / "checkpoints/step_00000006"
    manifest = json.loads((step / "manifest.json").read_text())
    seen["console"] = console(run, folder)
    seen["manifest"] = shape_of({key: value for key, value in manifest.items() if key != "files"})
    seen["manifest"]["files"] = sorted(manifest["files"])
    for key in ("data_fingerprint", "tokenizer_fingerprint"):
        seen[key] = manifest[key]
    seen["format"] = manifest["format"]
    seen["resolved"] = {case: yaml.safe_load((folder / case / "config.yaml").read_text()) for case in CASES}
    for found in seen["resolved"].values():
        del found["output_dir"], found["data"]
    seen["status"] = sorted(json.loads((run / "status.json").read_text()))
    goodput = json.loads((run / "goodput.json").read_text())
    seen["goodput"] = sorted((goodput if isinstance(goodput, list) else goodput["attempts"])[0])
    ended = call_forked("tools/convert_checkpoint.py", "export", "--checkpoint", run, "--output", folder / "hf")
    assert ended.code == 0, ended.err
    seen["exported"] = files_in(folder / "hf")
    for name in ("config.json", "generation_config.json"):
        seen[name] = json.loads((folder / "hf" / name).read_text())
    seen["flags"] = {str(p.relative_to(REPOSITORY)): flags(p) for p in commands()}
    return seen


def console(run: Path, folder: Path) -> list[str]:
    """Return the log's lines without numbers, paths, and the name of torch's build."""
    lines = (line.split(" ", 2)[2] for line in (run / "log.txt").read_text().splitlines())
    kept = "\n".join(line for line in lines if "saved" not in line and "goodput" not in line)
    kept = re.sub(r"torch \d\S*,", "torch VERSION,", kept.replace(str(folder), "DIR"))
    return re.sub(r"[-+]?\d[\d.,e+-]*", "#", kept).splitlines()


def commands() -> list[Path]:
    return [REPOSITORY / "pretrain_dlm.py", *sorted((REPOSITORY / "tools").glob("*.py"))]


def flags(path: Path) -> list[str]:
    """Return the options that a command adds: itself, or by a `main` or `add_..._options` that it imports."""
    tree = ast.parse(path.read_text())
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    named = (n for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr in ("add_argument", "add_parser"))
    own = [str(a.value) for n in named for a in n.args[:1] if isinstance(a, ast.Constant)]
    imports = (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module)
    shared = [n.module for n in imports if any(re.fullmatch("main|add_.*_options", name.name) for name in n.names)]
    return sorted([*own, *(flag for module in shared for flag in flags(REPOSITORY / f"{module.replace('.', '/')}.py"))])


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observed(tmp_path_factory.mktemp("frozen"))


FROZEN: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}


def same(found: Any, wanted: Any, where: str) -> list[str]:
    """Return the differences; floats are compared to a relative 2e-5."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = [f"{where}: key {key}" for key in sorted(set(found) ^ set(wanted))]
        return keys + [d for key in wanted if key in found for d in same(found[key], wanted[key], f"{where}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        return [d for i, (f, w) in enumerate(zip(found, wanted, strict=True)) for d in same(f, w, f"{where}.{i}")]
    if isinstance(wanted, float) and isinstance(found, float):
        return [] if found == pytest.approx(wanted, rel=2e-5, abs=1e-9) else [f"{where}: {found} != {wanted}"]
    return [] if found == wanted else [f"{where}: {found!r} != {wanted!r}"]


@pytest.mark.parametrize("part", sorted(FROZEN))
def test_nothing_a_user_sees_has_changed(now: dict[str, Any], part: str) -> None:
    assert same(now[part], FROZEN[part], part) == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(json.dumps(observed(Path(name)), indent=1, sort_keys=True) + "\n")
