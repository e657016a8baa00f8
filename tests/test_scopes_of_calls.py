"""Every call of vLLM's LLM is a scope, which tells its prompts and settings."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest

import kvhook
from tests.standin import fake_vllm, looked_up, play

pytestmark = pytest.mark.usefixtures("fresh")


class LLM:
    """In the place of vLLM's: its methods run an engine of the stand-in."""

    def __init__(self, engine: Any) -> None:
        self.llm_engine = engine

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> str:
        play(self.llm_engine, *[looked_up(10, 5)] * 2)
        return "outputs"

    def chat(self, messages: Any, sampling_params: Any = None) -> str:
        return self.generate([str(m) for m in messages], sampling_params)

    def embed(self, prompts: Any, **kwargs: Any) -> None:
        raise ValueError("no such model")


class SamplingParams:
    def __init__(self, n: int = 1, temperature: float = 1.0, max_tokens: int | None = 16, stop: str = "") -> None:
        self.n, self.temperature, self.max_tokens, self.stop = n, temperature, max_tokens, stop


@contextlib.contextmanager
def vllm_with_llm() -> Iterator[tuple[Any, Any]]:
    """The stand-in with a class ``LLM``."""
    module: Any = types.ModuleType("vllm.entrypoints.llm")
    module.LLM = type("LLM", (LLM,), {})
    with fake_vllm(change=lambda modules: modules.update({module.__name__: module})) as vllm:
        yield vllm, module.LLM


def test_every_call_of_llm_is_a_scope_with_its_prompts_and_settings():
    with vllm_with_llm() as (vllm, llm_class), kvhook.install() as session:
        one, two = vllm.engine(), vllm.engine()
        llm = llm_class(one)
        params = SamplingParams(n=2, max_tokens=4, stop="secret")
        assert llm.generate(["a", "b", "c"], params) == "outputs"
        llm.generate([5, 6, 7])
        llm.chat([{"role": "user"}], sampling_params=[params, params])
        with pytest.raises(ValueError, match="no such model"):
            llm.embed("text")
        llm_class(two).generate(prompts="one")
        told = [(s.name, s.num_prompts, s.params, s.engines) for s in session.scopes]
        assert told == [
            ("generate-0", 3, "n=2, max_tokens=4", (0,)),
            ("generate-1", 1, "", (0,)),
            ("chat-0", 1, "n=2, max_tokens=4 (the first of 2)", (0,)),
            ("embed-0", 1, "", (0,)),
            ("generate-2", 1, "", (1,)),
        ]
        assert session.summary(scope="generate").steps == 6
        assert session.summary(scope="chat-0").prefix_cache_hits == 10
        assert session.summary(scope="embed-0").steps == 0
        assert "secret" not in str(session.meta)
    assert session.faults == {}


def test_calls_are_put_back_and_nothing_is_left():
    with vllm_with_llm() as (_, llm_class):
        before = dict(vars(llm_class))
        with kvhook.install():
            assert "generate" in vars(llm_class)
        assert dict(vars(llm_class)) == before


def test_a_call_whose_arguments_are_wrong_raises_what_it_raises_without_kvhook():
    with vllm_with_llm() as (vllm, llm_class), kvhook.install() as session:
        with pytest.raises(TypeError, match="nonsense"):
            llm_class(vllm.engine()).generate(nonsense=1)
        assert session.faults == {}
        assert [s.num_prompts for s in session.scopes] == [-1]
