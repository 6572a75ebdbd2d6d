from __future__ import annotations

import pytest

from evals.vqa.scoring import CONTRACTIONS, clean, m4c, official

BOTH = [
    ("Yes", "yes"),
    ("the cat", "cat"),
    ("An apple and a pear", "apple and pear"),
    ("another", "another"),  # an article only as a word
    ("two", "2"),
    ("none", "0"),
    ("Ten dogs", "10 dogs"),
    ("eleven", "eleven"),
    ("a  b\tc\nd", "b c d"),
    ("3.", "3"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("mr. smith", "mr smith"),
    ("u.s.a.", "usa"),
    ("v1.0.", "v1.0"),
    ("red/blue", "red blue"),  # between letters, a mark is a blank
    ("red / blue", "red blue"),  # beside a blank, it goes
    ("red- blue-green", "red bluegreen"),  # once beside a blank, it goes everywhere
    ("t-shirt", "t shirt"),
    ("(left)", "left"),
    ('"stop"', "stop"),
    ("wow!", "wow"),
    ("dont", "don't"),
    ("Wont", "won't"),
    ("don't", "don't"),
    ("youre not", "you're not"),
    ("oclock", "o'clock"),
    ("somebody'd", "somebodyd"),
    ("id", "id"),
    ("shed", "shed"),
    ("its", "its"),
    ("", ""),
    ("the", ""),
]


@pytest.mark.parametrize(("answer", "wanted"), BOTH)
def test_both_conventions(answer: str, wanted: str) -> None:
    assert official(answer) == wanted
    assert m4c(answer) == wanted


@pytest.mark.parametrize(
    ("answer", "as_official", "as_m4c"),
    [
        ("1,000", "1000", "1000"),
        ("1,000/2-3", "100023", "1000 2 3"),  # the comma is gone before m4c looks for it
        ("red,blue", "red blue", "redblue"),
        ("red, blue", "red blue", "red blue"),
        ("what?", "what", "what"),
        ("why?not", "why not", "whynot"),
        ("mcdonald's", "mcdonald's", "mcdonald 's"),
        ("wheres 's", "where's 's", "where's 's"),
    ],
)
def test_where_they_differ(answer: str, as_official: str, as_m4c: str) -> None:
    assert official(answer) == as_official
    assert m4c(answer) == as_m4c


def test_the_table_of_contractions() -> None:
    assert len(CONTRACTIONS) == 114  # the public table's 120, without 4 in capitals and 2 that change nothing
    for short, full in CONTRACTIONS.items():
        assert short != full
        assert short == short.lower()
        assert short.replace("'", "") == full.replace("'", "")
    some = {
        "aint": "ain't",
        "cant": "can't",
        "couldnt've": "couldn't've",
        "couldn'tve": "couldn't've",
        "hed": "he'd",
        "shed've": "she'd've",
        "itll": "it'll",
        "mightve": "might've",
        "notve": "not've",
        "shant": "shan't",
        "therere": "there're",
        "twas": "'twas",
        "whens": "when's",
        "y'alld've": "y'all'd've",
        "'ows'at": "'ow's'at",
    }
    assert some.items() <= CONTRACTIONS.items()


def test_words_and_gaps_of_the_table() -> None:
    absent = "shed wed shell well ill its were id im shes let's somebodyd wheredve"
    assert not CONTRACTIONS.keys() & set(absent.split())


def test_clean_keeps_all_but_white_space() -> None:
    assert clean(" The\tA-team,\nNo. 1 ") == "The A-team, No. 1"
