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

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from kvhook.errors import KvhookError
from kvhook.options import Options, as_absolute
from kvhook.ring.place import ENV_DIR
from kvhook.ring.trace_file import TRACE_SUFFIX

ENV_ON = "KVHOOK"
#: Argument of `kvhook.install` -> its variable.
ENV_OPTIONS = {"trace": "KVHOOK_TRACE", "level": "KVHOOK_LEVEL", "core": "KVHOOK_CORE"}
ENV_LABEL = "KVHOOK_LABEL"
ENV_ANONYMOUS = "KVHOOK_ANONYMOUS"
#: Set by ``kvhook run``, which prints the summary itself.
ENV_RUN = "KVHOOK_RUN"

#: Bytes of a program's name in that of its trace.
_LONGEST_STEM = 100

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


def make_absolute(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the variables that are paths mean the same files when this process, or one that it starts, goes to another
    directory."""
    for variable in (ENV_DIR, ENV_OPTIONS["trace"]):
        if environment.get(variable):
            with contextlib.suppress(OSError):  # the current directory has been removed
                environment[variable] = os.path.join(os.getcwd(), environment[variable])


def is_folder(trace: str) -> bool:
    """Whether ``KVHOOK_TRACE`` names a folder rather than a file."""
    return trace.endswith(os.sep) or os.path.isdir(trace) or not trace.endswith(TRACE_SUFFIX)


def check_folder(said: str, trace: str) -> None:
    """Whether a folder may be made of this name: one like ``run.csv`` was meant to be a file.

    Args:
        said: the option or the variable, for the message.
        trace: its value.

    Raises:
        KvhookError: it looks like the name of a file.
    """
    kind = Path(trace).suffix
    if kind[1:2].isalpha() and not trace.endswith(os.sep) and not os.path.isdir(trace):
        raise KvhookError(f"{said}: a trace ends in {TRACE_SUFFIX}; if this is to be a folder, say {trace}{os.sep}")


def stem_of(program: str) -> str:
    """What a program is called in the name of its trace: short enough for a file, and in UTF-8."""
    return os.fsencode(Path(program).stem)[:_LONGEST_STEM].decode(errors="ignore")


def file_in(trace: str, *, anonymous: bool = False) -> Path:
    """The trace file of this process: what ``KVHOOK_TRACE`` says, or a file of its own in that folder.

    Raises:
        KvhookError: the folder cannot be made, or it looks as if no folder was meant.
    """
    if not is_folder(trace):
        return Path(trace)
    check_folder(f"KVHOOK_TRACE={trace}", trace)
    folder = as_absolute(ENV_OPTIONS["trace"], trace)
    stem = "run" if anonymous else stem_of(sys.argv[0] if sys.argv else "")
    program = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "python"
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise KvhookError(f"KVHOOK_TRACE={trace!r}: the folder cannot be made: {error.strerror or error}") from None
    return folder / f"{program}-{os.getpid()}{TRACE_SUFFIX}"
