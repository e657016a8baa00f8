"""Other people's tools, which wrap what kvhook wraps, and the orders in which they and kvhook can come and go."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import wrapt

from tests.standin import ENGINE


class Tool:
    """Somebody else's tool, which counts the steps of all engines."""

    def __init__(self, attribute: str = "step") -> None:
        self.attribute, self.calls, self.there = attribute, 0, False

    def engine_class(self) -> Any:
        import vllm.v1.engine.llm_engine as module

        return module.LLMEngine

    def come(self) -> None:
        self.there = True
        self.put()

    def go(self) -> None:
        self.there = False
        self.take()

    def put(self) -> None: ...

    def take(self) -> None: ...


class Plain(Tool):
    """It keeps what it found, calls it, and puts it back, whatever is there by then."""

    def put(self) -> None:
        self.found = found = vars(self.engine_class())[self.attribute]

        def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return found.__get__(engine)(*args, **kwargs)

        setattr(self.engine_class(), self.attribute, self.dress(step))

    def dress(self, step: Any) -> Any:
        return step

    def take(self) -> None:
        setattr(self.engine_class(), self.attribute, self.found)


class Wraps(Plain):
    """The same with `functools.wraps`."""

    def dress(self, step: Any) -> Any:
        return functools.wraps(self.found)(step)


class Tracer(Tool):
    """As ddtrace and OpenTelemetry do: put in with wrapt, and taken out as "what is there, unwrapped"."""

    def put(self) -> None:
        def around(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            self.calls += 1
            return wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper(ENGINE, f"LLMEngine.{self.attribute}", around)

    def take(self) -> None:
        there = getattr(self.engine_class(), self.attribute)
        if isinstance(there, (wrapt.FunctionWrapper, wrapt.BoundFunctionWrapper)):
            setattr(self.engine_class(), self.attribute, there.__wrapped__)


TOOLS: list[type[Tool]] = [Plain, Wraps, Tracer]

#: The orders in which two can come and go.
ORDERS = [
    order
    for order in itertools.permutations(("kvhook comes", "kvhook goes", "tool comes", "tool goes"))
    if order.index("kvhook comes") < order.index("kvhook goes") and order.index("tool comes") < order.index("tool goes")
]
NAMES_OF_ORDERS = [" ".join(part[0] + part.split()[1][0] for part in order) for order in ORDERS]
