"""Facts and other talk in Polish. Nothing that is said depends on who speaks: no past tense of a person."""

from __future__ import annotations

from random import Random

from data_prep.recall.kinds import Kind, Speech
from data_prep.recall.polish_words import (
    CITIES,
    COLOURS,
    FOODS,
    INSTRUMENTS,
    JOBS,
    NUMBERS,
    PEOPLE,
    PETS,
    THINGS,
    TIMES,
)
from data_prep.synthetic import word_table

_PET_SLOTS = word_table(
    """
    m, pies, psa
    m, kot, kota
    f, papuga, papugę
    m, koń, konia
    m, królik, królika
    m, chomik, chomika
    m, żółw, żółwia
    f, świnka morska, świnkę morską
    m, kanarek, kanarka
    f, koza, kozę
    """,
    "nom acc",
)
_FAMILY = word_table(
    """
    m, brat, brata, bratem, brata
    f, siostra, siostrę, siostrą, siostry
    m, wujek, wujka, wujkiem, wujka
    f, ciocia, ciocię, ciocią, cioci
    m, kuzyn, kuzyna, kuzynem, kuzyna
    f, kuzynka, kuzynkę, kuzynką, kuzynki
    m, dziadek, dziadka, dziadkiem, dziadka
    f, babcia, babcię, babcią, babci
    m, sąsiad, sąsiada, sąsiadem, sąsiada
    f, sąsiadka, sąsiadkę, sąsiadką, sąsiadki
    """,
    "nom acc inst gen",
)
_OWNED = word_table(
    """
    m, rower, rower
    f, kurtka, kurtkę
    m, samochód, samochód
    n, krzesło, krzesło
    f, torba, torbę
    m, płaszcz, płaszcz
    m, parasol, parasol
    n, łóżko, łóżko
    f, filiżanka, filiżankę
    m, plecak, plecak
    f, łódka, łódkę
    n, biurko, biurko
    f, walizka, walizkę
    f, czapka, czapkę
    """,
    "nom acc",
)
_HOLDERS = word_table(
    """
    m, w mojej torbie, w twojej torbie, w torbie
    m, na moim stole, na twoim stole, na stole
    m, w mojej szafie, w twojej szafie, w szafie
    m, na mojej półce, na twojej półce, na półce
    m, w mojej szufladzie, w twojej szufladzie, w szufladzie
    m, pod moim łóżkiem, pod twoim łóżkiem, pod łóżkiem
    m, w moim plecaku, w twoim plecaku, w plecaku
    m, w moim garażu, w twoim garażu, w garażu
    m, w mojej piwnicy, w twojej piwnicy, w piwnicy
    m, w moim koszyku, w twoim koszyku, w koszyku
    """,
    "nom your bare",
)
_MEALS = word_table(
    """
    n, na śniadanie
    m, na obiad
    f, na kolację
    m, na deser
    n, na drugie śniadanie
    """,
    "nom",
)
_COUNTED = word_table(
    """
    m, domu
    m, pokoju
    f, szafki
    m, biletu
    m, miejsca
    f, koszulki
    m, biurka
    """,
    "nom",
)
_EVENTS = word_table(
    """
    m, mój pociąg odjeżdża, odjeżdża mój pociąg, twój pociąg odjeżdża
    m, mój film zaczyna się, zaczyna się mój film, twój film zaczyna się
    m, mój autobus odjeżdża, odjeżdża mój autobus, twój autobus odjeżdża
    f, moja lekcja zaczyna się, zaczyna się moja lekcja, twoja lekcja zaczyna się
    m, mój koncert zaczyna się, zaczyna się mój koncert, twój koncert zaczyna się
    n, moje spotkanie zaczyna się, zaczyna się moje spotkanie, twoje spotkanie zaczyna się
    m, mój budzik dzwoni, dzwoni mój budzik, twój budzik dzwoni
    m, mój sklep otwiera się, otwiera się mój sklep, twój sklep otwiera się
    """,
    "nom when your",
)

_KINDS = (
    Kind(
        "name",
        PEOPLE,
        ("mam na imię {v}.", "nazywam się {v}.", "wszyscy znają mnie jako {v[acc]}.", "moje imię to {v}."),
        (
            ("jak mam na imię?", "masz na imię {v}."),
            ("jakie jest moje imię?", "twoje imię to {v}."),
            ("jak się nazywam?", "nazywasz się {v}."),
        ),
    ),
    Kind(
        "pet",
        PETS,
        (
            "{s[mój/moja]} {s} wabi się {v}.",
            "mam {s[acc]}, {s[który/która]} wabi się {v}.",
            "codziennie karmię {v[acc]}, to {s[mój/moja]} {s}.",
            "opiekuję się {v[inst]}, to {s[mój/moja]} {s}.",
        ),
        (
            ("jak wabi się {s[mój/moja]} {s}?", "{s[twój/twoja]} {s} wabi się {v}."),
            ("jakie imię ma {s[mój/moja]} {s}?", "{s[twój/twoja]} {s} ma na imię {v}."),
        ),
        _PET_SLOTS,
    ),
    Kind(
        "relative",
        PEOPLE,
        (
            "{s[mój/moja]} {s} ma na imię {v}.",
            "mam {s[acc]} {v[acc]}.",
            "opiekuję się {v[inst]}, {s[moim/moją]} {s[inst]}.",
            "często widuję {v[acc]}, {s[mojego/moją]} {s[acc]}.",
        ),
        (
            ("jak ma na imię {s[mój/moja]} {s}?", "{s[twój/twoja]} {s} ma na imię {v}."),
            ("jakie imię nosi {s[mój/moja]} {s}?", "{s[twój/twoja]} {s} to {v}."),
        ),
        _FAMILY,
        same_gender=True,
    ),
    Kind(
        "home",
        CITIES,
        (
            "mieszkam {v[loc]}.",
            "mój dom stoi {v[loc]}.",
            "moje miasto to {v}.",
            "po pracy wracam do domu, do {v[gen]}.",
        ),
        (
            ("gdzie mieszkam?", "mieszkasz {v[loc]}."),
            ("jak nazywa się moje miasto?", "twoje miasto to {v}."),
            ("gdzie stoi mój dom?", "twój dom stoi {v[loc]}."),
        ),
    ),
    Kind(
        "holiday",
        CITIES,
        ("na wakacje jadę do {v[gen]}.", "latem wyjeżdżam do {v[gen]}.", "wakacje spędzam {v[loc]}."),
        (
            ("dokąd jadę na wakacje?", "na wakacje jedziesz do {v[gen]}."),
            ("gdzie spędzam wakacje?", "wakacje spędzasz {v[loc]}."),
            ("jaki jest cel moich wakacji?", "cel twoich wakacji to {v}."),
        ),
    ),
    Kind(
        "work",
        CITIES,
        ("pracuję {v[loc]}.", "do pracy dojeżdżam do {v[gen]}.", "moje biuro jest {v[loc]}."),
        (
            ("gdzie pracuję?", "pracujesz {v[loc]}."),
            ("gdzie jest moje biuro?", "twoje biuro jest {v[loc]}."),
            ("w jakim mieście mam pracę?", "miasto twojej pracy to {v}."),
        ),
    ),
    Kind(
        "thing",
        THINGS,
        ("{s} leży {v}.", "{s[bare]} mam {v[acc]}.", "trzymam {v[acc]} {s[bare]}.", "{s} jest teraz {v}."),
        (
            ("co leży {s}?", "{s[your]} leży {v}."),
            ("co mam {s[bare]}?", "{s[bare]} masz {v[acc]}."),
            ("co trzymam {s[bare]}?", "{s[bare]} trzymasz {v[acc]}."),
        ),
        _HOLDERS,
    ),
    Kind(
        "colour",
        COLOURS,
        (
            "{s[mój/moja/moje]} {s} jest {v}.",
            "mam {v[acc]} {s[acc]}.",
            "{s[mój/moja/moje]} {s} ma kolor {v[masculine]}.",
        ),
        (
            ("jakiego koloru jest {s[mój/moja/moje]} {s}?", "{s[twój/twoja/twoje]} {s} jest {v}."),
            ("jaki kolor ma {s[mój/moja/moje]} {s}?", "{s[twój/twoja/twoje]} {s} ma kolor {v[masculine]}."),
        ),
        _OWNED,
    ),
    Kind(
        "number",
        NUMBERS,
        ("numer {s[mojego/mojej]} {s} to {v}.", "{v} to numer {s[mojego/mojej]} {s}."),
        (
            ("jaki jest numer {s[mojego/mojej]} {s}?", "numer {s[twojego/twojej]} {s} to {v}."),
            ("pamiętasz numer {s[mojego/mojej]} {s}?", "tak, to {v}."),
        ),
        _COUNTED,
    ),
    Kind(
        "food",
        FOODS,
        ("{s} jem {v[acc]}.", "{s} zawsze wybieram {v[acc]}.", "{s} mam dzisiaj {v[acc]}.", "lubię {v[acc]} {s}."),
        (
            ("co jem {s}?", "{s} jesz {v[acc]}."),
            ("co wybieram {s}?", "{s} wybierasz {v[acc]}."),
            ("jaki jest mój wybór {s}?", "twój wybór {s} to {v}."),
        ),
        _MEALS,
    ),
    Kind(
        "job",
        JOBS,
        (
            "{s[mój/moja]} {s} jest {v[inst]}.",
            "{s[mój/moja]} {s} pracuje jako {v}.",
            "{s[mój/moja]} {s} to z zawodu {v}.",
        ),
        (
            ("kim jest z zawodu {s[mój/moja]} {s}?", "{s[twój/twoja]} {s} jest {v[inst]}."),
            ("jaki zawód ma {s[mój/moja]} {s}?", "zawód {s[twojego/twojej]} {s[gen]} to {v}."),
        ),
        _FAMILY,
    ),
    Kind(
        "time",
        TIMES,
        ("{s} o {v[loc]}.", "dzisiaj {s} o {v[loc]}."),
        (
            ("o której {s[when]}?", "{s[your]} o {v[loc]}."),
            ("o jakiej godzinie {s[when]}?", "będzie wtedy {v}."),
        ),
        _EVENTS,
    ),
    Kind(
        "instrument",
        INSTRUMENTS,
        (
            "{s[mój/moja]} {s} gra na {v[loc]}.",
            "{s[mój/moja]} {s} uczy się grać na {v[loc]}.",
            "instrument {s[mojego/mojej]} {s[gen]} to {v}.",
        ),
        (
            ("na czym gra {s[mój/moja]} {s}?", "{s[twój/twoja]} {s} gra na {v[loc]}."),
            ("jaki jest instrument {s[mojego/mojej]} {s[gen]}?", "instrument {s[twojego/twojej]} {s[gen]} to {v}."),
        ),
        _FAMILY,
    ),
)

_OPPOSITES = ("duży mały", "gorący zimny", "długi krótki", "stary nowy", "wczesny późny", "pełny pusty",
              "szybki wolny", "wysoki niski")  # fmt: skip
_DAYS = ("poniedziałek", "wtorek", "środa", "czwartek", "piątek", "sobota", "niedziela")
_AFTER = ("poniedziałku", "wtorku", "środzie", "czwartku", "piątku", "sobocie", "niedzieli")
_SAID = ("wiatr", "most", "zima", "drzewo", "rzeka", "chmura", "śnieg", "droga", "wieża", "pole", "jezioro", "trawa")
_TALK = (
    ("Dzień dobry!", "Dzień dobry, miło cię widzieć."),
    ("Co słychać?", "Wszystko w porządku, dziękuję."),
    ("Pada deszcz.", "Lepiej zostań w domu."),
    ("Dziękuję!", "Nie ma za co."),
    ("Chce mi się spać.", "Odpocznij trochę."),
    ("Co za dzień!", "Opowiedz mi o nim."),
    ("To miłe.", "Też tak myślę."),
    ("Zaczekaj chwilę.", "Mam czas."),
    ("Porozmawiajmy.", "Bardzo chętnie."),
    ("Świeci słońce.", "Ciesz się ciepłem."),
    ("Jesteś tam?", "Tak, jestem."),
    ("Trochę mi się nudzi.", "Możemy w coś zagrać."),
)
_IS = {
    "zwierzę": ("wilk", "niedźwiedź", "jeleń", "żaba", "orzeł", "wąż", "zebra", "lew"),
    "roślina": ("róża", "tulipan", "dąb", "sosna", "paproć", "kaktus", "wierzba", "brzoza"),
    "narzędzie": ("piła", "wiertarka", "siekiera", "łopata", "śrubokręt", "grabie", "obcęgi", "kilof"),
}
_SMALL_NUMBERS = ("zero", "jeden", "dwa", "trzy", "cztery", "pięć", "sześć", "siedem", "osiem", "dziewięć", "dziesięć",
                  "jedenaście")  # fmt: skip


def _talk(rng: Random) -> tuple[str, str]:
    return rng.choice(_TALK)


def _opposite(rng: Random) -> tuple[str, str]:
    first, second = rng.sample(rng.choice(_OPPOSITES).split(), 2)
    return f"Jakie jest przeciwieństwo słowa {first}?", f"Przeciwieństwem jest {second}."


def _say(rng: Random) -> tuple[str, str]:
    word = rng.choice(_SAID)
    return f"Powiedz słowo {word}.", f"{word.capitalize()}."


def _next_day(rng: Random) -> tuple[str, str]:
    day = rng.randrange(7)
    return f"Jaki dzień jest po {_AFTER[day]}?", f"{_DAYS[(day + 1) % 7].capitalize()}."


def _what_is(rng: Random) -> tuple[str, str]:
    what = rng.choice(sorted(_IS))
    word = rng.choice(_IS[what])
    return f"Co to jest: {word}?", f"To {what}."


def _sum(rng: Random) -> tuple[str, str]:
    one, other = rng.randrange(1, 7), rng.randrange(1, 6)
    query = f"Ile to jest {_SMALL_NUMBERS[one]} i {_SMALL_NUMBERS[other]}?"
    return query, f"To jest {_SMALL_NUMBERS[one + other]}."


def _letters(rng: Random) -> tuple[str, str]:
    word = rng.choice(_SAID)
    return f"Na jaką literę zaczyna się słowo {word}?", f"Na literę {word[0].upper()}."


POLISH = Speech(
    _KINDS,
    ("Rozumiem, {v}.", "Dziękuję, zapamiętam to.", "Zapisane: {v}.", "Dobrze wiedzieć.", "Będę o tym pamiętać."),
    ("", "", "wiesz co, ", "posłuchaj: ", "warto wiedzieć: ", "na marginesie: "),
    ("", "", "powiedz mi, ", "mam pytanie: ", "a teraz powiedz: ", "przypomnij mi: "),
    (_talk, _opposite, _say, _next_day, _what_is, _sum, _letters),
)
