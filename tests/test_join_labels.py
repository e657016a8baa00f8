"""Labels of requests, which the front end knows, for the requests of an engine core."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvhook.analysis.join import labels_of

CORE = [("core", "<i8"), ("request_id", "<i8"), ("sample", "<i8")]
FRONT = [("engine", "<i8"), ("request_id", "<i8"), ("sample_index", "<i8"), ("label", "U20")]


def core(*rows: tuple[int, int, int]) -> Any:
    return np.array(list(rows), CORE)


def front(*rows: tuple[int, int, int, str]) -> Any:
    return np.array(list(rows), FRONT)


ROWS = ((0, 1, 0, "b"), (0, 0, 0, "a"), (0, 2, 0, "c"), (0, 2, 1, "d"), (0, 3, 0, ""))


def test_a_request_is_known_by_its_number_and_sample():
    asked = core((0, 0, -1), (0, 1, -1), (0, 2, 1), (0, 2, 0), (0, 3, -1), (0, 9, -1))
    assert labels_of(asked, front(*ROWS)).tolist() == ["a", "b", "d", "c", "", ""]


def test_a_request_without_a_number_has_no_label_here():
    assert labels_of(core((0, -1, -1)), front((0, -1, 0, "a"))).tolist() == [""]


def test_numbers_that_several_engines_count_from_0_tell_nothing():
    assert labels_of(core((0, 0, -1)), front(*ROWS, (1, 0, 0, "x"))).tolist() == [""]
    assert labels_of(core((0, 0, -1), (1, 0, -1)), front(*ROWS)).tolist() == ["", ""]


def test_a_trace_from_before_there_were_labels_has_none():
    old = np.array([(0, 1, 0)], FRONT[:3])
    assert labels_of(core((0, 1, -1)), old).tolist() == [""]
