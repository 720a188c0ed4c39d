"""The words that express the planted concepts, and their forms.

Every value of a concept has at least eight interchangeable words. No word of a subject begins with
a vowel, so that `a` is always right.
"""

from __future__ import annotations

from typing import NamedTuple


class Actor(NamedTuple):
    """A kind of subject."""

    nouns: list[str]
    adjectives: list[str]


class Topic(NamedTuple):
    """A topic of documents."""

    verbs: list[str]
    """Transitive; each goes with each object."""
    objects: list[str]
    places: list[str]


class Mood(NamedTuple):
    """A sentiment."""

    adjectives: list[str]
    """Before an object."""
    adverbs: list[str]
    feelings: list[str]
    """Between `is` and `about`."""


def _words(text: str) -> list[str]:
    return text.split()


SUBJECTS = {
    "animal": Actor(
        _words("dog cat horse rabbit fox bear monkey parrot"),
        _words("furry wild tame striped shaggy spotted whiskered caged"),
    ),
    "child": Actor(
        _words("boy girl kid toddler pupil teenager baby youngster"),
        _words("young little tiny playful freckled barefoot giggling growing"),
    ),
    "relative": Actor(
        _words("mother father sister brother cousin nephew niece grandmother"),
        _words("married widowed retired divorced distant talkative homely thrifty"),
    ),
    "medic": Actor(
        _words("doctor nurse surgeon dentist pharmacist paramedic midwife therapist"),
        _words("licensed trained certified gowned gloved qualified registered rural"),
    ),
    "royal": Actor(
        _words("king queen prince princess duke duchess baron sultan"),
        _words("noble crowned regal titled robed reigning dethroned bejewelled"),
    ),
    "soldier": Actor(
        _words("soldier sailor guard captain general sergeant corporal gunner"),
        _words("helmeted camouflaged decorated veteran saluting marching disciplined patrolling"),
    ),
}
TOPICS = {
    "sport": Topic(
        _words("kick throw catch pass strike chase block drop"),
        _words("ball puck javelin discus frisbee dart baton shuttlecock"),
        _words("stadium arena gym court pitch racetrack playground clubhouse"),
    ),
    "cooking": Topic(
        _words("bake cook fry stir boil roast taste slice"),
        _words("soup stew pie cake omelette pasta curry sauce"),
        _words("kitchen bakery restaurant cafe canteen diner tavern barbecue"),
    ),
    "music": Topic(
        _words("play sing compose perform rehearse practise hum whistle"),
        _words("song tune melody waltz ballad sonata anthem lullaby"),
        _words("concert opera studio ballroom conservatory festival bandstand theatre"),
    ),
    "travel": Topic(
        _words("visit explore reach leave cross tour map approach"),
        _words("harbour island village desert canyon coast border valley"),
        _words("airport station hotel hostel terminal campsite lodge embassy"),
    ),
    "science": Topic(
        _words("measure test observe study examine analyse inspect weigh"),
        _words("sample crystal molecule cell magnet planet fossil neutron"),
        _words("laboratory observatory university museum institute planetarium academy workshop"),
    ),
    "money": Topic(
        _words("buy sell trade value auction insure tax price"),
        _words("coin bond share stock mortgage pension fund loan"),
        _words("bank market shop office exchange mall counter treasury"),
    ),
}
SENTIMENTS = {
    "positive": Mood(
        _words("wonderful lovely delightful splendid superb charming excellent marvellous"),
        _words("happily gladly cheerfully proudly joyfully merrily eagerly gracefully"),
        _words("happy delighted cheerful thrilled glad excited pleased enthusiastic"),
    ),
    "negative": Mood(
        _words("terrible awful dreadful horrible ugly nasty miserable dismal"),
        _words("sadly angrily bitterly grimly gloomily nervously unwillingly wearily"),
        _words("sad angry upset worried unhappy anxious gloomy furious"),
    ),
}
TIMES = {
    "past": [
        "yesterday", "last week", "last night", "last year", "long ago", "a week ago",
        "some time ago", "in the past",
    ],
    "present": [
        "now", "nowadays", "these days", "currently", "at present", "at the moment", "right now",
        "as usual",
    ],
    "future": [
        "tomorrow", "next week", "next month", "next year", "soon", "before long", "one day",
        "in the future",
    ],
}  # fmt: skip
DETERMINERS = {
    "singular": _words("the a one this that every another each"),
    "plural": _words("the some two these those many several both"),
}
PREPOSITIONS = _words("at near behind outside beside opposite")
COPULAS = _words("be feel seem look")
FUTURES = ["will", "shall", "going to", "about to", "due to", "set to"]
"""Markers before the verb; all but the first two need a form of `be`."""

_PAST = {
    "throw": "threw", "catch": "caught", "strike": "struck", "sing": "sang", "leave": "left",
    "buy": "bought", "sell": "sold", "feel": "felt",
}  # fmt: skip
_DOUBLED = {"stir", "hum", "map", "drop"}
"""Verbs that double their last letter before -ed and -ing."""
_AUXILIARY = {
    "be": {"past": ("was", "were"), "present": ("is", "are")},
    "have": {"past": ("had", "had"), "present": ("has", "have")},
}
"""Verb and tense to singular and plural."""


def plural(noun: str) -> str:
    """The plural of a noun."""
    return "midwives" if noun == "midwife" else _with_s(noun)


def verb_form(verb: str, tense: str, number: str) -> str:
    """The simple past or present of a verb, third person."""
    if verb in _AUXILIARY:
        return _AUXILIARY[verb][tense][number == "plural"]
    if tense == "present":
        return _with_s(verb) if number == "singular" else verb
    if verb in _PAST:
        return _PAST[verb]
    if _ends_in_consonant_and_y(verb):
        return verb[:-1] + "ied"
    return _doubled(verb).removesuffix("e") + "ed"


def participle(verb: str) -> str:
    """The form in -ing."""
    return _doubled(verb).removesuffix("e") + "ing"


def _with_s(word: str) -> str:
    if _ends_in_consonant_and_y(word):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "sh", "ch")) else "s")


def _ends_in_consonant_and_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


def _doubled(verb: str) -> str:
    return verb + verb[-1] if verb in _DOUBLED else verb
