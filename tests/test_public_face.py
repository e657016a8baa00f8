"""``import kvhook`` alone: what it offers and what it does not load."""

from __future__ import annotations

import pytest

import kvhook
from tests.conftest import Python


def test_import_loads_no_vllm_no_torch_no_numpy_and_nothing_else_of_kvhook(python: Python):
    code = "import sys; before = set(sys.modules); import kvhook; print(*set(sys.modules) - before)"
    loaded = python(code).stdout.split()
    assert "kvhook" in loaded
    assert not {m for m in loaded if m.partition(".")[0] in ("vllm", "torch", "numpy", "wrapt")}
    assert [m for m in loaded if m.startswith("kvhook.")] == []


def test_install_loads_no_vllm_no_torch(python: Python):
    code = "import sys, kvhook; kvhook.install(); print(*sorted({'vllm', 'torch'} & set(sys.modules)))"
    assert python(code).stdout.split() == []


def test_every_name_of_the_public_face_is_there():
    for name in kvhook.__all__:
        assert getattr(kvhook, name) is not None
    assert set(kvhook.__all__) <= set(dir(kvhook))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'instal'"):
        kvhook.instal  # noqa: B018


def test_version_has_three_numbers():
    assert [part.isdecimal() for part in kvhook.__version__.split(".")] == [True, True, True]
