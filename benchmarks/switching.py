"""What an engine in this process is to have on: vLLM's stats, kvhook, a poller. Two ways of changing that.

The engine is built with its stats on: what is on can be switched off, the other way round it cannot.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvhook
from kvhook import _step, hooks
from kvhook.adapters.core import read_core
from kvhook.core.ledger import LedgerRing
from kvhook.core.recorder import CoreRecorder
from kvhook.hooks.patching import restore
from kvhook.hooks.quiet import do_nothing, quiet_manager
from kvhook.hooks.registry import registry
from kvhook.recording.installation import set_current_session

#: Arm -> whether vLLM's stats are on in the engine, the level at which kvhook records, whether get_metrics() is polled.
ARMS = {
    "off": ("off", None, False),
    "noise": ("off", None, False),
    "core": ("core", None, False),
    "light": ("core", "light", False),
    "made": ("quiet", None, False),
    "full": ("quiet", "full", False),
    "stats": ("on", None, False),
    "both": ("on", "full", False),
    "poll": ("on", None, True),
    "steps": ("off", None, False),
    "blocks": ("off", None, False),
    "steps_python": ("off", None, False),
    "blocks_python": ("off", None, False),
    "core_spared": ("core", None, False),
    "made_spared": ("quiet", None, False),
    "light_python": ("core", "light", False),
    "full_python": ("quiet", "full", False),
}
#: Arm -> how much is recorded inside the engine core, a value of kvhook.options.CORE_LEVELS; the others record nothing.
INSIDE = {"steps": "steps", "blocks": "blocks", "steps_python": "steps", "blocks_python": "blocks"}
#: Arm -> what of vLLM's own work on stats is left out, a method of the scheduler or the output processor: the most that
#: could be spared there.
SPARED = {"core_spared": ("scheduler", "make_stats"), "made_spared": ("processor", "_update_stats_from_output")}
#: Arms that record on Python's step path although the extension is there.
IN_PYTHON = ("light_python", "full_python", "steps_python", "blocks_python")
#: What kvhook's hooks know, all of it for one engine and one session.
TABLES: tuple[dict[Any, Any], ...] = (registry.steps, registry.records, registry.engines, registry.patched)


def set_stats(engine: Any, stats: str, manager: Any) -> None:
    """Let an engine make its stats as an arm wants them: "off", in the "core" alone, "quiet" or "on"."""
    in_front = stats in ("quiet", "on")
    engine.log_stats = engine.output_processor.lora_states.log_stats = in_front
    scheduler = engine.engine_core.engine_core.scheduler
    scheduler.log_stats = scheduler.kv_cache_manager.log_stats = stats != "off"
    engine.logger_manager = manager


def manager_for(stats: str, vllms: Any) -> Any:
    """The stat logger manager of an arm; `vllms` is vLLM's own."""
    return {"on": vllms, "quiet": quiet_manager(type(vllms))}.get(stats)


class Switch:
    """Puts one engine into the state of an arm: kvhook is installed for it, and uninstalled again."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.vllms = self.engine.logger_manager
        self.session: Any = None

    def to(self, arm: str) -> None:
        """Switch stats and kvhook as the arm wants them."""
        stats, level, _ = ARMS[arm]
        set_stats(self.engine, stats, manager_for(stats, self.vllms))
        self.engine.output_processor.log_stats = self.engine.log_stats
        if level:
            self.session = kvhook.install(level=level)
            hooks.watch(self.engine, stats_were_on=stats == "on")

    def back(self) -> None:
        """Take kvhook out again."""
        kvhook.uninstall()


class InCore:
    """What is recorded inside the engine core, put in and taken out.

    It is made once. What happens to the core while it is out is not known to it, so that its numbers are not right
    afterwards; what it does in a step is the same.
    """

    def __init__(self, scheduler: Any, level: str, native: Any) -> None:
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        core = read_core(scheduler)
        there, _step.native = _step.native, native
        self.recorder = CoreRecorder(0, core, place, 4096, {})
        self.ledger = LedgerRing(0, place, 4096, {"serial": 0}) if level == "blocks" else None
        self.errors: list[BaseException] = []
        self.recorder.follow(core, self.errors.append, self.ledger)
        _step.native = there
        self.account: Any = self.recorder.account()
        self.account.stop()

    def put_in(self) -> None:
        """The core is recorded."""
        self.account.tap()

    def out(self) -> None:
        """It is not."""
        self.account.stop()

    def close(self) -> None:
        """It is not recorded again."""
        if self.errors:
            raise self.errors[0]
        self.recorder.close()
        if self.ledger is not None:
            self.ledger.close()
        self.folder.cleanup()


class Plug:
    """What one arm wants of the engine, put in and taken out between two steps.

    For arms with kvhook a session is made once, and what it has put into vLLM is taken out and put back as a whole.
    """

    def __init__(self, llm: Any, arm: str, make_poller: Callable[[Any], Any]) -> None:
        self.engine = llm.llm_engine
        self.processor = self.engine.output_processor
        self.client = self.engine.engine_core
        self.stats, self.level, polled = ARMS[arm]
        self.native = None if arm in IN_PYTHON else _step.native
        self.poller = make_poller(self.engine) if polled else None
        self.manager = None
        self.session: Any = None
        self.patches: list[Any] = []
        self.tables: list[dict[Any, Any]] = []
        self.replaced: list[tuple[Any, str, Any]] = []
        owner, self.spared = SPARED.get(arm, ("processor", ""))
        self.sparing = self.client.engine_core.scheduler if owner == "scheduler" else self.processor
        scheduler = self.client.engine_core.scheduler
        self.inside = InCore(scheduler, INSIDE[arm], self.native) if arm in INSIDE else None

    def make(self, vllms: Any) -> None:
        """Make the session of this arm. `vllms` is vLLM's own stat logger manager."""
        self.manager = manager_for(self.stats, vllms)
        set_stats(self.engine, self.stats, self.manager)
        if self.level:
            there, _step.native = _step.native, self.native
            self.session = kvhook.install(level=self.level)
            hooks.watch(self.engine, stats_were_on=self.stats == "on")
            _step.native = there
            self.owner = registry.owner
            self.patches = list(registry.patches)
            self.tables = [dict(table) for table in TABLES]
            of_engine = ((self.client, "get_output"), (self.processor, "process_outputs"))
            self.replaced = [(o, n, vars(o)[n]) for o, n in of_engine if n in vars(o)]
        self.out()

    def put_in(self) -> None:
        """The engine is as this arm wants it."""
        set_stats(self.engine, self.stats, self.manager)
        for patch in self.patches:
            setattr(patch.parent, patch.attribute, patch.wrapper)
        for table, content in zip(TABLES, self.tables, strict=False):
            table.update(content)
        for owner, name, function in self.replaced:
            setattr(owner, name, function)
        if self.level:
            registry.owner = self.owner
        if self.spared:
            setattr(self.sparing, self.spared, do_nothing)
        if self.inside:
            self.inside.put_in()
        if self.poller:
            self.poller.begin()

    def out(self) -> None:
        """Nothing of this arm is in the engine any more."""
        if self.poller:
            self.poller.end()
        if self.inside:
            self.inside.out()
        if self.spared:
            vars(self.sparing).pop(self.spared, None)
        for patch in reversed(self.patches):
            restore(patch)
        for table, content in zip(TABLES, self.tables, strict=False):
            for key in content:
                content[key] = table.pop(key)
        for owner in (self.client, self.processor):
            for name in ("get_output", "process_outputs"):
                vars(owner).pop(name, None)
        registry.patches.clear()
        registry.owner = None
        set_current_session(None)

    def close(self) -> None:
        """The session is closed; its data can still be read."""
        if self.session:
            self.session.close()
        if self.poller:
            self.poller.close()
        if self.inside:
            self.inside.close()
