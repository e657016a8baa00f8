"""The live screen. Imports textual; only ``kvhook top`` imports this."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.events import Resize
from textual.widgets import Footer, Static

from kvhook.analysis.live import View
from kvhook.text.live import HELP, SORTS, no_engine, screen
from kvhook.top.colours import coloured

#: Seconds of the window that can be chosen.
WINDOWS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
#: Seconds between two looks at the rings.
EVERY = 0.2


class Top(App[None]):
    """Engines as they work.

    Args:
        look: takes in what has come and gives the engines, for a window of so many seconds. It is called in another
            thread, once at a time.
        ascii_only: draw without block characters.
        every: seconds between two looks.
        nothing: what is said if `look` gives no engine. It is called in that thread, too.
    """

    TITLE = "kvhook top"
    ENABLE_COMMAND_PALETTE = False
    # The text is cut to the terminal's size. With a scroll bar it would be narrower than its lines, which would break.
    CSS = """
    Screen { background: ansi_default; }
    #body { height: 1fr; overflow: hidden; }
    #text { height: auto; text-wrap: nowrap; text-overflow: clip; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "quit"),
        Binding("p,space", "pause", "pause"),
        Binding("plus,equals_sign", "window(1)", "longer", key_display="+"),
        Binding("minus", "window(-1)", "shorter", key_display="-"),
        Binding("s", "sort", "sort"),
        Binding("down,j", "select(1)", "next", show=False),
        Binding("up,k", "select(-1)", "previous", show=False),
        Binding("h,question_mark", "help", "help"),
        Binding("escape", "help(False)", show=False),
    ]

    def __init__(
        self,
        look: Callable[[float], list[View]],
        *,
        ascii_only: bool = False,
        every: float = EVERY,
        nothing: Callable[[], list[str]] = no_engine,
    ) -> None:
        super().__init__(ansi_color=True)
        self._look, self._ascii_only, self._every = look, ascii_only, every
        self._why_nothing, self._nothing = nothing, [""]
        self._text: Static | None = None
        self._room = 80, 24
        self._order: list[tuple[int, int]] = []
        #: the lines on the screen
        self.shown: list[str] = []
        self.views: list[View] = []
        self.window = 3
        self.sort = 0
        self.chosen: tuple[int, int] | None = None
        self.paused = self.helps = False
        self._looking = self._again = False

    def compose(self) -> ComposeResult:
        """One text, and the keys below it."""
        self._text = Static(id="text")
        with Container(id="body"):
            yield self._text
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to look."""
        self.set_interval(self._every, self.look_soon)
        self.look_soon()

    def on_resize(self, event: Resize) -> None:
        """Draw for the new size."""
        self._room = event.size.width, event.size.height
        self.draw()

    def look_soon(self) -> None:
        """Look at the rings in a thread beside this one, which answers keys meanwhile."""
        if self._looking:
            self._again = True
            return
        self._looking = True
        self.run_worker(self._look_there, thread=True)

    def _look_there(self) -> None:
        views = self._look(WINDOWS[self.window])  # also while paused: the ring does not wait
        if not views:
            self._nothing = self._why_nothing()
        with contextlib.suppress(RuntimeError):  # the screen has been closed meanwhile
            self.call_from_thread(self._looked, views)

    def _looked(self, views: list[View]) -> None:
        self._looking = False
        if not self.paused:
            self.views = views
            self.draw()
        if self._again:
            self._again = False
            self.look_soon()

    def draw(self) -> None:
        """Put the screen together."""
        names = list(SORTS)
        views = sorted(self.views, key=SORTS[names[self.sort]], reverse=self.sort > 0)
        keys = [(view.pid, view.engine) for view in views]
        selected = keys.index(self.chosen) if self.chosen in keys else 0
        self._order = keys
        many = f"{len(views)} engine{'' if len(views) == 1 else 's'}"
        heading = f"kvhook top   {time.strftime('%H:%M:%S')}   {many}   last {WINDOWS[self.window]:g} s"
        heading += f"   sorted by {names[self.sort]}" * (len(views) > 1) + "   PAUSED" * self.paused
        width, height = self._room[0], max(0, self._room[1] - 1)
        lines = (
            ["kvhook top", "", *HELP]
            if self.helps
            else screen(
                *(views, selected, width, height),
                heading=heading,
                ascii_only=self._ascii_only,
                nothing=self._nothing,
            )
        )
        text = coloured(lines, views[selected].used if views and not self.helps else None)
        self.shown = lines
        if self._text is not None and self._text.is_attached:
            self._text.update(text)

    def action_pause(self) -> None:
        """Stop the screen, or let it go on."""
        self.paused = not self.paused
        self.draw()

    def action_window(self, by: int) -> None:
        """A longer or a shorter window."""
        self.window = min(max(self.window + by, 0), len(WINDOWS) - 1)
        self.draw()
        self.look_soon()

    def action_sort(self) -> None:
        """Sort by something else."""
        self.sort = (self.sort + 1) % len(SORTS)
        self.draw()

    def action_select(self, by: int) -> None:
        """Show another engine in detail."""
        if self._order:
            at = self._order.index(self.chosen) if self.chosen in self._order else 0
            self.chosen = self._order[(at + by) % len(self._order)]
        self.draw()

    def action_help(self, on: bool | None = None) -> None:
        """Show or hide the keys."""
        self.helps = not self.helps if on is None else on
        self.draw()
