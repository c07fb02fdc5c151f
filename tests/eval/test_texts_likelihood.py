"""Documents cut into windows and measured; texts read from lines of JSON."""

from __future__ import annotations

import math

import pytest

from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from megadiff.eval.likelihood import Item, Likelihood, summed
from megadiff.eval.texts_likelihood import item_of, pooled, read_lines, rolled, rolling_items


@pytest.mark.parametrize(("length", "context"), [(8, 0), (8, 3), (5, 4), (100, 10)])
def test_every_token_is_scored_once_and_prompts_are_what_comes_before(length, context):
    ids = tuple(range(10, 40))
    items = rolling_items(ids, length=length, context=context, start=(0,))
    assert sum((item.completion for item in items), ()) == ids
    assert items[0].prompt == (0,)
    place = 0
    for item in items:
        assert len(item.completion) > 0
        assert len(item.ids) <= length
        if place:
            assert item.prompt == ids[max(0, place - context) : place]
        place += len(item.completion)
    with pytest.raises(ValueError, match="must be shorter than a sequence"):
        rolling_items(ids, length=8, context=8)


def test_perplexities_are_per_word_and_per_byte():
    text = "two words é"  # 3 words, 12 bytes
    first, second = Item((), (1, 2, 3, 4)), Item((), (1, 2, 3, 4, 5, 6, 7, 8))
    measured = {first: Likelihood(3.0, 0.3, 4), second: Likelihood(9.0, 0.4, 8)}
    found = rolled(summed([first, second], measured), text)
    assert (found.nll, found.tokens, found.words, found.bytes) == (12.0, 12, 3, 12)
    assert found.stderr == pytest.approx(0.5)
    assert found.word_perplexity == pytest.approx(math.exp(4))
    assert found.byte_perplexity == pytest.approx(math.e)
    assert found.bits_per_byte == pytest.approx(1 / math.log(2))
    both = pooled(summed([first, second, first, second], measured), [found, found])
    assert both.bits_per_byte == pytest.approx(found.bits_per_byte)
    assert both.stderr == pytest.approx(2 * 0.5)  # the same document twice, and so the same error twice
    other = Item((), (9,) * 12)
    measured[other] = Likelihood(12.0, 0.5, 12)
    apart = pooled(summed([first, second, other], measured), [found, found])
    assert apart.stderr == pytest.approx(0.5 * 2**0.5)
    half = pooled(summed([first, second, first, other], measured), [found, found])
    assert half.stderr == pytest.approx(((2 * 0.3) ** 2 + 0.4**2 + 0.5**2) ** 0.5)  # documents share one window of two
    line = found.as_json()
    assert line["bits_per_byte_stderr"] == pytest.approx(0.5 / 12 / math.log(2))
    assert line["word_perplexity_stderr"] == pytest.approx(math.exp(4) * 0.5 / 3)


class PairTokenizer(ByteTokenizer):
    """Bytes, but "ab" is one token: where a prompt ends in "a", the joint text is spelled otherwise."""

    def encode(self, text):
        ids = super().encode(text.replace("ab", "\x01"))
        return ids


def test_completions_are_spelled_as_in_running_text_where_they_can_be():
    tokens = PairTokenizer()
    item = item_of("x ", "ab", tokens, start=(0,), end=(1,))
    assert item.prompt == (0, *tokens.encode("x "))
    assert item.completion == (*tokens.encode("ab"), 1)
    assert len(tokens.encode("ab")) == 1
    split = item_of("a", "b", tokens)  # together they are one token, so there is no seam to cut at
    assert split.prompt == tuple(tokens.encode("a"))
    assert split.completion == tuple(tokens.encode("b"))


def test_lines_are_read_and_mistakes_are_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "n": 1}\n\n{"prompt": "", "completion": "c"}\n')
    assert read_lines(path, ["prompt", "completion"]) == [("a", "b"), ("", "c")]
    for text, message in [
        ('{"prompt": 3}\n', r"texts.jsonl:1: wanted a string under 'prompt', found 3; .*\['prompt'\]"),
        ('{"a": "b"}\n', r"wanted a string under 'prompt', found nothing; .*; choose with --prompt-key"),
        ("[]\n", "wanted a JSON object, found a list"),
        ('{"prompt": "a"}\n{"prompt"\n', "texts.jsonl:2: wanted a JSON object, found text that is none"),
        ("\n", "found an empty file"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_lines(path, ["prompt"])
    with pytest.raises(DataError, match=r"found nothing$"):
        read_lines(tmp_path / "none.jsonl", ["prompt"])
    with pytest.raises(DataError, match=rf"found nothing; did you mean {path}\?$"):
        read_lines(tmp_path / "texts.json", ["prompt"])


def test_texts_are_read_as_python_and_pandas_write_them(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [
        '{"text": "a", "score": NaN}',
        '{"text": "b\\ud800", "n": -Infinity}',
        '{"text": "c\\r"}',
        f'{{"text": "d", "n": 1{"0" * 5000}}}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b"\r\n")
    assert read_lines(path, ["text"]) == [("a",), ("b\ufffd",), ("c\r",), ("d",)]
