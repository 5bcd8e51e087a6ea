"""Polish words with the forms that sentences need: what is told in one case is asked for in another."""

from __future__ import annotations

from data_prep.synthetic import Word, word_table

PEOPLE = word_table(
    """
    m, Adam, Adama, Adamem
    f, Ania, Anię, Anią
    m, Bartek, Bartka, Bartkiem
    f, Zosia, Zosię, Zosią
    m, Tomek, Tomka, Tomkiem
    f, Maja, Maję, Mają
    m, Piotr, Piotra, Piotrem
    f, Kasia, Kasię, Kasią
    m, Michał, Michała, Michałem
    f, Hania, Hanię, Hanią
    m, Filip, Filipa, Filipem
    f, Ewa, Ewę, Ewą
    m, Wojtek, Wojtka, Wojtkiem
    f, Marta, Martę, Martą
    m, Jakub, Jakuba, Jakubem
    f, Julia, Julię, Julią
    m, Krzysztof, Krzysztofa, Krzysztofem
    f, Ola, Olę, Olą
    m, Marek, Marka, Markiem
    f, Basia, Basię, Basią
    m, Paweł, Pawła, Pawłem
    f, Gosia, Gosię, Gosią
    m, Rafał, Rafała, Rafałem
    f, Dorota, Dorotę, Dorotą
    m, Andrzej, Andrzeja, Andrzejem
    f, Iza, Izę, Izą
    m, Grzegorz, Grzegorza, Grzegorzem
    f, Magda, Magdę, Magdą
    m, Łukasz, Łukasza, Łukaszem
    f, Monika, Monikę, Moniką
    m, Mateusz, Mateusza, Mateuszem
    f, Natalia, Natalię, Natalią
    m, Dawid, Dawida, Dawidem
    f, Oliwia, Oliwię, Oliwią
    m, Robert, Roberta, Robertem
    f, Paulina, Paulinę, Pauliną
    m, Wiktor, Wiktora, Wiktorem
    f, Renata, Renatę, Renatą
    m, Oskar, Oskara, Oskarem
    f, Sylwia, Sylwię, Sylwią
    m, Igor, Igora, Igorem
    f, Teresa, Teresę, Teresą
    m, Leon, Leona, Leonem
    f, Urszula, Urszulę, Urszulą
    m, Szymon, Szymona, Szymonem
    f, Weronika, Weronikę, Weroniką
    m, Zbigniew, Zbigniewa, Zbigniewem
    f, Alicja, Alicję, Alicją
    m, Henryk, Henryka, Henrykiem
    f, Beata, Beatę, Beatą
    m, Jacek, Jacka, Jackiem
    f, Helena, Helenę, Heleną
    m, Maciej, Macieja, Maciejem
    f, Irena, Irenę, Ireną
    m, Sebastian, Sebastiana, Sebastianem
    f, Klara, Klarę, Klarą
    m, Ignacy, Ignacego, Ignacym
    f, Lena, Lenę, Leną
    m, Konrad, Konrada, Konradem
    f, Nina, Ninę, Niną
    m, Stanisław, Stanisława, Stanisławem
    f, Agata, Agatę, Agatą
    """,
    "nom acc inst",
)
PETS = word_table(
    """
    m, Burek, Burka, Burkiem
    m, Reksio, Reksia, Reksiem
    m, Azor, Azora, Azorem
    m, Mruczek, Mruczka, Mruczkiem
    m, Filemon, Filemona, Filemonem
    m, Puszek, Puszka, Puszkiem
    f, Łatka, Łatkę, Łatką
    f, Luna, Lunę, Luną
    f, Kropka, Kropkę, Kropką
    m, Fafik, Fafika, Fafikiem
    f, Pusia, Pusię, Pusią
    f, Figa, Figę, Figą
    m, Pikuś, Pikusia, Pikusiem
    m, Rudzik, Rudzika, Rudzikiem
    m, Maks, Maksa, Maksem
    m, Bruno, Brunona, Brunonem
    m, Kleks, Kleksa, Kleksem
    m, Tofik, Tofika, Tofikiem
    m, Karmel, Karmela, Karmelem
    f, Perełka, Perełkę, Perełką
    f, Iskra, Iskrę, Iskrą
    f, Gwiazdka, Gwiazdkę, Gwiazdką
    f, Śnieżka, Śnieżkę, Śnieżką
    f, Frania, Franię, Franią
    f, Kuleczka, Kuleczkę, Kuleczką
    f, Misia, Misię, Misią
    m, Borys, Borysa, Borysem
    m, Hektor, Hektora, Hektorem
    m, Herkules, Herkulesa, Herkulesem
    m, Ciapek, Ciapka, Ciapkiem
    m, Dyzio, Dyzia, Dyziem
    m, Gucio, Gucia, Guciem
    m, Pimpek, Pimpka, Pimpkiem
    m, Tygrys, Tygrysa, Tygrysem
    m, Wafel, Wafla, Waflem
    m, Biszkopt, Biszkopta, Biszkoptem
    m, Pączek, Pączka, Pączkiem
    f, Chmurka, Chmurkę, Chmurką
    """,
    "nom acc inst",
)
CITIES = word_table(
    """
    m, Kraków, w Krakowie, Krakowa
    f, Warszawa, w Warszawie, Warszawy
    m, Gdańsk, w Gdańsku, Gdańska
    m, Poznań, w Poznaniu, Poznania
    m, Wrocław, we Wrocławiu, Wrocławia
    f, Łódź, w Łodzi, Łodzi
    m, Lublin, w Lublinie, Lublina
    m, Toruń, w Toruniu, Torunia
    m, Szczecin, w Szczecinie, Szczecina
    f, Katowice, w Katowicach, Katowic
    m, Białystok, w Białymstoku, Białegostoku
    m, Rzeszów, w Rzeszowie, Rzeszowa
    n, Opole, w Opolu, Opola
    f, Kielce, w Kielcach, Kielc
    m, Olsztyn, w Olsztynie, Olsztyna
    f, Gdynia, w Gdyni, Gdyni
    m, Sopot, w Sopocie, Sopotu
    n, Zakopane, w Zakopanem, Zakopanego
    m, Radom, w Radomiu, Radomia
    m, Płock, w Płocku, Płocka
    m, Elbląg, w Elblągu, Elbląga
    m, Tarnów, w Tarnowie, Tarnowa
    m, Zamość, w Zamościu, Zamościa
    f, Praga, w Pradze, Pragi
    m, Berlin, w Berlinie, Berlina
    m, Paryż, w Paryżu, Paryża
    m, Londyn, w Londynie, Londynu
    m, Rzym, w Rzymie, Rzymu
    m, Wiedeń, w Wiedniu, Wiednia
    m, Madryt, w Madrycie, Madrytu
    f, Lizbona, w Lizbonie, Lizbony
    f, Ateny, w Atenach, Aten
    n, Wilno, w Wilnie, Wilna
    m, Budapeszt, w Budapeszcie, Budapesztu
    m, Sztokholm, w Sztokholmie, Sztokholmu
    f, Kopenhaga, w Kopenhadze, Kopenhagi
    """,
    "nom loc gen",
)
THINGS = word_table(
    """
    m, klucz, klucz
    f, książka, książkę
    m, list, list
    f, mapa, mapę
    m, zegarek, zegarek
    f, piłka, piłkę
    n, lustro, lustro
    f, lampa, lampę
    m, latawiec, latawiec
    f, moneta, monetę
    n, piórko, piórko
    f, latarka, latarkę
    m, młotek, młotek
    f, świeca, świecę
    n, mydło, mydło
    f, lornetka, lornetkę
    m, sznurek, sznurek
    f, poduszka, poduszkę
    m, guzik, guzik
    f, gazeta, gazetę
    n, wiadro, wiadro
    f, muszla, muszlę
    m, pierścionek, pierścionek
    f, rękawiczka, rękawiczkę
    m, portfel, portfel
    f, butelka, butelkę
    m, zeszyt, zeszyt
    f, igła, igłę
    m, ołówek, ołówek
    f, maska, maskę
    m, aparat, aparat
    f, linijka, linijkę
    m, kamień, kamień
    f, szachownica, szachownicę
    m, szalik, szalik
    m, grzebień, grzebień
    m, ręcznik, ręcznik
    m, kompas, kompas
    m, dzwonek, dzwonek
    m, wachlarz, wachlarz
    m, pędzel, pędzel
    n, dłuto, dłuto
    n, pióro, pióro
    """,
    "nom acc",
)
FOODS = word_table(
    """
    f, zupa, zupę
    m, rosół, rosół
    m, bigos, bigos
    m, pierogi, pierogi
    m, naleśniki, naleśniki
    f, kasza, kaszę
    m, ryż, ryż
    m, makaron, makaron
    f, sałatka, sałatkę
    f, ryba, rybę
    m, kurczak, kurczaka
    m, omlet, omlet
    f, jajecznica, jajecznicę
    f, owsianka, owsiankę
    f, kanapka, kanapkę
    m, twaróg, twaróg
    m, sernik, sernik
    f, szarlotka, szarlotkę
    m, jogurt, jogurt
    m, kotlet, kotlet
    m, gulasz, gulasz
    m, barszcz, barszcz
    m, żurek, żurek
    f, pizza, pizzę
    m, placki, placki
    m, gołąbki, gołąbki
    m, kopytka, kopytka
    m, kluski, kluski
    m, frytki, frytki
    m, tort, tort
    m, lody, lody
    m, budyń, budyń
    m, kisiel, kisiel
    f, galaretka, galaretkę
    f, fasolka, fasolkę
    n, leczo, leczo
    m, tosty, tosty
    m, racuchy, racuchy
    m, pasztet, pasztet
    f, zapiekanka, zapiekankę
    """,
    "nom acc",
)
JOBS = word_table(
    """
    m, lekarz, lekarzem, lekarka, lekarką
    m, nauczyciel, nauczycielem, nauczycielka, nauczycielką
    m, kucharz, kucharzem, kucharka, kucharką
    m, malarz, malarzem, malarka, malarką
    m, dentysta, dentystą, dentystka, dentystką
    m, aktor, aktorem, aktorka, aktorką
    m, pisarz, pisarzem, pisarka, pisarką
    m, piekarz, piekarzem, piekarka, piekarką
    m, krawiec, krawcem, krawcowa, krawcową
    m, ogrodnik, ogrodnikiem, ogrodniczka, ogrodniczką
    m, fryzjer, fryzjerem, fryzjerka, fryzjerką
    m, kelner, kelnerem, kelnerka, kelnerką
    m, listonosz, listonoszem, listonoszka, listonoszką
    m, policjant, policjantem, policjantka, policjantką
    m, strażak, strażakiem, strażaczka, strażaczką
    m, pielęgniarz, pielęgniarzem, pielęgniarka, pielęgniarką
    m, dziennikarz, dziennikarzem, dziennikarka, dziennikarką
    m, fotograf, fotografem, fotografka, fotografką
    m, skrzypek, skrzypkiem, skrzypaczka, skrzypaczką
    m, tancerz, tancerzem, tancerka, tancerką
    m, śpiewak, śpiewakiem, śpiewaczka, śpiewaczką
    m, prawnik, prawnikiem, prawniczka, prawniczką
    m, księgowy, księgowym, księgowa, księgową
    m, sprzedawca, sprzedawcą, sprzedawczyni, sprzedawczynią
    m, bibliotekarz, bibliotekarzem, bibliotekarka, bibliotekarką
    m, tłumacz, tłumaczem, tłumaczka, tłumaczką
    m, rolnik, rolnikiem, rolniczka, rolniczką
    m, leśnik, leśnikiem, leśniczka, leśniczką
    m, farmaceuta, farmaceutą, farmaceutka, farmaceutką
    m, informatyk, informatykiem, informatyczka, informatyczką
    m, rzeźbiarz, rzeźbiarzem, rzeźbiarka, rzeźbiarką
    m, kierowca, kierowcą, kierowczyni, kierowczynią
    m, reżyser, reżyserem, reżyserka, reżyserką
    m, architekt, architektem, architektka, architektką
    m, pływak, pływakiem, pływaczka, pływaczką
    m, astronom, astronomem, astronomka, astronomką
    """,
    "nom inst.m nom.f inst.f",
)
INSTRUMENTS = word_table(
    """
    n, pianino, pianinie
    f, gitara, gitarze
    f, skrzypce, skrzypcach
    m, flet, flecie
    f, trąbka, trąbce
    f, harfa, harfie
    f, perkusja, perkusji
    f, wiolonczela, wiolonczeli
    m, saksofon, saksofonie
    m, akordeon, akordeonie
    m, klarnet, klarnecie
    m, organy, organach
    m, bęben, bębnie
    m, obój, oboju
    m, puzon, puzonie
    f, altówka, altówce
    m, kontrabas, kontrabasie
    f, mandolina, mandolinie
    n, banjo, banjo
    n, ukulele, ukulele
    f, lutnia, lutni
    f, cytra, cytrze
    m, fagot, fagocie
    f, tuba, tubie
    f, waltornia, waltorni
    f, dudy, dudach
    f, harmonijka, harmonijce
    m, ksylofon, ksylofonie
    m, klawesyn, klawesynie
    f, lira, lirze
    f, fujarka, fujarce
    m, tamburyn, tamburynie
    f, okaryna, okarynie
    m, keyboard, keyboardzie
    """,
    "nom loc",
)


def _colours(stems: str) -> tuple[Word, ...]:
    """Adjectives of the hard declension (after k and g the endings have an i), agreeing with what has the colour."""
    made = []
    for stem in stems.split():
        y, e = ("i", "ie") if stem[-1] in "kg" else ("y", "e")
        nominative = {"nom.m": stem + y, "nom.f": stem + "a", "nom.n": stem + e}
        accusative = {"acc.m": stem + y, "acc.f": stem + "ą", "acc.n": stem + e}
        made.append(Word({"nom": stem + y, "masculine": stem + y, **nominative, **accusative}, 0))
    return tuple(made)


COLOURS = _colours(
    "czerwon zielon niebiesk żółt biał czarn srebrn złot brązow fioletow szar różow pomarańczow beżow granatow "
    "turkusow bordow kremow oliwkow błękitn liliow miodow miętow perłow rubinow szmaragdow purpurow rud łososiow "
    "cytrynow malinow wiśniow stalow piaskow kasztanow"
)
HOURS = word_table(
    """
    f, pierwsza, pierwszej
    f, druga, drugiej
    f, trzecia, trzeciej
    f, czwarta, czwartej
    f, piąta, piątej
    f, szósta, szóstej
    f, siódma, siódmej
    f, ósma, ósmej
    f, dziewiąta, dziewiątej
    f, dziesiąta, dziesiątej
    f, jedenasta, jedenastej
    f, dwunasta, dwunastej
    """,
    "nom loc",
)
TIMES = tuple(
    Word({case: f"{form} {minutes}" for case, form in hour.forms.items()}, 1)
    for minutes in ("piętnaście", "trzydzieści", "dwadzieścia", "pięćdziesiąt")
    for hour in HOURS
)
NUMBERS = tuple(Word({"nom": str(number)}, 0) for number in (*range(11, 100, 3), *range(12, 100, 3)))
