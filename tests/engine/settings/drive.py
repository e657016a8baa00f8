"""Runs the batches of a case on an engine, and keeps what came back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tests.engine.settings.cases import Act, Ask, Batch, Case


@dataclasses.dataclass
class Sample:
    """One output of one request, as it last came back; `reason` is "" until it is finished."""

    prompt: int
    index: int
    tokens: list[int]
    reason: str
    by_string: bool
    cached: int | None


@dataclasses.dataclass
class Asked:
    """A request that was sent, and its outputs by their index."""

    id: str
    ask: Ask
    prompt: list[int]
    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)
    aborted: bool = False

    @property
    def n(self) -> int:
        return int(self.ask.sampling.get("n", 1))


class Driver:
    """Steps an engine through cases. `around` is entered around each call of `LLMEngine.step`."""

    def __init__(self, llm: Any, around: Callable[[], Any] = contextlib.nullcontext, in_process: bool = True) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.around, self.in_process = around, in_process
        self.calls = 0

    def run(self, case: Case) -> list[Asked]:
        sent: list[list[Asked]] = []
        with self._stepping():
            for batch in case.batches:
                now = [Asked("", ask, self._prompt(ask, sent)) for ask in batch.asks]
                sent.append(now)
                self._batch(batch, now)
        return [one for asked in sent for one in asked]

    def _prompt(self, ask: Ask, sent: list[list[Asked]]) -> list[int]:
        if ask.follows is None:
            return ask.prompt
        before = sent[ask.follows[0]][ask.follows[1]]
        said = before.samples[0].tokens if before.samples else []
        return before.prompt + said + ask.prompt

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        """The engine's step, with what is due before it and what came out of it. It is what `LLM.generate` calls."""
        step = self.engine.step

        def stepped() -> Any:
            self._act()
            self.calls += 1
            with self.around():
                outputs = step()
            for output in outputs:
                self._take(output)
            self._at += 1
            return outputs

        self.engine.step = stepped
        try:
            yield
        finally:
            del self.engine.step

    def _batch(self, batch: Batch, now: list[Asked]) -> None:
        self._now, self._at = now, 0
        self._due: list[Act] = list(batch.acts)
        if batch.through == "generate":
            self._generate(batch)
        else:
            self._steps(batch)

    def _generate(self, batch: Batch) -> None:
        first = self.llm.request_counter.counter
        for i, asked in enumerate(self._now):
            asked.id = str(first + i)
        self.llm.generate(
            [{"prompt_token_ids": asked.prompt} for asked in self._now],
            [sampling(ask.sampling) for ask in batch.asks],
            use_tqdm=False,
            **({"priority": [ask.priority for ask in batch.asks]} if any(ask.priority for ask in batch.asks) else {}),
        )

    def _steps(self, batch: Batch) -> None:
        waiting = sorted(self._now, key=lambda asked: asked.ask.arrives)
        while waiting or self.engine.has_unfinished_requests():
            while waiting and (waiting[0].ask.arrives <= self._at or not self.engine.has_unfinished_requests()):
                self._add(waiting.pop(0), batch)
            self.engine.step()

    def _add(self, asked: Asked, batch: Batch) -> None:
        asked.id = str(next(self.llm.request_counter))
        params = sampling(asked.ask.sampling, batch.cumulative) if asked.ask.sampling else pooling()
        prompt = {"prompt_token_ids": asked.prompt}
        self.engine.add_request(asked.id, prompt, params, priority=asked.ask.priority)

    def _act(self) -> None:
        while self._due and self._due[0].step <= self._at:
            act = self._due.pop(0)
            if act.what == "abort":
                self._abort(self._now[act.ask])
            elif act.what == "reset":
                self.engine.reset_prefix_cache()
            else:
                self.engine.reset_prefix_cache(reset_running_requests=True)

    def _abort(self, asked: Asked) -> None:
        """Abort what is not finished. If nothing is left to do, the core of another process would never answer."""
        others = [one for one in self._now if one is not asked and not one.aborted and not self._done(one)]
        if asked.id and not self._done(asked) and (self.in_process or others):
            self.engine.abort_request([asked.id])
            asked.aborted = True

    def _done(self, asked: Asked) -> bool:
        return len([one for one in asked.samples.values() if one.reason]) == asked.n

    def _take(self, output: Any) -> None:
        (asked,) = (one for one in self._now if one.id == output.request_id)
        completions = getattr(output.outputs, "data", None) is None and output.outputs
        for one in completions or [None]:
            found = (
                Sample(len(asked.prompt), 0, [], "stop", False, None)
                if one is None
                else Sample(
                    len(output.prompt_token_ids),
                    one.index,
                    list(one.token_ids),
                    one.finish_reason or "",
                    isinstance(one.stop_reason, str),
                    output.num_cached_tokens,
                )
            )
            asked.samples[found.index] = found


def sampling(options: dict[str, Any], cumulative: bool = False) -> Any:
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found, unused-ignore]

    kind = RequestOutputKind.CUMULATIVE if cumulative else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**options, output_kind=kind)


def pooling() -> Any:
    from vllm import PoolingParams  # type: ignore[import-not-found, unused-ignore]

    # before 0.10 the engine alone has a task
    return PoolingParams(task="embed") if hasattr(PoolingParams, "task") else PoolingParams()
