"""Facts of science and nature, from tables: planets, units, prefixes, formulas, heights, estimates.

Tables give ``question | answer | explanation``; each table states the confidence of all its rows.
"""

from __future__ import annotations

from reply_facts import Confidence, Fact

# Settled by definition or by record.
HIGH_ROWS = """
What is the SI unit of force?|The newton|One newton gives one kilogram an acceleration of 1 m/s².
What is the SI unit of energy?|The joule|A joule is the work of one newton over one metre.
What is the SI unit of power?|The watt|A watt is one joule a second.
What is the SI unit of pressure?|The pascal|A pascal is one newton a square metre.
What is the SI unit of frequency?|The hertz|A hertz is one cycle a second.
What is the SI unit of electric charge?|The coulomb|One ampere carries one coulomb each second.
What is the SI unit of voltage?|The volt|A volt is one joule a coulomb.
What is the SI unit of electrical resistance?|The ohm|An ohm is one volt an ampere.
What is the SI unit of capacitance?|The farad|A farad is one coulomb a volt.
What is the SI unit of inductance?|The henry|A henry is one weber an ampere.
What is the SI unit of magnetic flux density?|The tesla|A tesla is one weber a square metre.
What is the SI base unit of temperature?|The kelvin|It is fixed by the Boltzmann constant.
What is the SI base unit of mass?|The kilogram|It is fixed by the Planck constant.
What is the SI base unit of length?|The metre|It is fixed by the speed of light.
What is the SI base unit of time?|The second|It is fixed by a caesium transition.
What is the SI base unit of electric current?|The ampere|It is fixed by the elementary charge.
What is the SI base unit of luminous intensity?|The candela|It is one of the seven base units.
What is the SI base unit of amount of substance?|The mole|A mole is a fixed count of entities.
How many SI base units are there?|Seven|Second, metre, kilogram, ampere, kelvin, mole and candela.
What is the speed of light in a vacuum?|299,792,458 m/s|The value is exact, since the metre is defined by it.
At what Celsius temperature is absolute zero?|-273.15 °C|Zero kelvin is defined to be there.
What does DNA stand for?|Deoxyribonucleic acid|It carries the genes of living cells.
What is the chemical formula of water?|H2O|Two hydrogen atoms and one oxygen atom.
What is the chemical formula of carbon dioxide?|CO2|One carbon atom and two oxygen atoms.
What is the chemical formula of table salt?|NaCl|Sodium and chlorine, one to one.
What is the chemical formula of methane?|CH4|One carbon atom and four hydrogen atoms.
What is the chemical formula of ammonia?|NH3|One nitrogen atom and three hydrogen atoms.
What is the chemical formula of sulfuric acid?|H2SO4|It holds two hydrogen, one sulfur and four oxygen atoms.
What is the chemical formula of glucose?|C6H12O6|Six carbon, twelve hydrogen and six oxygen atoms.
What is the chemical formula of ethanol?|C2H5OH|It is the alcohol in drinks.
What is the chemical formula of hydrogen peroxide?|H2O2|It has one oxygen atom more than water.
What is the chemical formula of quartz?|SiO2|Silicon dioxide is its other name.
What is the chemical formula of ozone?|O3|Three oxygen atoms make one molecule.
How many sides does a hexagon have?|6|Hexa is Greek for six.
How many sides does a dodecagon have?|12|Dodeca is Greek for twelve.
How many faces does an icosahedron have?|20|Each of them is a triangle.
How many edges does a cube have?|12|Four above, four below, four upright.
How many squares are on a chessboard?|64|Eight rows of eight.
How many keys does a standard piano have?|88|52 are white and 36 are black.
How many legs does a spider have?|8|Spiders are arachnids.
How many legs does an insect have?|6|Three pairs are the mark of insects.
How many chambers does the human heart have?|4|Two atria and two ventricles.
How many chromosomes are in a human body cell?|46|They form 23 pairs.
How many bones are in an adult human body?|206|Babies have more, and some grow together.
What gas do plants take in for photosynthesis?|Carbon dioxide|They give off oxygen in return.
Which organ pumps blood through the body?|The heart|It beats without rest.
Which part of a cell holds most of its DNA?|The nucleus|A membrane surrounds it.
Which planet is closest to the Sun?|Mercury|Its year lasts 88 days.
Which planet is the largest in the Solar System?|Jupiter|It is a gas giant.
Which planet is known as the Red Planet?|Mars|Iron oxide colours its dust.
Which planet turns on its side?|Uranus|Its axis is tilted by about 98 degrees.
Which planet is the farthest from the Sun?|Neptune|It was found in 1846.
How many planets are in the Solar System?|Eight|Pluto has been a dwarf planet since 2006.
Which planet has the moon Titan?|Saturn|Titan is its largest moon.
Which planet has the moon Europa?|Jupiter|Europa is one of the four Galilean moons.
Which planet has the moon Triton?|Neptune|Triton circles it backwards.
Which planet has the moons Phobos and Deimos?|Mars|Both were found in 1877.
What is the hardest natural mineral?|Diamond|It stands at 10 on the Mohs scale.
What is the softest mineral on the Mohs scale?|Talc|It stands at 1.
Which gas makes up most of the air?|Nitrogen|It is about 78 percent of dry air.
Which metal is liquid at room temperature?|Mercury|It melts at about -39 °C.
What is the pH of pure water at 25 °C?|7|Neither acid nor base prevails.
Who formulated the three laws of motion?|Isaac Newton|They stand in his Principia.
Who proposed the general theory of relativity?|Albert Einstein|He completed it in 1915.
Who made the first periodic table with gaps?|Dmitri Mendeleev|He published it in 1869.
Who discovered radium?|Marie and Pierre Curie|They announced it in 1898.
Who wrote On Computable Numbers?|Alan Turing|It appeared in 1936.
Who founded information theory?|Claude Shannon|His paper appeared in 1948.
Which ocean is the largest?|The Pacific Ocean|It is larger than all land together.
Which continent is the largest?|Asia|It holds about 30 percent of the land.
Which country has the largest area?|Russia|It spans eleven time zones.
Which mountain is the highest above sea level?|Mount Everest|It is on the border of Nepal and China.
Which river flows through Paris?|The Seine|It flows into the English Channel.
Which river flows through London?|The Thames|It flows into the North Sea.
Which river flows through Vienna and Budapest?|The Danube|It flows into the Black Sea.
Which river flows through Cairo?|The Nile|It flows into the Mediterranean.
Which river flows through Rome?|The Tiber|It flows into the Tyrrhenian Sea.
Which desert covers much of northern Africa?|The Sahara|It is the largest hot desert.
"""

# Measured and rounded.
MEDIUM_ROWS = """
How high is Mount Everest?|About 8,849 m|The survey of 2020 gave 8,848.86 m.
How high is K2?|About 8,611 m|Only Everest is higher.
How high is Mont Blanc?|About 4,806 m|Its ice cap changes by a few metres.
How high is Kilimanjaro?|About 5,895 m|It is the highest mountain of Africa.
How high is Aconcagua?|About 6,961 m|It is the highest mountain of the Americas.
How high is Denali?|About 6,190 m|A survey of 2015 gave this height.
How high is the Eiffel Tower?|About 330 m|Its antennas are counted.
How far is the Moon from the Earth?|About 384,400 km|It is the mean distance.
How far is the Earth from the Sun?|About 150 million km|Light takes some eight minutes.
How long does sunlight take to reach the Earth?|About 8 minutes 20 seconds|The way is about 150 million km.
What is the mean radius of the Earth?|About 6,371 km|The Earth is a little flat at the poles.
What is the diameter of the Moon?|About 3,475 km|It is a little over a quarter of the Earth's.
What is the diameter of Mars?|About 6,780 km|It is about half the Earth's.
What is the diameter of Jupiter?|About 140,000 km|It is eleven times the Earth's.
What is the speed of sound in air at 20 °C?|About 343 m/s|It rises with temperature.
What is the gravity at the Earth's surface?|About 9.8 m/s²|It differs a little from place to place.
What is the gravity at the Moon's surface?|About 1.6 m/s²|It is a sixth of the Earth's.
What is the density of gold?|About 19.3 g/cm³|It is much more than that of lead.
What is the density of iron?|About 7.87 g/cm³|It is measured at room temperature.
What is the density of lead?|About 11.3 g/cm³|It is measured at room temperature.
What is the density of aluminium?|About 2.70 g/cm³|It is a third of that of iron.
What is the density of ice?|About 0.92 g/cm³|So ice floats on water.
What is the melting point of iron?|About 1,538 °C|Carbon lowers it.
What is the melting point of gold?|About 1,064 °C|It is measured at normal pressure.
What is the melting point of copper?|About 1,085 °C|It is measured at normal pressure.
What is the melting point of lead?|About 327 °C|It is measured at normal pressure.
What is the melting point of tungsten?|About 3,420 °C|It is the highest of all metals.
What is the boiling point of nitrogen?|About -196 °C|It is measured at normal pressure.
What is the boiling point of ethanol?|About 78 °C|It is measured at normal pressure.
What is the surface temperature of the Sun?|About 5,500 °C|It is deduced from its light.
How long is the Moon's orbit around the Earth?|About 27.3 days|It is measured against the stars.
How long is a year on Mars?|About 687 Earth days|Mars is farther from the Sun.
How long is a year on Jupiter?|About 11.9 Earth years|Its orbit is five times as wide as ours.
How long is a day on Mars?|About 24 hours 37 minutes|It is one turn against the stars.
How much of the Earth's surface is water?|About 71 percent|Nearly all of it is sea.
How much of the air is oxygen?|About 21 percent|Dry air is meant, by volume.
How long is the Great Barrier Reef?|About 2,300 km|It lies off Australia.
How deep is the Challenger Deep?|About 10,900 m|Soundings differ by some tens of metres.
How deep is Lake Baikal?|About 1,640 m|No lake is deeper.
How long is the Rhine?|About 1,230 km|It was re-measured in 2010.
What is the half-life of carbon-14?|About 5,700 years|It serves to date old wood.
What is the mass of the Earth?|About 6.0 x 10^24 kg|It follows from its gravity.
What is the mass of the Sun?|About 2.0 x 10^30 kg|It follows from the planets' orbits.
"""

# Estimates on which good sources differ.
LOW_ROWS = """
How many stars are in the Milky Way?|Some 100 to 400 billion|Most are too faint to count.
How many galaxies can be seen in principle?|Perhaps hundreds of billions to two trillion|Estimates differ by ten.
How many species live on Earth?|Perhaps 8.7 million, without bacteria|Most are not yet described.
How many ants live on Earth?|Perhaps 20 quadrillion|It is scaled up from samples.
How many trees grow on Earth?|Perhaps 3 trillion|It is scaled up from samples.
How many cells are in a human body?|Perhaps 30 to 40 trillion|It depends on how one counts.
How many humans have ever lived?|Perhaps 100 to 120 billion|Early numbers are guesses.
How many languages are spoken today?|Some 7,000|It depends on what counts as a language.
How many words does English have?|Perhaps 170,000 to a million|It depends on what counts as a word.
When did anatomically modern humans appear?|Perhaps 300,000 years ago|New finds move the date.
When did life on Earth begin?|Perhaps 3.5 to 4 billion years ago|The oldest traces are disputed.
When was fire first controlled by humans?|Perhaps 400,000 to a million years ago|Sites are disputed.
When was the wheel invented?|Perhaps 5,500 years ago|The first finds are close in time.
When were dogs domesticated?|Perhaps 15,000 to 30,000 years ago|Genes and bones disagree.
When did Homer live?|Perhaps in the 8th century BC|Even his existence is disputed.
How heavy was Tyrannosaurus rex?|Perhaps 6 to 9 tonnes|Methods of estimation differ.
How fast could Tyrannosaurus rex run?|Perhaps 20 to 30 km/h|Models differ.
How old can a Greenland shark become?|Perhaps 270 to 500 years|The dating has wide bounds.
How long is the Amazon river?|Some 6,400 to 7,000 km|The choice of source and mouth differs.
How large is the whole universe?|It is not known|Only a part can be seen.
How many neurons are in a human brain?|Some 86 billion|Few brains have been counted.
What does a cumulus cloud weigh?|Perhaps 500 tonnes|It depends on size and water.
How many people lived in ancient Rome?|Perhaps half a million to a million|No census of all survives.
How many grains of sand are on Earth's beaches?|Perhaps 10^18 to 10^20|It rests on rough means.
How long do house cats sleep a day?|Some 12 to 16 hours|Cats and studies differ.
"""

# prefix, symbol, power of ten
PREFIXES = (
    "quetta Q 30, ronna R 27, yotta Y 24, zetta Z 21, exa E 18, peta P 15, tera T 12, giga G 9, mega M 6, kilo k 3, "
    "hecto h 2, deca da 1, deci d -1, centi c -2, milli m -3, micro µ -6, nano n -9, pico p -12, femto f -15, "
    "atto a -18, zepto z -21, yocto y -24, ronto r -27, quecto q -30"
)
BINARY_PREFIXES = "kibi Ki 10, mebi Mi 20, gibi Gi 30, tebi Ti 40, pebi Pi 50, exbi Ei 60"


def science_facts() -> list[Fact]:
    """One fact a row of the three tables."""
    tables = ((HIGH_ROWS, Confidence.HIGH), (MEDIUM_ROWS, Confidence.MEDIUM), (LOW_ROWS, Confidence.LOW))
    facts = []
    for table, confidence in tables:
        for row in table.strip().splitlines():
            question, answer, explanation = row.split("|")
            facts.append(
                Fact(
                    key=f"science:{question}",
                    topic="science",
                    questions=(question,),
                    answer=answer,
                    explanation=explanation,
                    confidence=confidence,
                )
            )
    return facts


def prefix_facts() -> list[Fact]:
    """Value and symbol of each decimal and binary prefix; one key a prefix."""
    facts = []
    for base, table in ((10, PREFIXES), (2, BINARY_PREFIXES)):
        for entry in table.split(", "):
            name, symbol, power = entry.split(" ")
            value = f"{base}^{power}"
            shared = {"key": f"prefix:{name}", "topic": "units"}
            facts.append(
                Fact(
                    **shared,
                    questions=(f"What factor does the prefix {name} stand for?",),
                    answer=value,
                    explanation=f"The prefix {name} is written {symbol}.",
                )
            )
            facts.append(
                Fact(
                    **shared,
                    questions=(f"What is the symbol of the prefix {name}?",),
                    answer=symbol,
                    explanation=f"{name.capitalize()} means {value}.",
                )
            )
            facts.append(
                Fact(
                    **shared,
                    questions=(f"Which prefix stands for {value}?",),
                    answer=name,
                    explanation=f"Its symbol is {symbol}.",
                )
            )
    return facts
