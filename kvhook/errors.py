"""What kvhook raises. Every message says what happened, to what, and what to do."""

from __future__ import annotations


class KvhookError(Exception):
    """A mistake or a condition the user can do something about; the message says what."""


class TraceFormatError(KvhookError):
    """A file is not a kvhook ring or trace, is damaged, or was written by a kvhook this one cannot read."""


class RingDirectoryError(KvhookError):
    """No directory was found in which a ring can be made safely."""


class StatsOffError(KvhookError):
    """The engine makes no stats, and that cannot be changed any more."""


class ExportError(KvhookError):
    """A trace cannot be written as asked: unknown format, missing package, or a file that is in the way."""
