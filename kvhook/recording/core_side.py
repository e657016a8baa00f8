"""The engine core's side of a session: what is to be recorded there, and what has been."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook import forks
from kvhook.adapters.ids import SHORTER, hash_ids
from kvhook.core.lives import request_key
from kvhook.core.plan import CorePlan
from kvhook.core.process import process
from kvhook.core.recorder import STREAM
from kvhook.discovery.cleaning import HISTORY_PREFIX, name_of_mark
from kvhook.discovery.recovery import recover
from kvhook.errors import KvhookError
from kvhook.faults import Faults
from kvhook.records.core import CoreRecords
from kvhook.records.core_files import files_of, open_cores
from kvhook.records.left import rings_of
from kvhook.ring.layout import CLOSED
from kvhook.ring.place import history_root, process_start
from kvhook.ring.reader import writer_alive
from kvhook.ring.trace_file import header_of

if TYPE_CHECKING:
    from kvhook.analysis.core_report import CoreReport
    from kvhook.options import Options
    from kvhook.recording.running_cores import RunningCores

_OFF = "kvhook was installed with core='off'"
_NOT_ARMED = (
    "kvhook was not installed: a kvhook.StatLogger by itself records what vLLM gives to its loggers, and nothing "
    "inside the engine core"
)
_NONE_YET = "no engine core has been made since kvhook.install()"
_FORKED = (
    "this process was forked off after kvhook.install(): engine cores that live in this very process are not recorded. "
    "kvhook.install() in here records them"
)
_NO_PLUGIN = (
    "vLLM does not load kvhook in engine cores of their own process, because kvhook is not installed as a package: "
    "pip install kvhook (pip install -e . for a checkout). With VLLM_ENABLE_V1_MULTIPROCESSING=0 the engine core is in "
    "this process, and is recorded without that"
)
PLUGIN_OFF = (
    "VLLM_PLUGINS is set and does not name kvhook, so that vLLM does not load it in its processes: add kvhook to it"
)


class CoreSide:
    """What one session has to do with engine cores.

    Args:
        options: of the session.
        ring_dir: where rings go.
    """

    def __init__(self, options: Options, ring_dir: Path) -> None:
        self._options, self._ring_dir = options, ring_dir
        self._made_in = forks.generation
        self._key = secrets.token_bytes(16)
        self._plan: CorePlan | None = None
        self._closed = False
        #: what adds the cores up, as soon as somebody asks
        self._running: dict[str, RunningCores] = {}
        #: whether temporary files are about to be removed
        self.ends = False

    def arm(self) -> None:
        """Record the engine cores that are made from now on, if they are to be recorded."""
        options = self._options
        if options.core == "off":
            return
        trace = options.trace_path
        stem = trace.with_suffix("") if trace is not None else self._folder() / "history"
        plan = CorePlan(
            level=options.core,
            ring_dir=os.path.abspath(self._ring_dir),
            ring_slots=max(64, options.ring_capacity // 2),
            stem=os.path.abspath(stem),
            limit=options.history_bytes,
            session=self.session,
            key=self._key.hex(),
            pid=os.getpid(),
            mark=str(history_root() / name_of_mark(os.getpid(), self.session)),
            hash_ids=options.hashes_ids,
            anonymous=options.anonymous,
            temporary=trace is None,
        )
        self._plan = plan.publish()
        process.arm(self._plan)

    def attach(self, scheduler: Any) -> None:
        """Record an engine core that exists already."""
        if self._plan is not None and not self._closed:
            process.attach(scheduler, self._plan)

    def disarm(self) -> None:
        """Take kvhook out of the engine cores of this process; those in other processes end by themselves."""
        if self._plan is not None and not self._closed and self._made_in == forks.generation:
            self._closed = True
            self._plan.withdraw()
            process.disarm()
            self._complete()

    def _complete(self) -> None:
        """Bring what killed engine cores left in their rings into their files, and remove the rings.

        vLLM kills a core that takes long to end, so that this is nothing unusual.
        """
        assert self._plan is not None
        for path in files_of(Path(self._plan.stem)):
            with contextlib.suppress(KvhookError, OSError):
                header = header_of(path)
                if header.meta.get("session") == self.session and not writer_alive(header):
                    if header.state != CLOSED and not self.ends:
                        recover(path, [self._ring_dir])
                    for ring in rings_of(header, [self._ring_dir]):
                        ring.unlink()

    @property
    def faults(self) -> Faults:
        """What failed with engine cores in this process."""
        return process.faults if self._plan is not None and self._made_in == forks.generation else Faults()

    def records(self, name: str) -> CoreRecords:
        """The engine cores of this session so far."""
        if self._made_in != forks.generation:
            return open_cores([], name, _FORKED)
        if self._plan is None:
            return open_cores([], name, _OFF if self._options.core == "off" else _NOT_ARMED)
        process.drain()
        lost = process.lost(self.session)
        said = "; ".join(f"{where}: {error}" for where, error in process.faults.last_errors.items())
        why = process.absent or (f"nothing of them could be kept ({said})" if any(lost.values()) else _why_none())
        found = open_cores(files_of(Path(self._plan.stem)), name, why, self.session)
        read = {(facts.get("pid"), facts.get("engine")) for facts in found.facts}
        cores = ((number, count) for (number, stream), count in lost.items() if stream == STREAM)
        found.lost_besides = sum(count for number, count in cores if (os.getpid(), number) not in read)
        return found

    def lost(self, cores: CoreRecords) -> int:
        """How many records of engine cores and their ledgers are lost so far; of ledgers in other processes that is
        not known.

        Args:
            cores: the engine cores of this session so far.
        """
        counted = process.lost(self.session) if self._made_in == forks.generation else {}
        # of a core in this process the spool has the newest count
        others = (
            lost
            for facts, lost in zip(cores.facts, cores.lost_of, strict=True)
            if facts.get("pid") != os.getpid() or (facts.get("engine"), STREAM) not in counted
        )
        return sum(counted.values()) + sum(others)

    def account(self) -> CoreReport | None:
        """The account of the engine cores of this session so far; None if there are none."""
        if self._made_in != forks.generation or self._plan is None:
            return None
        from kvhook.recording.running_cores import RunningCores

        process.drain()
        running = self._running.setdefault("it", RunningCores())
        return running.account(files_of(Path(self._plan.stem)), self.session)

    def request_key(self, request_id: str) -> int:
        """The ``request_key`` of a request id in this session."""
        return request_key(self._key, request_id)

    def hash_ids(self) -> None:
        """Have the front end record request ids as the options say, as the engine core does."""
        hash_ids((lambda text: self.request_key(text) >> SHORTER) if self._options.hashes_ids else None)

    def temporary(self) -> list[Path]:
        """The folder of temporary files, if this process has one."""
        return [self._folder()] if self._options.trace is None and self._made_in == forks.generation else []

    @property
    def session(self) -> str:
        """A name for this recording, which its files carry."""
        # made from the key, so that no part of the key itself stands in a file
        return hashlib.blake2b(self._key, digest_size=6).hexdigest()

    def _folder(self) -> Path:
        """Where temporary files go; the first engine core makes it."""
        pid = os.getpid()
        # the session's name is in that of its mark, which everybody can read: whoever knows it could make the folder
        secret = hashlib.blake2b(self._key, digest_size=6, person=b"folder").hexdigest()
        return history_root() / f"{HISTORY_PREFIX}{pid}-{process_start(pid)}-core{secret}"


def why_not_in_own_process() -> str:
    """Why an engine core in a process of its own, if it is spawned, is not recorded; "" if it is."""
    if is_kept_out(os.environ):
        return PLUGIN_OFF
    return "" if _is_a_plugin() else _NO_PLUGIN


@functools.cache
def _is_a_plugin() -> bool:
    """Whether vLLM finds kvhook among its plug-ins. Cached: it reads a file of every installed package, some 30 ms."""
    return any(plugin.name == "kvhook" for plugin in importlib.metadata.entry_points(group="vllm.general_plugins"))


def is_kept_out(environment: Mapping[str, str]) -> bool:
    """Whether ``VLLM_PLUGINS`` keeps vLLM from loading kvhook."""
    wanted = environment.get("VLLM_PLUGINS")
    return wanted is not None and "kvhook" not in wanted.split(",")


def _why_none() -> str:
    """Why no engine core has left anything, as far as can be told from here."""
    why = why_not_in_own_process()
    return f"{_NONE_YET}; or: {why}" if why else _NONE_YET
