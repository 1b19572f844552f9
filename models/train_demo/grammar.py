"""A tiny text grammar: templates with choices and slots, word pools and user wording noise.

A template may hold choices, ``[a|b|c]`` (they nest, and an empty choice is allowed), and slots,
``{word}``.  ``{a word}`` puts the right article before the slot's value, ``{A word}`` does so with
a capital, and ``{cap word}`` only capitalises the value.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

DATA = Path(__file__).parent / "data"

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(a |A |cap )?(\w+)\}")
_COLUMN = re.compile(r"\|(?![^\[]*\])")  # a bar that is not inside a choice
_SPACES = re.compile(r" {2,}")


def words(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


NAMES = words(
    "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Iris, Jack, Kate, Leo, Mia, Noah, Olivia,"
    "Paul, Quinn, Rosa, Sam, Tom, Uma, Victor, Wendy, Max, Yara, Zoe, Lily, Oscar, Ruby, Theo, Nina,"
    "Omar, Priya, Chen, Sofia, Luca, Ada, Hugo, Maya, Finn, Ella, Milo, Lucy, Peter, Mary, John,"
    "Alice, Bob, Charlie, Daisy, Eva, Frank, Gina, Ivan, Julia, Kim, Laura, Mark, Nora, Sarah"
)
FEMALE_NAMES = set(
    words(
        "Anna, Clara, Emma, Grace, Iris, Kate, Mia, Olivia, Quinn, Rosa, Uma, Wendy, Yara, Zoe, Lily,"
        "Ruby, Nina, Priya, Sofia, Ada, Maya, Ella, Lucy, Mary, Alice, Daisy, Eva, Gina, Julia, Kim,"
        "Laura, Nora, Sarah"
    )
)
HEROES = words(
    "fox, cat, dog, rabbit, bear, wolf, owl, mouse, turtle, frog, duck, hen, horse, pig, sheep, cow,"
    "lion, tiger, elephant, monkey, penguin, whale, dolphin, fish, bird, bee, ant, butterfly, snail,"
    "squirrel, hedgehog, deer, goat, robot, dragon, wizard, king, queen, prince, princess, boy, girl,"
    "farmer, fisherman, baker, sailor, pirate, knight, giant, fairy, ghost, snowman, old man,"
    "old woman, teacher, painter, gardener, astronaut, parrot, crow, spider, kitten, puppy, unicorn,"
    "little star, little cloud, tree, lamp, train, boat, computer, panda, koala, seal, swan, camel"
)
PLACES = words(
    "a quiet forest, a small village, a green valley, a big city, an old castle, a sunny land,"
    "a little house by the sea, an old farmhouse, a deep wood, a snowy land, a warm garden,"
    "a busy harbour, a town by the river, a wide field, a cave under a hill, a house with a red roof"
)
THINGS = words(
    "lamp, key, book, hat, map, ring, bell, drum, kite, basket, blanket, box, boat, red ball, coin,"
    "golden leaf, shiny stone, silver spoon, blue umbrella, old clock, small mirror, paper star,"
    "wooden flute, warm scarf, letter, button, feather, lantern, pair of shoes, glass bottle"
)
FOODS = words(
    "apples, bread, soup, cheese, honey, berries, cake, carrots, pancakes, nuts, pears, cookies,"
    "rice, beans, tea and toast, pumpkin pie, warm milk, strawberries, noodles, plums"
)
ADJECTIVES = words(
    "little, kind, brave, curious, clever, quiet, shy, cheerful, gentle, lonely, young, old, tiny,"
    "proud, sleepy, hungry, lucky, careful, friendly, patient"
)
_STARTS = words("b,br,c,ch,cl,d,dr,f,fl,g,gl,gr,h,j,k,l,m,n,p,pl,qu,r,s,sh,sk,st,t,tr,v,w,z,ph,a,e,o")
_MIDDLES = words("a,e,i,o,u,ai,ea,oo,ou,ar,er,or,in,an,en,al,el,is,om,um,y")
_ENDS = [*words(",n,r,l,t,s,ck,ll,nd,m,x,ble,tion,ing,er,ist,ment,ous,ic,on,us,ia,ware,port,ster"), ""]


def rows(name: str) -> list[list[str]]:
    """Read a pipe-separated table from the data folder; ``#`` starts a comment line."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [_COLUMN.split(line) for line in lines if line.strip() and not line.startswith("#")]


def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    special = phrase.startswith(("uni", "use", "one", "eu", "ut"))
    return ("an " if phrase[:1].lower() in "aeiou" and not special else "a ") + phrase


def cap(text: str) -> str:
    """Capitalise only the first letter."""
    return text[:1].upper() + text[1:]


def expand(rng: Random, template: str, /, **slots: str) -> str:
    """Choose every choice of a template, then fill in its slots."""
    while True:
        chosen, count = _CHOICE.subn(lambda m: rng.choice(m.group(1).split("|")), template)
        if not count:
            break
        template = chosen

    def fill(match: re.Match[str]) -> str:
        how, value = match.group(1), slots[match.group(2)]
        if how == "a ":
            return article(value)
        if how == "A ":
            return cap(article(value))
        return cap(value) if how else value

    return _SPACES.sub(" ", _SLOT.sub(fill, chosen)).strip()


def made_up_word(rng: Random) -> str:
    """A pronounceable word that most likely does not exist (to learn copying and "I don't know")."""
    syllables = [rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(syllables) + rng.choice(_ENDS)


def user_noise(rng: Random, text: str) -> str:
    """Vary how a user types: case, punctuation, politeness and small typing slips."""
    roll = rng.random()
    if roll < 0.10 and text.endswith("?") and not text.startswith(("Hello", "Hi", "Hey")):
        opener = rng.choice(("Hi! ", "Hello! ", "Hey, ", "Ok, ", "So, ", "Please tell me: ", "Thanks. "))
        text = opener + (text if opener[-2] in "!.:" or text[:2] == "I " else text[0].lower() + text[1:])
    elif roll < 0.14:
        text = text.rstrip("?.!") + rng.choice((", please.", " please", "?!", "...", " 🙂", " :)", "??"))
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    if rng.random() < 0.04 and len(text) > 12:
        spot = rng.randrange(4, len(text) - 1)
        if text[spot].isalpha() and text[spot + 1].isalpha():
            swapped = text[spot + 1] + text[spot]
            text = text[:spot] + (swapped if rng.random() < 0.5 else text[spot]) + text[spot + 2 :]
    return text
