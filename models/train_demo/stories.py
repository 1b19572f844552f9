"""Short stories from plots with interchangeable heroes, places and things."""

from __future__ import annotations

from random import Random

from .chat import Pair
from .grammar import (
    ADJECTIVES,
    DATA,
    FEMALE_NAMES,
    FOODS,
    HEROES,
    NAMES,
    PLACES,
    THINGS,
    article,
    cap,
    expand,
    made_up_word,
)

PLOTS = [
    [line for line in block.splitlines() if not line.startswith("#")]
    for block in (DATA / "stories.txt").read_text(encoding="utf-8").split("\n\n")
]
_FEMALE = {"hen", "queen", "princess", "girl", "old woman", "fairy", "cow"}
_MALE = {"king", "prince", "boy", "old man", "wizard", "fisherman", "sailor", "knight"}
_THEMES = {
    "friendship": 0, "kindness": 3, "courage": 1, "fear": 1, "a race": 5, "sharing": 7,
    "hard work": 2, "a star": 6, "a wish": 4, "the night": 6, "honesty": 0, "helping others": 2,
}  # fmt: skip


def name_for(rng: Random, hero: str, taken: str = "") -> str:
    """A name that suits a hero."""
    fits = [n for n in NAMES if n != taken]
    if hero in _FEMALE or hero in _MALE:
        fits = [n for n in fits if (n in FEMALE_NAMES) == (hero in _FEMALE)]
    return rng.choice(fits)


def _is_male(rng: Random, hero: str, name: str) -> bool:
    if hero in _FEMALE or hero in _MALE:
        return hero in _MALE
    return name not in FEMALE_NAMES if name in NAMES else rng.random() < 0.5


def story_text(
    rng: Random,
    hero: str,
    name: str,
    plot: int | None = None,
    place: str | None = None,
    friend: str | None = None,
) -> tuple[str, dict[str, str]]:
    """Tell a story about a hero; return it and the slots it used."""
    male = _is_male(rng, hero, name)
    friend = friend or rng.choice([h for h in HEROES if h != hero])
    fname = name_for(rng, friend, name)
    fmale = _is_male(rng, friend, fname)
    slots = {
        "hero": hero, "name": name, "adj": rng.choice(ADJECTIVES), "friend": friend,
        "fname": fname,
        "place": place or rng.choice(PLACES), "thing": rng.choice(THINGS), "food": rng.choice(FOODS),
        "he": "he" if male else "she", "his": "his" if male else "her",
        "him": "him" if male else "her", "himself": "himself" if male else "herself",
        "fhe": "he" if fmale else "she",
    }  # fmt: skip
    if slots["adj"] in ("old", "young", "little") and hero.split()[0] in ("old", "little"):
        slots["adj"] = "kind"
    lines = PLOTS[plot if plot is not None else rng.randrange(len(PLOTS))]
    told = [line for line in lines if not line.startswith("?") or rng.random() < 0.6]
    text = " ".join(expand(rng, line.lstrip("?"), **slots) for line in told)
    return text, slots


def any_story(rng: Random) -> tuple[str, dict[str, str]]:
    """A story about anyone."""
    hero = rng.choice(HEROES)
    return story_text(rng, hero, name_for(rng, hero))


def story(rng: Random) -> list[Pair]:
    """A request for a story, the story, and at times a question about it."""
    hero = rng.choice(HEROES) if rng.random() < 0.93 else made_up_word(rng)
    friend = None
    name = name_for(rng, hero) if rng.random() < 0.9 else cap(made_up_word(rng))
    ask = (
        "[Tell me|Write|Can you tell me|Please tell me|Make up|I want to hear|Give me|Could you write]"
        " [a story|a short story|a little story|a bedtime story|a fairy tale|a tale|a nice story]"
    )
    plot, place = None, None
    roll = rng.random()
    if roll < 0.12:
        user = expand(rng, ask)
    elif roll < 0.22:
        theme = rng.choice(list(_THEMES))
        plot = _THEMES[theme]
        user = expand(rng, ask) + f" about {theme}"
    elif roll < 0.34:
        user = expand(rng, ask) + f" about {article(hero)} {rng.choice(('named', 'called'))} {name}"
    elif roll < 0.44:
        place = rng.choice(PLACES)
        user = expand(rng, ask) + f" about {article(hero)} in {place}"
    elif roll < 0.56:
        friend = rng.choice([h for h in HEROES if h != hero])
        user = expand(rng, ask) + f" about {article(hero)} and {article(friend)}"
    else:
        user = expand(rng, ask) + f" about {article(hero)}"
    user += "?" if user.startswith(("Can", "Could")) else rng.choice((".", ".", "", "!"))
    text, slots = story_text(rng, hero, name, plot, place, friend)
    opener = rng.choice(("", "", "", "", "Here is a story. ", "Sure! ", "Of course! "))
    pairs = [Pair(user, opener + text)]
    if rng.random() < 0.35:
        questions = [
            ("[What was|What is] the name of the {h}?", "The name of the {h} was {n}."),
            ("[Who was|Who is] {f}?", "{f} was {a friend}."),
            ("[Who was|Who is] {n}?", "{n} was {a h}."),
            ("[I like it|That was nice|What a nice story|Great story|Lovely|Thank you]!",
             "[I am glad that you like it!|Thank you! I am happy that you like it.]"),
            ("[Another one|Tell me another one|One more story], please[.|]", ""),
        ]  # fmt: skip
        ask, reply = rng.choice(questions)
        kinds = {"h": hero, "n": name, "f": slots["fname"], "friend": slots["friend"]}
        if (f"{slots['fname']}" in text) or "{f}" not in ask:
            answer = expand(rng, reply, **kinds)
            if not answer:
                answer, _ = any_story(rng)
            pairs.append(Pair(expand(rng, ask, **kinds), answer))
    return pairs
