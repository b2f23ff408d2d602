"""Numbers as text for people: bytes, rates, shares, durations and counts."""

GIB, MIB, KIB = 2**30, 2**20, 2**10


def mib(num_bytes: float) -> str:
    """Always in MiB, with two decimals: 1288490 -> "1.23 MiB"."""
    return f"{num_bytes / MIB:.2f} MiB"


def gib(num_bytes: float) -> str:
    """Always in GiB, with one decimal."""
    return f"{num_bytes / GIB:.1f} GiB"


def size(num_bytes: float) -> str:
    """In the unit that fits, with three digits: "0.5 KiB", "1.29 MiB", "79.1 GiB"."""
    for limit, unit in ((GIB, "GiB"), (MIB, "MiB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}" if num_bytes < 1000 * limit else f"{num_bytes / limit:,.0f} {unit}"
    return f"{num_bytes / KIB:.3g} KiB"


def gb_per_s(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def percent(fraction: float) -> str:
    """0.123 -> "12.3%"; shares too small to be shown are "< 0.1%"."""
    return f"{fraction:.1%}" if fraction >= 0.0005 else "< 0.1%"


def duration(seconds: float) -> str:
    """In the units that fit: "1.23 ms", "2.5 s", "1 min 15 s", "3 h 01 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def count(number: int, noun: str) -> str:
    """1, "rank" -> "1 rank"; 2, "rank" -> "2 ranks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
