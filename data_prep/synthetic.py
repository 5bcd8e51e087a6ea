"""The sample corpus: stories, single interactions and dialogues in English and Polish, grown from a seed.

It exists so that the whole system can be tried, and tested, without any download. The texts are grammatical, name their
people and things again and again (so a model that reads further back predicts better), and the dialogues ask late for
facts that were told early. It is a toy: it teaches a model nothing about the world.

Polish needs agreement, so a template names the form it wants: `{h[acc]}` is a case, and `{h[poszedł/poszła]}` chooses
by the gender of the word (masculine/feminine/neuter; a group is masculine if any of it is). English uses the second
form for pronouns: `{h[he/she]}`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rxt_dist.errors import DataError
from rxt_dist.files import access_errors, require_folder, require_free_space, write_atomic

DEFAULT_BYTES = 3_000_000
LANGUAGES = ("en", "pl")

# Shares of a language's bytes.
_STORIES, _CHRONICLES, _INTERACTIONS = 0.55, 0.10, 0.10
_CHRONICLE_CHAPTERS = 12


@dataclass(frozen=True)
class Word:
    """A word with the forms that templates ask for; `gender` is 0, 1 or 2: masculine, feminine, neuter."""

    forms: dict[str, str]
    gender: int

    def __getitem__(self, key: str) -> str:
        """A form by name, or the part of `masculine/feminine[/neuter]` that agrees with this word."""
        return key.split("/")[self.gender] if "/" in key else self.forms[key]

    def __str__(self) -> str:
        return self.forms["nom"]


def word_table(lines: str, cases: str) -> tuple[Word, ...]:
    """One word a line: gender letter, then one form for each of `cases`, separated by commas."""
    words = []
    for line in lines.strip().splitlines():
        gender, *forms = [item.strip() for item in line.split(",")]
        words.append(Word(dict(zip(cases.split(), forms, strict=True)), "mfn".index(gender)))
    return tuple(words)


def _colours(stems: str) -> tuple[dict[str, tuple[str, str, str]], ...]:
    """Polish adjectives of the hard declension: case -> (masculine, feminine, neuter)."""
    result = []
    for stem in stems.split():
        y, e = ("i", "ie") if stem.endswith("k") else ("y", "e")
        result.append(
            {
                "nom": (stem + y, stem + "a", stem + e),
                "gen": (stem + e + "go", stem + e + "j", stem + e + "go"),
                "acc": (stem + y, stem + "ą", stem + e),
                "inst": (stem + y + "m", stem + "ą", stem + y + "m"),
            }
        )
    return tuple(result)


def _coloured(thing: Word, colour: dict[str, tuple[str, str, str]]) -> Word:
    forms = {case: f"{colour[case][thing.gender]} {thing[case]}" for case in colour}
    return Word(forms | {"bare": thing["nom"], "bare_acc": thing["acc"], "colour": colour["nom"][thing.gender]},
                thing.gender)  # fmt: skip


_PEOPLE = {
    "en": word_table(
        """
        m, Tom
        m, Jack
        m, Peter
        m, Adam
        m, Michael
        m, Oliver
        m, Henry
        m, Simon
        f, Anna
        f, Sophie
        f, Maya
        f, Kate
        f, Emily
        f, Hannah
        f, Ruth
        f, Julia
        """,
        "nom",
    ),
    "pl": word_table(
        """
        m, Tomek, Tomka, Tomkowi, Tomka, Tomkiem
        m, Janek, Janka, Jankowi, Janka, Jankiem
        m, Piotr, Piotra, Piotrowi, Piotra, Piotrem
        m, Adam, Adama, Adamowi, Adama, Adamem
        m, Michał, Michała, Michałowi, Michała, Michałem
        m, Filip, Filipa, Filipowi, Filipa, Filipem
        m, Wojtek, Wojtka, Wojtkowi, Wojtka, Wojtkiem
        m, Staś, Stasia, Stasiowi, Stasia, Stasiem
        f, Ania, Ani, Ani, Anię, Anią
        f, Zosia, Zosi, Zosi, Zosię, Zosią
        f, Maja, Mai, Mai, Maję, Mają
        f, Kasia, Kasi, Kasi, Kasię, Kasią
        f, Hania, Hani, Hani, Hanię, Hanią
        f, Ewa, Ewy, Ewie, Ewę, Ewą
        f, Marta, Marty, Marcie, Martę, Martą
        f, Julia, Julii, Julii, Julię, Julią
        """,
        "nom gen dat acc inst",
    ),
}

_ANIMALS = {
    "en": word_table(
        """
        m, cat
        m, dog
        m, hedgehog
        m, rabbit
        m, fox
        f, squirrel
        f, raven
        f, mouse
        f, goose
        f, goat
        """,
        "nom",
    ),
    "pl": word_table(
        """
        m, kot, kota, kotu, kota, kotem
        m, pies, psa, psu, psa, psem
        m, jeż, jeża, jeżowi, jeża, jeżem
        m, królik, królika, królikowi, królika, królikiem
        m, lis, lisa, lisowi, lisa, lisem
        f, wiewiórka, wiewiórki, wiewiórce, wiewiórkę, wiewiórką
        f, sowa, sowy, sowie, sowę, sową
        f, mysz, myszy, myszy, mysz, myszą
        f, gęś, gęsi, gęsi, gęś, gęsią
        f, koza, kozy, kozie, kozę, kozą
        """,
        "nom gen dat acc inst",
    ),
}

_PLACES = {
    "en": word_table(
        """
        n, in the forest, to the forest, from the forest
        n, in the garden, to the garden, from the garden
        n, at the school, to the school, from the school
        n, in the market square, to the market square, from the market square
        n, by the river, to the river, from the river
        n, in the old mill, to the old mill, from the old mill
        n, in the library, to the library, from the library
        n, in the mountains, to the mountains, from the mountains
        n, on the tower, to the tower, from the tower
        n, in the barn, to the barn, from the barn
        n, in the harbour, to the harbour, from the harbour
        n, in the park, to the park, from the park
        """,
        "at to from",
    ),
    "pl": word_table(
        """
        n, w lesie, do lasu, z lasu
        n, w ogrodzie, do ogrodu, z ogrodu
        n, w szkole, do szkoły, ze szkoły
        n, na rynku, na rynek, z rynku
        n, nad rzeką, nad rzekę, znad rzeki
        n, w starym młynie, do starego młyna, ze starego młyna
        n, w bibliotece, do biblioteki, z biblioteki
        n, w górach, w góry, z gór
        n, na wieży, na wieżę, z wieży
        n, w stodole, do stodoły, ze stodoły
        n, w porcie, do portu, z portu
        n, w parku, do parku, z parku
        """,
        "at to from",
    ),
}

_EN_THINGS = "key letter watch kite book map ball lamp box mirror feather coin".split()  # noqa: SIM905 - a word list
_EN_COLOURS = "red green yellow white black silver golden blue brown purple grey wooden".split()  # noqa: SIM905
_PL_THINGS = word_table(
    """
    m, klucz, klucza, klucz, kluczem
    m, list, listu, list, listem
    m, zegarek, zegarka, zegarek, zegarkiem
    m, latawiec, latawca, latawiec, latawcem
    f, książka, książki, książkę, książką
    f, mapa, mapy, mapę, mapą
    f, piłka, piłki, piłkę, piłką
    f, lampa, lampy, lampę, lampą
    n, pudełko, pudełka, pudełko, pudełkiem
    n, lustro, lustra, lustro, lustrem
    n, piórko, piórka, piórko, piórkiem
    f, moneta, monety, monetę, monetą
    """,
    "nom gen acc inst",
)
_PL_COLOURS = _colours("czerwon zielon żółt biał czarn srebrn złot niebiesk brązow fioletow szar drewnian")

# A story takes one sentence group from each scene, in order; h hero, f friend, a animal, t thing, p and q places.
_SCENES: dict[str, tuple[tuple[str, ...], ...]] = {
    "en": (
        (
            "Once there lived a {h[boy/girl]} called {h}. Every morning {h[he/she]} went {p[to]}.",
            "{h} was {n} years old and loved to walk {p[to]}, even when it rained.",
            "One {season} day {h} got up early, put on {h[his/her]} coat and set out {p[to]}.",
            "Nobody in the village knew the way {p[to]} better than {h}.",
        ),
        (
            "There {h[he/she]} had a friend, a small {a} that could keep a secret.",
            "{h[He/She]} never went alone: a clever {a} always walked beside {h[him/her]}.",
            "{p[at]} {h[he/she]} met a {a}. The {a} looked hungry, so {h} gave it some bread.",
            "A {a} was already waiting {p[at]}, because the {a} liked {h} very much.",
        ),
        (
            'Suddenly {h} saw {t[art]} lying on the ground. "Who lost this {t[bare]}?" {h[he/she]} asked.',
            "Under an old stone they found {t[art]}. It was cold and heavy, and {h} held it with both hands.",
            "The {a} stopped. Right in front of them lay {t[art]}, as if somebody had put it there a moment ago.",
            "{h} wanted to rest, but then the {a} pulled something out of the grass. It was {t[art]}!",
        ),
        (
            '"I think it belongs to {f}," said {h}. "{f} was {q[at]} yesterday."',
            "On the {t[bare]} there was a name: {f}. {h} had met {f} {q[at]}.",
            "{h} remembered that {f} had been looking for {t[art]} for {n} days.",
            '"Let us ask {f}," {h} decided. "{f[He/She]} knows everything about such things."',
        ),
        (
            "So they went {q[to]}. The way was long, and the wind blew harder with every step.",
            "They walked {q[to]} and counted {n} bridges on the way.",
            "It was late when they came {q[to]}, and the first stars were shining.",
            "On the way {q[to]} it began to snow, but the {a} did not want to turn back.",
        ),
        (
            "{f} was sitting {q[at]} and looked sad. When {f[he/she]} saw the {t[bare]}, {f[he/she]} jumped for joy.",
            '"My {t[bare]}!" cried {f}. "I was sure that I would never see it again."',
            "{f} took the {t[bare]} in {f[his/her]} hands and said nothing for a long while. Then {f[he/she]} smiled.",
            "At first {f} did not believe {h}, but the {t[colour]} {t[bare]} was really {f[his/hers]}.",
        ),
        (
            "To thank them, {f} gave {h} {n} apples and the {a} a warm place by the fire.",
            '"How can I thank you?" asked {f}. "Come with us {p[to]} tomorrow," answered {h}.',
            "{f} promised to teach {h} how to read old maps, and {f[he/she]} kept {f[his/her]} word.",
            "Then {f} told them where the {t[colour]} {t[bare]} came from, and the story lasted until midnight.",
        ),
        (
            "From that day {h}, {f} and the {a} were friends, and they often met {p[at]}.",
            'When {h} came home {q[from]}, {h[his/her]} mother asked where {h[he/she]} had been. "With {f}," said {h}.',
            "And the {t[bare]}? It still lies {q[at]}, and {f} shows it to everyone who asks.",
            "That night {h} dreamed of {t[art]}, and the {a} slept at {h[his/her]} feet.",
        ),
    ),
    "pl": (
        (
            "{h} {h[był bardzo ciekawy/była bardzo ciekawa]} świata. Każdego ranka {h[chodził/chodziła]} {p[to]}.",
            "{h} {h[miał/miała]} {n} lat i {h[lubił/lubiła]} chodzić {p[to]}, nawet kiedy padał deszcz.",
            "Pewnego dnia {season} {h} {h[wstał/wstała]} wcześnie, {h[włożył/włożyła]} płaszcz i {h[ruszył/ruszyła]} "
            "{p[to]}.",
            "Nikt we wsi nie znał drogi {p[to]} lepiej niż {h}.",
        ),
        (
            "{h[Miał/Miała]} tam przyjaciela: {a[był to mały/była to mała]} {a}, {a[który umiał/która umiała]} "
            "dochować tajemnicy.",
            "Nigdy nie {h[chodził sam/chodziła sama]}: obok {h[niego/niej]} zawsze {a[szedł mądry/szła mądra]} {a}.",
            "{p[at]} {h} {h[spotkał/spotkała]} {a[acc]}. {a[Był głodny/Była głodna]}, więc {h} {h[dał/dała]} "
            "{a[mu/jej]} trochę chleba.",
            "Już {a[czekał/czekała]} tam {a}, bo bardzo {a[lubił/lubiła]} {h[acc]}.",
        ),
        (
            'Nagle {h} {h[zobaczył/zobaczyła]} na ziemi {t[acc]}. "Kto zgubił {t[ten/tę/to]} {t[bare_acc]}?" — '
            "{h[zapytał/zapytała]}.",
            "Pod starym kamieniem {h} {h[znalazł/znalazła]} {t[acc]}. {t[Był zimny i ciężki/Była zimna i "
            "ciężka/Było zimne i ciężkie]}.",
            "{a[Zatrzymał/Zatrzymała]} się nawet {a}. Tuż przed nimi {t[leżał/leżała/leżało]} {t}, jakby ktoś "
            "{t[go/ją/je]} tam przed chwilą położył.",
            "{h} {h[chciał/chciała]} odpocząć, ale wtedy {a} {a[wyciągnął/wyciągnęła]} coś z trawy. "
            "{t[Był to/Była to/Było to]} {t}!",
        ),
        (
            '"Myślę, że {t[należał/należała/należało]} do {f[gen]}" — {h[powiedział/powiedziała]} {h}. '
            '"{f} {f[był/była]} wczoraj {q[at]}."',
            "{h} {h[przypomniał/przypomniała]} sobie, że {f} {f[szukał/szukała]} {t[gen]} przez {n} dni.",
            "Było tam napisane imię: {f}. {h} {h[poznał/poznała]} {f[acc]} {q[at]}.",
            '"Zapytajmy {f[acc]}" — {h[zdecydował/zdecydowała]} {h}. "{f} wie wszystko o takich rzeczach."',
        ),
        (
            "{g[Poszli/Poszły]} więc {q[to]}. Droga była długa, a wiatr wiał coraz mocniej.",
            "{g[Szli/Szły]} {q[to]} i {g[naliczyli/naliczyły]} po drodze {n} mostów.",
            "Było już późno, kiedy {g[przyszli/przyszły]} {q[to]}, a na niebie świeciły pierwsze gwiazdy.",
            "Po drodze {q[to]} zaczął padać śnieg, ale {a} nie {a[chciał/chciała]} zawrócić.",
        ),
        (
            "{f} {f[siedział/siedziała]} {q[at]} i {f[był smutny/była smutna]}. Kiedy {f[zobaczył/zobaczyła]} "
            "{t[acc]}, {f[podskoczył/podskoczyła]} z radości.",
            '"{t[Mój/Moja/Moje]} {t[bare]}!" — {f[zawołał/zawołała]} {f}. "{f[Byłem pewien/Byłam pewna]}, że już '
            '{t[go/jej/go]} nie zobaczę."',
            "{f} {f[wziął/wzięła]} {t[bare_acc]} do ręki i długo nic nie {f[mówił/mówiła]}. Potem się "
            "{f[uśmiechnął/uśmiechnęła]}.",
            "Na początku {f} nie {f[wierzył/wierzyła]} {h[dat]}, ale {t} naprawdę {t[należał/należała/należało]} do "
            "{f[niego/niej]}.",
        ),
        (
            "W podziękowaniu {f} {f[dał/dała]} {h[dat]} {n} jabłek, a {a[dat]} ciepłe miejsce przy ogniu.",
            '"Jak mam ci podziękować?" — {f[zapytał/zapytała]} {f}. "Chodź z nami jutro {p[to]}" — '
            "{h[odpowiedział/odpowiedziała]} {h}.",
            "{f} {f[obiecał/obiecała]} nauczyć {h[acc]} czytać stare mapy i {f[dotrzymał/dotrzymała]} słowa.",
            "Potem {f} {f[opowiedział/opowiedziała]} im, skąd się {t[wziął/wzięła/wzięło]} {t}, a opowieść trwała do "
            "północy.",
        ),
        (
            "Od tego dnia {h}, {f} i {a} {k[byli przyjaciółmi/były przyjaciółkami]} i często "
            "{k[spotykali/spotykały]} się {p[at]}.",
            'Kiedy {h} {h[wrócił/wróciła]} {q[from]}, mama zapytała, z kim {h[był/była]}. "Z {f[inst]}" — '
            "{h[odpowiedział/odpowiedziała]} {h}.",
            "A {t[bare]}? Do dziś leży {q[at]}, a {f} pokazuje {t[go/ją/je]} każdemu, kto zapyta.",
            "Tej nocy {h[dat]} {t[śnił/śniła/śniło]} się {t}, a {a} {a[spał/spała]} obok.",
        ),
    ),
}

_OPTIONAL_SCENES = (4, 6, 7)
_LATER = {
    "en": ("A week passed.", "The next morning was bright and cold.", "But that was not the end.", "Time went by."),
    "pl": ("Minął tydzień.", "Następny ranek był jasny i zimny.", "Ale to nie był koniec.", "Mijał czas."),
}
_SEASONS = {"en": ("spring", "summer", "autumn", "winter"), "pl": ("wiosną", "latem", "jesienią", "zimą")}
_NUMBERS = {
    "en": ("five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    "pl": ("pięć", "sześć", "siedem", "osiem", "dziewięć", "dziesięć", "jedenaście", "dwanaście"),
}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _english_thing(rng: random.Random) -> Word:
    colour, thing = rng.choice(_EN_COLOURS), rng.choice(_EN_THINGS)
    return Word({"nom": f"{colour} {thing}", "art": f"a {colour} {thing}", "bare": thing, "colour": colour}, 2)


def _thing(rng: random.Random, language: str) -> Word:
    if language == "en":
        return _english_thing(rng)
    return _coloured(rng.choice(_PL_THINGS), rng.choice(_PL_COLOURS))


def _group(*words: Word) -> Word:
    return Word({}, 1 if all(word.gender == 1 for word in words) else 0)


def _episode(rng: random.Random, language: str, hero: Word, friend: Word, animal: Word, first_scene: int) -> str:
    here, there = rng.sample(_PLACES[language], 2)
    words = {
        "h": hero,
        "f": friend,
        "a": animal,
        "g": _group(hero, animal),
        "k": _group(hero, animal, friend),
        "t": _thing(rng, language),
        "p": here,
        "q": there,
        "season": rng.choice(_SEASONS[language]),
    }
    sentences = []
    for number, scene in enumerate(_SCENES[language]):
        skipped = number in _OPTIONAL_SCENES and rng.random() < 0.3
        if number >= first_scene and not skipped:
            filled = rng.choice(scene).format(n=rng.choice(_NUMBERS[language]), **words)
            sentences.append(_capital(filled))
    return " ".join(sentences)


def story(rng: random.Random, language: str) -> str:
    """One story of one to four episodes about two people and an animal, 700 to 3,500 bytes."""
    hero, friend = rng.sample(_PEOPLE[language], 2)
    animal = rng.choice(_ANIMALS[language])
    episodes = [_episode(rng, language, hero, friend, animal, 0)]
    for _ in range(rng.randrange(4)):
        # Later episodes find another thing; who is who has been told.
        episodes.append(rng.choice(_LATER[language]) + " " + _episode(rng, language, hero, friend, animal, 2))
    return "\n\n".join(episodes)


# ---------------------------------------------------------------------------------------------------------------------
# Interactions and dialogues
# ---------------------------------------------------------------------------------------------------------------------

Turn = dict[str, str]

_PAIRS: dict[str, tuple[str, ...]] = {
    "en": ("big/small", "hot/cold", "long/short", "old/new", "early/late", "full/empty", "light/dark", "fast/slow"),
    "pl": ("duży/mały", "gorący/zimny", "długi/krótki", "stary/nowy", "wczesny/późny", "pełny/pusty", "jasny/ciemny",
           "szybki/wolny"),
}  # fmt: skip
_DAYS: dict[str, tuple[str, ...]] = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "pl": ("poniedziałek", "wtorek", "środa", "czwartek", "piątek", "sobota", "niedziela"),
}


def interaction(rng: random.Random, language: str) -> Turn:
    """One question with an answer that follows from it: sums, opposites, days, or the shorter of two words."""
    english = language == "en"
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randrange(2, 60), rng.randrange(2, 60)
        query = f"What is {a} plus {b}?" if english else f"Ile to jest {a} dodać {b}?"
        return {"query": query, "answer": f"{a} + {b} = {a + b}."}
    if kind == 1:
        first, second = rng.sample(rng.choice(_PAIRS[language]).split("/"), 2)
        if english:
            return {"query": f"What is the opposite of '{first}'?", "answer": f"The opposite is '{second}'."}
        return {"query": f"Jakie jest przeciwieństwo słowa '{first}'?", "answer": f"Przeciwieństwem jest '{second}'."}
    if kind == 2:
        day = rng.randrange(7)
        today, tomorrow = _DAYS[language][day], _DAYS[language][(day + 1) % 7]
        if english:
            return {"query": f"Which day comes after {today}?", "answer": f"After {today} comes {tomorrow}."}
        return {"query": f"Jaki dzień następuje po dniu {today}?", "answer": f"Następny dzień to {tomorrow}."}
    words = [str(word) for word in rng.sample(_ANIMALS[language], 2)]
    lengths = [len(word) for word in words]
    shown = f"'{words[0]}', '{words[1]}'"
    if english:
        query = f"How many letters do these words have: {shown}?"
        return {"query": query, "answer": f"'{words[0]}' has {lengths[0]} and '{words[1]}' has {lengths[1]}."}
    query = f"Ile liter mają te słowa: {shown}?"
    return {"query": query, "answer": f"'{words[0]}' ma {lengths[0]}, a '{words[1]}' ma {lengths[1]}."}


class Fact(NamedTuple):
    """A turn that tells something, the turn that asks for it, and what the answer hangs on (both turns spell it)."""

    tell: Turn
    ask: Turn
    value: str


def facts(rng: random.Random, language: str) -> list[Fact]:
    """Five facts about one person."""
    person, animal, thing = rng.choice(_PEOPLE[language]), rng.choice(_ANIMALS[language]), _thing(rng, language)
    place, number = rng.choice(_PLACES[language]), rng.choice(_NUMBERS[language])
    if language == "en":
        rows = (
            (f"Hello, my name is {person}.", f"Nice to meet you, {person}.", "Do you remember my name?",
             f"Yes, your name is {person}."),
            (f"I have a {animal} at home.", f"A {animal} is good company.", "Which animal do I have at home?",
             f"You have a {animal}."),
            (f"Yesterday I bought {thing['art']}.", f"I will remember the {thing}.", "What did I buy yesterday?",
             f"You bought {thing['art']}."),
            (f"I work {place['at']}.", "That sounds like a fine place.", "Where do I work?",
             f"You work {place['at']}."),
            (f"My lucky number is {number}.", f"{_capital(number)}, I have noted it.", "What is my lucky number?",
             f"Your lucky number is {number}."),
        )  # fmt: skip
    else:
        rows = (
            (f"Cześć, mam na imię {person}.", f"Miło cię poznać, {person}.", "Czy pamiętasz, jak mam na imię?",
             f"Tak, masz na imię {person}."),
            (f"W domu czeka na mnie {animal}.", f"{_capital(str(animal))} to dobre towarzystwo.",
             "Jakie zwierzę czeka na mnie w domu?", f"W domu czeka na ciebie {animal}."),
            (f"Na moim stole leży {thing}.", f"Zapamiętam, że to {thing}.", "Co leży na moim stole?",
             f"Na twoim stole leży {thing}."),
            (f"Pracuję {place['at']}.", "To brzmi jak dobre miejsce.", "Gdzie pracuję?",
             f"Pracujesz {place['at']}."),
            (f"Moja szczęśliwa liczba to {number}.", f"{_capital(number)}, już to zapisuję.",
             "Jaka jest moja szczęśliwa liczba?", f"Twoja szczęśliwa liczba to {number}."),
        )  # fmt: skip
    values = (str(person), str(animal), str(thing), place["at"], number)
    return [
        Fact({"query": a, "answer": b}, {"query": c, "answer": d}, value)
        for (a, b, c, d), value in zip(rows, values, strict=True)
    ]


def dialogue(rng: random.Random, language: str) -> list[Turn]:
    """Five to eight turns: facts are told, something else is talked about, then the facts are asked for."""
    chosen = rng.sample(facts(rng, language), rng.randrange(2, 4))
    between = [interaction(rng, language) for _ in range(rng.randrange(1, 3))]
    asked = [fact.ask for fact in chosen]
    rng.shuffle(asked)
    return [fact.tell for fact in chosen] + between + asked


_SPEAKERS = {"en": ("User", "Model"), "pl": ("Użytkownik", "Model")}


def render(turns: Sequence[Mapping[str, Any]], language: str) -> str:
    """Turns as plain text, for pre-training on documents."""
    user, model = _SPEAKERS[language]
    return "\n".join(f"{user}: {turn['query']}\n{model}: {turn['answer']}" for turn in turns)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _jsonl(make: Callable[[int], dict[str, Any]], text_bytes: int) -> str:
    """Records until their texts reach `text_bytes` of UTF-8."""
    lines: list[str] = []
    size = 0
    while size < text_bytes or not lines:
        record = make(len(lines))
        lines.append(json.dumps(record, ensure_ascii=False))
        size += len(record["text"].encode())
    return "\n".join(lines) + "\n"


def _language_files(language: str, text_bytes: int, seed: int) -> Iterator[tuple[str, str]]:
    """(path in the corpus, content) of one language's files."""

    def rng(kind: str) -> random.Random:
        return random.Random(f"rxt-sample-v1|{seed}|{language}|{kind}")

    source = rng("stories")
    yield (
        f"{language}/stories.jsonl",
        _jsonl(lambda _: {"kind": "story", "text": story(source, language)}, int(text_bytes * _STORIES)),
    )
    tales, written, number = rng("chronicles"), 0, 0
    while written < text_bytes * _CHRONICLES:
        number += 1
        chronicle = "\n\n".join(story(tales, language) for _ in range(_CHRONICLE_CHAPTERS)) + "\n"
        written += len(chronicle.encode())
        yield f"{language}/chronicles/{number:03d}.txt", chronicle
    single = rng("interactions")

    def one(n: int) -> dict[str, Any]:
        turn = interaction(single, language)
        return {"kind": "interaction", **turn, "text": render([turn], language)}

    yield f"{language}/interactions.jsonl", _jsonl(one, int(text_bytes * _INTERACTIONS))
    talk = rng("dialogues")

    def many(n: int) -> dict[str, Any]:
        turns = dialogue(talk, language)
        return {"kind": "dialogue", "turns": turns, "text": render(turns, language)}

    rest = 1 - _STORIES - _CHRONICLES - _INTERACTIONS
    yield f"{language}/dialogues.jsonl", _jsonl(many, int(text_bytes * rest))


def require_new_folder(out: Path) -> None:
    """Refuse a folder that exists and holds something (DataError), or cannot be written to (ConfigError)."""
    require_folder(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} already exists and is not empty. Name a new folder for the sample corpus.")


def write_sample(out: Path, text_bytes: int = DEFAULT_BYTES, seed: int = 0) -> list[tuple[str, int]]:
    """Write about `text_bytes` of text, half English and half Polish, into folder `out`; return (file, bytes) of each.

    The same seed and size give the same bytes.

    Raises:
        DataError: `out` exists and holds something.
    """
    require_new_folder(out)
    require_free_space(out, text_bytes * 3 // 2, "The sample corpus")
    written = []
    with access_errors(out, f"Delete {out}, which is not whole."):
        for language in LANGUAGES:
            for name, content in _language_files(language, text_bytes // len(LANGUAGES), seed):
                path = out / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content)
                written.append((name, len(content.encode())))
    return written
