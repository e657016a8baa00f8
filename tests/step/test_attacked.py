"""The extension when its surroundings are hostile: attribute getters that do harm, and other interpreters."""

from __future__ import annotations

import pytest

from kvhook import _step
from tests.conftest import Python
from tests.step.attacks import attacks

pytestmark = pytest.mark.skipif(_step.native is None, reason=f"no extension here: {_step.why_not}")


def test_attributes_that_do_harm_end_no_process_and_no_recording():
    assert attacks(150) == []


SUBINTERPRETER = """
import sys
import kvhook._step
try:
    import _interpreters as module  # 3.13
except ImportError:
    import _xxsubinterpreters as module
code = f"import sys; sys.path[:0] = {sys.path!r}; import kvhook._step as s; print(s.native, s.why_not, flush=True)"
print(kvhook._step.native is not None, flush=True)
run = getattr(module, "run_string", None) or module.exec
run(module.create(), code)
"""


def test_in_a_subinterpreter_python_records_and_the_reason_is_told(python: Python):
    here, there = python(SUBINTERPRETER, KVHOOK_PURE="0").stdout.splitlines()
    assert here == "True"
    assert there.startswith("None ")
    assert "subinterpreter" in there
