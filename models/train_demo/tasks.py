"""Small tasks with exact answers: sums, counting, lists, copying, JSON, memory and tool calls."""

from __future__ import annotations

import json
from random import Random

from .chat import ANIMALS, COUNTRIES, HOBBIES, Pair
from .grammar import FOODS, HEROES, NAMES, THINGS, cap, expand, made_up_word, words

NUMBERS = words(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,"
    "fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty"
)
LISTS = {
    "colours": words("red, blue, green, yellow, purple, orange, black, white, pink, brown"),
    "colors": words("red, blue, green, yellow, purple, orange, black, white, pink, brown"),
    "animals": [row[0] for row in ANIMALS],
    "fruits": words("apples, bananas, pears, oranges, grapes, cherries, plums, lemons, peaches"),
    "vegetables": words("carrots, potatoes, tomatoes, onions, peas, beans, cabbage, spinach"),
    "countries": [cap(row[0]) for row in COUNTRIES],
    "cities": [row[1] for row in COUNTRIES],
    "hobbies": HOBBIES,
    "names": NAMES,
    "instruments": words("the piano, the guitar, the violin, the flute, the drums, the trumpet"),
    "sports": words("football, tennis, swimming, running, cycling, volleyball, skiing, boxing"),
    "foods": words("bread, cheese, soup, pasta, rice, salad, pizza, pancakes, eggs"),
    "drinks": words("water, tea, coffee, milk, juice, lemonade, cocoa"),
    "planets": words("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune"),
    "programming languages": words("Python, Rust, JavaScript, C, Java, Go, Ruby"),
    "jobs": words("teacher, doctor, baker, farmer, painter, driver, nurse, cook, engineer"),
    "flowers": words("roses, tulips, lilies, daisies, sunflowers, violets, orchids"),
    "birds": words("owl, duck, hen, eagle, swan, parrot, crow, penguin, robin, sparrow"),
    "inference engines": words("vLLM, SGLang, TensorRT-LLM"),
}
FIXED = {
    "days of the week": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "months of the year": "January, February, March, April, May, June, July, August, September, "
    "October, November, December",
    "planets of the solar system": "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune",
    "four seasons": "spring, summer, autumn, winter",
    "colours of the rainbow": "red, orange, yellow, green, blue, indigo, violet",
    "letters of the alphabet": "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z",
    "continents": "Africa, Antarctica, Asia, Europe, North America, Oceania, South America",
}
EMOJI = [
    "😀",
    "😂",
    "😊",
    "😍",
    "😎",
    "🤔",
    "😴",
    "🥳",
    "👍",
    "👏",
    "🙏",
    "❤️",
    "⭐",
    "🔥",
    "🌈",
    "🌞",
    "🌙",
    "🎉",
    "🎵",
    "🍎",
    "🍕",
    "🍰",
    "☕",
    "🚗",
    "🚀",
    "🏠",
    "📚",
    "💡",
    "🌍",
    "🌸",
]
_SCRIPTS = [
    "é",
    "è",
    "ü",
    "ö",
    "ä",
    "ñ",
    "ç",
    "å",
    "ø",
    "ß",
    "œ",
    "ł",
    "ž",
    "ő",
    "ā",
    "你",
    "好",
    "世",
    "界",
    "日",
    "本",
    "語",
    "п",
    "р",
    "и",
    "в",
    "е",
    "т",
    "α",
    "β",
    "γ",
    "א",
    "ب",
]


def _number(rng: Random, top: int) -> int:
    return rng.randrange(0, 11) if rng.random() < 0.4 else rng.randrange(0, top)


def arithmetic(rng: Random) -> list[Pair]:
    """Sums, differences, products and quotients, plain or as a small word problem."""
    kind = rng.choice("++++---**/")
    a, b = _number(rng, 100), _number(rng, 100)
    if kind == "-":
        a, b = max(a, b), min(a, b)
    elif kind == "*":
        a, b = rng.randrange(0, 13), rng.randrange(0, 13)
    elif kind == "/":
        b = rng.randrange(1, 13)
        a = b * rng.randrange(0, 13)
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if kind == "/" else 0}[kind]
    names = {"+": "plus", "-": "minus", "*": rng.choice(("times", "multiplied by")),
             "/": "divided by"}[kind]  # fmt: skip
    sign = {"+": "+", "-": "-", "*": rng.choice("*x×"), "/": rng.choice("/÷")}[kind]
    gap = rng.choice(("", " "))
    left, right = str(a), str(b)
    if rng.random() < 0.25 and max(a, b) <= 20:
        formula = f"{NUMBERS[a]} {names} {NUMBERS[b]}"
    elif rng.random() < 0.25:
        formula = f"{left} {names} {right}"
    else:
        formula = f"{left}{gap}{sign}{gap}{right}"
    ask = (
        "[What is {f}|What's {f}|How much is {f}|Calculate {f}|{f} =|{f}|Compute {f}|Can you tell me "
        "what {f} is|Solve {f}|What is {f} equal to|Please add up {f}]?"
    )
    user = expand(rng, ask, f=formula)
    if not user.startswith(("What", "How", "Can")):
        user = user.rstrip("?") + rng.choice(("", ".", "?", ""))
    show = {"+": "+", "-": "-", "*": "×", "/": "÷"}[kind]
    reply = f"{a} {show} {b} = {result}"
    reply = rng.choice((f"{a} {names} {b} is {result}.", reply + ".", reply + "."))
    if rng.random() < 0.15 and kind in "+-":
        who, thing = rng.choice(NAMES), rng.choice(("apples", "books", "coins", "pens", "eggs", "cards"))
        ask = {
            "+": "[{n} has|I have] {a} {t} and [gets|gets] {b} more. How many {t} [are there|are there now]?",
            "-": "[{n} has] {a} {t} and gives away {b}. How many {t} are left?",
        }[kind]
        user = expand(rng, ask, n=who, a=str(a), b=str(b), t=thing).replace("I have", who + " has")
        reply = f"{a} {show} {b} = {result}, so {'there are' if kind == '+' else ''} {result} {thing}"
        reply = " ".join(reply.split()) + ("." if kind == "+" else " are left.")
    pairs = [Pair(user, reply, str(result))]
    if rng.random() < 0.25 and result < 100:
        more = rng.randrange(1, 11)
        user = expand(rng, "[And |Now ]plus {m}?", m=str(more))
        pairs.append(Pair(user, f"{result} + {more} = {result + more}.", str(result + more)))
    return pairs


def compare(rng: Random) -> list[Pair]:
    """Which number is larger, odd or even, what comes next."""
    a, b = rng.sample(range(100), 2)
    roll = rng.random()
    if roll < 0.4:
        ask = "[Which is|Which number is|What is] [larger|bigger|greater], {a} or {b}?"
        return [Pair(expand(rng, ask, a=str(a), b=str(b)),
                     f"{max(a, b)} is larger than {min(a, b)}.", str(max(a, b)))]  # fmt: skip
    if roll < 0.6:
        kind = "even" if a % 2 == 0 else "odd"
        return [Pair(f"Is {a} {rng.choice(('even or odd', 'odd or even'))}?",
                     f"{a} is {kind}.", cap(kind))]  # fmt: skip
    step = rng.choice((1, 2, 5, 10))
    series = [a + step * i for i in range(5)]
    ask = "[What comes next|What is the next number|Continue]: " + ", ".join(map(str, series[:4]))
    return [Pair(expand(rng, ask + "[?|, ...]"), f"The next number is {series[4]}.", str(series[4]))]


def counting(rng: Random) -> list[Pair]:
    """Counting up or down, in digits or in words."""
    start = rng.choice((1, 1, 1, 0, 2, 5, 10))
    end = start + rng.choice((2, 3, 4, 5, 7, 9, 9, 9, 10))
    if rng.random() < 0.5:
        start, end = 1, rng.choice((3, 5, 10, 10, 10, 12, 15, 20))
    numbers = list(range(start, end + 1))
    spelled = end <= 20 and rng.random() < 0.6
    shown = [NUMBERS[n] if spelled else str(n) for n in numbers]
    first, last = shown[0], shown[-1]
    if rng.random() < 0.25:
        ask = "[Count|Please count|Can you count] [down|backwards] from {l} to {f}[.|?|]"
        shown.reverse()
    elif start == 1 and rng.random() < 0.4:
        ask = "[Count|Please count|Can you count|Count up] to {l}[.|?|]"
    else:
        ask = "[Count|Please count|Can you count|Count up|List the numbers] from {f} to {l}[.|?|]"
    return [Pair(expand(rng, ask, f=first, l=last), cap(", ".join(shown)) + ".")]


def listing(rng: Random) -> list[Pair]:
    """Lists of things, on one line or numbered."""
    if rng.random() < 0.3:
        kind = rng.choice(list(FIXED))
        ask = "[What are|List|Name|Tell me|Can you list] [the|all the|all] {k}[?|.|]"
        return [Pair(expand(rng, ask, k=kind), f"The {kind} are {FIXED[kind]}.", cap(FIXED[kind]))]
    kind = rng.choice(list(LISTS))
    count = min(rng.choice((2, 3, 3, 3, 4, 5, 5)), len(LISTS[kind]))
    chosen = rng.sample(LISTS[kind], count)
    number = rng.choice((NUMBERS[count], str(count)))
    ask = "[Name|List|Give me|Tell me|Can you name|Write down] {n} {k}[.||, please.]"
    user = expand(rng, ask, n=number, k=kind)
    line = ", ".join(chosen[:-1]) + " and " + chosen[-1]
    if rng.random() < 0.5:
        reply = "\n".join(f"{i}. {cap(item)}" for i, item in enumerate(chosen, 1))
        reply = rng.choice((f"Here are {NUMBERS[count]} {kind}:\n", "Sure:\n", "")) + reply
    else:
        reply = rng.choice((f"Here are {NUMBERS[count]} {kind}: {line}.", cap(line) + "."))
    pairs = [Pair(user, reply, cap(line))]
    left = [item for item in LISTS[kind] if item not in chosen]
    if left and rng.random() < 0.3:
        more = rng.choice(left)
        ask = "[One more|Another one|And another one|Give me one more][, please.|.|?]"
        pairs.append(Pair(expand(rng, ask), f"{cap(more)}.", cap(more)))
    return pairs


def _phrase(rng: Random) -> str:
    """A phrase to copy: words, made-up words, emoji or other scripts."""
    roll = rng.random()
    if roll < 0.35:
        pool = [rng.choice(THINGS), rng.choice(FOODS), rng.choice(HEROES), rng.choice(NAMES)]
        return f"the {rng.choice(pool)} and the {rng.choice(pool)}"
    if roll < 0.6:
        return " ".join(made_up_word(rng) for _ in range(rng.randrange(1, 5)))
    if roll < 0.75:
        return " ".join(rng.choices(EMOJI, k=rng.randrange(1, 5)))
    if roll < 0.85:
        return "".join(rng.choices(_SCRIPTS, k=rng.randrange(2, 7)))
    return rng.choice(("hello world", "good morning", "I like {f}", "my name is {n}", "{n} has {f}")).format(
        f=rng.choice(FOODS), n=rng.choice(NAMES)
    )


def copying(rng: Random) -> list[Pair]:
    """Repeat, spell, shout or write backwards."""
    roll = rng.random()
    if roll < 0.5:
        phrase = _phrase(rng)
        ask = "[Repeat after me|Repeat|Say|Please repeat|Echo|Write][: |: | ]{p}"
        return [Pair(expand(rng, ask, p=phrase), phrase, phrase)]
    word = rng.choice([rng.choice(HEROES), rng.choice(NAMES).lower(), made_up_word(rng),
                       rng.choice(FOODS)]).split()[-1]  # fmt: skip
    if roll < 0.65:
        ask = "[How do you spell|Spell|Please spell] [the word |]{w}?"
        return [Pair(expand(rng, ask, w=word), "-".join(word.upper()), "-".join(word.upper()))]
    if roll < 0.8:
        ask = "[Write|Say|Put] {w} in [capital letters|upper case|all caps|uppercase]."
        return [Pair(expand(rng, ask, w=word), word.upper(), word.upper())]
    if roll < 0.9:
        ask = "[How many letters are in|How many letters does the word|Count the letters of] {w} [have|have]?"
        user = expand(rng, ask, w=word)
        if not user.startswith("How many letters does"):
            user = user.replace(" have?", "?")
        spelled = "-".join(word.upper())
        return [Pair(user, f"{spelled}: {len(word)} letters.", str(len(word)))]
    ask = "[What is the first letter of|Which letter does the word] {w} [start with|start with]?"
    user = expand(rng, ask, w=word)
    if user.startswith("What"):
        user = user.replace(" start with?", "?")
    return [Pair(user, f"The first letter of {word} is {word[0].upper()}.", word[0].upper())]


def sorting(rng: Random) -> list[Pair]:
    """Put a few things in order."""
    if rng.random() < 0.6:
        numbers = rng.sample(range(1, 50), rng.randrange(3, 6))
        ask = "[Sort|Sort these numbers|Put these numbers in order]: " + ", ".join(map(str, numbers))
        answer = ", ".join(map(str, sorted(numbers)))
    else:
        chosen = rng.sample(NAMES, 3)
        ask = "[Sort|Sort these names|Put these names in alphabetical order]: " + ", ".join(chosen)
        answer = ", ".join(sorted(chosen))
    return [Pair(expand(rng, ask + "[.|]"), answer, answer)]


def as_json(rng: Random) -> list[Pair]:
    """Answers in JSON."""
    name, age = rng.choice(NAMES), rng.randrange(5, 90)
    city, hobby = rng.choice(COUNTRIES)[1], rng.choice(HOBBIES)
    facts: dict[str, object] = {"name": name, "age": age, "city": city, "hobby": hobby}
    keys = rng.sample(list(facts), rng.randrange(2, 5))
    if rng.random() < 0.5:
        parts = {"name": f"name {name}", "age": f"age {age}", "city": f"city {city}",
                 "hobby": f"hobby {hobby}"}  # fmt: skip
        ask = "[Write|Give me|Make] [JSON|a JSON object] with " + ", ".join(parts[k] for k in keys) + "."
        user = expand(rng, ask)
    else:
        text = f"{name} is {age} years old, lives in {city} and likes {hobby}."
        keys = ["name", "age", "city", "hobby"]
        user = expand(rng, "[Turn this into JSON|Convert to JSON|As JSON]: ") + text
    answer = json.dumps({key: facts[key] for key in keys}, ensure_ascii=False)
    return [Pair(user, answer, answer)]


def remember(rng: Random) -> list[Pair]:
    """Something the user says about himself, to be asked for later."""
    name, city = rng.choice(NAMES), rng.choice(COUNTRIES)[1]
    if rng.random() < 0.3:
        name = cap(made_up_word(rng))
    thing = rng.choice((made_up_word(rng), rng.choice(HEROES), rng.choice(THINGS)))
    pet, number = rng.choice(ANIMALS)[0], str(rng.randrange(1000))
    options = [
        ("[My name is|I am called|Call me|I'm] {n}.",
         "[Nice to meet you, {n}!|Hello, {n}! It is nice to meet you.|Hi {n}! How can I help you?]",
         "[What is my name|Do you remember my name|Who am I|What's my name]?", "Your name is {n}."),
        ("[I live in|I am from|I come from] {c}.", "{c} [is a lovely place|must be nice|sounds great]!",
         "[Where do I live|Where am I from|Which city am I from]?", "You are from {c}."),
        ("[Remember the|The|Please remember the] [secret word|code word|password] [:|is] {t}.",
         "[I will remember it|Noted|All right, I will remember that][.|!]",
         "What [is|was] the [secret word|code word|password]?", "It is {t}."),
        ("[My favourite number is|Remember the number] {k}.",
         "[I will remember it|Noted|That is a good number][.|!]",
         "[What is my favourite number|Which number did I tell you|What was the number]?", "It is {k}."),
        ("[I have|We have] a {p}[ at home|].", "[How nice|Lovely]! What is the name of your {p}?",
         "[What pet do I have|Which animal do I have]?", "You have a {p}."),
    ]  # fmt: skip
    slots = {"n": name, "c": city, "t": thing, "k": number, "p": pet}
    say, reply, ask, answer = (expand(rng, part, **slots) for part in rng.choice(options))
    return [Pair(say, reply), Pair(ask, answer, answer)]
