"""The answers that are found in conversations of twelve chat templates, against masks written by hand.

The tokenizer of a case has one token for each special name and one for each byte of other text, so the wanted tokens
follow from the wanted text, in which answers lie between ⟦ and ⟧, without any tokenizer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megadiff.data.chat_template import ChatTemplate, find_template
from megadiff.data.conversations import chat_options, encoder_of
from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import DataError

SYSTEM = {"role": "system", "content": "Be kind."}
TURN = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo."}]
SECOND = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So so."}]


@dataclass(frozen=True)
class Case:
    """A template with the text of one turn, and of two turns behind a system message (None: it has none)."""

    template: str
    one: str
    two: str | None
    names: tuple[str, ...] = ()
    """Names of special tokens."""


def loop(body: str, *, prompt: str = "", before: str = "") -> str:
    """Return a template that writes `body` for each message m, and `prompt` for generation."""
    end = "{% if add_generation_prompt %}" + prompt + "{% endif %}" if prompt else ""
    return before + "{% for m in messages %}" + body + "{% endfor %}" + end


CHATML = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
CHATML_PROMPT = "{{ '<|im_start|>assistant\\n' }}"
ASK, SAY, BEGIN, END = (f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant", "begin of text", "end of text"))
CHATML_NAMES = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

CASES = {
    "chatml": Case(
        loop(CHATML, prompt=CHATML_PROMPT),
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n⟦Yo.<|im_end|>⟧",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Yo.<|im_end|>⟧\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n⟦So so.<|im_end|>⟧",
        CHATML_NAMES,
    ),
    "llama 2": Case(
        loop(
            "{% if m.role == 'user' %}{% set first = loop.index0 <= 1 and messages[0].role == 'system' %}"
            "{{ bos_token + '[INST] ' }}"
            "{% if first %}{{ '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' }}{% endif %}"
            "{{ m.content.strip() + ' [/INST]' }}{% elif m.role == 'assistant' %}"
            "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
        ),
        "<s>[INST] Hi? [/INST]⟦ Yo. </s>⟧",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi? [/INST]⟦ Yo. </s>⟧<s>[INST] How? [/INST]⟦ So so. </s>⟧",
        ("<s>", "</s>"),
    ),
    "llama 3": Case(
        loop(
            "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}",
            before="{{ bos_token }}",
            prompt="{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        ),
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟦Yo.<|eot_id|>⟧",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Yo.<|eot_id|>⟧<|start_header_id|>user"
        "<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦So so.<|eot_id|>⟧",
        ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": Case(
        loop(
            "{% if m.role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}"
            "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}"
            "{{ '<end_of_turn>\\n' }}",
            before="{{ bos_token }}",
            prompt="{{ '<start_of_turn>model\\n' }}",
        ),
        "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n⟦Yo.<end_of_turn>⟧",
        None,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": Case(
        loop(
            "{% if m.role == 'user' %}{{ '[INST] ' }}"
            "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
            "{% if m == last and messages[0].role == 'system' %}"
            "{{ messages[0].content + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' }}"
            "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}",
            before="{{ bos_token }}",
        ),
        "<s>[INST] Hi?[/INST]⟦ Yo.</s>⟧",
        "<s>[INST] Hi?[/INST]⟦ Yo.</s>⟧[INST] Be kind.\n\nHow?[/INST]⟦ So so.</s>⟧",
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "phi 3": Case(
        loop("{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}", prompt="{{ '<|assistant|>\\n' }}"),
        "<|user|>\nHi?<|end|>\n<|assistant|>\n⟦Yo.<|end|>⟧",
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\n⟦Yo.<|end|>⟧\n<|user|>\nHow?<|end|>\n"
        "<|assistant|>\n⟦So so.<|end|>⟧",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    ),
    "zephyr": Case(
        loop("{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}", prompt="{{ '<|assistant|>\\n' }}"),
        "<|user|>\nHi?</s>\n<|assistant|>\n⟦Yo.</s>⟧",
        "<|system|>\nBe kind.</s>\n<|user|>\nHi?</s>\n<|assistant|>\n⟦Yo.</s>⟧\n<|user|>\nHow?</s>\n<|assistant|>\n"
        "⟦So so.</s>⟧",
        ("</s>",),
    ),
    "vicuna": Case(
        loop(
            "{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content }}"
            "{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}",
            prompt="{{ ' ASSISTANT:' }}",
        ),
        "USER: Hi? ASSISTANT:⟦ Yo.</s>⟧",
        "Be kind. USER: Hi? ASSISTANT:⟦ Yo.</s>⟧USER: How? ASSISTANT:⟦ So so.</s>⟧",
        ("</s>",),
    ),
    "deepseek": Case(
        loop(
            "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ 'ASK' + m.content }}"
            "{% else %}{{ 'SAY' + m.content.split('</think>')[-1] + eos_token }}{% endif %}",
            before="{{ bos_token }}",
            prompt="{{ 'SAY' }}",
        )
        .replace("ASK", ASK)
        .replace("SAY", SAY),
        f"{BEGIN}{ASK}Hi?{SAY}⟦Yo.{END}⟧",
        f"{BEGIN}Be kind.{ASK}Hi?{SAY}⟦Yo.{END}⟧{ASK}How?{SAY}⟦So so.{END}⟧",
        (BEGIN, END, ASK, SAY),
    ),
    "tulu": Case(
        loop(
            "{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token }}"
            "{% if not loop.last %}{{ '\\n' }}{% endif %}"
            "{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}",
            prompt="{{ '<|assistant|>\\n' }}",
        ),
        "<|user|>\nHi?\n<|assistant|>\n⟦Yo.<|endoftext|>⟧",
        "<|system|>\nBe kind.\n<|user|>\nHi?\n<|assistant|>\n⟦Yo.<|endoftext|>⟧\n<|user|>\nHow?\n<|assistant|>\n"
        "⟦So so.<|endoftext|>⟧",
        ("<|endoftext|>",),
    ),
    "alpaca": Case(
        loop(
            "{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}"
            "{% elif m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}"
            "{% else %}{{ '### Response:\\n' + m.content + '\\n\\n' }}{% endif %}"
        ),
        "### Instruction:\nHi?\n\n### Response:\n⟦Yo.⟧",
        "Be kind.\n\n### Instruction:\nHi?\n\n### Response:\n⟦Yo.⟧\n\n### Instruction:\nHow?\n\n"
        "### Response:\n⟦So so.⟧",
    ),
    "generation tags": Case(
        loop(
            "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
            prompt=CHATML_PROMPT,
        ),
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n⟦Yo.<|im_end|>⟧",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Yo.<|im_end|>⟧\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n⟦So so.<|im_end|>⟧",
        CHATML_NAMES,
    ),
    "thoughts before the last answer": Case(
        loop(
            "{{ '<|im_start|>' + m.role + '\\n' }}"
            "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
            "{{ m.content + '<|im_end|>\\n' }}",
            prompt=CHATML_PROMPT,
        ),
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nYo.<|im_end|>⟧",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Yo.<|im_end|>⟧\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nSo so.<|im_end|>⟧",
        CHATML_NAMES,
    ),
}


def definition(names):
    """Return a tokenizer of the library with an id for each byte, and behind these one for each special name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(names))
    return inner


def write_tokenizer(folder, case):
    """Write a folder as Transformers has it, and return it."""
    folder.mkdir(exist_ok=True)
    definition(case.names).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": case.template}
    for key, known in (("bos_token", ("<s>", "<bos>", BEGIN)), ("eos_token", ("</s>", "<eos>", "<|endoftext|>", END))):
        config |= [(key, name) for name in known if name in case.names]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def encoded(folder, messages, *, turns="together", **framing):
    """Return the conversations of some messages."""
    options = chat_options(folder, "messages", turns=turns)
    framing = {"prepend_bos": False, "append_eod": False, **framing}
    return list(encoder_of(load_tokenizer(folder), options, **framing).encode(json.dumps([messages])))


def by_hand(marked, names):
    """Return the tokens and the mask of a text whose answers lie between ⟦ and ⟧."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {letter: place for place, letter in enumerate(letters)}
    ids, mask, is_answer = [], [], False
    pattern = "|".join([*map(re.escape, names), "⟦", "⟧", "(?s:.)"])
    for piece in re.findall(pattern, marked):
        if piece in "⟦⟧":
            is_answer = piece == "⟦"
            continue
        found = [byte_of[_letter(byte)] for byte in piece.encode()]
        if piece in names:
            found = [256 + names.index(piece)]
        ids += found
        mask += [is_answer] * len(found)
    return ids, mask


def _letter(byte):
    """Return GPT-2's printable character for a byte."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [other for other in range(256) if other not in own]
    return chr(byte) if byte in own else chr(0x100 + others.index(byte))


@pytest.mark.parametrize("name", CASES)
def test_only_the_tokens_of_answers_are_predicted(name, tmp_path):
    case = CASES[name]
    folder = write_tokenizer(tmp_path / "tokenizer", case)
    for messages, wanted in ((TURN, case.one), ([SYSTEM, *TURN, *SECOND], case.two)):
        if wanted is None:
            with pytest.raises(DataError, match=r"the chat template refuses it \(no system message here"):
                encoded(folder, messages)
            continue
        (found,) = encoded(folder, messages)
        assert (found.ids, found.predicted) == by_hand(wanted, case.names)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.two is not None])
def test_turns_apart_predict_their_last_answer_alone(name, tmp_path):
    case = CASES[name]
    folder = write_tokenizer(tmp_path / "tokenizer", case)
    first, second = encoded(folder, [SYSTEM, *TURN, *SECOND], turns="apart")
    assert (first.ids, first.predicted) == (lambda c: (c.ids, c.predicted))(*encoded(folder, [SYSTEM, *TURN]))
    (whole,) = encoded(folder, [SYSTEM, *TURN, *SECOND])
    assert second.ids == whole.ids
    assert second.predicted == [place >= len(whole.ids) - sum(second.predicted) for place in range(len(whole.ids))]
    assert 0 < sum(second.predicted) < sum(whole.predicted)


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    case = CASES[name]
    folder = write_tokenizer(tmp_path / "tokenizer", case)
    messages = TURN if case.two is None else [SYSTEM, *TURN, *SECOND]
    (found,) = encoded(folder, messages)
    outside = PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = outside.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert found.ids == wanted[: len(found.ids)]
    assert not outside.decode(wanted[len(found.ids) :]).strip()  # a template's blanks behind the last answer


def test_tags_give_the_mask_of_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    case = CASES["generation tags"]
    folder = write_tokenizer(tmp_path / "tokenizer", case)
    (found,) = encoded(folder, [SYSTEM, *TURN, *SECOND])
    outside = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        [SYSTEM, *TURN, *SECOND], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [int(is_answer) for is_answer in found.predicted] == outside["assistant_masks"][: len(found.predicted)]


def test_a_token_that_begins_before_an_answer_belongs_to_it(tmp_path):
    """A word piece with its blank, as SentencePiece has them, is never given away when the answer begins inside it."""
    folder = write_tokenizer(tmp_path / "tokenizer", CASES["zephyr"])
    pieces = ["<unk>", "</s>", "\u2581A", "\u2581B", "B:", "\u2581", ":", "B", "A"]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: place for place, piece in enumerate(pieces)},
            merges=[("\u2581", "A"), ("\u2581", "B"), ("B", ":")],
            unk_token="<unk>",
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.add_special_tokens(["<unk>", "</s>"])
    inner.save(str(folder / "tokenizer.json"))
    template = loop("{{ m.content + ('B: ' if m.role == 'user' else eos_token) }}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    (found,) = encoded(folder, [{"role": "user", "content": "A"}, {"role": "assistant", "content": "A"}])
    assert [pieces[token] for token in found.ids] == ["\u2581A", "B:", "\u2581A", "</s>"]
    assert found.predicted == [False, False, True, True]


def test_bos_and_eos_are_added_where_the_template_has_none(tmp_path):
    names = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    folder = write_tokenizer(tmp_path / "tokenizer", Case(CASES["chatml"].template, "", "", names))
    (found,) = encoded(folder, TURN, prepend_bos=True, append_eod=True)
    assert (found.ids, found.predicted) == by_hand(f"<s>{CASES['chatml'].one[:-1]}</s>⟧", names)
    folder = write_tokenizer(tmp_path / "other", CASES["llama 2"])
    (found,) = encoded(folder, TURN, prepend_bos=True, append_eod=True)
    assert (found.ids, found.predicted) == by_hand(CASES["llama 2"].one, CASES["llama 2"].names)


def test_a_missing_tokenizer_is_not_blamed_on_its_template(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", CASES["chatml"])
    with pytest.raises(DataError, match=rf"found nothing; did you mean {folder}\?"):
        find_template(tmp_path / "tokeniser", None, instead="prompts")


def test_a_named_template_and_a_file_are_found(tmp_path, monkeypatch):
    case = CASES["chatml"]
    folder = write_tokenizer(tmp_path / "tokenizer", case)
    (wanted,) = encoded(folder, TURN)
    named = [{"name": "tools", "template": "?"}, {"name": "default", "template": case.template}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert encoded(folder, TURN) == [wanted]
    with monkeypatch.context() as here:
        here.chdir(folder)
        with pytest.raises(DataError, match="wanted a tokenizer with a chat template"):
            find_template("byte", None, instead="prompts")
        with pytest.raises(
            DataError, match=r"found none; give one with --chat-template FILE, or a text with --prompt$"
        ):
            find_template("byte", None, instead="a text with --prompt")
    for damaged in ([{"name": "default"}], ["?"]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": damaged}))
        with pytest.raises(DataError, match="wanted a tokenizer with a chat template"):
            encoded(folder, TURN)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(case.template)
    assert encoded(folder, TURN) == [wanted]


def test_a_template_that_repeats_or_drops_an_answer_is_refused():
    for body, times in (("{{ m.content * 2 }}", 2), ("{{ m.role }}", 0)):
        with pytest.raises(DataError, match=f"writes the content of message 2 {times} times in place of once"):
            ChatTemplate(loop(body), {}).render(TURN)
    with pytest.raises(DataError, match=r"the chat template is damaged \(line 1: .*; correct it"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(DataError, match="generation tags of the chat template mark no answer"):
        ChatTemplate("{% if false %}{% generation %}{% endgeneration %}{% endif %}x", {}).render(TURN)
    demanding = "{% if m.role == 'assistant' and 'Yo' not in m.content %}{{ raise_exception('no Yo') }}{% endif %}"
    with pytest.raises(DataError, match=r"refuses another content of message 2 \(no Yo\), .* generation tags"):
        ChatTemplate(loop(demanding + "{{ m.content }}"), {}).render(TURN)
