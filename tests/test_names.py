"""Names that the field does not use, and that this project once had, stay out of its code and configuration.

Names of tests fit in a line of pytest's output.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

from megadiff.config.load import load_config
from megadiff.config.suggestions import KEY_BY_OTHER_NAME
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("megadiff", "tools", "slurm")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
_REPLACED_NAMES = """
    rate_from LinearRate mask_share uniform_share _Level is_div is_kept_div mean_weight RowObjective row_report
    NoisedRows PlacedRows Row rows_per_step Score HeadLoss HeadTokens Head worth_computing Formula hide_unreal
    real_columns share_out AskedModel wired wire Prepared Resumption Standing Taken StepResult Ending Outcome
    culprits find_culprits Saves Saver open_trained TrainedModel configure_reduction hold_to_norm LayerParts
    parts_for branch_norm micro_sequences global_sequences tensor_overlap RowLoader lead_s condemn doorbell
    siblings Siblings Account name_culprit Draws level_grid Wish Manner Framing HeldOut mend cooldown_steps
    resolve_cooldown
"""
REPLACED = frozenset(_REPLACED_NAMES.split())
"""Identifiers whose replacements a reader coming from Megatron-LM, torchtitan or Transformers would search for."""

TEST_NAME_LIMIT = 70
"""Length that the name of a test stays below."""

OLD_KEYS = {
    "noise.form": "noise.process",
    "noise.rate": "noise.schedule",
    "conditioning.independent": "conditioning.per_token_noise",
    "conditioning.linear": "conditioning.linear_noise",
    "conditioning.infill": "conditioning.infilling",
    "conditioning.empty": "conditioning.pad_insertion",
    "objective.head": "objective.loss_kernel",
    "objective.is_weight": "objective.itakura_saito_weight",
    "batch.global_sequences": "batch.global_batch_size",
    "batch.micro_sequences": "batch.micro_batch_size",
    "batch.ramp": "batch.rampup",
    "parallel.tensor_overlap": "parallel.tp_comm_overlap",
    "kernels": "transformer_impl",
    "schedule.cooldown": "schedule.decay_steps",
    "schedule.shape": "schedule.decay_shape",
    "stop.lead_s": "stop.grace_period_s",
    "eval.rows": "eval.sequences",
    "eval.noise_levels": "eval.num_noise_levels",
}


def identifiers(path: Path) -> set[str]:
    """Return every name in a file's code; strings and comments are left out."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_replaced_name_is_left(path):
    assert sorted(identifiers(path) & REPLACED) == []


def test_the_rule_sees_a_replaced_name(tmp_path):
    (tmp_path / "old.py").write_text('"""A Score."""\nvalue = HeldOut.measure(row_report=1)  # Wish\n')
    assert identifiers(tmp_path / "old.py") & REPLACED == {"HeldOut", "row_report"}


@pytest.mark.parametrize("folder", ["megadiff/kernels", "tests/kernels"])
def test_no_replaced_folder_is_left(folder):
    assert not list((ROOT / folder).glob("*.py"))


@pytest.mark.parametrize(("old", "new"), OLD_KEYS.items())
def test_an_old_key_is_refused_with_its_new_name(old, new):
    assert KEY_BY_OTHER_NAME[old] == new
    with pytest.raises(ConfigError, match=rf"(?s){re.escape(old)}.*{re.escape(new)}"):
        load_config(ROOT / "examples/demo.yaml", [f"{old}=1"], RunConfig)


def test_names_of_tests_are_short():
    names = [
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert "test_names_of_tests_are_short" in names
    assert [name for name in names if len(name) >= TEST_NAME_LIMIT] == []
