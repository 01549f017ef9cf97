"""Stop strings end the text wherever token borders fall."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from refimpl.decoding.stopping import StopScanner


def scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = "".join(map(scanner.push, pieces)) + scanner.finish()
    return shown, scanner.stopped


def test_without_stop_strings_all_text_passes_at_once() -> None:
    scanner = StopScanner([])
    assert [scanner.push("ab"), scanner.push(""), scanner.push("c")] == ["ab", "", "c"]


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(["END"])
    assert [scanner.push("xE"), scanner.push("N"), scanner.push("T")] == ["x", "", "ENT"]


def test_a_stop_string_over_three_pieces_is_found_and_cut_off() -> None:
    assert scan(["one E", "N", "D two"], ["END"]) == ("one ", True)


def test_nothing_is_shown_after_the_stop() -> None:
    scanner = StopScanner(["."])
    assert [scanner.push("a.b"), scanner.push("c"), scanner.finish()] == ["a", "", ""]


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert scan(["abcd"], ["abcd", "c"]) == ("ab", True)
    assert scan(["abc"], ["c", "abc"]) == ("", True)  # together: the longest


def test_held_text_is_shown_when_the_text_ends() -> None:
    assert scan(["almost EN"], ["END"]) == ("almost EN", False)


@given(
    text=st.text("ab", max_size=14),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    cuts=st.sets(st.integers(0, 14)),
)
def test_the_outcome_does_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], cuts: set[int]
) -> None:
    borders = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert scan(pieces, stops) == scan(list(text), stops) == scan([text], stops)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    shown, stopped = scan(pieces, stops)
    assert stopped == bool(ends)
    assert text.startswith(shown)
    if not stopped:
        assert shown == text
