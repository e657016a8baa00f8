"""Methods of single objects, replaced by functions of kvhook's, and put back.

Several parts of kvhook, and the user's own tools, may replace the same method of the same object, and go in any order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

#: What stands for "the object had no such attribute of its own".
_NOTHING: Any = object()


class Overlay:
    """A function in the place of a method of one object.

    Attributes:
        function: what has been put there.
        before: what the object itself had there, and gets back.
    """

    __slots__ = ("__weakref__", "_name", "_owner", "before", "function")

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._name, self.function = name, function
        try:
            self._owner: Callable[[], Any] = weakref.ref(owner)  # whoever keeps an overlay does not keep an engine
        except TypeError:
            self._owner = lambda: owner  # somebody's own, to which there are no weak references
        self.before = vars(owner).get(name, _NOTHING)
        setattr(owner, name, function)
        _overlays[id(function)] = self

    def is_on_top(self) -> bool:
        """Whether nobody has put anything over it, and it is still there."""
        owner = self._owner()
        return owner is not None and vars(owner).get(self._name) is self.function

    def take_out(self) -> None:
        """Put back what was there before.

        If another overlay lies over this one, that one will put it back. What somebody else has put over it stays, and
        calls this function further on.
        """
        owner = self._owner()
        if owner is None:
            return
        top = vars(owner).get(self._name, _NOTHING)
        if top is self.function:
            if self.before is _NOTHING:
                delattr(owner, self._name)
            else:
                setattr(owner, self._name, self.before)
            return
        above = _overlay_of(top)
        while above is not None and above.before is not self.function:
            above = _overlay_of(above.before)
        if above is not None:
            above.before = self.before


#: id of a function -> its overlay. Weak: an overlay is held by what has put it there.
_overlays: weakref.WeakValueDictionary[int, Overlay] = weakref.WeakValueDictionary()


def _overlay_of(function: Any) -> Overlay | None:
    found = _overlays.get(id(function))
    return found if found is not None and found.function is function else None
