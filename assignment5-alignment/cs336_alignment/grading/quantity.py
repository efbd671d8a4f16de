r"""Splitting an answer into a magnitude and a unit.

Some of MATH's answers have units (`12\text{ square units}`, `\$4`, `65\%`, `45^\circ`), and a response may omit or add
them. Units are therefore compared only if both sides have a known one: 5 cm is not 5 m, but 5, 5 cm and 5 apples are
all equal. Units are not converted: `50\text{ cents}` is not `\$0.50`.
"""

import re
from dataclasses import dataclass

_NAMES = {
    "inch": "inch inches in", "foot": "foot feet ft", "yard": "yard yards yd", "mile": "mile miles mi",
    "millimeter": "millimeter millimeters mm", "centimeter": "centimeter centimeters centimetre centimetres cm",
    "meter": "meter meters metre metres m", "kilometer": "kilometer kilometers kilometre kilometres km",
    "second": "second seconds sec secs s", "minute": "minute minutes min mins", "hour": "hour hours hr hrs h",
    "day": "day days", "week": "week weeks", "month": "month months", "year": "year years yr yrs",
    "gram": "gram grams gm g", "kilogram": "kilogram kilograms kg", "pound": "pound pounds lb lbs",
    "ounce": "ounce ounces oz", "ton": "ton tons",
    "milliliter": "milliliter milliliters ml", "liter": "liter liters litre litres L", "gallon": "gallon gallons gal",
    "quart": "quart quarts", "pint": "pint pints", "cup": "cup cups",
    "dollar": "$ dollar dollars", "cent": "cent cents",
    "degree": "° degree degrees deg", "radian": "radian radians rad", "percent": "% percent percents",
    "mile per hour": "mph", "kilometer per hour": "kph km/h", "am": "am", "pm": "pm",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _NAMES.items() for word in words.split()}
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_KNOWN_WORDS = _UNITS.keys() | _POWERS.keys()
_SCALES = {"dozen": "12", "hundred": "100", "thousand": "1000", "million": "10^{6}", "billion": "10^{9}",
           "trillion": "10^{12}"}  # fmt: skip

_SET_AS_TEXT = re.compile(r"(.*?[^ ]) ?\\text\{([^{}]*)\}(?:\^\{([23])\})?", re.DOTALL)
_BARE_WORDS = re.compile(r"(.*[0-9})!]) ?([a-zA-Z][a-zA-Z /.]*)(?:\^\{([23])\})?")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")  # their degrees are not a unit
_NO_UNITS = frozenset(["and", "or", "if", "for", "where", "when", "mod", "to", "is", "not"])


@dataclass(frozen=True)
class Quantity:
    """A magnitude, as text, and its unit."""

    magnitude: str
    unit: str | None = None
    """Name of a known unit. None if there is no unit, or an unknown one."""


def quantity(text: str) -> Quantity:
    r"""Split the unit off a canonical text.

    Words set as text after something else are a unit, whatever they are. Bare words after a number are a unit if they
    are known, or longer than two letters and separated by a space: `2ab` is a product. A number word multiplies.

    >>> quantity(r"440\text{cm}^{2}"), quantity("$32348"), quantity("5 million")
    (Quantity(magnitude='440', unit='centimeter^2'), Quantity(magnitude='32348', unit='dollar'), Quantity(magnitude='5\\cdot10^{6}', unit=None))
    """  # noqa: E501
    if len(text) > 1 and text[-1] in "%°" and not _TRIGONOMETRIC.search(text):
        return Quantity(text[:-1], _UNITS[text[-1]])
    if text.startswith(("$", "-$")):
        inner = quantity(text.replace("$", "", 1))
        return Quantity(inner.magnitude, inner.unit or "dollar")
    if set_as_text := _SET_AS_TEXT.fullmatch(text):
        return _measured(*set_as_text.groups())
    if (bare := _BARE_WORDS.fullmatch(text)) and _may_be_bare(bare[2], apart=bare.start(2) > bare.end(1)):
        return _measured(*bare.groups())
    return Quantity(text)


def _may_be_bare(words: str, apart: bool) -> bool:
    """Whether bare words after a number can be its unit."""
    every = words.split()
    if not apart:
        return len(every) == 1 and len(words) > 1 and words in _UNITS
    return not _NO_UNITS.intersection(every) and all(
        len(word) > 2 or (len(word) > 1 and word.lower() in _KNOWN_WORDS) for word in every
    )


def _measured(magnitude: str, words: str, power: str | None) -> Quantity:
    every = words.replace(".", "").split()
    if every and every[0].lower() in _SCALES:
        magnitude += rf"\cdot{_SCALES[every.pop(0).lower()]}"
    exponent = int(power or 1)
    if every and every[0] in _POWERS:
        exponent = _POWERS[every.pop(0)]
    elif len(every) > 1 and every[-1] in _POWERS:
        exponent = _POWERS[every.pop()]
    name = " ".join(every)
    unit = _UNITS.get(name) or _UNITS.get(name.lower())
    return Quantity(magnitude, f"{unit}^{exponent}" if unit and exponent > 1 else unit)
