"""The label that requests get which are added in a part of a program: `label`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_current: contextvars.ContextVar[str] = contextvars.ContextVar("kvhook_label", default="")

#: A label is a name, not a text: it is cut here.
LONGEST = 200


@contextlib.contextmanager
def label(text: str) -> Iterator[None]:
    """Label the requests that are added inside the ``with`` block.

    It holds for the thread or the asyncio task it is used in, with or without a session, and an inner label takes the
    place of an outer one. It can also decorate a function.

    >>> with kvhook.label("agent-7"):
    ...     outputs = llm.generate(prompts, params)
    >>> session.summary(label="agent-7").num_finished_reqs
    4

    Args:
        text: the label; of more than 200 characters the first 200 count.
    """
    token = _current.set(str(text)[:LONGEST])
    try:
        yield
    finally:
        _current.reset(token)


#: The label of this thread or task; "" for none.
current_label = _current.get
