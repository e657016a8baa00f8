"""A scheduler that writes down what it schedules and what its block pool holds: in whatever process the core lives.

It also waits until all requests of a call of ``generate`` have arrived, so that a core in a process of its own
schedules what one in the front end's process does, however long the requests take to get there. Two variables tell it
of both: ``NOTED`` is the file, ``WAVES`` is how many requests come together, call by call: ``1,8,40``.
"""

from __future__ import annotations

import json
import os
import re
from itertools import accumulate
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler  # type: ignore[import-not-found, unused-ignore]


def name_of(request_id: str) -> str:
    """A request's id without the random digits that vLLM has appended since 0.14."""
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)


class NotingScheduler(Scheduler):  # type: ignore[misc, unused-ignore]
    """See above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._came = 0
        #: the batches that wait for their result, and what was seen of them
        self._rows: list[tuple[Any, dict[str, Any]]] = []
        self._gathered = {0, *accumulate(int(n) for n in os.environ["WAVES"].split(","))}
        self._notes = open(os.environ["NOTED"], "a", encoding="utf-8")  # noqa: SIM115

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        self._came += 1

    def has_unfinished_requests(self) -> bool:
        return self._came in self._gathered and bool(super().has_unfinished_requests())

    def has_requests(self) -> bool:
        return self._came in self._gathered and bool(super().has_requests())

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        before = {request.request_id for request in self.running}
        output = super().schedule(*args, **kwargs)
        after = {request.request_id for request in self.running}
        blocks = self._blocks()
        row = {
            "tokens": {name_of(name): count for name, count in output.num_scheduled_tokens.items()},
            "new": [[name_of(new.req_id), list(new.block_ids)] for new in output.scheduled_new_reqs],
            "finished": sorted(map(name_of, output.finished_req_ids)),
            "preempted": sorted(map(name_of, before - after)),
            "num_running_reqs": len(after),
            "num_kv_blocks_peak": sum(1 for b in blocks if b.ref_cnt),
            "num_kv_blocks_cached": sum(1 for b in blocks if not b.ref_cnt and b.block_hash is not None),
            "num_kv_blocks_empty": sum(1 for b in blocks if not b.ref_cnt and b.block_hash is None),
        }
        self._rows.append((output, row))
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().update_from_output(scheduler_output, *args, **kwargs)
        (row,) = (row for output, row in self._rows if output is scheduler_output)
        self._rows = [one for one in self._rows if one[0] is not scheduler_output]
        row["num_kv_blocks_used"] = sum(1 for b in self._blocks() if b.ref_cnt)
        self._notes.write(json.dumps(row) + "\n")
        self._notes.flush()
        return result

    def _blocks(self) -> list[Any]:
        pool = self.kv_cache_manager.block_pool
        return [block for block in pool.blocks if block is not getattr(pool, "null_block", None)]
