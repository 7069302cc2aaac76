"""Facts about the world, from tables: countries, elements, planets, history, books, science.

Only settled entries are kept: countries whose capital or continent is disputed or being moved are left out.
"""

from __future__ import annotations

from reply_facts import Confidence, Fact

# Continent: country, capital; ...
COUNTRIES = {
    "Europe": (
        "Albania, Tirana; Andorra, Andorra la Vella; Austria, Vienna; Belarus, Minsk; Belgium, Brussels; "
        "Bosnia and Herzegovina, Sarajevo; Bulgaria, Sofia; Croatia, Zagreb; Czechia, Prague; Denmark, Copenhagen; "
        "Estonia, Tallinn; Finland, Helsinki; France, Paris; Germany, Berlin; Greece, Athens; Hungary, Budapest; "
        "Iceland, Reykjavik; Ireland, Dublin; Italy, Rome; Latvia, Riga; Liechtenstein, Vaduz; Lithuania, Vilnius; "
        "Malta, Valletta; Moldova, Chisinau; Montenegro, Podgorica; North Macedonia, Skopje; Norway, Oslo; "
        "Poland, Warsaw; Portugal, Lisbon; Romania, Bucharest; Serbia, Belgrade; Slovakia, Bratislava; "
        "Slovenia, Ljubljana; Spain, Madrid; Sweden, Stockholm; Ukraine, Kyiv; the United Kingdom, London"
    ),
    "Asia": (
        "Afghanistan, Kabul; Bahrain, Manama; Bangladesh, Dhaka; Bhutan, Thimphu; Brunei, Bandar Seri Begawan; "
        "Cambodia, Phnom Penh; China, Beijing; India, New Delhi; Iran, Tehran; Iraq, Baghdad; Japan, Tokyo; "
        "Jordan, Amman; Kuwait, Kuwait City; Kyrgyzstan, Bishkek; Laos, Vientiane; Lebanon, Beirut; "
        "the Maldives, Malé; Mongolia, Ulaanbaatar; Myanmar, Naypyidaw; Nepal, Kathmandu; North Korea, Pyongyang; "
        "Oman, Muscat; Pakistan, Islamabad; the Philippines, Manila; Qatar, Doha; Saudi Arabia, Riyadh; "
        "South Korea, Seoul; Syria, Damascus; Tajikistan, Dushanbe; Thailand, Bangkok; Turkmenistan, Ashgabat; "
        "the United Arab Emirates, Abu Dhabi; Uzbekistan, Tashkent; Vietnam, Hanoi"
    ),
    "Africa": (
        "Algeria, Algiers; Angola, Luanda; Botswana, Gaborone; Burkina Faso, Ouagadougou; Cameroon, Yaoundé; "
        "Cape Verde, Praia; the Central African Republic, Bangui; Chad, N'Djamena; the Comoros, Moroni; "
        "the Democratic Republic of the Congo, Kinshasa; the Republic of the Congo, Brazzaville; "
        "Eritrea, Asmara; Ethiopia, Addis Ababa; Gabon, Libreville; the Gambia, Banjul; Ghana, Accra; "
        "Guinea, Conakry; Guinea-Bissau, Bissau; Kenya, Nairobi; Lesotho, Maseru; Liberia, Monrovia; Libya, Tripoli; "
        "Madagascar, Antananarivo; Malawi, Lilongwe; Mali, Bamako; Mauritania, Nouakchott; Mauritius, Port Louis; "
        "Morocco, Rabat; Mozambique, Maputo; Namibia, Windhoek; Niger, Niamey; Nigeria, Abuja; Rwanda, Kigali; "
        "Senegal, Dakar; the Seychelles, Victoria; Sierra Leone, Freetown; Somalia, Mogadishu; South Sudan, Juba; "
        "Sudan, Khartoum; Tanzania, Dodoma; Togo, Lomé; Tunisia, Tunis; Uganda, Kampala; Zambia, Lusaka; "
        "Zimbabwe, Harare"
    ),
    "North America": (
        "Antigua and Barbuda, Saint John's; the Bahamas, Nassau; Barbados, Bridgetown; Belize, Belmopan; "
        "Canada, Ottawa; Costa Rica, San José; Cuba, Havana; Dominica, Roseau; "
        "the Dominican Republic, Santo Domingo; El Salvador, San Salvador; Guatemala, Guatemala City; "
        "Haiti, Port-au-Prince; Honduras, Tegucigalpa; Jamaica, Kingston; Mexico, Mexico City; Nicaragua, Managua; "
        "Saint Kitts and Nevis, Basseterre; Saint Lucia, Castries; Saint Vincent and the Grenadines, Kingstown; "
        "the United States, Washington, D.C."
    ),
    "South America": (
        "Argentina, Buenos Aires; Brazil, Brasília; Chile, Santiago; Colombia, Bogotá; Ecuador, Quito; "
        "Guyana, Georgetown; Paraguay, Asunción; Peru, Lima; Suriname, Paramaribo; Uruguay, Montevideo; "
        "Venezuela, Caracas"
    ),
    "Oceania": (
        "Australia, Canberra; Fiji, Suva; Kiribati, Tarawa; the Marshall Islands, Majuro; Micronesia, Palikir; "
        "New Zealand, Wellington; Palau, Ngerulmud; Papua New Guinea, Port Moresby; Samoa, Apia; "
        "the Solomon Islands, Honiara; Tonga, Nuku'alofa; Tuvalu, Funafuti; Vanuatu, Port Vila"
    ),
}

CURRENCIES = (
    "Japan, yen; the United Kingdom, pound sterling; India, Indian rupee; China, renminbi; Brazil, real; "
    "Mexico, Mexican peso; Canada, Canadian dollar; Australia, Australian dollar; New Zealand, New Zealand dollar; "
    "South Korea, won; Thailand, baht; Vietnam, dong; Poland, złoty; Czechia, koruna; Hungary, forint; "
    "Sweden, Swedish krona; Norway, Norwegian krone; Denmark, Danish krone; Iceland, Icelandic króna; "
    "Ukraine, hryvnia; Albania, lek; Romania, leu; Nigeria, naira; Ghana, cedi; Kenya, Kenyan shilling; "
    "Ethiopia, birr; Morocco, Moroccan dirham; Algeria, Algerian dinar; Zambia, kwacha; Botswana, pula; "
    "Argentina, Argentine peso; Peru, sol; Chile, Chilean peso; Colombia, Colombian peso; Paraguay, guaraní; "
    "Costa Rica, colón; Guatemala, quetzal; Honduras, lempira; Bangladesh, taka; Bhutan, ngultrum; "
    "Mongolia, tögrög; Laos, kip; Cambodia, riel; Nepal, Nepalese rupee; Pakistan, Pakistani rupee; "
    "Saudi Arabia, riyal; Iran, rial; Iraq, Iraqi dinar; France, euro; Germany, euro; Italy, euro; Spain, euro; "
    "Portugal, euro; Ireland, euro; Finland, euro; Greece, euro; Austria, euro; Belgium, euro; Estonia, euro"
)

ELEMENTS = (
    "hydrogen H, helium He, lithium Li, beryllium Be, boron B, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne, "
    "sodium Na, magnesium Mg, aluminium Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K, "
    "calcium Ca, scandium Sc, titanium Ti, vanadium V, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, "
    "copper Cu, zinc Zn, gallium Ga, germanium Ge, arsenic As, selenium Se, bromine Br, krypton Kr, rubidium Rb, "
    "strontium Sr, yttrium Y, zirconium Zr, niobium Nb, molybdenum Mo, technetium Tc, ruthenium Ru, rhodium Rh, "
    "palladium Pd, silver Ag, cadmium Cd, indium In, tin Sn, antimony Sb, tellurium Te, iodine I, xenon Xe, "
    "caesium Cs, barium Ba, lanthanum La, cerium Ce, praseodymium Pr, neodymium Nd, promethium Pm, samarium Sm, "
    "europium Eu, gadolinium Gd, terbium Tb, dysprosium Dy, holmium Ho, erbium Er, thulium Tm, ytterbium Yb, "
    "lutetium Lu, hafnium Hf, tantalum Ta, tungsten W, rhenium Re, osmium Os, iridium Ir, platinum Pt, gold Au, "
    "mercury Hg, thallium Tl, lead Pb, bismuth Bi, polonium Po, astatine At, radon Rn, francium Fr, radium Ra, "
    "actinium Ac, thorium Th, protactinium Pa, uranium U, neptunium Np, plutonium Pu, americium Am, curium Cm, "
    "berkelium Bk, californium Cf, einsteinium Es, fermium Fm, mendelevium Md, nobelium No, lawrencium Lr, "
    "rutherfordium Rf, dubnium Db, seaborgium Sg, bohrium Bh, hassium Hs, meitnerium Mt, darmstadtium Ds, "
    "roentgenium Rg, copernicium Cn, nihonium Nh, flerovium Fl, moscovium Mc, livermorium Lv, tennessine Ts, "
    "oganesson Og"
)
PERIOD_ENDS = (2, 10, 18, 36, 54, 86, 118)
ATOMIC_MASSES = (
    "hydrogen 1.008, helium 4.003, lithium 6.94, beryllium 9.012, boron 10.81, carbon 12.011, nitrogen 14.007, "
    "oxygen 15.999, fluorine 18.998, neon 20.180, sodium 22.990, magnesium 24.305, aluminium 26.982, silicon 28.085, "
    "phosphorus 30.974, sulfur 32.06, chlorine 35.45, argon 39.95, potassium 39.098, calcium 40.078, "
    "titanium 47.867, chromium 51.996, manganese 54.938, iron 55.845, cobalt 58.933, nickel 58.693, copper 63.546, "
    "zinc 65.38, silver 107.868, tin 118.710, iodine 126.904, tungsten 183.84, platinum 195.084, gold 196.967, "
    "mercury 200.592, lead 207.2, uranium 238.029"
)

EVENTS = (
    "the Battle of Hastings was fought, 1066; Magna Carta was first sealed, 1215; "
    "Constantinople fell to the Ottomans, 1453; Columbus first reached the Americas, 1492; "
    "Vasco da Gama reached India by sea, 1498; Martin Luther published his 95 theses, 1517; "
    "the Spanish Armada sailed against England, 1588; the Thirty Years' War began, 1618; "
    "the Peace of Westphalia was signed, 1648; the Great Fire of London broke out, 1666; "
    "Newton published the Principia, 1687; the Seven Years' War began, 1756; "
    "the American Declaration of Independence was adopted, 1776; the French Revolution began, 1789; "
    "Haiti declared its independence, 1804; the Battle of Trafalgar was fought, 1805; "
    "the Battle of Waterloo was fought, 1815; Darwin published On the Origin of Species, 1859; "
    "the American Civil War began, 1861; the London Underground opened, 1863; the Suez Canal opened, 1869; "
    "Bell received his telephone patent, 1876; the Eiffel Tower was finished, 1889; "
    "Röntgen discovered X-rays, 1895; the first modern Olympic Games were held, 1896; "
    "the first Nobel Prizes were awarded, 1901; the Wright brothers first flew a powered aeroplane, 1903; "
    "Einstein published special relativity, 1905; Amundsen reached the South Pole, 1911; the Titanic sank, 1912; "
    "the Panama Canal opened, 1914; the First World War began, 1914; the Russian Revolution took place, 1917; "
    "the First World War ended, 1918; Fleming discovered penicillin, 1928; Wall Street crashed, 1929; "
    "Pluto was discovered, 1930; the Second World War began in Europe, 1939; the Second World War ended, 1945; "
    "the United Nations was founded, 1945; the transistor was invented, 1947; India became independent, 1947; "
    "NATO was founded, 1949; the structure of DNA was published, 1953; Everest was first climbed, 1953; "
    "Sputnik 1 was launched, 1957; Gagarin flew into space, 1961; the Berlin Wall was built, 1961; "
    "humans first landed on the Moon, 1969; Voyager 1 was launched, 1977; smallpox was declared eradicated, 1980; "
    "the Chernobyl accident happened, 1986; the Berlin Wall fell, 1989; Germany was reunified, 1990; "
    "the Hubble telescope was launched, 1990; the Soviet Union was dissolved, 1991; "
    "Nelson Mandela became president of South Africa, 1994; Hong Kong returned to China, 1997; "
    "the euro came into use as cash, 2002; the Higgs boson discovery was announced, 2012; "
    "gravitational waves were first detected, 2015; the first image of a black hole was published, 2019; "
    "the James Webb telescope was launched, 2021; the C language first appeared, 1972; Unix was begun, 1969; "
    "the Intel 4004 was released, 1971; Python was first released, 1991; Linux was first released, 1991; "
    "the World Wide Web was proposed, 1989; the transformer architecture was published, 2017; "
    "the LoRA paper first appeared, 2021; the QLoRA paper first appeared, 2023; Git was first released, 2005; "
    "CUDA was first released, 2007; the first email was sent between two computers, 1971; "
    "the back-propagation paper in Nature appeared, 1986; AlexNet won the ImageNet contest, 2012"
)

BOOKS = (
    "Hamlet, William Shakespeare; Don Quixote, Miguel de Cervantes; War and Peace, Leo Tolstoy; "
    "Crime and Punishment, Fyodor Dostoevsky; Pride and Prejudice, Jane Austen; Jane Eyre, Charlotte Brontë; "
    "Wuthering Heights, Emily Brontë; Oliver Twist, Charles Dickens; Moby-Dick, Herman Melville; "
    "Frankenstein, Mary Shelley; Dracula, Bram Stoker; The Divine Comedy, Dante Alighieri; Faust, Goethe; "
    "Les Misérables, Victor Hugo; Madame Bovary, Gustave Flaubert; The Trial, Franz Kafka; Ulysses, James Joyce; "
    "Mrs Dalloway, Virginia Woolf; Nineteen Eighty-Four, George Orwell; Brave New World, Aldous Huxley; "
    "The Hobbit, J. R. R. Tolkien; The Little Prince, Antoine de Saint-Exupéry; The Stranger, Albert Camus; "
    "One Hundred Years of Solitude, Gabriel García Márquez; Things Fall Apart, Chinua Achebe; "
    "The Name of the Rose, Umberto Eco; Beloved, Toni Morrison; Candide, Voltaire; "
    "Gulliver's Travels, Jonathan Swift; Robinson Crusoe, Daniel Defoe; Treasure Island, Robert Louis Stevenson; "
    "The Time Machine, H. G. Wells; The Old Man and the Sea, Ernest Hemingway; The Great Gatsby, F. Scott Fitzgerald; "
    "To Kill a Mockingbird, Harper Lee; The Master and Margarita, Mikhail Bulgakov; "
    "The Tale of Genji, Murasaki Shikibu; Middlemarch, George Eliot; "
    "A Doll's House, Henrik Ibsen; The Cherry Orchard, Anton Chekhov"
)


def _pairs(table: str) -> list[tuple[str, str]]:
    """Splits ``name, value; name, value``; the value is what follows the first comma."""
    rows = (row.split(", ", 1) for row in table.split("; "))
    return [(name, value) for name, value in rows]


def country_facts() -> list[Fact]:
    """Capital both ways, continent and currency of each country; one key a country."""
    facts = []
    currency_by_country = dict(_pairs(CURRENCIES))
    for continent, table in COUNTRIES.items():
        for country, capital in _pairs(table):
            key = f"country:{country}"
            shared = {"key": key, "topic": "geography"}
            facts.append(
                Fact(
                    **shared,
                    questions=(f"What is the capital of {country}?", f"Which city is the capital of {country}?"),
                    answer=capital,
                    explanation=f"The capital of {country} is {capital}.",
                )
            )
            facts.append(
                Fact(
                    **shared,
                    questions=(
                        f"{capital} is the capital of which country?",
                        f"Which country has {capital} as its capital?",
                    ),
                    answer=country.removeprefix("the "),
                    explanation=f"The government of {country} sits in {capital}.",
                )
            )
            facts.append(
                Fact(
                    **shared,
                    questions=(f"On which continent is {country}?", f"Which continent does {country} belong to?"),
                    answer=continent,
                    explanation=f"By the usual division of the world, {country} belongs to {continent}.",
                )
            )
            if country in currency_by_country:
                currency = currency_by_country[country]
                facts.append(
                    Fact(
                        **shared,
                        questions=(f"What is the currency of {country}?", f"Which currency is used in {country}?"),
                        answer=currency[0].upper() + currency[1:],
                        explanation=f"Prices in {country} are given in the {currency}.",
                    )
                )
    return facts


def element_facts() -> list[Fact]:
    """Symbol both ways, atomic number both ways, period and, for common ones, the mass; one key an element."""
    facts = []
    masses = dict(entry.split(" ") for entry in ATOMIC_MASSES.split(", "))
    for index, entry in enumerate(ELEMENTS.split(", ")):
        name, symbol = entry.split(" ")
        number = index + 1
        period = 1 + sum(number > end for end in PERIOD_ENDS)
        rows: list[tuple[str, str, str, Confidence]] = [
            (f"What is the chemical symbol of {name}?", symbol, f"Chemists write {name} as {symbol}.", Confidence.HIGH),
            (f"Which element has the symbol {symbol}?", name, f"{symbol} stands for {name}.", Confidence.HIGH),
            (
                f"What is the atomic number of {name}?",
                str(number),
                f"An atom of {name} has {number} proton{'s' if number > 1 else ''}.",
                Confidence.HIGH,
            ),
            (f"Which element has atomic number {number}?", name, f"It is {name}, symbol {symbol}.", Confidence.HIGH),
            (f"In which period is {name}?", f"Period {period}", f"Its atomic number is {number}.", Confidence.HIGH),
        ]
        if name in masses:
            mass = masses[name]
            rows.append(
                (f"What is the atomic mass of {name}?", f"About {mass} u", "It is a rounded mean.", Confidence.MEDIUM)
            )
        for question, answer, explanation, confidence in rows:
            facts.append(
                Fact(
                    key=f"element:{name}",
                    topic="chemistry",
                    questions=(question,),
                    answer=answer[0].upper() + answer[1:],
                    explanation=explanation[0].upper() + explanation[1:],
                    confidence=confidence,
                )
            )
    return facts


def event_facts() -> list[Fact]:
    """The year of each event."""
    return [
        Fact(
            key=f"event:{event}",
            topic="history",
            questions=(f"In which year did this happen: {event}?", f"Give the year in which {event}."),
            answer=year,
            explanation=f"{event[0].upper()}{event[1:]} in {year}.",
        )
        for event, year in (row.rsplit(", ", 1) for row in EVENTS.split("; "))
    ]


def book_facts() -> list[Fact]:
    """The author of each work."""
    return [
        Fact(
            key=f"book:{title}",
            topic="literature",
            questions=(f"Who wrote {title}?", f"Who is the author of {title}?"),
            answer=author,
            explanation=f"{title} is a work of {author}.",
        )
        for title, author in _pairs(BOOKS)
    ]
