"""Trace files as several processes would leave them: those of front ends, and those of engine cores beside them.

A front end is recorded over the vLLM that plays a script; what it says of its process is what the test wants. An engine
core's steps are written as the test gives them.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.adapters.config import engine_facts
from kvhook.core.recorder import CoreRecorder
from kvhook.core.writer import Writer
from kvhook.core_schema import CORE_STEP_FIELDS
from kvhook.recording import owner, recorder
from kvhook.recording.spool import Spool
from tests.standin import fake_vllm, step_stats

#: Blocks of the played engine that can be used.
BLOCKS = 60


def front(path: Path, used: Sequence[int], *, pid: int, parent: int = 1, **about: Any) -> str:
    """Record a front end: blocks in use at the end of each of its steps. `about` are facts about the engine. Gives the
    name of the recording."""
    kvhook.uninstall()
    told = recorder.process_facts()
    with pytest.MonkeyPatch.context() as patch:
        facts = told | {"pid": pid, "parent_pid": parent}
        patch.setattr(recorder, "process_facts", lambda: facts)
        patch.setattr(owner, "engine_facts", lambda adapter, engine: engine_facts(adapter, engine) | about)
        with fake_vllm() as vllm, kvhook.install(ring_dir=path.parent / "rings", trace=path, core="off") as session:
            engine = vllm.engine(num_gpu_blocks=BLOCKS + 1)
            for blocks in used:
                engine.plan.append(step_stats(kv_cache_usage=blocks / BLOCKS, num_running_reqs=1, generated=1))
                engine.step()
            (about,) = session.meta["engines"]
    return str(about["session"])


def core(
    path: Path,
    used: Sequence[int],
    peaks: Sequence[int],
    *,
    pid: int,
    parent: int,
    session: str,
    begun: int = 0,
    **facts: Any,
) -> Path:
    """Record an engine core: blocks in use at the end of each step, and the most inside of it. It has scheduled ten
    tokens in each step.

    Args:
        path: of the trace that is asked for: ``run.kvh``.
        used: blocks.
        peaks: blocks.
        pid: of its process.
        parent: the process that the session was installed in.
        session: name of the recording.
        begun: when its first step began, on the monotonic clock.
        facts: what else it says of itself.
    """
    rings = path.parent / "rings"
    rings.mkdir(exist_ok=True)
    known = {"block_size": 32, "num_kv_blocks": BLOCKS} | facts
    about: Any = types.SimpleNamespace(facts=known, absent={})
    made = CoreRecorder(0, about, rings, 64, _whose(pid, parent, session, facts))
    writer = Writer(made.ring.layout, made.ring.publish, 0, b"k" * 16)
    file = path.with_name(f"{path.stem}.core0-{pid}.kvh")
    spool = Spool(lambda part: iter([file]), None, _fault)
    spool.add(made)
    for number, (blocks, peak) in enumerate(zip(used, peaks, strict=True)):
        at = begun + 1000 * number
        row = {"step": number, "stats_number": number, "num_scheduled_tokens": 10, "num_decode_tokens": 10}
        row |= {"num_kv_blocks": BLOCKS, "num_kv_blocks_used": blocks, "num_kv_blocks_peak": peak}
        row |= {"t_schedule_ns": at, "t_scheduled_ns": at + 1, "t_update_ns": at + 2, "t_end_ns": at + 3}
        writer.step(tuple(row.get(field.name, 0) for field in CORE_STEP_FIELDS))
    spool.close()
    made.close()
    made.ring.path.unlink()
    return file


def _whose(pid: int, parent: int, session: str, facts: dict[str, Any]) -> dict[str, Any]:
    usual = {"own_process": True, "num_front_ends": 1, "core_level": "steps"}
    return usual | facts | {"pid": pid, "parent": parent, "session": session}


def _fault(where: str, error: BaseException, then: str) -> None:
    raise error
