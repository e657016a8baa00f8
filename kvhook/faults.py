"""kvhook's own failures: counted, and logged once for each place."""

from __future__ import annotations

import logging
import traceback

log = logging.getLogger("kvhook")


class Faults:
    """Counts what went wrong inside kvhook and reports each place once.

    Nothing in here raises: it runs inside somebody else's engine.
    """

    def __init__(self) -> None:
        #: Place -> how often it failed.
        self.counts: dict[str, int] = {}
        #: Place -> the first error there, as one line.
        self.first_errors: dict[str, str] = {}

    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Count an error.

        Args:
            where: the place, in words a user understands.
            error: what was raised there.
            then: what kvhook does about it, in words that end a sentence.
        """
        self.counts[where] = self.counts.get(where, 0) + 1
        if where in self.first_errors:
            return
        what = self.first_errors[where] = f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        log.warning("kvhook: %s failed: %s%s. The engine is not affected; %s.", where, what, at, then)
