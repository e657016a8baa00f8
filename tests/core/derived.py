"""What follows from the events of the reference model, found naively: content by content, event by event."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.core.reference import Model

Content = tuple[int, ...]


@dataclass
class Life:
    """One content in one block."""

    block: int
    content: Content
    request: int
    cached: int
    used: int
    freed: int = -1
    evicted: int = -1
    hits: int = 0
    again: int = -1


@dataclass
class Derived:
    """Everything that the tests compare."""

    lives: list[Life] = field(default_factory=list)
    between: list[int] = field(default_factory=list)
    #: prefix -> the requests that begin with it; how often its last block was found
    requests: dict[Content, set[int]] = field(default_factory=dict)
    found: dict[Content, int] = field(default_factory=dict)

    @property
    def evicted(self) -> list[Life]:
        """Those that were evicted."""
        return [life for life in self.lives if life.evicted >= 0]


def derive(model: Model) -> Derived:
    """Walk through all that happened in a model."""
    out = Derived()
    contents = iter(model.contents)
    there: dict[int, Life] = {}
    needed: dict[Content, int] = {}
    gone: dict[Content, Life] = {}
    for event in model.events:
        life = there.get(event.block)
        if event.what == "cache":
            content = next(contents)
            life = there[event.block] = Life(event.block, content, event.request, event.step, event.step)
            out.lives.append(life)
            if content in gone:
                gone.pop(content).again = event.step
        if event.what in ("cache", "hit"):
            assert life is not None
            if life.content in needed:
                out.between.append(event.step - needed[life.content])
            needed[life.content] = life.used = event.step
            out.requests.setdefault(life.content, set()).add(event.request)
            if event.what == "hit":
                life.hits += 1
                out.found[life.content] = out.found.get(life.content, 0) + 1
        elif event.what == "free" and life is not None:
            life.freed = event.step
        elif event.what == "evict":
            assert life is not None
            life.evicted = event.step
            gone[life.content] = there.pop(event.block)
    return out
