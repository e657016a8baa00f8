"""The step path in C: see kvhook/_step/__init__.py, and the comment at the head of each C file."""

from collections.abc import Callable
from typing import Any

from typing_extensions import Buffer

OPERATIONS: tuple[str, ...]
REGISTERS: tuple[str, ...]
STACK_DEPTH: int

def forked() -> None: ...
def nothing(*_: Any, **__: Any) -> None: ...

class RingStore:
    """Called as ``publish(n, record)``: stores record number n, packed, and gives the next number, n + 1."""

    def __new__(cls, map: Buffer, header_bytes: int, slot_bytes: int, capacity: int, crc: bool = ...) -> RingStore: ...
    def __call__(self, n: int, record: Buffer, /) -> int: ...

class Publisher:
    """The functions of `kvhook.adapters.step_functions.StepFunctions`, from a plan of `kvhook.adapters.program`."""

    def __new__(
        cls,
        plan: dict[str, Any],
        publish: Callable[[int, bytes], int],
        clock: Callable[[], int] | None,
        on_sample: Callable[[int, int, int, int, int, int], int] | None,
        orphan: Callable[[bool], None],
        left: Callable[..., Any],
        engine: int,
        start: tuple[int, int, int],
    ) -> Publisher: ...
    def record(self, *args: Any, **kwargs: Any) -> None: ...
    def publish(self, t_start_ns: int, t_end_ns: int, /) -> None: ...
    def take(self, *args: Any, **kwargs: Any) -> bool: ...
    def add(self) -> None: ...
    def abort(self, request: Any, /) -> None: ...
    def flush(self) -> bool: ...
    def left(self) -> Any: ...

class StepMethod:
    """A function in a class, with the step's record around it."""

    __wrapped__: Any
    def __new__(
        cls,
        original: Callable[..., Any],
        steps: dict[int, Callable[[int, int], None]],
        failed: Callable[[BaseException, int], None],
        unseen: Callable[[Any], Callable[[int, int], None] | None],
    ) -> StepMethod: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

class Counter:
    """Counts a step's outputs: ``count(outputs, states, counts)``, see `kvhook.adapters.light.make_counter`."""

    def __new__(cls, preempted: Any, add_prompt: Callable[[Any, Any, Any], None]) -> Counter: ...
    def __call__(self, outputs: Any, states: Any, counts: Any, /) -> None: ...

class OutputTap:
    """In place of ``get_output``, see `kvhook.hooks.taps`: at level full with `first`, at level light with `count`."""

    counts: Any

    def __new__(
        cls,
        get_output: Callable[..., Any],
        take: Callable[..., bool],
        failed: Callable[[Exception], None],
        num_free: Callable[[], int] | None,
        *,
        first: Any = ...,
        rest: Callable[[Any, Any, int, bool], None] | None = ...,
        count: Callable[[Any, Any, Any], None] | None = ...,
        make_counts: Callable[[], Any] | None = ...,
        processor: Any = ...,
        clock: Callable[[], int] | None = ...,
        every: int = ...,
        measure_every: int = ...,
    ) -> OutputTap: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

CORE_COLUMNS: tuple[str, ...]

class CoreState:
    """The numbers of an engine core that is recorded: see `kvhook.core.state.CoreState`, which has the same ones."""

    def push(self, scheduled: tuple[Any, ...], /) -> None: ...
    def take(self) -> tuple[int, ...]: ...
    def bind(self, **parts: Any) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any, /) -> None: ...

class CoreTap:
    """In place of a method inside the engine core; `role` says which."""

    __wrapped__: Any
    def __new__(cls, role: str, original: Callable[..., Any], state: CoreState) -> CoreTap: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
