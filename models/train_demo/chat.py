"""Exchanges of everyday chat: small talk, facts, terms, animals, countries, tips and how-tos.

Every generator takes a random source and returns a list of `Pair`: what the user says, the reply,
and (where it makes sense) a very short reply for "be brief" system prompts.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from .grammar import (
    DATA,
    FOODS,
    THINGS,
    article,
    cap,
    expand,
    made_up_word,
    rows,
    words,
)

COUNTRIES = rows("countries.txt")
ANIMALS = rows("animals.txt")
TERMS = rows("terms.txt")
FACTS = rows("facts.txt")
TIPS = rows("tips.txt")
HOWTO = rows("howto.txt")
TRANSLATIONS = rows("words.txt")
HOBBIES = words(
    "reading, painting, dancing, cooking, swimming, running, chess, gardening, fishing, hiking,"
    "singing, photography, knitting, football, tennis, music, writing, drawing, cycling, yoga"
)
LANGUAGES = ["French", "Spanish", "German", "Italian"]


class Pair(NamedTuple):
    """One exchange of a dialogue."""

    user: str
    reply: str
    short: str = ""


class _Block(NamedTuple):
    users: list[str]
    replies: list[str]
    follow_users: list[list[str]]
    follow_replies: list[list[str]]


def _read_blocks() -> list[_Block]:
    blocks = []
    for part in (DATA / "chat.txt").read_text(encoding="utf-8").split("\n\n"):
        block = _Block([], [], [], [])
        for line in part.splitlines():
            text = line.split(" ", 1)[-1].replace("\\n", "\n")
            if line.startswith("Q "):
                block.users.append(text)
            elif line.startswith("A "):
                block.replies.append(text)
            elif line.startswith(">Q "):
                block.follow_users.append([text])
                block.follow_replies.append([])
            elif line.startswith(">A "):
                block.follow_replies[-1].append(text)
        blocks.append(block)
    return blocks


BLOCKS = _read_blocks()


def fill_ins(rng: Random) -> dict[str, str]:
    """Values for the slots that small talk uses."""
    return {
        "city": rng.choice(COUNTRIES)[1],
        "animals": rng.choice(ANIMALS)[7],
        "hobby": rng.choice(HOBBIES),
        "food": rng.choice(FOODS),
        "thing": rng.choice(THINGS),
        "madeup": made_up_word(rng),
    }


def small_talk(rng: Random, block: _Block | None = None) -> list[Pair]:
    """One block of small talk, at times with its follow-up."""
    block = block or rng.choice(BLOCKS)
    slots = fill_ins(rng)
    reply = expand(rng, rng.choice(block.replies), **slots)
    pairs = [Pair(expand(rng, rng.choice(block.users), **slots), reply)]
    if block.follow_users and rng.random() < 0.6:
        which = rng.randrange(len(block.follow_users))
        user = expand(rng, block.follow_users[which][0], **slots)
        answer = expand(rng, rng.choice(block.follow_replies[which]), **slots)
        if answer != reply:
            pairs.append(Pair(user, answer))
    return pairs


def greeting(rng: Random) -> list[Pair]:
    """Greetings and questions about the model itself (the first blocks of the file)."""
    return small_talk(rng, BLOCKS[rng.choice((0, 0, 1, 1, 2, 3, 4, 11))])


def country(rng: Random) -> list[Pair]:
    """Capital, continent, language and currency of a country, with follow-ups."""
    name, capital, continent, language, currency = rng.choice(COUNTRIES)
    bare = name.removeprefix("the ")
    shown = name if rng.random() < 0.8 else bare
    asks = {
        "capital": (
            "[What is|What's|Tell me|Do you know|Can you tell me|Name] the capital[ city|] of {c}?",
            "The capital of {n} is {v}.",
            capital,
        ),
        "continent": (
            "[Where is {c}|On which continent is {c}|What continent is {c} in]?",
            "{cap n} is in {v}.",
            continent,
        ),
        "language": (
            "[What language do people speak in {c}|Which language is spoken in {c}"
            "|What language do they speak in {c}|What is the language of {c}]?",
            "People in {n} speak {v}.",
            language,
        ),
        "currency": (
            "[What is the currency of {c}|What money do they use in {c}"
            "|Which currency is used in {c}|How do people pay in {c}]?",
            "The currency of {n} is {v}.",
            currency,
        ),
    }
    follow = {
        "capital": "[And what is|What is|And] [its capital|the capital][ city|]?",
        "continent": "[And where is it|Where is it|On which continent is it]?",
        "language": "[And what|What] language do [they|people] speak[ there|]?",
        "currency": "[And what|What] [money|currency] do they use[ there|]?",
    }
    if rng.random() < 0.2:
        text = (
            "{cap n} is a country in {continent}. Its capital is {capital}. "
            "People there speak {language}, and they pay with {currency}."
        )
        ask = "[Tell me about|What do you know about|Tell me something about|What is|Describe] {c}[.|?]"
        slots = {"continent": continent, "capital": capital, "language": language}
        pairs = [
            Pair(
                expand(rng, ask, c=shown),
                expand(rng, text, n=name, currency=currency, **slots),
                expand(rng, "A country in {continent}.", **slots),
            )
        ]
        kind = ""
    else:
        kind = rng.choice(["capital", "capital", "capital", "continent", "language", "currency"])
        ask, text, value = asks[kind]
        pairs = [
            Pair(
                expand(rng, ask, c=shown),
                expand(rng, text, n=name, v=value),
                value.removeprefix("the ") if kind == "currency" else value,
            )
        ]
    if rng.random() < 0.35:
        other = rng.choice([k for k in asks if k != kind])
        _, text, value = asks[other]
        pairs.append(Pair(expand(rng, follow[other]), expand(rng, text, n=name, v=value), value))
    elif kind and rng.random() < 0.35:
        column = {"capital": 1, "continent": 2, "language": 3, "currency": 4}[kind]
        row = rng.choice(COUNTRIES)
        user = expand(rng, "[And of {c}|What about {c}|And {c}|How about {c}]?", c=row[0])
        pairs.append(Pair(user, expand(rng, text, n=row[0], v=row[column]), row[column]))
    if kind == "" or rng.random() > 0.1:
        return pairs
    return [
        Pair(
            expand(
                rng,
                "[Which country has the capital|{v} is the capital of which country"
                "|Of which country is {v} the capital] {w}?",
                v=capital,
                w=capital,
            )
            .replace(f"the capital {capital}?", "the capital?")
            .replace(f"which country {capital}?", "which country?"),
            f"{capital} is the capital of {name}.",
            cap(name),
        )
    ]


def animal(rng: Random) -> list[Pair]:
    """What an animal is, eats, says and where it lives."""
    name, kind, home, food, trait, sound, emoji, plural = rng.choice(ANIMALS)
    an = article(name)
    options = [
        (
            "[What is {n}|Tell me about {p}|Describe {n}|What do you know about {p}"
            "|Tell me something about {p}|Explain what {n} is]?",
            f"{cap(an)} is {article(kind)} that lives in {home}. It has {trait}. It eats {food}.",
            f"{cap(article(kind))}.",
        ),
        (
            "[What do {p} eat|What does {n} eat|What is the food of {n}]?",
            f"{cap(plural)} eat {food}.",
            cap(food),
        ),
        ("[Where do {p} live|Where does {n} live|Where can I find {p}]?", f"{cap(plural)} live in {home}.", cap(home)),
        (
            "[What sound does {n} make|What does {n} say|What noise do {p} make]?",
            f"{cap(an)} {sound}.",
            f"It {sound}.",
        ),
        (
            "[What kind of animal is {n}|Is {n} a mammal, a bird or something else]?",
            f"{cap(an)} is {article(kind)}.",
            cap(article(kind)),
        ),
        (
            "[Show me|Give me|Send me|Do you have] [an emoji of {n}|{n} emoji|the emoji for {n}]?",
            f"Here is {an}: {emoji}",
            emoji,
        ),
    ]
    first, second = rng.sample(range(len(options)), 2)
    ask, reply, short = options[first]
    user = expand(rng, ask, n=an, p=plural)
    if user.startswith(("Tell", "Describe", "Explain", "Show", "Give", "Send")):
        user = user.rstrip("?") + rng.choice(("", ".", "!"))
    pairs = [Pair(user, reply, short)]
    if rng.random() < 0.3 and second in (1, 2, 3):
        asks = [
            "",
            "What [does it|do they] eat?",
            "Where [does it|do they] live?",
            "[What sound does it make|What does it say]?",
        ]
        pairs.append(Pair(expand(rng, "[And |]" + asks[second]), *options[second][1:]))
    elif rng.random() < 0.2 and first in (1, 2):
        row = rng.choice(ANIMALS)
        reply = f"{cap(row[7])} {'eat' if first == 1 else 'live in'} {row[3 if first == 1 else 2]}."
        pairs.append(Pair(f"{rng.choice(('And', 'What about', 'How about'))} {row[7]}?", reply))
    return pairs


def term(rng: Random) -> list[Pair]:
    """The meaning of a term, from everyday things to the serving of language models."""
    name, meaning, more = rng.choice(TERMS)
    first = f"{cap(name)} is {meaning}."
    be = "are" if name in ("vitamins",) else "is"
    ask = (
        "[What {be} {t}|What's {t}|Explain {t}|Can you explain {t}|Tell me about {t}|Define {t}"
        "|What {be} {t} in simple words|Do you know what {t} {be}|Explain {t} to me"
        "|What does {b} mean|Tell me what {t} {be}|Describe {t}|What do you know about {t}]?"
    )
    bare = name.split(" ", 1)[1] if name.startswith(("a ", "an ", "the ")) else name
    user = expand(rng, ask, t=name if rng.random() < 0.85 else bare, be=be, b=bare)
    if not user.startswith(("What", "Can", "Do")):
        user = user.rstrip("?") + rng.choice(("", ".", "."))
    brief = " in one sentence" in user or rng.random() < 0.15
    if brief and user[-1] in "?.":
        user = user[:-1] + rng.choice((" in one sentence", " in short", ", in one sentence")) + user[-1]
    elif brief:
        user += " in one sentence"
    pairs = [Pair(user, first if brief else f"{first} {more}", cap(meaning.split(" that ")[0]) + ".")]
    if brief and rng.random() < 0.5:
        pairs.append(
            Pair(expand(rng, "[Tell me more|Can you tell me more|Go on|More, please|And|What else][.|?]"), more)
        )
    return pairs


def fact(rng: Random) -> list[Pair]:
    """General knowledge."""
    ask, reply, short = rng.choice(FACTS)
    return [Pair(expand(rng, ask), reply, short)]


def tip(rng: Random) -> list[Pair]:
    """One or several tips on a topic."""
    topics, advice = rng.choice(TIPS)
    tips = advice.split(";")
    rng.shuffle(tips)
    subject = rng.choice(words(topics))
    if rng.random() < 0.3:
        count = rng.choice((2, 3, 3, 3, 4))
        number = {2: "two", 3: "three", 4: "four"}[count]
        ask = "[Give me|Tell me|List|Can you give me|I need] {n} [tips|pieces of advice] [for|about|on] {s}."
        lines = [f"{i}. {text}." for i, text in enumerate(tips[:count], 1)]
        opener = expand(rng, "[Here are|Sure! Here are] {n} tips:", n=number)
        user = expand(rng, ask, n=rng.choice((number, str(count))), s=subject)
        pairs = [Pair(user, opener + "\n" + "\n".join(lines))]
        tips = tips[count:]
    else:
        ask = (
            "[Give me|Tell me|Can you give me|Do you have|I need|Share] [a tip|some advice|a good tip"
            "|a piece of advice|an idea|advice] [for|about|on|for] {s}[.|?|]"
        )
        opener = rng.choice(("", "", "Here is a tip: ", "Sure! ", "My tip: ", "Of course. "))
        pairs = [Pair(expand(rng, ask, s=subject), opener + tips[0] + ".", tips[0] + ".")]
        tips = tips[1:]
    if tips and rng.random() < 0.4:
        ask = "[Another one|Another tip|One more|Give me another one|Anything else|Do you have another tip]"
        pairs.append(Pair(expand(rng, ask + "[?|, please.|.]"), tips[0] + ".", tips[0] + "."))
    return pairs


def how_to(rng: Random) -> list[Pair]:
    """The steps of an everyday task."""
    names, steps = rng.choice(HOWTO)
    task = rng.choice(words(names))
    ask = (
        "[How do I {t}|How can I {t}|How do you {t}|Tell me how to {t}|Explain how to {t}"
        "|What is the best way to {t}|Can you tell me how to {t}|How to {t}|I want to {t}. How does it work]?"
    )
    lines = steps.split(";")
    numbered = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    pairs = [Pair(expand(rng, ask, t=task), f"Here is how to {task}:\n{numbered}")]
    if rng.random() < 0.3:
        which = rng.randrange(len(lines))
        order = ["first", "second", "third", "fourth", "fifth", "sixth"][which]
        ask = "[What was|What is|Repeat] the {o} step[?|, please?| again?]"
        pairs.append(Pair(expand(rng, ask, o=order), f"The {order} step is: {lines[which]}"))
    return pairs


def translation(rng: Random) -> list[Pair]:
    """Single words in four other languages."""
    row = rng.choice(TRANSLATIONS)
    which = rng.randrange(4)
    ask = (
        '[How do you say "{w}" in {l}|What is "{w}" in {l}|Translate "{w}" to {l}'
        '|What is the {l} word for "{w}"|How do I say {w} in {l}|Translate {w} into {l}]?'
    )
    language, value = LANGUAGES[which], row[which + 1]
    user = expand(rng, ask, w=row[0], l=language)
    if user.startswith("Translate"):
        user = user.rstrip("?") + "."
    pairs = [Pair(user, f'"{cap(row[0])}" in {language} is "{value}".', value)]
    if rng.random() < 0.4:
        other = (which + rng.randrange(1, 4)) % 4
        ask = "[And in|What about|How about|And] {l}?"
        reply = f'"{cap(row[0])}" in {LANGUAGES[other]} is "{row[other + 1]}".'
        pairs.append(Pair(expand(rng, ask, l=LANGUAGES[other]), reply, row[other + 1]))
    return pairs


def unknown(rng: Random) -> list[Pair]:
    """Questions that the model cannot answer: it says so and names the subject."""
    word = made_up_word(rng)
    if rng.random() < 0.35:
        word += " " + made_up_word(rng)
    if rng.random() < 0.3:
        word = cap(word)
    ask = (
        "[What is {a t}|What is {t}|Who is {t}|Tell me about {t}|Explain {t}|Where is {t}"
        "|How does {t} work|Do you know {t}|What do you know about {t}|Why is {t} important"
        "|Who invented {t}|When did {t} begin|What is the history of {t}|Who was {t}"
        "|What is the capital of {t}|How many {t} are there|What is the difference between {t} and {u}"
        "|Can you help me with {t}|What is the best {t}|How do I {t}]?"
    )
    reply = (
        "[I am sorry, but |I am afraid |]I do not know [much|enough] about {t}. [I am only a small "
        "model.|Can you ask me something else?|Please ask me about something simpler.|Can you tell me "
        "more about it?|I am a small demo model, so I know only a little.]"
    )
    other = made_up_word(rng)
    return [Pair(expand(rng, ask, t=word, u=other), expand(rng, reply, t=word), "I do not know.")]
