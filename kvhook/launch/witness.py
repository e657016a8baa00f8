"""Whether a signal was sent to this process alone, or to its whole process group. The kernel does not say which.

What is sent to a group (``os.killpg``, ``kill -- -PGID``, ``timeout``) reaches the program without being handed on, and
a second time would be once too often: a program that is saving its work would be interrupted in it. So a process of the
same group stands by, in which all signals are blocked: what is waiting there was sent to the group.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys

#: Is asked for a signal by its number, and says whether it had it. It ends when nobody can ask any more.
_CODE = "import os, signal\nwhile n := os.read(0, 1): os.write(0, b'n' if signal.sigtimedwait(n, 0) is None else b'y')"
#: Seconds for an answer. It takes far less, unless somebody has stopped the process.
_PATIENCE = 10.0


class Witness:
    """The process that stands by. Without one (it could not be started, or somebody has ended it), every signal counts
    as sent to this process alone."""

    def __init__(self) -> None:
        self._line: socket.socket | None = None
        self._pid = 0
        with contextlib.suppress(OSError, ValueError):
            self._begin()

    def _begin(self) -> None:
        pair = socket.socketpair()
        # where standard streams are closed, the numbers of these may be theirs
        ours, theirs = (socket.socket(fileno=fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 3)) for one in pair)
        for one in pair:
            one.close()
        with theirs:
            actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)]
            opened = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (1, 2)]
            command = [sys.executable, "-I", "-S", "-c", _CODE]
            try:
                self._pid = os.posix_spawn(
                    command[0],
                    command,
                    os.environ,
                    file_actions=[*actions, *opened],
                    setsigmask=signal.valid_signals(),
                )
            except BaseException:
                ours.close()
                raise
        ours.settimeout(_PATIENCE)
        self._line = ours

    def had(self, number: int) -> bool:
        """Whether a signal that has come to this process came to the group. Each is told of once."""
        if self._line is None:
            return False
        # a signal to a group is sent to one process after the other, under a lock of the kernel's that this call takes
        # too (it changes nothing): when it returns, all of them have the signal
        with contextlib.suppress(OSError):
            os.setpgid(0, os.getpgrp())
        answer = b""
        with contextlib.suppress(OSError):
            self._line.sendall(bytes([number]))
            answer = self._line.recv(1)
        if not answer:
            self.end()  # what it says later would be taken for an answer to another question
        return answer == b"y"

    def end(self) -> None:
        """End the process. Ending twice is fine."""
        if self._line is not None:
            self._line.close()
            self._line = None
            with contextlib.suppress(OSError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
