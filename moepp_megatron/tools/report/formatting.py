"""Formats numbers for readers."""

import math
from collections.abc import Callable

NOT_FINITE = "not finite"


def number(value: float, digits: int = 4) -> str:
    """A plain number with a fixed count of decimals, scientific if very large or small."""
    if not math.isfinite(value):
        return NOT_FINITE
    if value != 0 and not 10.0**-digits <= abs(value) < 1e7:
        return f"{value:.3e}"
    return f"{value:,.{digits}f}"


def or_dash(value: float, show: Callable[[float], str] = number) -> str:
    """A number in this form, or a dash where there is none."""
    return show(value) if math.isfinite(value) else "-"


def significant(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:,.3g}" if math.isfinite(value) else NOT_FINITE


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f}%" if math.isfinite(fraction) else NOT_FINITE


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{round(value):,}" if math.isfinite(value) else NOT_FINITE


def big_count(value: float) -> str:
    """A whole number; from 100 million on in millions, billions or trillions."""
    if not abs(value) >= 1e8 or not math.isfinite(value):
        return count(value)
    for unit, name in ((1e12, "trillion"), (1e9, "billion")):
        if abs(value) >= unit:
            return f"{value / unit:,.2f} {name}"
    return f"{value / 1e6:,.1f} million"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return NOT_FINITE
    scale = 0
    while abs(value) >= base and scale < len(units) - 1:
        value /= base
        scale += 1
    return f"{value:,.0f} {units[0]}" if scale == 0 else f"{value:,.2f} {units[scale]}"


def data_size(bytes_: float) -> str:
    """Bytes in binary units."""
    return _scaled(bytes_, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def flops(value: float) -> str:
    """Floating-point operations in decimal units."""
    return _scaled(value, 1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def duration(seconds: float) -> str:
    """Seconds as seconds, minutes or hours."""
    if not math.isfinite(seconds):
        return NOT_FINITE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
