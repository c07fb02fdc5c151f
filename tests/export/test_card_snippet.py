"""The card's snippet is Python whatever the folder is called, and loads the folder as the page on Hugging Face does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megadiff.checkpoint.manifest import read_manifest
from megadiff.export.export import markdown_text, model_card, python_text

NAMES = [
    "demo-hf",
    'a"b',
    "it's",
    "back\\slash",
    "line\nbreak",
    "```fence```",
    "{folder}",
    "%s {0}",
    "#title",
    "née \U0001f600",
    'x"); import os; os.system("true"); ("',
    "\x7f\x00",
    "a|b <script>",
]


def card(checkpoint, name, **changes):
    manifest = read_manifest(checkpoint).model_copy(update=changes)
    return model_card(
        manifest,
        name=name,
        description="A model.",
        parameters=1,
        dtype="float32",
        metrics=None,
        tokenizer_files=["tokenizer.json"],
    )


def snippet(text):
    (found,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return ast.parse(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_snippet_names_the_folder_and_nothing_else_of_it_is_code(checkpoints, name):
    text = card(checkpoints["tp1"], name)
    tree, plain = snippet(text), snippet(card(checkpoints["tp1"], "demo-hf"))
    folder = tree.body[1]
    assert isinstance(folder, ast.Assign)
    assert ast.literal_eval(folder.value) == name
    assert [ast.dump(a) for a in tree.body[:1] + tree.body[2:]] == [
        ast.dump(a) for a in plain.body[:1] + plain.body[2:]
    ]
    assert text.count("```") == 2
    titles = [line for line in text.splitlines() if line.startswith("# ")]
    assert titles == [f"# {markdown_text(name)}"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_printable_line_in_both_languages(name):
    assert ast.literal_eval(python_text(name)) == name
    for text in (python_text(name), markdown_text(name)):
        assert "\n" not in text
        assert text.isprintable()


def test_the_snippet_loads_as_the_page_does(checkpoints):
    page = (Path(__file__).parents[2] / "docs/hugging-face.md").read_text(encoding="utf-8")
    theirs, ours = page, card(checkpoints["tp1"], "demo-hf")
    for line in (
        "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast",
        'ids = tokenizer("A list is", return_tensors="pt").input_ids',
        "print(tokenizer.decode(text[0], skip_special_tokens=True))",
    ):
        assert line in theirs
        assert line in ours
    assert "import AutoModelForCausalLM, AutoTokenizer" not in ours
    assert "max_new_tokens=8, " in ours  # half of the toy's sequence


def test_the_card_says_how_a_prompt_is_framed(checkpoints):
    assert "neither bos nor eos is added" in card(checkpoints["tp1"], "x")
    assert "bos comes before it" in card(checkpoints["tp1"], "x", prepended_bos=True)
