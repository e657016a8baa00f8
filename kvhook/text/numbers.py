"""Single numbers as text: times, shares, counts, rates."""

from __future__ import annotations


def seconds(value: float) -> str:
    """A time with three digits and the unit that suits it; ``-`` for NaN."""
    if value != value:
        return "-"
    for factor, unit in ((1e-6, "us"), (1e-3, "ms")):
        if abs(value) < 999.5 * factor:
            return f"{value / factor:.3g} {unit}" if value else "0 s"
    return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent; ``-`` for None."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def count(value: int | None) -> str:
    """A number with thousands separated; ``not known`` for None."""
    return "not known" if value is None else f"{value:,}"


def rate(value: float | None) -> str:
    """Tokens per second inside steps."""
    return "-" if value is None else f"{value:,.0f} per second in steps"


def of_bytes(number: int | None) -> str:
    """Bytes of a KV cache; ``-`` for None."""
    if number is None:
        return "-"
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.3g} MiB"
