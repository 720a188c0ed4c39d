"""Records of features as a page of HTML to browse, in one file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import Record
from dlmctl.report.page import escaped, page, token
from dlmctl.sae.features.charts import bars
from dlmctl.sae.features.firing_stats import ALIVE

KINDS = {
    "top": "Strongest",
    "weighted": "Drawn in proportion to the activation",
    "inactive": "Not active",
}
CONTROLS = (
    '<input id="search" type="search" placeholder="Search" '
    'title="A number, a word, an explanation" aria-label="Search">'
    '<select id="sort" aria-label="Sort by"><option value="feature">Number</option>'
    '<option value="rate">Firing rate</option><option value="max">Largest activation</option>'
    '<option value="score">Balanced accuracy</option></select>'
)


def with_page(records: Iterable[Record], path: Path) -> Iterator[Record]:
    """The records unchanged; the page is written after the last one.

    Raises:
        DataError: a record of a feature lacks a field that the page shows.
    """
    cards: list[str] = []
    rows: list[str] = []
    facts: dict[str, Any] = {}
    for record in records:
        if "windows" in record:
            anchor = f"f{len(cards)}"
            try:
                rows.append(_row(record, anchor))
                cards.append(_card(record, anchor))
                facts = facts or _facts(record)
            except (KeyError, TypeError, ValueError) as error:
                message = f"not a whole record of 'dlmctl sae-features' ({error})"
                raise DataError(message, record.where) from None
        yield record
    title = f"Features of {facts.get('autoencoder', 'no autoencoder')}"
    write_file(path, page("features", title, facts, CONTROLS, rows, cards).encode())


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    corpus, levels = record["corpus"], record["t"]
    kinds = {
        "mask": "masked tokens",
        "unmask": "visible tokens of masked text",
        "all": "all tokens of masked text",
        "clean": "text in which nothing is masked",
    }
    facts = {
        "autoencoder": record["sae"],
        "model": f"{record['model']} ({record['revision']})",
        "layer": record["layer"],
        "features": f"{record['latents']}" + (f", K {record['k']}" if record["k"] else ""),
        "encoded": kinds.get(record["positions"], record["positions"]),
        "corpus": f"{corpus['documents']} documents, {corpus['tokens']} tokens",
        "alive": f"{corpus['alive']} features with more than {ALIVE} activations",
    }
    return {**facts, "level t": f"{levels[0]:g} to {levels[1]:g}"} if levels else facts


def _row(record: Mapping[str, Any], anchor: str) -> str:
    feature = int(record["feature"])
    words = record.get("explanation") or " ".join(
        entry["token"].strip() for entry in record["logits"]["top"][:4]
    )
    score = _score(record)
    return (
        f'<li data-feature="{feature}" data-rate="{float(record["firing_rate"])}" '
        f'data-max="{float(record["max"])}" data-score="{-1 if score is None else score}">'
        f'<a href="#{anchor}"><b>{feature}</b> <i>{record["firing_rate"]:.2%}</i> '
        f"<span>{escaped(words)}</span></a></li>\n"
    )


def _card(record: Mapping[str, Any], anchor: str) -> str:
    feature = int(record["feature"])
    numbers = [
        f"active on {record['firing_rate']:.3%} of tokens ({record['active']})",
        f"largest {record['max']:g}",
    ]
    if record["mean"] is not None:
        numbers.append(f"mean when active {record['mean']:g}")
    return (
        f'<section id="{anchor}"><h2><a href="#{anchor}">Feature {feature}</a></h2>'
        f'<p class="numbers">{escaped(" · ".join(numbers))}</p>{_judgement(record)}'
        f'<div class="charts">{_charts(record)}</div>{_effects(record["logits"])}'
        f"{''.join(_windows(kind, record) for kind in KINDS)}</section>\n"
    )


def _score(record: Mapping[str, Any]) -> float | None:
    judged = record.get("judged")
    return None if judged is None else float(judged["balanced_accuracy"])


def _judgement(record: Mapping[str, Any]) -> str:
    parts = []
    if record.get("explanation"):
        parts.append(f"<q>{escaped(record['explanation'])}</q>")
    if record.get("judged"):
        judged = record["judged"]
        parts.append(
            f"judged by {escaped(judged['judge'] or 'a judge')} with accuracy "
            f"{judged['accuracy']:.2f}, balanced {judged['balanced_accuracy']:.2f}"
        )
    if isinstance(record.get("error"), dict):
        parts.append(f"not judged: {escaped(record['error'].get('message'))}")
    return f'<p class="judgement">{" — ".join(parts)}</p>' if parts else ""


def _charts(record: Mapping[str, Any]) -> str:
    edges, counts = record["histogram"]["edges"], record["histogram"]["counts"]
    drawn = ""
    if counts:
        titles = [
            f"{low:g} to {high:g}: {count:g}"
            for low, high, count in zip(edges, edges[1:], counts, strict=False)
        ]
        ends = (f"{edges[0]:g}", f"{edges[-1]:g}")
        drawn += bars(counts, titles, ends, "Activations (log)")
    profile = record["time_profile"]
    if profile:
        edges = profile["edges"]
        ends = (f"t = {edges[0]:g}", f"{edges[-1]:g}")
        for name, what in (("firing_rate", "Firing rate over t"), ("mean", "Mean when active")):
            titles = [
                f"t {low:g} to {high:g}: {0 if value is None else value:g}, {tokens:g} tokens"
                for low, high, value, tokens in zip(
                    edges, edges[1:], profile[name], profile["tokens"], strict=False
                )
            ]
            drawn += bars(profile[name], titles, ends, what)
    return drawn


def _effects(logits: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    def tokens(side: str) -> str:
        return "".join(
            f'<code title="{float(entry["logit"]):+g}">{escaped(entry["token"])}</code>'
            for entry in logits[side]
        )

    return (
        f'<p class="effect">raises {tokens("top")}</p>'
        f'<p class="effect">lowers {tokens("bottom")}</p>'
    )


def _windows(kind: str, record: Mapping[str, Any]) -> str:
    windows = record["windows"].get(kind) or []
    if not windows:
        return ""
    largest = float(record["max"]) or 1.0
    lines = "".join(
        f'<li><span class="where">{_where(window)}</span>{_line(window, largest)}</li>'
        for window in windows
    )
    opened = " open" if kind == "top" else ""
    return (
        f"<details{opened}><summary>{KINDS[kind]} <i>{len(windows)}</i></summary>"
        f"<ol>{lines}</ol></details>"
    )


def _where(window: Mapping[str, Any]) -> str:
    name = str(window.get("id", ""))
    sample = f" sample {window['sample']}" if "sample" in window else ""
    place = f"{name}{sample}, token {window['position']}, t {window['t']:g}"
    value = window["activations"][window["middle"]]
    return f'<abbr title="{escaped(place)}">{value:.3g}</abbr>'


def _line(window: Mapping[str, Any], largest: float) -> str:
    """The tokens of a window; plain text needs no element of its own."""
    made = ""
    entries = zip(window["tokens"], window["masked"], window["activations"], strict=True)
    for number, (text, masked, value) in enumerate(entries):
        names = ["m"] * bool(masked) + ["c"] * (number == window["middle"])
        if not names and value <= 0:
            made += escaped(text)
            continue
        title = f"{value:g}" if value > 0 else "not active"
        title += ", masked: the model did not see it" if masked else ""
        shade = min(1.0, value / largest) if value > 0 else None
        made += token(escaped(text), title, shade, names)
    return f'<span class="text">{made}</span>'
