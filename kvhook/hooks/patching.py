"""Which names of vLLM are replaced, and how they are put back.

The adapters' tables say which names (`kvhook.adapters`), `kvhook.hooks.wrappers` says by what. This module never
imports vLLM: it patches modules that are loaded, and waits with wrapt's post-import hooks for those that are not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import wrapt

from kvhook.adapters import BY_LEVEL, NEWEST
from kvhook.adapters.calls import MODULE as CALLS
from kvhook.adapters.fit import choose, is_there
from kvhook.adapters.settings import Settings
from kvhook.adapters.table import Adapter, Target, lookup, release, vllm_version
from kvhook.faults import USERS
from kvhook.hooks.calls import patch_calls
from kvhook.hooks.engine_events import patch_engine_events
from kvhook.hooks.engines import forget
from kvhook.hooks.registry import Owner, Patch, PatchedAdapter, registry
from kvhook.hooks.wrappers import stoppable, stoppable_step


def arm(owner: Owner, level: str = "full") -> None:
    """Patch vLLM for this owner: at once where it is imported, else as soon as it is. Never imports it.

    Args:
        owner: is informed about new engines.
        level: how much is to be recorded, a key of `kvhook.adapters.BY_LEVEL`.
    """
    registry.begin(owner, level)
    for trigger in dict.fromkeys([*(a.trigger for a in BY_LEVEL[level]), CALLS]):
        if trigger in sys.modules:
            registry.imported.add(trigger)
        elif trigger not in registry.imports_awaited:
            # an import hook cannot be removed: it is registered once, and looks for an owner when it is called
            registry.imports_awaited.add(trigger)
            wrapt.register_post_import_hook(_on_import, trigger)
    _patch_what_is_there()


def disarm() -> None:
    """Put back what was there. A name that somebody else has wrapped meanwhile keeps our wrapper below theirs, where
    it does nothing any more."""
    owner, registry.owner = registry.owner, None
    for engine_id in [*registry.engines, *registry.inherited]:
        try:
            forget(engine_id)
        except USERS:
            raise
        except BaseException as error:
            if owner is not None:
                owner.fault("taking kvhook out of an engine", error, "what is left there does nothing")
    registry.clear()
    unpatch()


def unpatch() -> None:
    """Put the replaced names back. Where somebody else has put something over our wrapper, or in its place, theirs
    stays, and ours does nothing any more, should they still call it."""
    for patch in reversed(registry.patches):
        if not restore(patch):
            patch.stop()
    registry.patches.clear()
    registry.patched.clear()


def patched() -> dict[str, dict[str, Target]]:
    """Name of an adapter -> its targets that are patched at this moment, by role."""
    return {name: {t.role: t for t in p.targets if t.role} for name, p in registry.patched.items()}


def _on_import(module: Any) -> None:
    """A module that was waited for has been imported."""
    registry.imports_awaited.discard(module.__name__)
    registry.imported.add(module.__name__)
    _patch_what_is_there()


def _patch_what_is_there() -> None:
    """Patch the engines of the vLLM that is loaded, if there is an owner; of each family all or none."""
    owner = registry.owner
    if owner is None:
        return
    try:
        adapters = BY_LEVEL[registry.level]
        for family in dict.fromkeys(a.family for a in adapters):
            of_family = [a for a in adapters if a.family == family and a.trigger in registry.imported]
            _patch_family([a for a in of_family if is_there(a)])
        if registry.patched and CALLS in registry.imported:
            patch_calls()
    except USERS:
        raise
    except BaseException as error:
        owner.fault("patching vLLM", error, "nothing is recorded")


#: Engine cores have hooks and adapters of their own, which may fit although those of the front end do not.
_CORES = ". Engine cores are recorded separately: session.cores() says whether they are"


def _patch_family(adapters: list[Adapter]) -> None:
    """Patch each engine class with the first adapter that fits; nothing at all if one of them has none."""
    chosen = [choose(engine, registry.level) for engine in dict.fromkeys(a.engine for a in adapters)]
    complaints = [text for _, _, missing in chosen for text in missing]
    if complaints:
        registry.warn_once(
            "kvhook: nothing is patched in vLLM's front end, and its steps are not recorded: vLLM %s is not one this "
            "kvhook knows (%s). A newer kvhook may know it: pip install -U kvhook%s",
            vllm_version() or "(unknown version)",
            "; ".join(dict.fromkeys(complaints)),
            _CORES if adapters[0].family == "v1" else "",
        )
        return
    for adapter, found, _ in chosen:
        if adapter.name not in registry.patched:
            _patch(adapter, found)


def _maker(role: str) -> Callable[[Any], tuple[Any, Callable[[], None]]]:
    """What makes the wrapper for a role, and what stops it."""
    if role == "settings":
        return _settings
    return stoppable_step if role == "engine_step" else functools.partial(stoppable, role)


def _settings(envs: Any) -> tuple[Any, Callable[[], None]]:
    made = Settings(envs)
    return made, made.forget


def _patch(adapter: Adapter, found: tuple[Target, ...]) -> None:
    """Patch every target, or none. What is patched already, for another engine, stays."""
    new: list[Patch] = []
    engine = lookup(adapter.engine)
    try:
        for target in found:
            module, _, name = target.path.partition(":")
            parent, attribute, original = wrapt.resolve_path(sys.modules[module], name)
            if not target.role or any(p.parent is parent and p.attribute == attribute for p in registry.patches):
                continue
            make = _maker(target.role)
            wrapper, stop = make(original)
            inherited = attribute not in vars(parent)
            setattr(parent, attribute, wrapper)
            new.append(Patch(parent, attribute, original, wrapper, inherited, stop, make))
    except BaseException:
        for patch in reversed(new):
            restore(patch)
        raise
    registry.patches.extend(new)
    registry.patched[adapter.name] = PatchedAdapter(adapter, engine, found)
    patch_engine_events(engine)
    if release(vllm_version()) > release(NEWEST):
        registry.warn_once(
            "kvhook: vLLM %s is newer than this kvhook knows (%s). It is recorded as far as it is like that one; what "
            "is missing is in session.meta['absent']",
            vllm_version(),
            NEWEST,
        )


def restore(patch: Patch) -> bool:
    """Put the original back; False if somebody else's wrapper is over ours."""
    if vars(patch.parent).get(patch.attribute) is not patch.wrapper:
        return False
    if patch.inherited:
        delattr(patch.parent, patch.attribute)
    else:
        setattr(patch.parent, patch.attribute, patch.original)
    return True
