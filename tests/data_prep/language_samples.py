"""Texts in English, Polish and neither, written for the tests of the language guess."""

from __future__ import annotations

ENGLISH = (
    "The heron is a large wading bird that lives near shallow water. It feeds on fish and frogs, which it catches with "
    "a quick stab of its bill. Both parents build the nest and take turns sitting on the eggs.",
    "Basalt is a dark volcanic rock. Most of the ocean floor is made of it, and it forms when lava cools quickly.",
    "Council approves new tram line\n\nMembers voted 21 to 14 on Tuesday night for a plan to extend the tram to the "
    "harbour. Work will begin in spring, said the mayor, who called it 'a good day for this city'.",
    "Shares fell sharply on Monday after the company said that profits would not meet its forecast.",
    "BIG SALE! Buy two pairs of shoes and get the third for free. Offer ends Sunday. Visit our store or order online!",
    "For sale: used bicycle, blue, 21 gears, good tyres. Some scratches on the frame. Call after 6 pm.",
    "Once there was a fox who could not sleep. Every night she counted the stars, and every night one was missing. "
    '"Who is taking them?" she asked the owl. But the owl only blinked.',
    'He put the letter down. Outside, rain ran along the gutters. "You knew," she said. "You knew all this time."',
    "What is the difference between weather and climate?",
    "How do I get the stain out of a wool coat without taking it to the cleaner?",
    "It is in the second drawer, under the maps.",
    "Yes, that would work, but you should check the brakes before you leave.",
    "Preheat the oven to 180 degrees. Mix flour, sugar and salt; add the butter and rub it in with your fingers. Bake "
    "for 25 minutes, until the top is golden.",
    "I don't think they'll come today. The road from the village is closed, and it's getting dark.",
    "To install the driver, download the archive, unpack it and run the script as root. If this fails, look at "
    "the log.",
    "Warsaw is the capital of Poland.",
    "He was born in 1798 and died in 1855.",
    "Could I book a table for two?",
    "Lech Wałęsa spoke in Gdańsk with Łukasz.",
    "Dear Ms Harrow,\n\nthank you for your letter of 3 May. We are sorry that your parcel has not arrived. Our courier "
    "will contact you within two days.\n\nKind regards",
    "The treaty was signed in Kraków in 1525. Its text, kept in the archive, names three witnesses from Łódź.",
    "abstract: we study how heat moves through thin films. the results show that conductivity depends on thickness.",
    "Great hotel!!! The staff were so friendly and the breakfast was amazing. Will come back for sure :)",
    "Article 4. The tenant shall pay the rent by the tenth day of each month. If the rent is not paid, the owner may "
    "end this agreement after a written notice.",
)

POLISH = (
    "Czapla siwa to duży ptak brodzący, zamieszkujący brzegi płytkich wód. Żywi się rybami i żabami, które chwyta "
    "szybkim ruchem dzioba. Gniazdo budują oboje rodzice.",
    "Bazalt – ciemna skała wulkaniczna. Powstaje, gdy lawa szybko stygnie; zbudowana jest z niego większość dna "
    "oceanów.",
    "Rada przyjęła projekt nowej linii tramwajowej\n\nWe wtorek wieczorem 21 radnych zagłosowało za "
    "przedłużeniem trasy "
    "do portu. Prace ruszą wiosną – zapowiedział burmistrz.",
    "W poniedziałek akcje spółki gwałtownie potaniały, gdyż zysk okazał się niższy od prognoz.",
    "WIELKA WYPRZEDAŻ! Kup dwie pary butów, a trzecią dostaniesz gratis. Oferta ważna do niedzieli. Zapraszamy!",
    "Sprzedam rower, niebieski, 21 biegów, opony w dobrym stanie. Drobne rysy na ramie. Dzwonić po 18.",
    "Był sobie lis, który nie mógł zasnąć. Co noc liczył gwiazdy i co noc jednej brakowało. „Kto je zabiera?” – "
    "zapytał "
    "sowę. Ale sowa tylko mrugnęła.",
    "Odłożył list. Na dworze padało. – Wiedziałeś – powiedziała. – Cały czas wiedziałeś.",
    "Czym różni się pogoda od klimatu?",
    "Jak usunąć plamę z wełnianego płaszcza bez oddawania go do pralni?",
    "W drugiej szufladzie, pod mapami. Poszukaj dobrze, na pewno tam jest.",
    "Tak, to zadziała, ale przed wyjazdem sprawdź hamulce.",
    "Piekarnik rozgrzać do 180 stopni. Wymieszać mąkę, cukier i sól, dodać masło i zagnieść. Piec 25 minut na złoty "
    "kolor.",
    "Chyba dziś nie przyjadą. Droga ze wsi jest zamknięta, a robi się ciemno.",
    "Aby zainstalować sterownik, pobierz archiwum, rozpakuj je i uruchom skrypt jako root. Jeśli wystąpi błąd, zajrzyj "
    "do dziennika.",
    "Warszawa to stolica Polski, położona nad Wisłą.",
    "Poproszę kawę i dwie bułki z masłem.",
    "Kot spał na piecu, a pies pod stołem.",
    "Autobus przyjechał spóźniony.",
    "Szanowna Pani,\n\ndziękujemy za list z 3 maja. Przykro nam, że przesyłka nie dotarła. Kurier skontaktuje się z "
    "Panią w ciągu dwóch dni.\n\nZ poważaniem",
    "Zespół The Who zagrał w Gdańsku. Na scenie pojawili się też goście z Pragi: Dvořák i Kolářová.",
    "streszczenie: badamy przepływ ciepła w cienkich warstwach. wyniki pokazują, że przewodność zależy od grubości.",
    "Super hotel!!! Obsługa przemiła, śniadania rewelacja. Na pewno jeszcze wrócimy :)",
    "§ 4. Najemca płaci czynsz do dziesiątego dnia każdego miesiąca. W razie opóźnienia wynajmujący może wypowiedzieć "
    "umowę.",
)

NEITHER = (
    "Der Reiher ist ein großer Vogel, der in der Nähe von flachem Wasser lebt. Er war so schnell, dass man ihn "
    "kaum sah.",
    "De reiger is een grote vogel die in of bij ondiep water leeft. Het is niet bekend of hij had gegeten.",
    "Volavka je velký pták, který žije u mělkých vod. Na jaře se vrací z jihu, ale ne vždy. Jak víme od lovců, "
    "po zimě.",
    "Volavka je veľký vták a žije pri plytkej vode. Na jar sa vracia z juhu, ale nie vždy. Od lovcov vieme, ako loví.",
    "Garnys yra didelis paukštis, gyvenantis prie seklių vandenų. Jis minta žuvimis ir varlėmis, kurias gaudo greitai.",
    "Čaplja je velika ptica koja živi uz plitke vode. Na proljeće se vraća, ali ne uvijek. Od lovaca znamo što jede.",
    "El pájaro vive en el agua y no se sabe si me ha visto. Has de mirar a la orilla, que es donde come.",
    "Hejren er en stor fugl, der lever ved vandet. Den er her for at finde fisk og har ikke set os.",
    "for (int i = 0; i < n; ++i) { total += values[i]; }  // suma\nreturn total / n;",
    "select id, name from users where id = 7;",
    "Hij is in of bij het huis.",
    "Das Haus ist in der Stadt, an dem Fluss, und er war so an ihn gewohnt.",
    "Ne znam, ali na moru je lijepo, od jutra do mraka.",
    "if x is not None and y is not None:\n    for item in x:\n        yield item\nwhile not done or y:\n    pass",
    "12.5 13.1 14.8\n9.2 8.8 7.0\nA B C",
    "",
)
