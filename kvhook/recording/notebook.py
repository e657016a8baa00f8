"""What a session writes down beside the steps: scopes, labels, labelled requests, and what was done to engines.

Nothing of it happens in a step. A scope is written to the trace when it begins and when it ends, so that it is in the
file if the process is killed; labelled requests are written with the next records.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvhook.adapters.calls import Call
from kvhook.errors import KvhookError
from kvhook.facts import without_paths
from kvhook.labels import LONGEST, current_label
from kvhook.options import LabelOf
from kvhook.recording.engine_events import EventsBook
from kvhook.records.engine_events import DONE
from kvhook.records.events import Scope, scope_events
from kvhook.records.part import FOREVER, Interval
from kvhook.ring.notes import RingNotes
from kvhook.schema import NAMES

log = logging.getLogger("kvhook")

#: So many scopes that have ended, and labelled requests, are written again when a bounded history begins a new file.
MOST_KEPT = 10_000
#: So many different labels are told apart.
MOST_NAMES = 1 << 16
_OTHERS = "(other labels)"

#: Names of scopes that are warm-up without being told.
WARMUP_NAMES = frozenset({"warm-up", "warmup", "warm up", "warm_up"})

#: The notebook and the scope that this thread or task is in.
_around: contextvars.ContextVar[tuple[Any, int] | None] = contextvars.ContextVar("kvhook_scope", default=None)


class Notebook:
    """The scopes and labels of one session.

    Args:
        written: is called when something is to be written soon: a scope has begun or ended.
        clock: monotonic nanoseconds.
        nameless: LoRA adapters and the labels that a separator finds in request ids are numbered instead of named.
        label_of: what `kvhook.install(labels=...)` was given.
        request_key: gives the digest by which the engine core knows a request id.
    """

    def __init__(
        self,
        written: Callable[[], None],
        label_of: LabelOf = None,
        request_key: Callable[[str], int] = lambda _: -1,
        clock: Callable[[], int] = time.monotonic_ns,
        nameless: bool = False,
    ) -> None:
        self._written, self._clock, self._request_key = written, clock, request_key
        self._label_of = _label_function(label_of)
        self._number_labels, self._number_adapters = nameless and isinstance(label_of, str), nameless
        #: a text that is not to be recorded -> what stands for it
        self._stand_ins: dict[tuple[str, str], str] = {}
        self._numbers = itertools.count()
        self._calls: Counter[str] = Counter()
        self._pending: deque[list[Any]] = deque()
        self._open: dict[int, Scope] = {}
        self._ended: deque[Scope] = deque(maxlen=MOST_KEPT)
        self._requests: deque[list[Any]] = deque(maxlen=MOST_KEPT)
        self._codes: dict[str, dict[str, int]] = {column: {} for column in NAMES}
        self._warmups: dict[int, Interval] = {}
        #: what was done to engines
        self.engine_events = EventsBook(clock, written)
        self._lock = threading.Lock()
        self._beside_rings = RingNotes()
        self.closed = False

    # ---- scopes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, name: str, warmup: bool | None) -> Iterator[Scope]:
        """See `kvhook.Session.scope`."""
        if self.closed:
            log.warning("kvhook: scope %r is not recorded: the session is closed", name)
        is_warmup = name.strip().lower() in WARMUP_NAMES if warmup is None else bool(warmup)
        scope = self._begin(Scope(next(self._numbers), name[:LONGEST], warmup=is_warmup))
        token = _around.set((self, scope.number))
        try:
            yield scope
        finally:
            with suppress(ValueError):  # a generator that was closed in another task
                _around.reset(token)
            self._end(scope.number)

    def begin_call(self, engines: Sequence[int], call: Call) -> Callable[[], None]:
        """A call of ``LLM`` begins; gives what ends it."""
        with self._lock:
            count = self._calls[call.method]
            self._calls[call.method] += 1
        name = f"{call.method}-{count}"
        scope = Scope(
            next(self._numbers), name, call.method, engines=tuple(engines), num_prompts=call.num_prompts,
            params=call.params,
        )  # fmt: skip
        number = self._begin(scope).number
        return lambda: self._end(number)

    def _begin(self, scope: Scope) -> Scope:
        around = _around.get()
        parent = around[1] if around is not None and around[0] is self else -1
        if parent not in self._open:
            parent = -1
        # the clock last: what took time before this belongs to nobody's scope
        with self._lock:
            scope = scope._replace(parent=parent, began_ns=self._clock())
            self._open[scope.number] = scope
            if scope.warmup:
                self._warmups[scope.number] = (scope.began_ns, FOREVER)
            self._pending += scope_events(scope)
        self._written()
        return scope

    def _end(self, number: int) -> None:
        with self._lock:
            scope = self._open.pop(number, None)
            if scope is None:
                return
            scope = scope._replace(ended_ns=self._clock())
            self._ended.append(scope)
            if scope.warmup:
                self._warmups[number] = (scope.began_ns, scope.ended_ns)
            self._pending.append(["end", number, scope.ended_ns])
        self._written()

    def warmups(self) -> list[Interval]:
        """From when to when the session was warming up; what goes on has no end yet. Monotonic nanoseconds."""
        with self._lock:
            return list(self._warmups.values())

    # ---- labels ----------------------------------------------------------------------------------------------------

    def label_request(self, engine: int, request_id: Any, lora_name: str) -> tuple[int, int]:
        """The codes of the label and of the LoRA adapter of a request that was added; -1 where it has none."""
        own = self._label_of(request_id) if self._label_of is not None else None
        label = current_label() if own is None or own == "" else str(own)[:LONGEST]
        if self._number_labels and own:
            label = self._stand_in("label", label)
        if self._number_adapters and lora_name:
            lora_name = self._stand_in("adapter", lora_name)
        if not label and not lora_name:
            return -1, -1
        lora_name = lora_name[:LONGEST]
        if lora_name and lora_name not in self._codes["lora_name"]:
            self.engine_events.begin("lora_first_used", [engine] if engine >= 0 else [], lora_name)(DONE)
        codes = self._code("label", label), self._code("lora_name", lora_name)
        # as text: a reader believes no number in a file that has more than 62 bits
        key = format(self._request_key(str(request_id)), "x")
        event = ["request", engine, self._clock(), key, *codes]
        self._pending.append(event)
        self._requests.append(event)
        return codes

    def detail(self, kind: str, text: str) -> str:
        """What is recorded of the details of an engine event."""
        if not self._number_adapters or not text:
            return text
        return self._stand_in("adapter", text) if kind.startswith("lora_") else without_paths(text)

    def _stand_in(self, what: str, text: str) -> str:
        """``label-0``, ``label-1`` and so on, the same for the same text."""
        known = self._stand_ins
        if (what, text) not in known and len(known) >= 2 * MOST_NAMES:
            return _OTHERS
        return known.setdefault((what, text), f"{what}-{sum(kind == what for kind, _ in known)}")

    def _code(self, column: str, text: str) -> int:
        if not text:
            return -1
        codes = self._codes[column]
        code = codes.get(text)
        if code is None:
            with self._lock:
                if len(codes) >= MOST_NAMES:
                    text = _OTHERS
                code = codes.setdefault(text, len(codes))
                self._pending.append(["name", column, code, text])
        return code

    # ---- for the spool ---------------------------------------------------------------------------------------------

    def take(self) -> list[list[Any]]:
        """What has not been written yet; it is the caller's now."""
        out = []
        while self._pending:
            try:
                out.append(self._pending.popleft())
            except IndexError:  # another thread was quicker
                break
        if out:
            self._beside_rings.take(out, self.everything)
        return out + self.engine_events.take()

    def begin_ring(self, ring: Path) -> None:
        """A ring was made: scopes and labels are noted beside it as well, for those who have nothing but the ring."""
        self._beside_rings.begin(ring, self.everything())

    def put_back(self, events: Sequence[list[Any]]) -> None:
        """Events that could not be written; they come first next time."""
        self._pending.extendleft(reversed(events))

    @property
    def due(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._pending) or self.engine_events.due

    def everything(self) -> list[list[Any]]:
        """What a new file begins with: all names, and the scopes that are open or ended lately."""
        with self._lock:
            out = [["name", c, code, text] for c, codes in self._codes.items() for text, code in codes.items()]
            for scope in sorted([*self._ended, *self._open.values()]):
                out += scope_events(scope)
            return out + self.engine_events.everything() + [list(event) for event in self._requests]


def _label_function(label_of: LabelOf) -> Callable[[Any], Any] | None:
    if label_of is None or callable(label_of):
        return label_of
    separator = label_of
    return lambda request_id: str(request_id).rpartition(separator)[0]


def check_name(name: object) -> str:
    """The name of a scope.

    Raises:
        KvhookError: it is none.
    """
    if not isinstance(name, str) or not name.strip():
        raise KvhookError(f"a scope has a name, such as session.scope('warm-up'), not {name!r}")
    return name
