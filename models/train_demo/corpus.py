"""Dialogues put together from exchanges: system prompts, several turns, long conversations.

A document is a list of ``(role, text)`` messages; role ``text`` stands for plain text without any
chat markup.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from . import chat, open_talk, stories, tasks
from .chat import COUNTRIES, Pair
from .grammar import HEROES, NAMES, cap, expand, made_up_word, user_noise

Message = tuple[str, str]
Generator = Callable[[Random], list[Pair]]

WEIGHTED: list[tuple[Generator, float]] = [
    (chat.greeting, 10), (chat.small_talk, 20), (chat.country, 10), (chat.animal, 8),
    (chat.term, 14), (chat.fact, 10), (chat.tip, 8), (chat.how_to, 4), (chat.translation, 4),
    (chat.unknown, 6), (stories.story, 12), (tasks.arithmetic, 14), (tasks.compare, 2),
    (tasks.counting, 4), (tasks.listing, 6), (tasks.copying, 6), (tasks.sorting, 1.5),
    (tasks.as_json, 2), (tasks.remember, 6), (open_talk.puzzled, 4), (open_talk.statement, 4),
    (open_talk.suggestion, 5), (open_talk.choice, 4), (open_talk.difference, 1),
]  # fmt: skip
_GENERATORS = [generator for generator, _ in WEIGHTED]
_WEIGHTS = [weight for _, weight in WEIGHTED]
_SHORT: list[Generator] = [
    chat.country, chat.fact, chat.animal, chat.translation, tasks.arithmetic, tasks.compare,
    chat.term, chat.unknown, tasks.listing,
]  # fmt: skip

GENERIC = [
    "You are a [helpful|friendly|kind|useful|polite] [assistant|AI assistant|chatbot|model].",
    "You are a helpful assistant.[ Answer the questions of the user.| Be friendly.| Be concise.|]",
    "You are Demo, a [small|tiny] language model[ of the dynamo project|].",
    "[Be|Always be] [nice|friendly|helpful|honest|polite][ to the user|].",
    "You are an assistant that helps with {w}.[ Please be polite.|]",
    "Answer as well as you can.",
]
BRIEF = [
    "[Be brief|Answer briefly|Keep your answers short|Answer in as few words as possible].",
    "You are a helpful assistant. [Answer in one word|Give short answers only|Be very brief].",
]
PIRATE = ["You are a pirate.", "Talk like a pirate.", "[Answer|Speak] like a pirate[, please|]."]
EMOJI = ["[Use emojis|Use an emoji|End with an emoji|Add an emoji][ in every answer|].",
         "You are a cheerful assistant who loves emojis."]  # fmt: skip
UPPER = ["[Answer|Write|Reply] in [capital letters|upper case|all caps][ only|]."]
_TOOLS = {
    "get_weather": ("Get the weather of a city", "city", "[What is the weather in|How is the weather "
                    "in|Tell me the weather in|Is it raining in] {v}?"),
    "get_time": ("Get the local time of a city", "city", "[What time is it in|Tell me the time in] {v}?"),
    "search": ("Search the web", "query", "[Search for|Look up|Search the web for|Find] {v}."),
    "play_song": ("Play a song by its title", "title", "[Play|Please play|I want to hear] {v}."),
    "send_message": ("Send a message to a person", "name", "[Send a message to|Write a message to] {v}."),
}  # fmt: skip
_REPORTS = ["sunny", "rainy", "cloudy", "windy", "snowy", "warm", "cold", "foggy"]


def talk(rng: Random, turns: int, generators: list[Generator] | None = None) -> list[Pair]:
    """Exchanges of several kinds after one another."""
    pairs: list[Pair] = []
    while len(pairs) < turns:
        new = rng.choice(generators)(rng) if generators else rng.choices(_GENERATORS, _WEIGHTS)[0](rng)
        if len(new) == 2 and new[1].user and _is_memory(new) and rng.random() < 0.6:
            between = talk(rng, rng.randrange(1, max(2, min(turns, 8))), [chat.fact, chat.small_talk])
            if not any(_is_memory([pair]) for pair in between):
                new = [new[0], *between, new[1]]
        pairs.extend(new)
    return pairs


def _is_memory(pairs: list[Pair]) -> bool:
    return pairs[-1].reply.startswith(("Your name is", "You are from", "It is ", "You have a"))


def messages(rng: Random, pairs: list[Pair], system: str = "") -> list[Message]:
    """Chat messages of exchanges, with the noise of user typing."""
    found: list[Message] = [("system", system)] if system else []
    for pair in pairs:
        exact = pair.reply in pair.user or any(ord(c) > 0x2000 for c in pair.user)
        found.append(("user", pair.user if exact else user_noise(rng, pair.user)))
        found.append(("assistant", pair.reply))
    return found


def persona(rng: Random, turns: int) -> list[Message]:
    """A dialogue under a system prompt that changes how the model answers."""
    roll = rng.random()
    if roll < 0.40:
        name = rng.choice(NAMES) if rng.random() < 0.5 else cap(made_up_word(rng))
        role = rng.choice((rng.choice(HEROES), "assistant", "helpful assistant", "friendly robot",
                           "teacher", "cook", "doctor", "librarian", "guide"))  # fmt: skip
        slots = {"n": name, "r": role}
        system = expand(rng, "[You are {n}, {a r}.|Your name is {n}. You are {a r}.|You are {a r} "
                             "called {n}.][ Be friendly.| Help the user.|]", **slots)  # fmt: skip
        ask = "[Hello! |Hi! |][Who are you|What is your name|What's your name|What are you]?"
        reply = "[Hello! |Hi! |][I am {n}, {a r}.|My name is {n}, and I am {a r}.][ How can I help you?|]"
        pairs = [Pair(expand(rng, ask), expand(rng, reply, **slots))]
        plain: list[Generator] = [chat.fact, chat.country, chat.term, chat.tip, tasks.arithmetic]
        rest = talk(rng, turns, plain) if turns > 1 else []
        return messages(rng, pairs + rest if rng.random() < 0.7 else rest + pairs, system)
    if roll < 0.65:
        pairs = [p._replace(reply=p.short or p.reply) for p in talk(rng, turns, _SHORT)]
        return messages(rng, pairs, expand(rng, rng.choice(BRIEF)))
    pairs = talk(rng, turns)
    if roll < 0.80:
        ends = ("Arr!", "Ahoy!", "Yo ho ho!", "Aye aye!")
        tails = (" Arr!", " Shiver me timbers!", " Yo ho ho!", "")
        pairs = [p._replace(reply=f"{rng.choice(ends)} {p.reply}{rng.choice(tails)}".strip()) for p in pairs]
        return messages(rng, pairs, expand(rng, rng.choice(PIRATE)))
    if roll < 0.92:
        pairs = [p._replace(reply=f"{p.reply} {rng.choice(tasks.EMOJI)}") for p in pairs]
        return messages(rng, pairs, expand(rng, rng.choice(EMOJI)))
    pairs = [p._replace(reply=p.reply.upper()) for p in pairs]
    return messages(rng, pairs, expand(rng, rng.choice(UPPER)))


def tool_use(rng: Random) -> list[Message]:
    """A dialogue in which the model calls a tool and reports its result."""
    names = rng.sample(list(_TOOLS), rng.randrange(1, 4))
    schemas: list[dict[str, object]] = []
    for name in names:
        text, argument, _ = _TOOLS[name]
        parameters: dict[str, object] = {"type": "object", "properties": {argument: {"type": "string"}}}
        if rng.random() < 0.5:
            parameters["required"] = [argument]
        function = {"name": name, "description": text, "parameters": parameters}
        schemas.append({"type": "function", "function": function})
    name = rng.choice(names)
    _, argument, ask = _TOOLS[name]
    value = {"city": rng.choice(COUNTRIES)[1], "name": rng.choice(NAMES)}.get(argument, "")
    value = value or rng.choice((made_up_word(rng), rng.choice(HEROES), rng.choice(chat.TERMS)[0]))
    call = json.dumps({"name": name, "arguments": {argument: value}}, ensure_ascii=False)
    system = expand(rng, rng.choice(GENERIC), w=made_up_word(rng)) if rng.random() < 0.4 else ""
    found = [("system", (system + "\n\n" if system else "") + tools_text(schemas))]
    if rng.random() < 0.25:
        found += messages(rng, talk(rng, 1, [chat.greeting, chat.fact, tasks.arithmetic]))
    found.append(("user", expand(rng, ask, v=value)))
    found.append(("assistant", f"<tool_call>\n{call}\n</tool_call>"))
    if rng.random() < 0.6:
        report = rng.choice(_REPORTS)
        degrees = rng.randrange(-10, 35)
        hour = f"{rng.randrange(24)}:{rng.randrange(10, 60)}"
        result, reply = {
            "get_weather": (f'{{"weather": "{report}", "temperature": {degrees}}}',
                            f"The weather in {value} is {report}, with {degrees} degrees."),
            "get_time": (f'{{"time": "{hour}"}}', f"It is {hour} in {value}."),
            "search": ('{"results": 3}', f"I found 3 results for {value}."),
            "play_song": ('{"status": "playing"}', f"Now playing {value}."),
            "send_message": ('{"status": "sent"}', f"The message to {value} was sent."),
        }[name]  # fmt: skip
        found.append(("user", f"<tool_response>\n{result}\n</tool_response>"))
        found.append(("assistant", reply))
    return found


def tools_text(schemas: list[dict[str, object]]) -> str:
    """The system text that lists the tools; the chat template writes the same."""
    lines = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    return (
        "You may call these tools:\n<tools>\n" + lines + "\n</tools>\nTo call a tool, answer with "
        '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
    )


def document(rng: Random) -> list[Message]:
    """One training document of ordinary length."""
    roll = rng.random()
    if roll < 0.05:
        return [("text", stories.any_story(rng)[0])]
    turns = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6))
    if roll < 0.08:
        return tool_use(rng)
    if roll < 0.20:
        return persona(rng, turns)
    system = expand(rng, rng.choice(GENERIC), w=made_up_word(rng)) if rng.random() < 0.3 else ""
    return messages(rng, talk(rng, turns), system)


def long_document(rng: Random, turns: int) -> list[Message]:
    """A long conversation, with words to remember across it and at times a long text to read."""
    system = expand(rng, rng.choice(GENERIC), w=made_up_word(rng)) if rng.random() < 0.4 else ""
    keep = tasks.remember(rng)
    pairs = talk(rng, turns)
    spot = rng.randrange(0, max(1, len(pairs) // 2))
    pairs[spot:spot] = keep[:1]
    pairs.append(keep[1])
    if rng.random() < 0.5:
        word = made_up_word(rng)
        parts = [stories.any_story(rng)[0] for _ in range(max(2, turns // 2))]
        spot = rng.randrange(len(parts))
        parts[spot] += f" The magic word is {word}."
        text = "\n\n".join(parts)
        ask = expand(rng, "[What is|Find] the magic word[ in the text|]?")
        user = rng.choice((f"{ask}\n\n{text}", f"{text}\n\n{ask}"))
        pairs.append(Pair(user, f"The magic word is {word}.", word))
    pairs += talk(rng, 2)
    return messages(rng, pairs, system)
