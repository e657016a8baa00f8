"""A program as a child process that behaves as if it had been started directly."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvhook.errors import KvhookError
from kvhook.launch.witness import Witness

#: Signals that are handed on when somebody sends them to this process alone.
FORWARDED = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
)
_AWAITED = FORWARDED | {signal.SIGCHLD}
#: Seconds after which the child is looked at without a signal: a thread of numpy's may have been given SIGCHLD where
#: the child ended before it was waited for.
_LONGEST = 0.5


class NotStarted(KvhookError):
    """The program cannot be started. `code` is what a shell gives then."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def threads_without_signals() -> Iterator[None]:
    """Threads that are started in this block, as numpy does when it is imported, never get a signal that is waited for
    here: in a thread that does not block it, it would end this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    meanwhile: Callable[[], None] = lambda: None,
    pause: float = 60.0,
) -> int:
    """Start a program, wait for its end, and hand signals on to it.

    What the terminal sends (Ctrl-C, a hang-up) goes to all processes of the foreground, and what is sent to a process
    group to all of that, so the program has it already: only what was sent to this process alone is handed on. Of what
    the terminal sends the kernel says so; for the rest see `kvhook.launch.witness`.

    Args:
        command: the program and its arguments.
        environment: of the program.
        meanwhile: is called now and then, with this process's signals blocked.
        pause: the most seconds between two calls.

    Returns:
        Its exit code, or minus the number of the signal that ended it.

    Raises:
        NotStarted: there is no such program, or it may not be run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, nobody can know an exit code
    witness = Witness()
    try:
        child = _start(command, environment, before)
        while True:
            info = signal.sigtimedwait(_AWAITED, min(pause, _LONGEST))
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            # codes above 0 are the kernel's: the terminal's signals, and SIGCHLD
            if info is not None and info.si_code <= 0 and info.si_signo in FORWARDED:
                to_group = witness.had(info.si_signo)
                if not to_group or os.getpgid(child) != os.getpgrp():  # it may have gone to a group of its own
                    os.kill(child, info.si_signo)
            meanwhile()
    finally:
        witness.end()
        signal.signal(signal.SIGCHLD, on_child)
        while signal.sigtimedwait(FORWARDED, 0) is not None:
            pass  # what came with the program's end was meant for it
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(command: Sequence[str], environment: Mapping[str, str], mask: set[signal.Signals | int]) -> int:
    try:
        # Python ignores these two; a program does not begin with that
        usual = [signal.SIGPIPE, signal.SIGXFSZ]
        return os.posix_spawnp(command[0], list(command), dict(environment), setsigmask=mask, setsigdef=usual)
    except FileNotFoundError:
        raise NotStarted(f"there is no program {command[0]!r}", 127) from None
    except ValueError as error:  # an empty name
        raise NotStarted(f"{command[0]!r} cannot be run: {error}", 127) from None
    except OSError as error:
        raise NotStarted(f"{command[0]!r} cannot be run: {error.strerror or error}", 126) from None


def end_like(code: int) -> int:
    """End this process as the program has ended: by the same signal, or with the exit code that is returned."""
    if code >= 0:
        return code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the program has left its own core file, if one is wanted
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
    os.kill(os.getpid(), -code)
    return 128 - code  # not reached, unless the signal does not end a process
