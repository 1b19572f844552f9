"""Open-ended talk: statements, suggestions, choices, and questions the model has no answer to."""

from __future__ import annotations

from random import Random

from .chat import ANIMALS, COUNTRIES, HOBBIES, TERMS, Pair
from .grammar import FOODS, HEROES, NAMES, PLACES, THINGS, cap, expand, made_up_word, words

VERBS = words(
    "work, fly, sing, dance, grow, change, fall, move, sleep, run, break, shine, burn, float, cost so much,"
    "purr, bark, laugh, cry, exist, matter, learn, remember things, get old, help people, smell, taste good"
)
DEEDS = words("bought, found, lost, saw, made, sold, got, painted, broke, borrowed, forgot, cleaned, fixed, dropped")
PLANS = words(
    "visit my family, go on holiday, learn to swim, write a book, buy a house, start a new job, cook dinner,"
    "plant a garden, run a race, change my life, go to the beach, meet my friends, move to a new city,"
    "read more, get a dog, build a website, clean the house, go to bed early, play with my children"
)
TIMES = words("today, yesterday, last week, this morning, on Monday, last night, in the park, on my way home")
BASICS = words(
    "people, children, stars, cars, trains, planes, airplanes, computers, phones, magnets, clouds, trees,"
    "birds, boats, plants, robots, engines, batteries, clocks, cells, rockets, bridges, taxes, models, dogs"
)


def _noun(rng: Random) -> str:
    return rng.choice((rng.choice(BASICS), rng.choice(ANIMALS)[7], made_up_word(rng) + "s", rng.choice(BASICS)))


def _verb(rng: Random) -> str:
    return rng.choice(VERBS) if rng.random() < 0.7 else made_up_word(rng)


def puzzled(rng: Random) -> list[Pair]:
    """How and why questions without an answer: the reply repeats what was asked."""
    noun, verb, how = _noun(rng), _verb(rng), rng.choice(("how", "how", "why", "why", "when", "where"))
    if rng.random() < 0.25:
        verb += " " + rng.choice(("in winter", "at night", "in the sea", "on the moon", f"in {made_up_word(rng)}"))
    ask = (
        f"[{cap(how)} do {{n}} {{v}}|Explain {how} {{n}} {{v}}|Do you know {how} {{n}} {{v}}"
        f"|Can you explain {how} {{n}} {{v}}|Tell me {how} {{n}} {{v}}|I wonder {how} {{n}} {{v}}]"
    )
    user = expand(rng, ask, n=noun, v=verb)
    user += "?" if user.startswith((cap(how), "Do", "Can")) else rng.choice((".", ""))
    reply = (
        "[I am sorry, but |I am afraid |]I do not know " + how + " {n} {v}. [I am only a small model."
        "|That is a good question for a bigger model!|A good book could tell you more.|]"
    )
    return [Pair(user, expand(rng, reply, n=noun, v=verb), "I do not know.")]


def statement(rng: Random) -> list[Pair]:
    """Things that the user did, likes or plans."""
    roll = rng.random()
    if roll < 0.4:
        thing = rng.choice((rng.choice(THINGS), rng.choice(HEROES), made_up_word(rng)))
        user = expand(rng, f"I {rng.choice(DEEDS)} {{a t}} {rng.choice(TIMES)}.", t=thing)
        reply = "[That sounds interesting!|Really?|Oh!|I see.] [Tell me more about the {t}|What is the {t} like?]"
        text = expand(rng, reply, t=thing)
        return [Pair(user, text if text.endswith("?") else text + ".")]
    if roll < 0.7:
        plan = rng.choice(PLANS)
        user = expand(rng, "[I want to|I would like to|I am going to|Tomorrow I will|I have to] {p}[.|!]", p=plan)
        reply = "[That sounds good|What a nice plan|Good idea|That is a good plan]! "
        reply += "[When do you want to {p}?|I hope that it goes well."
        reply += "|What do you need in order to {p}?|Enjoy it!]"
        return [Pair(user, expand(rng, reply, p=plan))]
    if roll < 0.85:
        user = "My [brother|sister|mother|father|friend|neighbour|teacher|son|daughter] [is called {n}|likes {f}"
        user += "|is ill|is coming to visit|has a birthday|lives in {c}]."
        reply = "[Thank you for telling me|I see|Oh, I see]. "
        reply += "[Please say hello from me!|Tell me more.|How nice of you to share that.]"
        slots = {"n": rng.choice(NAMES), "f": rng.choice(FOODS), "c": rng.choice(COUNTRIES)[1]}
        return [Pair(expand(rng, user, **slots), expand(rng, reply))]
    noun = _noun(rng)
    user = expand(rng, "[{cap n} are|I think that {n} are] [great|strange|beautiful|too loud|fun|boring|nice].", n=noun)
    reply = "[I see|Interesting|You may be right]. What do you [like|notice] most about {n}?"
    return [Pair(user, expand(rng, reply, n=noun))]


def suggestion(rng: Random) -> list[Pair]:
    """Ideas: what to eat, read, do, give or call a pet."""
    food, hobby, place = rng.choice(FOODS), rng.choice(HOBBIES), rng.choice(PLACES)
    name, thing, city = rng.choice(NAMES), rng.choice(THINGS), rng.choice(COUNTRIES)[1]
    pet, hero = rng.choice(ANIMALS)[0], rng.choice(HEROES)
    options = [
        ("[What should I|What can I|What shall I] [eat|cook|have|make] [today|for dinner|for lunch"
         "|for breakfast|tonight]?",
         "[How about {f}?|You could try {f}.|Why not try {f}?] [It is simple and good.|Enjoy your meal!|]"),
        ("[What should I do|What can I do|Any ideas what to do] [today|this weekend|tonight"
         "|on Sunday|with my friends]?",
         "[How about {h}?|You could try {h}.|Why not try {h}?] [It is fun alone and with friends.|Enjoy it!|]"),
        ("[Suggest a name for|Give me a name for|What should I call|I need a name for] my [new |]{p}[.|?|]",
         "[How about {n}?|You could choose {n}.|I like {n}.] It [suits|is a good name for] a {p}."),
        ("[What should I buy|What can I give|Suggest a gift|I need a gift] for my [friend|mother"
         "|father|sister|brother]?",
         "[How about {a t}?|You could give {a t}.] [A small note makes it even better.|A good book is nice too.|]"),
        ("[Where should I go|Where can I travel|Suggest a city to visit|Where should I spend my holiday]?",
         "[How about {c}?|You could visit {c}.] [I have heard that it is lovely.|Take a good book with you.|]"),
        ("[What should I read|Recommend a book|Suggest a book|What book should I read]?",
         "[How about|You could read] a book about {a r} in {l}. [Fairy tales are always good.|]"),
        ("[Give me a sentence with|Write a sentence with|Use|Make a sentence with] the word {r}[ in a sentence|].",
         "The {r} [found|lost|saw|made] {a t} in {l}."),
        ("[Write|Give me|Make up] [a slogan|a motto|a headline] for [my shop|my team|my school|my {p}][.|]",
         "[Small steps, big joy!|Together we go further!|Good work, good friends!|Bright days start here!]"),
        ("[Write|Help me write|Can you write] [an email|a letter|a message|a note] to [my boss"
         "|my friend|{n}|my teacher][.|]",
         "Dear [friend|{n}],\n\nI hope that you are well. I am writing to [say thank you"
         "|ask for your help|tell you the news].\n\n[Best wishes|Kind regards]"),
    ]  # fmt: skip
    slots = {"f": food, "h": hobby, "p": pet, "n": name, "t": thing, "c": city, "r": hero, "l": place}
    ask, reply = rng.choice(options)
    return [Pair(expand(rng, ask, **slots), expand(rng, reply, **slots))]


def choice(rng: Random) -> list[Pair]:
    """Which of two things, and simple yes-or-no questions."""
    if rng.random() < 0.5:
        pool = rng.choice((FOODS, HOBBIES, [row[1] for row in COUNTRIES], BASICS, NAMES))
        one, two = rng.sample(pool, 2)
        if rng.random() < 0.3:
            one, two = made_up_word(rng), made_up_word(rng)
        picked = rng.choice((one, two))
        ask = "[Which is better|Which do you prefer|What is better|What do you like more|What should I choose], "
        ask += "{x} or {b}?"
        reply = "[I would choose|I like|Hard to say, but I would pick] {p}[.|, but both are good.|. And you?]"
        return [Pair(expand(rng, ask, x=one, b=two), expand(rng, reply, p=picked), cap(picked) + ".")]
    row, other = rng.choice(ANIMALS), rng.choice(ANIMALS)
    kind = row[1] if rng.random() < 0.5 else other[1]
    name = row[0]
    yes = kind == row[1]
    ask = expand(rng, "[Is {a n} {a k}|Are {p} {k}s]?", n=name, k=kind, p=row[7]).replace("fishs", "fish")
    reply = expand(rng, "Yes, {a n} is {a k}." if yes else "No, {a n} is {a r}.", n=name, k=kind, r=row[1])
    return [Pair(ask, reply, "Yes." if yes else "No.")]


def difference(rng: Random) -> list[Pair]:
    """The difference between two known terms, told by their meanings."""
    one, two = rng.sample(TERMS, 2)
    user = f"What is the difference between {one[0]} and {two[0]}?"
    return [Pair(user, f"{cap(one[0])} is {one[1]}. {cap(two[0])} is {two[1]}.")]
