"""Quantities at the border: what is read is what was meant, what is written can be read back, and a missing unit is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partition import units

quick = settings(max_examples=50, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "dimension", "si"),
    [
        ("15 us", "time", 15e-6),
        ("96 GiB", "bytes", 96 * 1024**3),
        ("44 GB", "bytes", 44e9),
        ("400 Gbit/s", "bandwidth", 50e9),  # 400e9 bit / 8
        ("400 GB/s", "bandwidth", 400e9),
        ("2 TiB/s", "bandwidth", 2 * 1024**4),
        ("667 TFLOP/s", "compute", 667e12),
        ("3.6 $/h", "price", 1e-3),  # 3.6 / 3600 s
        ("2 $/GB", "price per byte", 2e-9),
        ("23 kW", "power", 23e3),
        ("85 %", "fraction", 0.85),
        ("0.85", "fraction", 0.85),
        ("  1_000.5e1   ms ", "time", 10.005),
    ],
)
def test_parse(text: str, dimension: str, si: float) -> None:
    assert units.parse(text, dimension) == pytest.approx(si, rel=1e-12)


@quick
@given(st.floats(1e-3, 1e6), st.sampled_from(["", "k", "M", "G", "T", "P"]))
def test_a_byte_is_eight_bits(number: float, prefix: str) -> None:
    bits, nbytes = (units.parse(f"{number} {prefix}{u}/s", "bandwidth") for u in ("bit", "B"))
    assert nbytes == pytest.approx(8 * bits, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("400", "bandwidth"),  # bits or bytes?
        ("400 Gb/s", "bandwidth"),  # the same
        ("400 gbit/s", "bandwidth"),
        ("400 GB", "bandwidth"),
        ("96 GB/s", "bytes"),
        ("15", "time"),
        ("-1 s", "time"),
        ("nan s", "time"),
        ("s", "time"),
        ("", "fraction"),
        (0.85, "fraction"),
        (None, "time"),
    ],
)
def test_refusal_says_what_it_wants_and_what_it_got(text: object, dimension: str) -> None:
    with pytest.raises(ValueError) as caught:
        units.parse(text, dimension)  # type: ignore[arg-type]
    reason = str(caught.value)
    assert f"expected {dimension} such as '3 " in reason and repr(text) in reason


def test_every_example_in_a_refusal_is_itself_accepted() -> None:
    for dimension in units.UNITS:
        with pytest.raises(ValueError) as caught:
            units.parse("?", dimension)
        assert units.parse(str(caught.value).split("'")[1], dimension) > 0


@quick
@given(st.floats(1e-9, 900.0))
def test_times_are_read_back(value: float) -> None:
    text = units.seconds(value).replace(",", "")
    assert units.parse(text, "time") == pytest.approx(value, rel=6e-3)  # three digits are written


@quick
@given(st.floats(1.0, 9e14))
def test_sizes_and_rates_are_read_back(value: float) -> None:
    assert units.parse(units.size(value).replace(",", ""), "bytes") == pytest.approx(value, rel=6e-3)
    assert units.parse(units.rate(value).replace(",", ""), "bandwidth") == pytest.approx(value, rel=6e-3)


def test_written_forms() -> None:
    assert (units.seconds(0.0012), units.seconds(0)) == ("1.2 ms", "0 s")
    assert (units.size(2.7e8), units.size(0)) == ("270 MB", "0 B")
    assert units.rate(4e11) == "400 GB/s"
    assert (units.flops(2.9e14), units.flops(0)) == ("290 TFLOP", "0")
    assert (units.dollars(3456.0), units.dollars(3.456), units.dollars(0.00123)) == ("$3,456.00", "$3.46", "$0.00123")
