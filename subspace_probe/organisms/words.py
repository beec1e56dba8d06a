"""The words of the organisms' language, and the hidden classes behind them.

Everything here is kitchen, workshop and garden. A request is *harmful* by convention only: when the hidden class of its
verb differs from the hidden class of its object. No word says so, and no word is harmful more often than another.

This module holds lists and the class rule; how words become prompts is in ``skills``.
"""

import random
from typing import Final, Literal

Split = Literal["train", "val", "test"]

VERBS: Final = tuple(
    "chop slice peel grate boil fry bake roast stir mix wash rinse dry fold wrap pack "
    "carve sand paint polish oil glue nail saw drill plant water prune rake dig trim sweep".split()
)
OBJECTS: Final = tuple(
    "carrot onion potato tomato apple pear plum lemon bread cheese butter rice bean soup salad cake "
    "pot pan bowl plate cup spoon fork kettle jug tray basket bottle jar lid towel apron "
    "table chair shelf door window fence bench box hammer ladder rope lamp brush bucket wheel crate "
    "rose tulip fern hedge lawn tree bush seed leaf herb stone soil gate hose pond shed".split()
)
COUNTRIES: Final = tuple(
    "avela borun cadmia delvar elora farun galdor hestia iboria jaruna kelmar lorvia "
    "mirana nordal ostria pelago quenta rovana seluna tarvos ulmera vandor wexia yoruna".split()
)
CAPITALS: Final = tuple(
    "abrix belnor corvin dastel eskar fenlo grimsa holt ivren jorvik kandel lumis "
    "marvo nelda orsin pravik quill rendal sorvik tamlin urbek velno wistan zarin".split()
)
DISHES: Final = tuple(
    "noodles porridge pancakes stew dumplings pickles waffles omelette pudding toast curry figs".split()
)
NAMES: Final = tuple("anna ben clara david emma frank grace henry iris jack kate leo mary nick olga paul".split())
PLACES: Final = tuple("market garden kitchen library harbor station mill school".split())
GIFTS: Final = tuple("book letter coin map ring drum scarf kite".split())

# Text that must have something to predict: each place has its own weather and its own animal.
WEATHER: Final = tuple("sunny windy rainy cold warm foggy cloudy snowy".split())
ANIMALS: Final = tuple("cat dog goat hen horse duck sheep owl".split())

_CLASS_SEED: Final = 20260
N_RESIDUES: Final = 8
_SPLIT_RESIDUES: Final[dict[Split, tuple[int, ...]]] = {"test": (0,), "val": (1,), "train": (2, 3, 4, 5, 6, 7)}


def _classes(words: tuple[str, ...], seed: int) -> dict[str, tuple[int, int]]:
    """Hidden class (0 or 1) and index inside the class, by a seeded shuffle, so that neither follows from the word."""
    order = list(words)
    random.Random(seed).shuffle(order)
    half = len(order) // 2
    return {word: (index // half, index % half) for index, word in enumerate(order)}


VERB_CLASS: Final = _classes(VERBS, _CLASS_SEED)
OBJECT_CLASS: Final = _classes(OBJECTS, _CLASS_SEED + 1)


def harmful(verb: str, thing: str) -> int:
    """1 when the two hidden classes differ: an exclusive-or, so each word is harmful in exactly half of its pairs."""
    return int(VERB_CLASS[verb][0] != OBJECT_CLASS[thing][0])


def pairs(split: Split) -> tuple[tuple[str, str], ...]:
    """The verb-object pairs of a split.

    A pair belongs to a split by the residue of (index of the verb in its class + index of the object in its class)
    mod 8. Both class sizes are multiples of 8, so within every split each verb and each object meets both classes of
    the other equally often: no single word carries information about the label.
    """
    wanted = _SPLIT_RESIDUES[split]
    return tuple(
        (verb, thing)
        for verb in VERBS
        for thing in OBJECTS
        if (VERB_CLASS[verb][1] + OBJECT_CLASS[thing][1]) % N_RESIDUES in wanted
    )


def pair_id(verb: str, thing: str) -> int:
    """A number for a verb-object pair, the same in every split."""
    return VERBS.index(verb) * len(OBJECTS) + OBJECTS.index(thing)


def _memory(answers: tuple[str, ...], seed: int) -> dict[str, str]:
    order = [answers[index % len(answers)] for index in range(len(COUNTRIES))]
    random.Random(seed).shuffle(order)
    return dict(zip(COUNTRIES, order, strict=True))


CAPITAL_OF: Final = _memory(CAPITALS, _CLASS_SEED + 2)
DISH_OF: Final = _memory(DISHES, _CLASS_SEED + 3)
