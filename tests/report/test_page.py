"""What pages share: texts of unknown origin are made visible, and harmless."""

from __future__ import annotations

from html_page import EVIL, Page

from dlmctl.report.page import escaped, page, shortened, shown, shown_lines, token


def test_what_cannot_be_seen_is_written_as_its_number() -> None:
    assert shown("a\n\tb") == "a↵⇥b"
    assert shown("\u202e\u0000") == "\\u202e\\u0000"
    assert shown("\u0301x") == "◌\u0301x"
    assert shown("ä 漢 😀") == "ä 漢 😀"
    assert shown("\U000e0001\ud800") == "\\ue0001\\ud800"


def test_new_lines_stay_where_they_are_asked_for() -> None:
    assert shown_lines("a\n\n\u0301b") == "a↵\n↵\n◌\u0301b"
    assert shown_lines("a\x1b[31m") == "a\\u001b[31m"


def test_a_long_text_is_cut_even_where_it_has_no_words() -> None:
    assert shortened("a  b\nc", 5) == "a b c"
    assert shortened("a  b\nc", 4) == "a b …"
    assert shortened("0" * 300, 10) == "0" * 10 + " …"


def test_a_page_of_hostile_texts_has_no_elements_but_its_own() -> None:
    facts = {text: text for text in EVIL}
    cards = [f"<p>{token(escaped(text), escaped(text), 0.5)}</p>" for text in EVIL]
    made = Page(page("tokens", EVIL[0], facts, "", [], cards))
    assert len(made.attributes("script")) == 1
    assert not [a for _, a in made.tags if any(name.startswith("on") for name in a)]
    assert [a["title"] for a in made.attributes("b")] == [shown(text) for text in EVIL]
    assert made.text("dl/div/dd") == "".join(map(shown, EVIL))
