"""Shapes and dtypes are checked in every call of the annotated modules while tests run."""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import pkgutil

import pytest
import torch
from jaxtyping import TypeCheckError

from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.objective import VocabularySums, gidd_objective
from tests.support import shapes

PROCESS = HybridMixing(5, 3, 0.0)
IDS, LEVELS, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2, 3, 5)
pytestmark = pytest.mark.skipif(
    os.environ.get("MEGADIFF_CHECK_SHAPES") != "1", reason="shapes are checked with MEGADIFF_CHECK_SHAPES=1"
)
SHAPES = {"Bool", "Float", "Int", "Integer"}


def modules():
    """Yield the names of the annotated modules."""
    for name in shapes.CHECKED:
        yield name
        path = getattr(importlib.import_module(name), "__path__", None)
        yield from (found.name for found in pkgutil.iter_modules(path or [], f"{name}."))


def test_a_wrong_shape_is_refused():
    gidd_objective(LOGITS, IDS, IDS, LEVELS, mixing=PROCESS)
    with pytest.raises(TypeCheckError, match="parameter 'log_snr'"):
        gidd_objective(LOGITS, IDS, IDS, LEVELS[0], mixing=PROCESS)


def test_a_wrong_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="parameter 'clean'"):
        PROCESS.weight(LEVELS, LEVELS, IDS)


def test_a_wrong_shape_in_a_named_tuple_is_refused():
    with pytest.raises(TypeCheckError, match=r"VocabularySums\.log_p_noised"):
        VocabularySums(LEVELS, LEVELS[0], None)


def test_a_wrong_result_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "sigmoid", lambda values: values.unsqueeze(0))
    with pytest.raises(TypeCheckError, match="checking the return value"):
        PROCESS.uniform_prob(LEVELS)


@pytest.mark.parametrize("name", list(modules()))
def test_every_name_in_an_annotation_of_a_shape_is_known(name):
    """An annotation with a name that exists for type checkers alone would be left unchecked in silence."""
    module = importlib.import_module(name)
    with open(module.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    annotations = [
        annotation
        for node in ast.walk(tree)
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if annotation is not None
    ]
    names = [{part.id for part in ast.walk(found) if isinstance(part, ast.Name)} for found in annotations]
    used = set().union(*(found for found in names if found & SHAPES))
    assert [
        missing for missing in sorted(used) if not hasattr(module, missing) and not hasattr(builtins, missing)
    ] == []
