"""What kvhook raises. Every message says what happened, to what, and what to do."""

from __future__ import annotations


def shown(text: str, kept: str = "\n\t") -> str:
    """Text for people, which cannot send escape sequences to their terminal: it may hold the name of somebody's file.

    Args:
        text: the text.
        kept: control characters that stay; others become a question mark.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in kept else "?" for c in text)


class KvhookError(Exception):
    """A mistake or a condition the user can do something about; the message says what."""

    def __str__(self) -> str:
        return shown(super().__str__())


class TraceFormatError(KvhookError):
    """A file is not a kvhook ring or trace, is damaged, or was written by a kvhook this one cannot read."""


class RingDirectoryError(KvhookError):
    """No directory was found in which a ring can be made safely."""


class StatsOffError(KvhookError):
    """The engine makes no stats, and that cannot be changed any more."""


class ExportError(KvhookError):
    """A trace cannot be written as asked: unknown format, missing package, or a file that is in the way."""
