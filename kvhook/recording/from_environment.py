"""Recording without a line of code: what ``KVHOOK=1`` and the variables beside it ask for.

======================== ===============================================================================
``KVHOOK=1``             record every engine that is made in this process and in those that it starts
``KVHOOK_TRACE``         stream the run to this ``.kvh`` file; or a folder, where each process has a file
``KVHOOK_LEVEL``         ``full`` or ``light``
``KVHOOK_CORE``          ``steps``, ``blocks`` or ``off``
``KVHOOK_LABEL``         a label for every request
``KVHOOK_ANONYMOUS=1``   leave out what could name somebody
======================== ===============================================================================

They are the arguments of `kvhook.install` of these names. A program that calls ``install`` itself gets them too, for
the arguments that it leaves out.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvhook.errors import KvhookError
from kvhook.options import Options
from kvhook.ring.trace_file import TRACE_SUFFIX

ENV_ON = "KVHOOK"
#: Argument of `kvhook.install` -> its variable.
ENV_OPTIONS = {"trace": "KVHOOK_TRACE", "level": "KVHOOK_LEVEL", "core": "KVHOOK_CORE"}
ENV_LABEL = "KVHOOK_LABEL"
ENV_ANONYMOUS = "KVHOOK_ANONYMOUS"
#: Set by ``kvhook run``, which prints the summary itself.
ENV_RUN = "KVHOOK_RUN"

_OFF = frozenset({"", "0", "false", "no", "off"})


def is_on(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for recording."""
    return _is_set(ENV_ON, environment)


def is_anonymous(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for leaving out what could name somebody."""
    return _is_set(ENV_ANONYMOUS, environment)


def _is_set(name: str, environment: Mapping[str, str]) -> bool:
    return environment.get(name, "").strip().lower() not in _OFF


def completed(options: Options, environment: Mapping[str, str] = os.environ) -> Options:
    """The options, with those that were left out as the environment says, if it asks for recording."""
    if is_anonymous(environment):  # whoever sets it wants it of every run
        options = dataclasses.replace(options, anonymous=True)
    if not is_on(environment):
        return options
    usual = {field.name: field.default for field in dataclasses.fields(Options)}
    asked: dict[str, Any] = {
        name: environment[variable]
        for name, variable in ENV_OPTIONS.items()
        if environment.get(variable) and getattr(options, name) == usual[name]
    }
    if "trace" in asked:
        asked["trace"] = str(file_in(asked["trace"], anonymous=options.anonymous))
    if (label := environment.get(ENV_LABEL)) and options.labels is None:
        asked["labels"] = lambda _: label
    return dataclasses.replace(options, **asked)


def is_folder(trace: str) -> bool:
    """Whether ``KVHOOK_TRACE`` names a folder rather than a file."""
    return trace.endswith(os.sep) or os.path.isdir(trace) or not trace.endswith(TRACE_SUFFIX)


def file_in(trace: str, *, anonymous: bool = False) -> Path:
    """The trace file of this process: what ``KVHOOK_TRACE`` says, or a file of its own in that folder.

    Raises:
        KvhookError: the folder cannot be made.
    """
    if not is_folder(trace):
        return Path(trace)
    stem = "run" if anonymous else Path(sys.argv[0] if sys.argv else "").stem
    program = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "python"
    try:
        os.makedirs(trace, exist_ok=True)
    except OSError as error:
        raise KvhookError(f"KVHOOK_TRACE={trace!r}: the folder cannot be made: {error.strerror or error}") from None
    return Path(trace) / f"{program}-{os.getpid()}{TRACE_SUFFIX}"
