"""Forks of this process, noticed in one place.

What was made before a fork belongs to the parent: its rings, its files and its session. Code that must know remembers
`generation` when it makes something, and compares later::

    made_in = forks.generation
    ...
    if made_in != forks.generation:
        return  # this is a forked child

A number is compared rather than a process id, because ``os.getpid()`` takes 160 ns.
"""

from __future__ import annotations

import os
from collections.abc import Callable

#: How many forks lie between this process and the one that first imported this module.
generation = 0

_callbacks: list[Callable[[], None]] = []


def call_in_child(callback: Callable[[], None]) -> None:
    """Call a function in every child that is forked from now on, after `generation` has changed."""
    _callbacks.append(callback)


def _in_child() -> None:
    global generation
    generation += 1
    for callback in _callbacks:
        callback()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
