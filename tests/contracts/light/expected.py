"""Which adapters serve a release at level light, and which columns are live."""

from __future__ import annotations

from kvhook.adapters import LIGHT_ADAPTERS
from tests.contracts.adapters.expected import STEP_COLUMNS
from tests.contracts.core_engines import V1_RELEASES
from tests.contracts.releases import between

BY_NAME = {a.name: a for a in LIGHT_ADAPTERS}

#: first release, last release, the adapters that serve it at level light
SERVED_BY = (
    ("0.6.0", "0.7.3", "v0"),
    ("0.8.0", "0.8.5.post1", "v1-light-0.8 v1-async-light-0.8 v0"),
    ("0.9.0", "0.9.0.1", "v1-light v1-async-light-0.9 v0"),
    ("0.9.1", "0.10.2", "v1-light v1-async-light v0"),
    ("0.11.0", None, "v1-light v1-async-light"),
)
#: what kvhook knows by itself, works out, or counts
OWN = (
    "step engine_index t_start_ns t_end_ns has_scheduler_stats has_iteration_stats level kvhook_ns num_kv_blocks "
    "num_kv_blocks_used num_finished_reqs"
)
#: columns that only level full has
NOT_LIGHT = "scheduler_stats_logged num_corrupted_reqs mm_cache_queries mm_cache_hits"


def expected_adapters(release: str) -> list[str]:
    return next(names.split() for first, last, names in SERVED_BY if between(release, first, last))


def expected_columns(release: str) -> set[str]:
    changes = [names.split() for first, names in STEP_COLUMNS["v1"].items() if between(release, first)]
    return {*OWN.split(), *(name for names in changes for name in names)} - set(NOT_LIGHT.split())


ENGINES = [(r, name) for r in V1_RELEASES for name in expected_adapters(r) if name != "v0"]
