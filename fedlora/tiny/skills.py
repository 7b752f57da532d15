"""Instruction skills: short prompts with one right answer, so that exact match means something.

A skill is an instruction, a *form* (what the input looks like) and an answer template over the same fields. The
public skills are in the text the embedded base was trained on; the private ones are house conventions that it has not
seen, and that clients teach it. The four groups can arrive one after another as tasks.

Train and test never meet: the hash of an input decides which split it belongs to, before any seed is involved.
Pure python and numpy: no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

import numpy as np

from fedlora.errors import ConfigError
from fedlora.rng import stream

Split = Literal["train", "test"]
Fields = dict[str, str]

GROUPS: Final = ("dates", "records", "numbers", "letters")
TEST_SHARE: Final = 0.2  # of all inputs of a skill
_GIVE_UP: Final = 2000  # draws in a row that bring nothing new, before a skill counts as exhausted

MONTHS: Final = "January February March April May June July August September October November December".split()
FIRST_NAMES: Final = (
    "Maria Anna Elena Sofia Clara Laura Nina Olga Rosa Tara Vera Zoe Bianca Diana Fatima Grace Hanna Irene Peter Omar "
    "Noah Luis Kofi Jonas Ivan Hugo Henry Felix David Carlos Ahmed Samuel"
).split()
SURNAMES: Final = (
    "Lopez Smith Miller Garcia Silva Rossi Weber Fischer Novak Kumar Singh Tanaka Chen Nguyen Kim Park Okafor Mensah "
    "Haddad Cohen Murphy Kelly Brown Jones Taylor Evans Baker Turner Green Young Adams Moreau Dubois Costa Ivanov Nagy "
    "Jansen Larsen Berg Quinn"
).split()
CITIES: Final = (
    "Lyon Paris Berlin Madrid Rome Vienna Prague Oslo Dublin London Lisbon Athens Milan Porto Warsaw Riga Boston "
    "Denver Delhi Tokyo Seoul Accra Lagos Cairo"
).split()
SERVICES: Final = (
    "db web mail auth cache queue search billing proxy backup sync export report login store sensor".split()
)
FAULTS: Final = (
    "disk full,link down,bad token,no route,slow reply,out of memory,file missing,key expired,port closed,time drift,"
    "wrong user,lost packet,low power,high load,bad input,lock held"
).split(",")
SYMPTOMS: Final = (
    "chest pain,high fever,dry cough,skin rash,back pain,head injury,broken arm,sore throat,short breath,"
    "blurred vision,stomach ache,deep cut,swollen knee,dizzy spell,racing pulse,burned hand"
).split(",")
GOODS: Final = (
    "copper pipes,steel bolts,paper rolls,glass jars,oak boards,rubber seals,cotton bags,wall tiles,paint cans,"
    "cable drums,work gloves,light bulbs,brass hinges,plastic trays,door locks,wood screws"
).split(",")
_TIMES: Final = ("once", "twice", "three times", "four times")


def _pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _digits(rng: np.random.Generator, count: int) -> str:
    """`count` digits, the first not zero."""
    return str(rng.integers(10 ** (count - 1), 10**count))


def _moment(rng: np.random.Generator) -> Fields:
    """A minute between 1950 and 2049."""
    year, month = int(rng.integers(1950, 2050)), int(rng.integers(1, 13))
    leap = year % 4 == 0  # 2000 is one, and no other century falls in the range
    day = int(rng.integers(1, (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1] + 1))
    hour, minute = int(rng.integers(24)), int(rng.integers(60))
    return {
        "d": f"{day}",
        "dd": f"{day:02}",
        "mm": f"{month:02}",
        "month": MONTHS[month - 1],
        "mon": MONTHS[month - 1][:3],
        "yy": f"{year % 100:02}",
        "yyyy": f"{year}",
        "quarter": f"{(month + 2) // 3}",
        "hh": f"{hour:02}",
        "h12": f"{(hour + 11) % 12 + 1}",
        "ampm": "am" if hour < 12 else "pm",
        "mi": f"{minute:02}",
    }


def _person(rng: np.random.Generator) -> Fields:
    first, last = _pick(rng, FIRST_NAMES), _pick(rng, SURNAMES)
    return {
        "first": first,
        "last": last,
        "f": first[0],
        "l": last[0],
        "first_lower": first.lower(),
        "last_lower": last.lower(),
        "title": _pick(rng, ("Ms", "Mr", "Dr")),
        "city": _pick(rng, CITIES),
        "id": _digits(rng, 4),
    }


def _log(rng: np.random.Generator) -> Fields:
    return {
        "hh": f"{rng.integers(24):02}",
        "mi": f"{rng.integers(60):02}",
        "level": _pick(rng, ("INFO", "WARN", "ERROR")),
        "service": _pick(rng, SERVICES),
        "fault": _pick(rng, FAULTS),
        "code": _digits(rng, 3),
    }


def _number(rng: np.random.Generator) -> Fields:
    """Digits that read as thousands and rest, with two decimals and a count."""
    times = int(rng.integers(4))
    return {
        "k": _digits(rng, int(rng.integers(1, 4))),
        "rest": f"{rng.integers(1000):03}",
        "cents": f"{rng.integers(100):02}",
        "times": _TIMES[times],
        "n": f"{times + 1}",
    }


def _phone(rng: np.random.Generator) -> Fields:
    """Ten digits, the first a zero."""
    pairs = [f"{rng.integers(100):02}" for _ in range(4)]
    return {"area": _digits(rng, 1), "p": pairs[0], "q": pairs[1], "r": pairs[2], "s": pairs[3]}


def _case(rng: np.random.Generator) -> Fields:
    return {"symptom": _pick(rng, SYMPTOMS), "urgency": f"{rng.integers(1, 6)}", "room": _digits(rng, 3)}


def _stock(rng: np.random.Generator) -> Fields:
    return {
        "goods": _pick(rng, GOODS),
        "count": f"{rng.integers(2, 100)}",
        "bin": f"{'ABCDEFGH'[rng.integers(8)]}{rng.integers(10, 100)}",
    }


_DATE = "d dd mm month mon yy yyyy quarter"
_TIME = "hh h12 ampm mi"
_NAME = "first last f l"


@dataclass(frozen=True)
class Form:
    """What an input looks like: `prompt` over what `draw` gives, and the fields a reader can tell from it."""

    draw: Callable[[np.random.Generator], Fields]
    prompt: str
    fields: tuple[str, ...]


def _form(draw: Callable[[np.random.Generator], Fields], prompt: str, *fields: str) -> Form:
    return Form(draw, prompt, tuple(" ".join(fields).split()))


FORMS: Final[Mapping[str, Form]] = MappingProxyType(
    {
        "date in words": _form(_moment, "{d} {month} {yyyy}", _DATE),
        "date with slashes": _form(_moment, "{dd}/{mm}/{yyyy}", _DATE),
        "date in iso": _form(_moment, "{yyyy}-{mm}-{dd}", _DATE),
        "moment in iso": _form(_moment, "{yyyy}-{mm}-{dd} {hh}:{mi}", _DATE, _TIME),
        "moment in words": _form(_moment, "{d} {month} {yyyy}, {h12}:{mi} {ampm}", _DATE, _TIME),
        "json": _form(
            _person,
            '{{"name": "{first} {last}", "city": "{city}", "id": {id}}}',
            _NAME,
            "city id first_lower last_lower",
        ),
        "pairs": _form(_person, "id={id} name={first} {last} city={city}", _NAME, "city id first_lower last_lower"),
        "log": _form(_log, "{hh}:{mi} {level} {service}: {fault} ({code})", "hh mi level service fault code"),
        "whole": _form(_number, "{k}{rest}", "k rest"),
        "grams": _form(_number, "{k}{rest} g", "k rest"),
        "kilos": _form(_number, "{k}.{rest} kg", "k rest"),
        "cents": _form(_number, "{k}{rest}{cents} cents", "k rest cents"),
        "price": _form(_number, "{k}{rest}.{cents}", "k rest cents"),
        "dose": _form(_number, "{k}{rest} mg {times}", "k rest times n"),
        "phone": _form(_phone, "0{area}{p}{q}{r}{s}", "area p q r s"),
        "name": _form(_person, "{first} {last}, {city}", _NAME, "city first_lower last_lower"),
        "titled name": _form(_person, "{title} {first} {last}, {city}", _NAME, "city title first_lower last_lower"),
        "case": _form(_case, "{symptom}, level {urgency}, room {room}", "symptom urgency room"),
        "stock": _form(_stock, "{count} {goods}, shelf {bin}", "count goods bin"),
    }
)


@dataclass(frozen=True)
class Skill:
    """One thing a model can be taught: `instruction` over inputs of a form, answered by a template."""

    name: str
    group: str
    public: bool  # the embedded base has been trained on it
    description: str
    instruction: str
    form: Form
    answer: str  # template over form.fields
    example: tuple[str, str]  # input, output


def _skill(name: str, group: str, public: bool, form: str, instruction: str, answer: str) -> Skill:
    shape = FORMS[form]
    fields = shape.draw(stream(0, "skill example", name))
    example = shape.prompt.format(**fields), answer.format(**fields)
    kind = "public, known to the base" if public else "private, a house convention"
    description = f"{kind}: {shape.prompt.replace('{{', '{').replace('}}', '}')} becomes {answer}"
    return Skill(name, group, public, description, instruction, shape, answer, example)


def _table() -> dict[str, Skill]:
    public = [
        ("date_iso", "dates", "date in words", "Write the date in ISO form", "{yyyy}-{mm}-{dd}"),
        ("date_british", "dates", "date in iso", "Write the date the British way", "{dd}/{mm}/{yyyy}"),
        ("date_american", "dates", "date in words", "Write the date the American way", "{mm}/{dd}/{yyyy}"),
        ("date_long", "dates", "date with slashes", "Write the date in words", "{d} {month} {yyyy}"),
        ("date_short", "dates", "date in iso", "Shorten the date", "{d} {mon} {yy}"),
        ("date_quarter", "dates", "date with slashes", "Name the quarter of the date", "Q{quarter} {yyyy}"),
        ("clock_24", "dates", "moment in words", "Give the time in 24 hours", "{hh}:{mi}"),
        ("clock_12", "dates", "moment in iso", "Give the time with am or pm", "{h12}:{mi} {ampm}"),
        ("json_name", "records", "json", "Read the name from the record", "{first} {last}"),
        ("json_city", "records", "json", "Read the city from the record", "{city}"),
        ("json_id", "records", "json", "Read the id from the record", "{id}"),
        (
            "pairs_to_csv",
            "records",
            "pairs",
            "Turn the record into a table row",
            "{id},{first} {last},{city}",
        ),
        ("pairs_owner", "records", "pairs", "Who lives where?", "{last} in {city}"),
        ("log_level", "records", "log", "Read the level of the log line", "{level}"),
        ("log_fault", "records", "log", "What went wrong?", "{fault}"),
        ("log_place", "records", "log", "Where and when did it fail?", "{service} at {hh}:{mi}"),
        ("kilos", "numbers", "grams", "Convert to kilograms", "{k}.{rest} kg"),
        ("grams", "numbers", "kilos", "Convert to grams", "{k}{rest} g"),
        ("euros", "numbers", "cents", "Convert to euros", "{k}{rest}.{cents} EUR"),
        ("thousands", "numbers", "whole", "Group the digits by thousands", "{k},{rest}"),
        ("round_down", "numbers", "price", "Round down to a whole number", "{k}{rest}"),
        ("phone_pairs", "numbers", "phone", "Split the phone number in pairs", "0{area} {p} {q} {r} {s}"),
        ("phone_end", "numbers", "phone", "Give the last four digits", "{r}{s}"),
        ("dose_count", "numbers", "dose", "How many doses?", "{n}"),
        ("initials", "letters", "name", "Give the initials", "{f}. {l}."),
        ("surname_first", "letters", "name", "Put the surname first", "{last}, {first}"),
        ("email", "letters", "name", "Make an email address", "{first_lower}.{last_lower}@mail.org"),
        ("greeting", "letters", "titled name", "Open a formal letter", "Dear {title} {last},"),
        ("room_sign", "letters", "case", "Which room is it?", "Room {room}"),
        ("complaint", "letters", "case", "What is the complaint?", "{symptom}"),
        ("shelf", "letters", "stock", "Where is it stored?", "Shelf {bin}"),
        ("packing", "letters", "stock", "Say what to pack", "{goods}: {count}"),
    ]
    private = [
        ("archive_stamp", "dates", "date in words", "Stamp the letter for the archive", "ARC {yy}.{mm}.{dd}"),
        (
            "shift_entry",
            "dates",
            "moment in iso",
            "Enter the visit in the shift book",
            "{d} {mon} at {hh}h{mi}",
        ),
        (
            "payment_due",
            "dates",
            "date with slashes",
            "Print the date of the payment",
            "Due by {month} {d}, {yyyy}",
        ),
        ("badge_line", "records", "pairs", "Print the badge for the visitor", "{last} {f}. ({id})"),
        ("parcel_label", "records", "json", "Label the parcel for the customer", "{id} / {city} / {last}"),
        ("ticket_title", "records", "log", "Open a ticket for the fault", "[{service}-{code}] {fault}"),
        ("invoice_total", "numbers", "price", "Print the total on the invoice", "CHF {k}'{rest}.{cents}"),
        ("dose_chart", "numbers", "dose", "Write the dose on the chart", "{k}.{rest} g x{n}"),
        ("phone_abroad", "numbers", "phone", "Dial the number from abroad", "+33 {area} {p} {q} {r} {s}"),
        ("triage_tag", "letters", "case", "Tag the patient for triage", "T{urgency}-{room}: {symptom}"),
        (
            "sign_off",
            "letters",
            "titled name",
            "Sign the letter to the customer",
            "Regards, {f}. {last} ({city})",
        ),
        ("order_line", "letters", "stock", "Add a line to the order", "{bin} | {count} x {goods}"),
    ]
    return {
        name: _skill(name, group, is_public, form, instruction, answer)
        for is_public, rows_ in ((True, public), (False, private))
        for name, group, form, instruction, answer in rows_
    }


SKILLS: Final[Mapping[str, Skill]] = MappingProxyType(_table())


def split_of(text: str) -> Split:
    """The split an input belongs to, for every skill, seed and machine."""
    digest = hashlib.sha256(b"fedlora.tiny.split\0" + text.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def rows(skill: str, split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """`count` different examples of one skill: instruction, input, output, skill, group.

    A larger `count` with the same seed begins with the same rows. Inputs of the two splits differ for any seeds.

    Raises: ConfigError for an unknown skill or split, a negative count, and when the skill has hardly any inputs left
    (plain dates have about 29,000 for training and 7,000 for testing).
    >>> rows("kilos", "train", 1, seed=0)[0]["instruction"]
    'Convert to kilograms'
    """
    if skill not in SKILLS:
        raise ConfigError(f"no skill is called {skill!r}; there are {', '.join(SKILLS)}")
    if split not in get_args(Split):
        raise ConfigError(f"split must be 'train' or 'test', got {split!r}")
    if count < 0:
        raise ConfigError(f"count must be at least 0, got {count}")
    known, rng = SKILLS[skill], stream(seed, "skill rows", skill, split)
    found: dict[str, str] = {}
    idle = 0
    while len(found) < count:
        fields = known.form.draw(rng)
        text = known.form.prompt.format(**fields)
        if text in found or split_of(text) != split:
            idle += 1
            if idle == _GIVE_UP:
                raise ConfigError(
                    f"skill {skill!r} has hardly any {split} inputs left: {count} asked, {len(found)} found"
                )
            continue
        idle = 0
        found[text] = known.answer.format(**fields)
    return [
        {
            "instruction": known.instruction,
            "input": text,
            "output": answer,
            "skill": skill,
            "group": known.group,
        }
        for text, answer in found.items()
    ]
