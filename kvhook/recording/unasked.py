"""A process whose program says nothing of kvhook: installed because the environment asks for it."""

from __future__ import annotations

import atexit
import logging
import os

from kvhook.recording.from_environment import ENV_RUN, is_on
from kvhook.recording.installation import current_session, install

log = logging.getLogger("kvhook")


def install_if_asked() -> None:
    """Install kvhook in this process, if the environment asks for it and the program has not done so itself."""
    session = current_session()
    if not is_on() or (session is not None and not session.is_closed and not session.belongs_to_parent):
        return
    install()
    if ENV_RUN not in os.environ:
        atexit.register(_tell)


def _tell() -> None:
    """The program ends: print the summary to standard error. The session is completed after this."""
    from kvhook.streams import say
    from kvhook.text.afterwards import next_commands, short

    session = current_session()
    if session is None or session.belongs_to_parent:
        return
    try:
        summary = session.summary()
        if summary.engines:
            more = "\n\n" + next_commands([short(path) for path in session.files]) if session.files else ""
            say(f"\n{summary}{more}")
    except Exception as error:  # the program has done its work
        log.warning("kvhook: the summary cannot be printed: %s: %s", type(error).__name__, error)
