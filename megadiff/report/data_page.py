"""Data for people: statistics of sources, and the sequences of a training step, in a terminal or as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from megadiff.report.markup import escaped, paragraph, section, table
from megadiff.report.page import STYLE, document

if TYPE_CHECKING:
    from megadiff.data.source_statistics import Excerpt, LengthBin, SourceStatistics
    from megadiff.run.step_sequences import ShownSequence, ShownToken, StepSequences


LEGEND = (
    "¶ a document begins   ░ masked   {changed by noise}   «noise-free: prompt or context»   "
    "⟨name⟩ special token   ⏎ line end   \ufffd not printable"
)
"""Meaning of the marks in the terminal."""

_WIDTH, _LABEL, _BAR = 116, 18, 40
_NONE = ("", "")
_LINE_ENDS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def one_line(text: str) -> str:
    """Return text in which line ends and other control characters are visible marks."""
    return "".join(_LINE_ENDS.get(c, c if c.isprintable() else "\ufffd") for c in text)


def source_facts(found: SourceStatistics, look: Callable[[int], str] | None) -> list[tuple[str, str]]:
    """Return the figures of a source, each with its name.

    Args:
        found: the figures.
        look: returns the text of an id; None without a tokenizer.
    """
    ratio = found.bytes_per_token
    per_byte = f"; {1 / ratio:.4g} tokens per byte, {ratio:.4g} bytes per token" if ratio else ""
    empty = f"{found.empty_documents:,} of them empty" if found.empty_documents else "none empty"
    facts = [
        ("documents", f"{found.documents:,}, {empty}"),
        ("tokens", f"{found.tokens:,} of {found.vocab_size:,} ids, {found.used_ids:,} of which occur{per_byte}"),
        *_answers(found),
        (
            "framing",
            f"bos begins {_of(found.begin_with_bos, found.documents)}, eos ends "
            f"{_of(found.end_with_eos, found.documents)}; {found.padding_tokens:,} padding tokens",
        ),
        ("repeated", _repeats(found)),
        *((f"in {prefix}", f"{_of(shared, found.documents)} of these") for prefix, shared in found.also_in.items()),
        ("lengths", _lengths(found)),
        ("entropy", f"unigram {_nats(found.unigram, ratio)}, bigram {_nats(found.bigram, ratio)}"),
        ("most frequent", ", ".join(_frequent(found, look))),
    ]
    return facts


def describe_source(found: SourceStatistics, shown: Sequence[Excerpt], look: Callable[[int], str] | None) -> list[str]:
    """Return the lines about a source: its figures, the histogram of its lengths, and the beginnings of documents."""
    lines = [found.prefix]
    for name, text in source_facts(found, look):
        lines += _labelled(name, text)
        if name == "lengths":
            lines += [f"    {line}" for line in _bars(found.histogram)]
    for excerpt in shown:
        lines += _labelled(f"document {excerpt.document}", f"{excerpt_size(excerpt)}:")
        lines += _wrapped(one_line(excerpt.text))
    return lines


def excerpt_size(excerpt: Excerpt) -> str:
    """Return the number of tokens of a document, and of those that are shown."""
    cut = f", the first {excerpt.shown:,}" if excerpt.shown < excerpt.tokens else ""
    return f"{excerpt.tokens:,} tokens{cut}"


def _of(count: int, documents: int) -> str:
    return f"{count:,} document{'s' * (count != 1)} ({count / documents:.2%})"


def _answers(found: SourceStatistics) -> list[tuple[str, str]]:
    """Return the figure of the answers of conversations; none of text."""
    if found.answer_tokens is None:
        return []
    share = found.answer_tokens / found.tokens
    return [("answers", f"{found.answer_tokens:,} tokens ({share:.2%}), which are predicted; «given» marks the others")]


def _repeats(found: SourceStatistics) -> str:
    if not found.repeats:
        return "no document equals another one"
    most = "; ".join(
        f"document {group.first} ({group.tokens:,} tokens) {group.times:,} times" for group in found.most_repeated
    )
    return (
        f"{_of(found.repeats, found.documents)}, {found.repeated_tokens:,} tokens, the same as an earlier one; {most}"
    )


def _lengths(found: SourceStatistics) -> str:
    low, tenth, median, most, nearly, high = found.lengths
    mean = found.tokens / (found.documents - found.empty_documents)
    return (
        f"{low:,} to {high:,} tokens, mean {mean:,.1f}, median {median:,}; 10% have at most {tenth:,}, "
        f"90% at most {most:,}, 99% at most {nearly:,}"
    )


def _nats(nats: float | None, bytes_per_token: float | None) -> str:
    if nats is None:
        return "unknown (too few tokens)"
    bits = f" ({nats / math.log(2) / bytes_per_token:.3f} bits per byte)" if bytes_per_token else ""
    return f"{nats:.4f} nats per token{bits}"


def _frequent(found: SourceStatistics, look: Callable[[int], str] | None) -> Iterable[str]:
    for token, count in found.most_frequent:
        name = f"`{one_line(look(token))}` ({token})" if look is not None else str(token)
        yield f"{name} {count / found.tokens:.1%}"


def _bars(histogram: Sequence[LengthBin]) -> list[str]:
    most = max(part.documents for part in histogram)
    bounds = [f"{part.shortest:,} to {part.longest:,}" if part.longest > 1 else "1" for part in histogram]
    width, counts = max(map(len, bounds)), max(len(f"{part.documents:,}") for part in histogram)
    return [
        f"{bound:>{width}} {part.documents:>{counts},} {'#' * math.ceil(_BAR * part.documents / most)}".rstrip()
        for bound, part in zip(bounds, histogram, strict=True)
    ]


def describe_step(found: StepSequences) -> list[str]:
    """Return the first lines about a step: what is shown, and where its data are read from."""
    last = found.first_sample + found.in_step - 1
    return [
        f"step {found.step:,} of {found.steps:,}: samples {found.first_sample:,} to {last:,}, "
        f"{len(found.sequences):,} of {found.in_step:,} sequences shown, method {found.method}",
        *found.remarks,
    ]


def sequence_facts(found: ShownSequence, *, is_shifted: bool) -> list[tuple[str, str]]:
    """Return where a sequence comes from, and its noise and weights, each with a name."""
    origin, tokens = found.origin, found.tokens
    begun = sum(token.begins_document for token in tokens)
    facts = [
        (
            "source",
            f"{found.key}, {found.source}: sequence {found.number:,} of this run from there, in epoch "
            f"{found.epoch + 1:,}",
        ),
        (
            "first token",
            f"{origin.prefix}: token {origin.token:,}, document {origin.document:,}, position {origin.within:,}",
        ),
        ("documents", f"{len({token.document for token in tokens} - {None}):,}, of which {begun:,} begin here"),
    ]
    if not is_shifted:
        facts.append(("noise", _noise(found)))
    return [*facts, ("loss", _loss(found))]


def _noise(found: ShownSequence) -> str:
    level = "noise-free"
    if (levels := found.log_snr_range) is not None:
        level = f"log-SNR {levels[0]:+.4f}" + (f" to {levels[1]:+.4f}" if levels[0] < levels[1] else "")
    inserted = sum(token.is_inserted for token in found.tokens)
    given = f", {found.count('given'):,} noise-free" if found.count("given") else ""
    prompt = f" (a prompt of {found.prompt_length:,})" if found.prompt_length else ""
    pads = f", {inserted:,} inserted pads" if inserted else ""
    return (
        f"{found.pattern}, {level}; of {len(found.tokens):,} tokens {found.count('masked'):,} masked, "
        f"{found.count('changed'):,} changed, {found.count('kept'):,} kept{given}{prompt}{pads}"
    )


def _loss(found: ShownSequence) -> str:
    counted = [token for token in found.tokens if token.has_loss]
    weights = [token.weight for token in counted if token.weight is not None]
    if not weights:
        return f"{len(counted):,} tokens"
    return f"{len(counted):,} tokens, weights {min(weights):.4g} to {max(weights):.4g}, sum {math.fsum(weights):.6g}"


def describe_sequence(found: ShownSequence, *, is_shifted: bool, with_table: bool) -> list[str]:
    """Return the lines about one sequence: its facts, its targets, and what the model reads.

    Args:
        found: the sequence.
        is_shifted: whether the model reads the tokens before the targets.
        with_table: whether to add a line for every token.
    """
    lines = [f"sample {found.sample}"]
    for name, text in sequence_facts(found, is_shifted=is_shifted):
        lines += _labelled(name, text)
    lines += ["  targets", *_wrapped(clean_line(found.tokens))]
    lines += ["  model's input", *_wrapped(noised_line(found.tokens, is_shifted=is_shifted))]
    return lines + (_table(found.tokens) if with_table else [])


def clean_line(tokens: Sequence[ShownToken]) -> str:
    """Return the text of the targets, with a mark where a document begins."""
    return "".join("¶" * token.begins_document + one_line(token.clean_text) for token in tokens)


def noised_line(tokens: Sequence[ShownToken], *, is_shifted: bool) -> str:
    """Return the text that the model reads, with the marks of `LEGEND`."""
    marks = {"given": ("«", "»"), "changed": ("{", "}")}
    text, before = "", "kept"
    for token in tokens:
        state = token.state if not is_shifted else "kept"
        if state != before or state == "changed":
            text += marks.get(before, _NONE)[1] + marks.get(state, _NONE)[0]
        text += "¶" * (token.begins_document and not is_shifted) + one_line(token.noised_text)
        before = state
    return text + marks.get(before, _NONE)[1]


def _table(tokens: Sequence[ShownToken]) -> list[str]:
    head = "position document    target text         input text         state    log-SNR     weight"
    lines = [f"  {head}"]
    for place, token in enumerate(tokens):
        document = f"{'¶' if token.begins_document else ''}{'' if token.document is None else token.document}"
        texts = [repr(one_line(text)) if text else "" for text in (token.clean_text, token.noised_text)]
        weight = f"{token.weight:.6g}" if token.weight is not None else "?"
        state = f"{token.state}{'+pad' if token.is_inserted else ''}"
        lines.append(
            f"  {place:>8} {document:>8} {token.clean:>9} {texts[0]:<8} {token.noised:>8} {texts[1]:<8} {state:>12} "
            f"{token.log_snr:>+10.4f} {weight:>10}"
        )
    return lines


def _labelled(name: str, text: str) -> list[str]:
    """Return a name and its text, wrapped into a column of its own."""
    first, *rest = wrap(text, _WIDTH - _LABEL, break_on_hyphens=False) or [""]
    lead = f"  {name}"
    head = [f"{lead:<{_LABEL}}{first}"] if len(lead) < _LABEL else [lead, f"{'':<{_LABEL}}{first}"]
    return [*head, *(f"{'':<{_LABEL}}{line}" for line in rest)]


def _wrapped(text: str) -> list[str]:
    """Return text in lines of equal width, cut wherever they end."""
    size = _WIDTH - 6
    return [f"    | {text[start : start + size]}" for start in range(0, max(1, len(text)), size)]


_STYLE = f"""{STYLE}
.tokens {{ font: 14px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 1rem;
  border-left: 3px solid var(--grid); padding-left: .7rem; }}
.tokens span {{ border-bottom: 3px solid transparent; }}
.tokens .border {{ color: var(--c1); font-weight: 700; border: 0; }}
.tokens .given {{ color: var(--quiet); font-style: italic; border-bottom: 3px dotted var(--c0); }}
.tokens .masked {{ background: var(--c5); color: var(--paper); border-bottom-color: var(--paper); }}
.tokens .changed {{ color: var(--c1); font-weight: 700; border-bottom: 3px solid var(--c1); }}
.tokens .pad {{ outline: 1px dashed var(--quiet); }}
.tokens .alternate {{ background: #8882; }}
.tokens.marks {{ border: 0; padding: 0; }}
.tokens.marks span {{ margin-right: 1.2rem; }}
svg.lengths {{ width: 22rem; height: 1rem; display: block; }}
svg.lengths rect {{ fill: var(--c0); }}
"""

_KEY = (
    ("border", "¶ a document begins"),
    ("given", "noise-free: prompt or context"),
    ("", "kept by the noise"),
    ("masked", "masked"),
    ("changed", "changed by the noise"),
    ("pad", "inserted pad"),
)
_POINT = "Point at a token for its position, ids, document, log-SNR and loss weight."
_WIDEST_BAR = 350


def step_page(found: StepSequences, *, run: str) -> str:
    """Return the page about sequences of a step.

    Args:
        found: the sequences.
        run: name of the run.
    """
    first, *remarks = describe_step(found)
    key = "".join(f'<span class="{name}">{escaped(text)}</span>' for name, text in _KEY)
    parts = [
        "".join(map(paragraph, remarks)) + f'<p class="tokens marks">{key}</p>' + paragraph(_POINT),
        *(_sequence(sequence, is_shifted=found.is_shifted) for sequence in found.sequences),
    ]
    return document(f"{run}, step {found.step}", f"{run}: step {found.step}", first, "\n".join(parts), style=_STYLE)


def _sequence(found: ShownSequence, *, is_shifted: bool) -> str:
    return section(
        f"sample{found.sample}",
        f"sample {found.sample}",
        _facts(sequence_facts(found, is_shifted=is_shifted), caption="Origin and noise of the sequence"),
        "<h3>targets</h3>",
        _tokens(found.tokens, is_input=False, is_shifted=is_shifted),
        "<h3>model's input</h3>",
        _tokens(found.tokens, is_input=True, is_shifted=is_shifted),
    )


def _tokens(tokens: Sequence[ShownToken], *, is_input: bool, is_shifted: bool) -> str:
    parts = []
    for place, token in enumerate(tokens):
        if token.begins_document and not (is_input and is_shifted):
            parts.append(f'<span class="border" title="document {token.document} begins">¶</span>')
        names = [token.state] if is_input and token.state != "kept" else []
        names += ["pad"] * token.is_inserted + ["alternate"] * (place % 2 and not names)
        text = _visible(token.noised_text if is_input else token.clean_text)
        parts.append(f'<span class="{" ".join(names)}" title="{escaped(_about(place, token))}">{text}</span>')
    return f'<div class="tokens">{"".join(parts)}</div>'


def _about(place: int, token: ShownToken) -> str:
    weight = "unknown" if token.weight is None else f"{token.weight:.6g}"
    where = "behind the last document" if token.document is None else f"document {token.document}"
    return (
        f"position {place}, {where}: target {token.clean} {one_line(token.clean_text)!r}, input "
        f"{token.noised} {one_line(token.noised_text)!r}, {token.state}{', inserted pad' * token.is_inserted}, log-SNR "
        f"{token.log_snr:+.4f}, loss weight {weight if token.state != 'given' else '0 (noise-free)'}"
    )


def _visible(text: str) -> str:
    """Return a token's text as markup; line ends are marked and kept, and an empty text has a width."""
    return escaped("\n".join(one_line(f"{line}\n") for line in text.split("\n"))[:-1]) or "\u200a"


def sources_page(
    parts: Sequence[tuple[SourceStatistics, Sequence[Excerpt], Callable[[int], str] | None]],
) -> str:
    """Return the page about sources.

    Args:
        parts: figures of each source, beginnings of its documents, and the texts of its ids; None without a tokenizer.
    """
    inside = []
    for number, (found, shown, look) in enumerate(parts):
        inside.append(
            section(
                f"source{number}",
                found.prefix,
                _facts(source_facts(found, look), caption="Figures of the source"),
                _length_bars(found.histogram),
                *(_excerpt(excerpt) for excerpt in shown),
            )
        )
    names = ", ".join(found.prefix for found, *_ in parts)
    return document(names, f"{names}: data", f"{len(parts)} source(s)", "\n".join(inside), style=_STYLE)


def _facts(facts: Sequence[tuple[str, str]], *, caption: str) -> str:
    rows = [(escaped(name), escaped(text)) for name, text in facts]
    return table(("figure", "value"), rows, caption=caption)


def _length_bars(histogram: Sequence[LengthBin]) -> str:
    most = max(part.documents for part in histogram)
    rows = [
        (
            f"{part.shortest:,} to {part.longest:,}",
            f"{part.documents:,}",
            f"{part.tokens:,}",
            f'<svg class="lengths" viewBox="0 0 {_WIDEST_BAR} 16" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect width="{_WIDEST_BAR * part.documents / most:.1f}" height="16"/></svg>',
        )
        for part in histogram
    ]
    heads = ("tokens in a document", "documents", "tokens", "documents, relatively")
    return table(heads, rows, caption="Lengths of documents")


def _excerpt(excerpt: Excerpt) -> str:
    heading = f"<h3>document {excerpt.document}</h3>"
    return heading + paragraph(excerpt_size(excerpt)) + f"<pre>{escaped(excerpt.text)}</pre>"
