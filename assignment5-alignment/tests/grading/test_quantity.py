"""Units."""

import pytest

from cs336_alignment.grading.latex import canonical
from cs336_alignment.grading.quantity import quantity


@pytest.mark.parametrize(
    ("text", "magnitude", "unit"),
    [
        ("5", "5", None),
        (r"1599 \text{ dollars}", "1599", "dollar"),
        (r"\$32,\!348", "32348", "dollar"),
        (r"-\$0.50", "-0.50", "dollar"),
        (r"65\%", "65", "percent"),
        (r"45^\circ", "45", "degree"),
        ("45 degrees", "45", "degree"),
        (r"440\text{ cm}^2", "440", "centimeter^2"),
        (r"440\text{ square centimeters}", "440", "centimeter^2"),
        ("440 cm squared", "440", "centimeter^2"),
        (r"144 \mbox{ m}^3", "144", "meter^3"),
        (r"8\sqrt{3} \text { square inches}", r"8\sqrt{3}", "inch^2"),
        (r"12\text{ square units}", "12", None),
        (r"18\text{ ways.}", "18", None),
        ("5 apples", "5", None),
        ("5cm", "5", "centimeter"),
        (r"9\text{ a.m.}", "9", "am"),
        ("9:00 PM", "9:00", "pm"),
        ("5 million", r"5\cdot10^{6}", None),
        (r"3\text{ dozen eggs}", r"3\cdot12", None),
        ("2ab", "2ab", None),  # a product
        ("2 pi", r"2\pi", None),
        ("5 mod 7", "5 mod7", None),
        (r"\text{east}", r"\text{east}", None),
        (r"\cos 13^\circ", r"\cos13°", None),  # the angle's degrees, not the cosine's
        ("%", "%", None),
        ("$", "", None),
    ],
)
def test_units(text, magnitude, unit):
    found = quantity(canonical(text))
    assert (found.magnitude, found.unit) == (magnitude, unit)
