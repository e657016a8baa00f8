"""The methods that make engine events, against those that vLLM's engines have, release by release."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest

from kvhook.adapters.engine_events import ANY, METHODS, describe
from kvhook.records.engine_events import CODES
from tests.contracts.extract_engine_events import FACTS

RELEASES: dict[str, dict[str, dict[str, str]]] = json.loads(FACTS.read_text(encoding="utf-8"))
#: A call of each method with what its argument may be, and the detail that is told of it.
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "sleep": ({"level": 2}, "level 2"),
    "wake_up": ({"tags": ["weights", "kv_cache"]}, "tags weights kv_cache"),
    "add_lora": ({"lora_request": types.SimpleNamespace(lora_name="french", lora_path="/secret")}, "french"),
    "remove_lora": ({"lora_id": 3}, "lora_id 3"),
    "pin_lora": ({"lora_id": 3}, "lora_id 3"),
}


@pytest.mark.parametrize("release", RELEASES)
def test_what_is_told_of_a_call_is_an_argument_of_that_release(release: str):
    for place, methods in RELEASES[release].items():
        for method, arguments in methods.items():
            names = arguments.split()
            scope: dict[str, Any] = {}
            exec(f"def function({', '.join(f'{name}=None' for name in names[1:])}): ...", scope)
            given, detail = CALLS.get(method, ({}, ""))
            if release == "0.7.3" and method == "wake_up":
                given, detail = {}, ""  # it knew no tags
            if method == ANY:
                told = describe(scope["function"], method, ("reload_weights",), {})
                assert told is not None, place
                assert (told.kind, told.detail) == ("weights_updated", "reload_weights"), place
                continue
            told = describe(scope["function"], method, (), given)
            assert told is not None, place
            assert (told.kind, told.detail) == (METHODS[method].kind, detail), place
            assert told.kind in CODES


@pytest.mark.parametrize("release", [r for r in RELEASES if int(r.split(".")[1]) >= 8])
def test_what_trainers_call_is_there_since_0_8(release: str):
    for place, methods in RELEASES[release].items():
        if ".v1." in place:
            assert {"sleep", "wake_up", "reset_prefix_cache", "add_lora", "remove_lora", ANY} <= methods.keys(), place


def test_every_method_is_one_of_some_release():
    known = {method for release in RELEASES.values() for methods in release.values() for method in methods}
    assert {*METHODS, ANY} == known
