"""What the monitor logs, above progress bars instead of through them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable


class AboveBars(logging.Handler):
    """Writes warnings and worse to the standard error, above the bars that tqdm draws there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        try:
            text = self.format(record)
            tqdm = sys.modules.get("tqdm")
            if tqdm is None:
                sys.stderr.write(f"{text}\n")
            else:
                tqdm.tqdm.write(text, file=sys.stderr)
        except Exception:
            self.handleError(record)


def log_above_bars() -> Callable[[], None]:
    """Log above progress bars, unless the program says itself where its log goes.

    Returns:
        What ends it.
    """
    log = logging.getLogger("gradmon")
    if log.hasHandlers():
        return _nothing
    handler = AboveBars()
    log.addHandler(handler)
    return lambda: log.removeHandler(handler)


def _nothing() -> None:
    """Do nothing."""
