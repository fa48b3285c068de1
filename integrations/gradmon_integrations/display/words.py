"""Text from outside, such as names and messages, made safe for a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    r"""A text without line breaks, and without characters that steer the terminal.

    Example:
        >>> one_line("a\n  b\x1b[31m")
        'a b?[31m'
    """
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def duration(seconds: float, units: int = 2) -> str:
    """How long something takes, in the few units that matter.

    Example:
        >>> duration(4.2), duration(75), duration(3 * 3600 + 120), duration(200000, units=1)
        ('4 s', '1 min 15 s', '3 h 2 min', '2 d')
    """
    left, parts = max(0, round(seconds)), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:units])
