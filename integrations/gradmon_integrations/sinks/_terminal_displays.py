"""Progress bars and live displays of other programs: whether there are any, and how to print above them."""

from __future__ import annotations

import sys
from typing import Any

from rich.file_proxy import FileProxy
from rich.text import Text


def busy() -> bool:
    """Whether tqdm or rich draw on the terminal now, so that nobody else should."""
    return _proxy() is not None or _live_on_global_console() or _tqdm_draws()


def print_above(text: str) -> bool:
    """Print lines above what another library draws, by its own means; ANSI colours are kept.

    Returns:
        Whether there was one to print above.
    """
    proxy = _proxy()
    if proxy is not None:
        proxy.write(f"{text}\n")
        return True
    if _live_on_global_console():
        import rich

        rich.get_console().print(Text.from_ansi(text))
        return True
    if _tqdm_draws():
        with sys.modules["tqdm.std"].tqdm.external_write_mode(file=sys.stdout):
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        return True
    return False


def _proxy() -> FileProxy | None:
    """What rich puts in the place of the standard streams while something is live."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, FileProxy):
            return stream
    return None


def _live_on_global_console() -> bool:
    # Private, and under another name before rich 14.1; needed only for displays that do not redirect the streams.
    console: Any = sys.modules["rich"].__dict__.get("_console")
    return bool(getattr(console, "_live_stack", None) or getattr(console, "_live", None))


def _tqdm_draws() -> bool:
    standard = sys.modules.get("tqdm.std")
    if standard is None:
        return False
    try:
        bars: list[Any] = list(getattr(standard.tqdm, "_instances", ()))
    except RuntimeError:  # a bar came or went meanwhile in another thread
        return True
    # A bar that is still being made has neither attribute yet, and is about to be drawn.
    return any(not getattr(bar, "disable", False) and _on_terminal(getattr(bar, "fp", None)) for bar in bars)


def _on_terminal(file: Any) -> bool:
    return file is None or bool(getattr(file, "isatty", bool)())
