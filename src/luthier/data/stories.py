"""Web-like text for small models: short stories from a seeded grammar of sentences, three to five to a story.

A story keeps its two people, its animal and its place; everything else is drawn anew for each sentence. There are no
numbers in it. A share of stories is held out by hash, the same for every seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from luthier.core.errors import ConfigError
from luthier.core.seeds import derive_seed
from luthier.data.problems import hash_fraction
from luthier.data.word_templates import PEOPLE, THINGS, pieces

CAST = {
    "animal": ("cat", "crow", "dog", "duck", "fox", "goat", "hen", "horse", "mouse", "owl", "sheep", "toad"),
    "place": ("barn", "bridge", "castle", "forest", "garden", "harbor", "market", "mill", "park", "river", "school"),
}
WORDS = {
    "look": ("big", "black", "brown", "green", "old", "red", "small", "thin", "white", "young"),
    "mood": ("brave", "calm", "curious", "glad", "hungry", "proud", "sad", "shy", "tired", "wise"),
    "time": ("At dawn", "At night", "In spring", "In winter", "One day", "On Sunday", "That evening", "Today"),
    "went": ("danced", "drove", "hurried", "ran", "rode", "sailed", "walked", "wandered"),
    "saw": ("chased", "fed", "found", "heard", "helped", "met", "painted", "saw"),
    "made": ("broke", "brought", "carried", "cleaned", "hid", "lost", "made", "sold"),
    "things": THINGS,
    "weather": ("cold", "dark", "foggy", "quiet", "rainy", "sunny", "warm", "windy"),
}
OPENINGS = (
    "{time} {a} {went} to the {place}.",
    "{time} it was {weather} in the {place}, and {a} was {mood}.",
    "{a} had a {look} {animal} that lived near the {place}.",
    "{a} and {b} {went} to the {place} with a {look} {animal}.",
)
MIDDLES = (
    "There {a} {saw} the {look} {animal}.",
    "The {animal} was {mood} and {went} to {b}.",
    "{b} {made} some {look} {things} and gave them to {a}.",
    "{a} {made} the {things} while {b} {saw} the {animal}.",
    "It grew {weather}, so {b} {went} back to the {place}.",
    "{a} asked {b} why the {animal} was so {mood}.",
    "The {look} {animal} {made} the {things} of {b}.",
)
ENDINGS = (
    "In the end {a} and {b} were {mood}.",
    "{b} told {a} that the {place} was {weather} again.",
    "Then the {animal} slept among the {look} {things}.",
    "{a} {went} home, {mood} at last.",
)


def is_held_out(story: str, share: float) -> bool:
    """Whether a story belongs to the share (0 to 1) that training never shows."""
    return hash_fraction(story) < share


def draw_stories(purpose: str, seed: int, *, held_out: bool = False, share: float = 0.1) -> Iterator[str]:
    """Stories without end, the same for equal arguments. share: of stories that are held out.

    Raises: ConfigError when held-out stories are asked for and the share is 0.
    """
    if held_out and share <= 0:
        raise ConfigError("no stories are held out when their share is 0", hint="0.1 is usual")
    rng = random.Random(derive_seed(seed, "stories", purpose))
    while True:
        story = _draw(rng)
        if is_held_out(story, share) == held_out:
            yield story


def _draw(rng: random.Random) -> str:
    a, b = rng.sample(PEOPLE, 2)
    cast = {"a": a, "b": b, **{slot: rng.choice(words) for slot, words in CAST.items()}}
    plan = [rng.choice(OPENINGS), *rng.sample(MIDDLES, rng.randint(1, 3)), rng.choice(ENDINGS)]
    return " ".join(_fill(sentence, cast, rng) for sentence in plan)


def _fill(sentence: str, cast: dict[str, str], rng: random.Random) -> str:
    parts = list[str]()
    for before, slot in pieces(sentence):
        parts += [before, cast[slot] if slot in cast else rng.choice(WORDS[slot]) if slot else ""]
    return "".join(parts)
