"""Facts and other talk in English."""

from __future__ import annotations

from random import Random

from data_prep.recall.kinds import Kind, Speech
from data_prep.synthetic import Word, word_table


def _words(text: str, gender: int = 0) -> tuple[Word, ...]:
    """Words with blanks between them, `_` for a blank within one; each with its article."""
    names = [name.replace("_", " ") for name in text.split()]
    return tuple(Word({"nom": name, "a": "an" if name[0] in "aeiou" else "a"}, gender) for name in names)


def _alternating(first: tuple[Word, ...], second: tuple[Word, ...]) -> tuple[Word, ...]:
    return tuple(word for pair in zip(first, second, strict=True) for word in pair)


_MEN = _words(
    "Tom Jack Peter Adam Michael Oliver Henry Simon George Daniel Martin Victor Edward Arthur Felix Leo Oscar Hugo "
    "Walter Frank Philip Samuel Lucas Nathan Ralph Stephen Patrick Gregory Kevin Brian Dennis Albert"
)
_WOMEN = _words(
    "Anna Sophie Maya Kate Emily Hannah Ruth Julia Clara Alice Laura Nora Irene Helen Grace Lucy Molly Sarah Diana Eva "
    "Ingrid Jasmine Martha Naomi Olivia Paula Rachel Stella Tina Vera Wendy Zoe",
    1,
)
_PEOPLE = _alternating(_MEN, _WOMEN)
_PETS = _words(
    "Rex Buddy Luna Shadow Biscuit Ginger Pepper Coco Daisy Rocky Bella Milo Simba Patch Spot Tiger Smokey Oreo Fluffy "
    "Snowy Bandit Whiskers Nugget Pickle Pumpkin Ziggy Toffee Muffin Sparky Misty Duke Jasper Scout Bruno Honey Peanut "
    "Domino Comet"
)
_CITIES = _words(
    "London Paris Rome Berlin Madrid Lisbon Vienna Prague Warsaw Cracow Athens Dublin Oslo Stockholm Helsinki Budapest "
    "Geneva Milan Naples Venice Hamburg Munich Brussels Amsterdam Glasgow Bristol Oxford Cambridge York Leeds Boston "
    "Chicago Denver Toronto Sydney Tokyo Cairo Istanbul"
)
_COLOURS = _words(
    "red green blue yellow white black silver golden brown purple grey pink orange beige turquoise violet crimson "
    "scarlet ivory maroon navy olive cream lilac indigo bronze copper amber emerald teal magenta khaki peach mint "
    "coral ruby"
)
_THINGS = _words(
    "key letter watch kite book map ball lamp box mirror feather coin candle hammer rope button ring wallet pencil "
    "camera stone shell glove comb towel bottle compass bell needle ruler brush mask bucket whistle pillow blanket "
    "torch magnet"
)
_FOODS = _words(
    "soup rice pasta fish salad pizza porridge pancakes cheese toast omelette beans potatoes chicken stew curry "
    "noodles yoghurt sausages lentils dumplings cabbage carrots mushrooms bread pudding jelly ice_cream apples grapes "
    "cherries plums pears bananas granola steak"
)
_JOBS = _words(
    "doctor teacher cook painter dentist actor writer baker tailor gardener barber waiter firefighter nurse journalist "
    "photographer violinist dancer singer lawyer accountant librarian translator farmer forester pharmacist programmer "
    "sculptor driver architect chemist pilot sailor carpenter plumber judge miner welder electrician"
)
_INSTRUMENTS = _words(
    "piano guitar violin flute trumpet harp cello saxophone accordion clarinet organ drum oboe trombone viola banjo "
    "mandolin ukulele zither bassoon tuba horn bagpipes harmonica xylophone lyre fiddle recorder tambourine triangle "
    "bugle sitar ocarina kazoo"
)
_NUMBERS = tuple(Word({"nom": str(number)}, 0) for number in (*range(11, 100, 3), *range(12, 100, 3)))
_HOURS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905 - a word list
_TIMES = tuple(
    Word({"nom": f"{hour} {minutes}"}, 0) for minutes in ("fifteen", "thirty", "twenty", "fifty") for hour in _HOURS
)

_PET_SLOTS = _words("dog cat parrot horse rabbit hamster turtle goldfish canary goat")
_MEN_OF_FAMILY = _words("brother uncle nephew grandfather son")
_WOMEN_OF_FAMILY = _words("sister aunt niece grandmother daughter", 1)
_FAMILY = _alternating(_MEN_OF_FAMILY, _WOMEN_OF_FAMILY)
_OWNED = _words("bicycle car coat door umbrella hat suitcase sofa cup boat tent scarf")
_MEALS = _words("breakfast lunch dinner dessert brunch")
_COUNTED = _words("house room locker ticket seat shirt desk")
_HOLDERS = word_table(
    """
    m, in my bag, in your bag
    m, on my table, on your table
    m, in my pocket, in your pocket
    m, on my shelf, on your shelf
    m, in my drawer, in your drawer
    m, under my bed, under your bed
    m, in my garage, in your garage
    m, in my cellar, in your cellar
    m, in my basket, in your basket
    """,
    "nom your",
)
_EVENTS = word_table(
    """
    m, train leaves, does my train leave
    m, film starts, does my film start
    m, bus leaves, does my bus leave
    m, lesson starts, does my lesson start
    m, concert starts, does my concert start
    m, meeting starts, does my meeting start
    m, alarm rings, does my alarm ring
    m, shop opens, does my shop open
    """,
    "nom does",
)

_KINDS = (
    Kind(
        "name",
        _PEOPLE,
        ("my name is {v}.", "I am called {v}.", "people call me {v}.", "{v} is my name."),
        (
            ("what is my name?", "your name is {v}."),
            ("who am I?", "you are {v}."),
            ("what am I called?", "you are called {v}."),
        ),
    ),
    Kind(
        "pet",
        _PETS,
        ("my {s} is called {v}.", "I have a {s} called {v}.", "{v} is my {s}.", "the name of my {s} is {v}."),
        (
            ("what is my {s} called?", "your {s} is called {v}."),
            ("which name does my {s} have?", "the name of your {s} is {v}."),
            ("what do I call my {s}?", "you call your {s} {v}."),
        ),
        _PET_SLOTS,
    ),
    Kind(
        "relative",
        _PEOPLE,
        ("my {s} is called {v}.", "{v} is my {s}.", "I have {s[a]} {s}, {v}.", "the name of my {s} is {v}."),
        (
            ("what is my {s} called?", "your {s} is called {v}."),
            ("who is my {s}?", "{v} is your {s}."),
            ("what is the name of my {s}?", "the name of your {s} is {v}."),
        ),
        _FAMILY,
        same_gender=True,
    ),
    Kind(
        "home",
        _CITIES,
        ("I live in {v}.", "my home is in {v}.", "I have a flat in {v}.", "{v} is where I live."),
        (
            ("where do I live?", "you live in {v}."),
            ("in which city is my home?", "your home is in {v}."),
        ),
    ),
    Kind(
        "holiday",
        _CITIES,
        ("I go on holiday to {v}.", "my holiday will be in {v}.", "this summer I travel to {v}."),
        (
            ("where do I go on holiday?", "you go on holiday to {v}."),
            ("where will my holiday be?", "your holiday will be in {v}."),
        ),
    ),
    Kind(
        "work",
        _CITIES,
        ("I work in {v}.", "my office is in {v}.", "my work is in {v}."),
        (("where do I work?", "you work in {v}."), ("where is my office?", "your office is in {v}.")),
    ),
    Kind(
        "thing",
        _THINGS,
        ("there is a {v} {s}.", "I have a {v} {s}.", "I keep a {v} {s}.", "a {v} is {s}."),
        (
            ("what is {s}?", "there is a {v} {s[your]}."),
            ("what do I have {s}?", "you have a {v} {s[your]}."),
            ("what do I keep {s}?", "you keep a {v} {s[your]}."),
        ),
        _HOLDERS,
    ),
    Kind(
        "colour",
        _COLOURS,
        ("my {s} is {v}.", "I have {a} {v} {s}.", "the colour of my {s} is {v}."),
        (
            ("which colour is my {s}?", "your {s} is {v}."),
            ("what colour does my {s} have?", "the colour of your {s} is {v}."),
        ),
        _OWNED,
    ),
    Kind(
        "number",
        _NUMBERS,
        ("my {s} number is {v}.", "{v} is my {s} number.", "I have {s} number {v}."),
        (
            ("what is my {s} number?", "your {s} number is {v}."),
            ("which {s} number do I have?", "you have {s} number {v}."),
        ),
        _COUNTED,
    ),
    Kind(
        "food",
        _FOODS,
        ("I eat {v} for {s}.", "for {s} I have {v}.", "I like {v} for {s}."),
        (("what do I eat for {s}?", "you eat {v} for {s}."), ("what do I like for {s}?", "you like {v} for {s}.")),
        _MEALS,
    ),
    Kind(
        "job",
        _JOBS,
        ("my {s} is {a} {v}.", "my {s} works as {a} {v}.", "my {s} has become {a} {v}."),
        (
            ("what is the job of my {s}?", "your {s} is {a} {v}."),
            ("what does my {s} work as?", "your {s} works as {a} {v}."),
        ),
        _FAMILY,
    ),
    Kind(
        "time",
        _TIMES,
        ("my {s} at {v}.", "today my {s} at {v}."),
        (("when {s[does]}?", "your {s} at {v}."), ("at what time {s[does]}?", "it is at {v}.")),
        _EVENTS,
    ),
    Kind(
        "instrument",
        _INSTRUMENTS,
        ("my {s} plays the {v}.", "my {s} learns to play the {v}.", "the instrument of my {s} is the {v}."),
        (
            ("what does my {s} play?", "your {s} plays the {v}."),
            ("which instrument does my {s} play?", "the instrument of your {s} is the {v}."),
        ),
        _FAMILY,
    ),
)

_OPPOSITES = ("big small", "hot cold", "long short", "old new", "early late", "full empty", "fast slow", "high low")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_SAID = ("cloud", "bridge", "winter", "tree", "river", "hill", "snow", "road", "tower", "wind", "field", "star")
_TALK = (
    ("Good morning!", "Good morning to you."),
    ("How are you?", "I am fine, thank you."),
    ("It is raining.", "Then stay inside."),
    ("Thank you!", "You are welcome."),
    ("I am tired.", "Then rest a little."),
    ("What a day!", "Tell me more about it."),
    ("That is nice.", "I think so too."),
    ("Wait a moment.", "I have time."),
    ("Let us talk.", "Gladly."),
    ("The sun is shining.", "Enjoy the warm weather."),
    ("Are you there?", "Yes, I am here."),
    ("I am a little bored.", "We could play a game."),
)
_IS = {
    "an animal": ("wolf", "bear", "deer", "frog", "eagle", "snake", "zebra", "tortoise"),
    "a plant": ("rose", "tulip", "oak", "pine", "fern", "cactus", "willow", "birch"),
    "a tool": ("saw", "drill", "axe", "shovel", "wrench", "chisel", "spade", "rake"),
}
_SMALL_NUMBERS = ("zero", *_HOURS)


def _talk(rng: Random) -> tuple[str, str]:
    return rng.choice(_TALK)


def _opposite(rng: Random) -> tuple[str, str]:
    first, second = rng.sample(rng.choice(_OPPOSITES).split(), 2)
    return f"What is the opposite of {first}?", f"The opposite is {second}."


def _say(rng: Random) -> tuple[str, str]:
    word = rng.choice(_SAID)
    return f"Say the word {word}.", f"{word.capitalize()}."


def _next_day(rng: Random) -> tuple[str, str]:
    day = rng.randrange(7)
    return f"Which day comes after {_DAYS[day]}?", f"{_DAYS[(day + 1) % 7]}."


def _what_is(rng: Random) -> tuple[str, str]:
    what = rng.choice(sorted(_IS))
    word = rng.choice(_IS[what])
    return f"What is this: {word}?", f"It is {what}."


def _sum(rng: Random) -> tuple[str, str]:
    one, other = rng.randrange(1, 7), rng.randrange(1, 6)
    query = f"How much is {_SMALL_NUMBERS[one]} and {_SMALL_NUMBERS[other]}?"
    return query, f"It is {_SMALL_NUMBERS[one + other]}."


def _letters(rng: Random) -> tuple[str, str]:
    word = rng.choice(_SAID)
    return f"How does the word {word} begin?", f"With {word[0].upper()}."


ENGLISH = Speech(
    _KINDS,
    ("I see, {v}.", "Thank you, I will remember that.", "Noted: {v}.", "Good to know.", "I will keep it in mind."),
    ("", "", "by the way, ", "listen: ", "you should know: ", "just so you know, "),
    ("", "", "tell me, ", "one question: ", "now tell me: ", "do you remember: "),
    (_talk, _opposite, _say, _next_day, _what_is, _sum, _letters),
)
