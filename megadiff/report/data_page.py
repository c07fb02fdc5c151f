"""Data as one HTML page: statistics of sources, and the sequences of a training step, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megadiff.report.data_text import describe_step, excerpt_size, one_line, sequence_facts, source_facts
from megadiff.report.markup import escaped, paragraph, section, table
from megadiff.report.page import STYLE, document

if TYPE_CHECKING:
    from megadiff.data.source_statistics import Excerpt, LengthBin, SourceStatistics
    from megadiff.run.step_sequences import ShownSequence, ShownToken, StepSequences

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
                _lengths(found.histogram),
                *(_excerpt(excerpt) for excerpt in shown),
            )
        )
    names = ", ".join(found.prefix for found, *_ in parts)
    return document(names, f"{names}: data", f"{len(parts)} source(s)", "\n".join(inside), style=_STYLE)


def _facts(facts: Sequence[tuple[str, str]], *, caption: str) -> str:
    rows = [(escaped(name), escaped(text)) for name, text in facts]
    return table(("figure", "value"), rows, caption=caption)


def _lengths(histogram: Sequence[LengthBin]) -> str:
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
