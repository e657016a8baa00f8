"""What happened beside the steps: scopes that began and ended, names of labels, labelled requests, clock readings.

A trace holds them in its META records, under the fact ``events``, a list of lists. Each begins with what it is::

    ["scope", number, name, kind, parent, t_ns, warmup, engines, num_prompts, params]   a scope began
    ["end", number, t_ns]                                                               it ended
    ["name", column, code, text]          what a code in a column of names (`kvhook.schema.NAMES`) means
    ["request", engine, t_ns, request_key, label, lora_name]     a request with a label or an adapter was added (codes;
                                                                 the key in hexadecimal)
    ["clock", monotonic_ns, realtime_ns]                         both clocks at one moment
    ["engine_event", number, kind, engines, began_ns, ended_ns, detail, outcome, calls]    see `records.engine_events`;
                                                                 one with the same number that comes later is what holds

The same event may stand in several files of a run: events are told apart by their numbers and codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvhook.facts import printable
from kvhook.records.engine_events import EngineEvent, as_cells, from_cells
from kvhook.schema import NAMES

_MOST = 1 << 62
_LONGEST_PATH = 4096


class Scope(NamedTuple):
    """A part of a run that has a name: a ``with session.scope(...)`` block, or a call such as ``LLM.generate``.

    Attributes:
        number: of the scope in its run, from 0, in the order in which they began.
        name: what the user called it; of a call its method and the how-manieth call of it: ``"generate-0"``.
        kind: ``"scope"``, or the method that was called: ``"generate"``, ``"chat"``, ``"embed"`` and so on.
        parent: number of the scope around it, -1 if there is none.
        began_ns: when it began, monotonic clock.
        ended_ns: when it ended; -1 if it has not, or if the process was killed in it.
        warmup: whether it, or a scope around it, is warm-up.
        engines: the numbers of the engines it is about; empty for all.
        num_prompts: how many prompts the call was given; -1 where that is not known.
        params: outline of the call's sampling parameters, such as ``"max_tokens=16, temperature=0.0"``.
        began_unix_ns, ended_unix_ns: the same moments since 1970, in nanoseconds; -1 where it has not ended.
        path: the names of the scopes around it and its own, with ``/`` between them.
    """

    number: int
    name: str
    kind: str = "scope"
    parent: int = -1
    began_ns: int = 0
    ended_ns: int = -1
    warmup: bool = False
    engines: tuple[int, ...] = ()
    num_prompts: int = -1
    params: str = ""
    began_unix_ns: int = -1
    ended_unix_ns: int = -1
    path: str = ""

    def __str__(self) -> str:
        took = f"{(self.ended_ns - self.began_ns) / 1e9:.3f} s" if self.ended_ns >= 0 else "has not ended"
        prompts = f", {self.num_prompts} prompt{'s' * (self.num_prompts != 1)}" if self.num_prompts >= 0 else ""
        return f"{self.path or self.name}: {took}{prompts}{f', {self.params}' if self.params else ''}"


class Request(NamedTuple):
    """A request that was added with a label or a LoRA adapter, by the key that its engine core knows it by too."""

    engine: int
    t_ns: int
    request_key: int
    label: int
    lora_name: int


class Events:
    """The events of one run, in whatever order they come.

    Attributes:
        scopes: number -> scope; ``path`` and the clock since 1970 are not filled in.
        names: column of `kvhook.schema.NAMES` -> code -> text.
        requests: those that have a label or an adapter, as they were added.
        clocks: monotonic -> realtime, in nanoseconds, of the same moments.
        engine_events: number -> what was done to an engine; the clock since 1970 is not filled in.
    """

    def __init__(self) -> None:
        self.scopes: dict[int, Scope] = {}
        self.names: dict[str, dict[int, str]] = {column: {} for column in NAMES}
        self.requests: dict[Request, None] = {}
        self.clocks: dict[int, int] = {}
        self.engine_events: dict[int, EngineEvent] = {}
        self._ends: dict[int, int] = {}
        self._shared = False

    def take(self, raw: Any) -> None:
        """Take in events out of a file; what is none is left out."""
        self._own()
        for event in raw if isinstance(raw, list) else ():
            if isinstance(event, list) and event and isinstance(event[0], str):
                take = _TAKE.get(event[0])
                if take is not None:
                    take(self, event[1:])

    def add(self, later: Events) -> None:
        """Take in those of a later part of the run; they stay as they are."""
        if not self:
            # a run in one file: nothing is copied, however many there are
            for name in _PARTS:
                setattr(self, name, getattr(later, name))
            self._shared = True
            return
        self._own()
        for number, scope in later.scopes.items():
            self.scopes.setdefault(number, scope)
        for column, names in later.names.items():
            self.names[column].update(names)
        self.requests.update(later.requests)
        self.clocks.update(later.clocks)
        for event in later.engine_events.values():
            self._later(event)
        for number, ended in (*later._ends.items(), *((s.number, s.ended_ns) for s in later.scopes.values())):
            if ended >= 0:
                self._end(number, ended)

    def moved(self, scopes: int, engines: range, codes: Mapping[str, int], engine_events: int = 0) -> Events:
        """The same among the events of other runs.

        Args:
            scopes: what is added to the numbers of scopes.
            engine_events: what is added to the numbers of what was done to engines.
            engines: the numbers that its engines have there.
            codes: column of names -> what is added to its codes.
        """
        out, first = Events(), engines.start
        for scope in self.scopes.values():
            number, parent = scope.number + scopes, scope.parent + scopes if scope.parent >= 0 else -1
            mine = tuple(first + e for e in scope.engines) or tuple(engines)
            out.scopes[number] = scope._replace(number=number, parent=parent, engines=mine)
        for column, names in self.names.items():
            out.names[column] = {code + codes[column]: text for code, text in names.items()}
        for one in self.requests:
            label, lora = (c + codes[n] if c >= 0 else -1 for c, n in zip(one[3:], NAMES, strict=True))
            out.requests[one._replace(engine=first + one.engine, label=label, lora_name=lora)] = None
        for event in self.engine_events.values():
            mine = tuple(first + e for e in event.engines) or tuple(engines)
            out._later(event._replace(number=event.number + engine_events, engines=mine))
        return out

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _PARTS if name != "names") or any(self.names.values())

    def as_list(self) -> list[list[Any]]:
        """All of them, as a file holds them."""
        out: list[list[Any]] = [["clock", *pair] for pair in self.clocks.items()]
        out += [["name", c, code, text] for c, names in self.names.items() for code, text in names.items()]
        for scope in self.scopes.values():
            out += scope_events(scope)
        out += [as_cells(event) for event in self.engine_events.values()]
        return out + [["request", r.engine, r.t_ns, format(r.request_key, "x"), *r[3:]] for r in self.requests]

    def _own(self) -> None:
        """Copy what belongs to others before it is changed."""
        if self._shared:
            self.names = {column: dict(names) for column, names in self.names.items()}
            for name in _PARTS:
                if name != "names":
                    setattr(self, name, dict(getattr(self, name)))
            self._shared = False

    def _scope(self, cells: Sequence[Any]) -> None:
        number, name, kind, parent, began, warmup, engines, prompts, params = cells
        numbers = (number, parent, began, prompts, *engines)
        if all(map(_is_number, numbers)) and number >= 0 and all(isinstance(t, str) for t in (name, kind, params)):
            ended = self._ends.pop(number, -1)
            known = self.scopes.get(number)
            if known is not None and ended < 0:
                ended = known.ended_ns
            text = [printable(t) for t in (name, kind, params)]
            self.scopes[number] = Scope(
                number, text[0], text[1], parent, began, ended, warmup is True, tuple(engines), prompts, text[2]
            )

    def _end(self, number: Any, ended: Any) -> None:
        if not (_is_number(number) and _is_number(ended)):
            return
        scope = self.scopes.get(number)
        if scope is None:
            self._ends[number] = ended
        else:
            self.scopes[number] = scope._replace(ended_ns=ended)

    def _name(self, column: Any, code: Any, text: Any) -> None:
        if column in self.names and _is_number(code) and isinstance(text, str):
            self.names[column][code] = printable(text)

    def _request(self, engine: Any, t_ns: Any, key: Any, label: Any, lora_name: Any) -> None:
        if all(map(_is_number, (engine, t_ns, label, lora_name))) and isinstance(key, str) and len(key) <= 16:
            number = int(key, 16)
            if -1 <= number < 1 << 63:
                self.requests[Request(engine, t_ns, number, label, lora_name)] = None

    def _engine_event(self, *cells: Any) -> None:
        event = from_cells(cells)
        if event is not None:
            self._later(event)

    def _later(self, event: EngineEvent) -> None:
        """Of what is told several times of one event, what was told last holds."""
        known = self.engine_events.get(event.number)
        if known is None or event.ended_ns >= known.ended_ns:
            self.engine_events[event.number] = event

    def _clock(self, monotonic: Any, realtime: Any) -> None:
        if _is_number(monotonic) and _is_number(realtime):
            self.clocks[monotonic] = realtime


_PARTS = ("scopes", "names", "requests", "clocks", "engine_events", "_ends")


def _forgiving(method: Any) -> Any:
    def take(events: Events, cells: list[Any]) -> None:
        try:
            method(events, *cells)
        except (TypeError, ValueError):
            return  # a file that was edited, or is of a newer kvhook

    return take


#: What an event begins with -> what takes in the rest of it.
_TAKE = {
    "scope": _forgiving(lambda events, *cells: events._scope(cells)),  # noqa: SLF001 (in this very module)
    "end": _forgiving(Events._end),  # noqa: SLF001
    "name": _forgiving(Events._name),  # noqa: SLF001
    "request": _forgiving(Events._request),  # noqa: SLF001
    "clock": _forgiving(Events._clock),  # noqa: SLF001
    "engine_event": _forgiving(Events._engine_event),  # noqa: SLF001
}


def scope_events(scope: Scope) -> list[list[Any]]:
    """A scope as events: that it began, and that it ended if it has."""
    s = scope
    began = [
        *("scope", s.number, s.name, s.kind, s.parent, s.began_ns),
        *(s.warmup, list(s.engines), s.num_prompts, s.params),
    ]
    return [began] if s.ended_ns < 0 else [began, ["end", s.number, s.ended_ns]]


def described(scopes: Iterable[Scope]) -> list[Scope]:
    """Scopes in the order in which they began, with their paths, and warm-up where a scope around them is."""
    known: dict[int, Scope] = {}
    for scope in sorted(scopes, key=lambda s: s.number):
        around = known.get(scope.parent)
        path = f"{around.path}/{scope.name}" if around is not None else scope.name
        if len(path) > _LONGEST_PATH:  # scopes of a forged file may lie in each other without end
            path = f".../{scope.name}"[:_LONGEST_PATH]
        known[scope.number] = scope._replace(path=path, warmup=scope.warmup or (around is not None and around.warmup))
    return list(known.values())


def open_scope(raw: Any, engine: int) -> str:
    """The path of the innermost scope of an engine that has begun and not ended, out of raw events; "" without any."""
    events = Events()
    events.take(raw)
    going_on = [
        s for s in described(events.scopes.values()) if s.ended_ns < 0 and (not s.engines or engine in s.engines)
    ]
    return going_on[-1].path if going_on else ""


def from_meta(raw: Any) -> list[Scope]:
    """The scopes of ``meta["scopes"]``, as an export holds them; what is none is left out."""
    out = []
    for cells in raw if isinstance(raw, list) else ():
        try:
            scope = Scope(**{k: v for k, v in cells.items() if k in Scope._fields})
            texts, numbers = (scope.name, scope.kind, scope.params, scope.path), (scope.number, scope.parent)
            times = (scope.began_ns, scope.ended_ns, scope.began_unix_ns, scope.ended_unix_ns, scope.num_prompts)
            engines = tuple(scope.engines)
        except (TypeError, AttributeError):
            continue
        if all(isinstance(t, str) for t in texts) and all(map(_is_number, (*numbers, *times, *engines))):
            out.append(scope._replace(engines=engines, warmup=scope.warmup is True))
    return out


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < _MOST
