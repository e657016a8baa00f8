"""Random settings and workloads on vLLM's own scheduler, and what is predicted for them from one record.

A seed stands for one scenario: settings, requests in calls that come one after the other, what happens in between, and
caches of other sizes. It is recorded once with vLLM's scheduler, then vLLM's scheduler is run again for each of the
other sizes, and what it finds there is compared with what `kvhook whatif` says. Nothing is computed, so that a scenario
takes a second.

    python -m tests.core.random_caches 0-200      prints what does not agree, and how many sizes were told as exact
"""

from __future__ import annotations

import inspect
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.core.scheduler_here import was_preempted

#: Makes a recording of a driver with these settings.
Make = Callable[..., Any]


class Request(NamedTuple):
    """One prompt of a call."""

    prompt: list[int]
    answer: list[int]
    params: dict[str, Any]


class Call(NamedTuple):
    """Prompts that are sent together, and what happens while they are worked on."""

    requests: list[Request]
    #: "", "reset" (before it), "reset while it runs", "abort", "late" (the second half comes while the first runs)
    event: str


class Scenario(NamedTuple):
    """What a seed stands for."""

    block_size: int
    times: int
    settings: dict[str, Any]
    calls: list[Call]
    #: blocks that can be used, in blocks of ``times * block_size`` tokens, beyond what the longest request needs
    more: list[int]
    recorded_more: int


def scenario(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(seed)
    block_size, times = rng.choice([4, 8, 16, 16, 32]), rng.choice([1, 1, 1, 2, 4])
    places = rng.choice([1, 2, 4, 6, 16, 64])
    settings: dict[str, Any] = {
        "max_num_seqs": places,
        "max_num_batched_tokens": max(rng.choice([16, 48, 96, 200, 1024]), places),
        "max_model_len": 512,
    }
    if rng.random() < 0.1:
        settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": rng.choice([512, 700])}
    if rng.random() < 0.08:
        settings["long_prefill_token_threshold"] = 24
    if rng.random() < 0.08:
        settings["scheduling_policy"] = "priority"
    if rng.random() < 0.1:
        settings["watermark"] = rng.choice([0.02, 0.1])
    calls = _calls(rng, "scheduling_policy" in settings)
    more = [0, rng.randrange(1, 12), rng.randrange(12, 80), 2000]
    return Scenario(block_size, times, settings, calls, more, rng.choice([0, 5, 40, 2000]))


def _calls(rng: random.Random, priorities: bool) -> list[Call]:
    stems = [_tokens(rng, rng.randrange(3, 180)) for _ in range(rng.randrange(1, 5))]
    said: list[list[int]] = []
    calls = []
    strange = rng.random() < 0.3
    for _ in range(rng.choice([1, 1, 3, 6, 12])):
        requests: list[Request] = []
        for _ in range(rng.choice([1, 2, 5, 9, 20])):
            kind = rng.random()
            if kind < 0.15:
                prompt = _tokens(rng, rng.randrange(1, 12))
            elif kind < 0.3 and said:
                prompt = (rng.choice(said) + _tokens(rng, rng.randrange(0, 40)))[:400]
            elif kind < 0.4 and requests:
                prompt = list(rng.choice(requests).prompt)
            elif kind < 0.5:
                prompt = _tokens(rng, rng.randrange(100, 400))
            else:
                prompt = rng.choice(stems) + _tokens(rng, rng.randrange(0, 60))
            params: dict[str, Any] = {}
            if priorities:
                params["priority"] = rng.randrange(3)
            if strange and rng.random() < 0.1:
                params["cache_salt"] = rng.choice("ab")
            if strange and rng.random() < 0.1:
                params["prompt_logprobs"] = 1
            samples = rng.choice([1, 1, 1, 1, 1, 3])
            for _ in range(samples):
                requests.append(Request(prompt, _tokens(rng, rng.randrange(1, rng.choice([2, 8, 60]))), params))
        event = rng.choice(["", "", "", "reset"])
        if strange:
            event = rng.choice(["", "reset", "reset while it runs", "abort", "late"])
        calls.append(Call(requests, event))
        said += [request.prompt + request.answer for request in requests]
    return calls


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, 500) for _ in range(count)]


def longest(told: Scenario) -> int:
    """Tokens of the longest request."""
    return max(len(r.prompt) + len(r.answer) for call in told.calls for r in call.requests)


class Played(NamedTuple):
    """What vLLM's scheduler did."""

    #: tokens that requests found when they were first admitted
    hit_tokens: int
    preemptions: int


def play(recording: Any, told: Scenario) -> Played:
    """Send everything to one scheduler."""
    driver, scheduler = recording.driver, recording.driver.scheduler
    answers: dict[str, list[int]] = {}
    found: dict[str, int] = {}
    original, look_up = driver.result_of, scheduler.kv_cache_manager.get_computed_blocks

    def result_of(output: Any) -> Any:
        result = original(output)
        for name, sampled in zip(result.req_ids, result.sampled_token_ids, strict=True):
            if sampled and name in scheduler.requests:
                sampled[0] = answers[name][scheduler.requests[name].num_output_tokens]
        return result

    def get_computed_blocks(request: Any) -> Any:
        result = look_up(request)
        if not was_preempted(request):
            found[request.request_id] = int(result[1])
        return result

    driver.result_of, scheduler.kv_cache_manager.get_computed_blocks = result_of, get_computed_blocks
    resets = "reset_running_requests" in inspect.signature(scheduler.reset_prefix_cache).parameters
    for number, call in enumerate(told.calls):
        if call.event == "reset":
            assert scheduler.reset_prefix_cache()
        half = len(call.requests) // 2 if call.event == "late" else len(call.requests)
        names = [_add(driver, r, answers) for r in call.requests[:half]]
        rng = random.Random(number)
        for step in range(100_000):
            if not scheduler.has_unfinished_requests() and (step > 3 or half == len(call.requests)):
                break
            if step == 3 and half < len(call.requests):
                names += [_add(driver, r, answers) for r in call.requests[half:]]
                half = len(call.requests)
            if step == 2 and call.event == "abort":
                driver.abort(*[n for n in rng.sample(names, min(2, len(names))) if n in scheduler.requests])
            if step == 2 and call.event == "reset while it runs" and resets:
                scheduler.reset_prefix_cache(reset_running_requests=True)
            driver.step()
        else:
            raise AssertionError("the scheduler does not come to an end")
    driver.result_of, scheduler.kv_cache_manager.get_computed_blocks = original, look_up
    return Played(sum(found.values()), len(recording.read().preemptions()))


def _add(driver: Any, request: Request, answers: dict[str, list[int]]) -> str:
    made = driver.add(request.prompt, max_tokens=len(request.answer), **request.params)
    answers[made.request_id] = request.answer
    name: str = made.request_id
    return name


def _fitting(told: Scenario) -> Scenario:
    """The same without settings that this vLLM does not have."""
    from vllm.engine.arg_utils import EngineArgs

    known = inspect.signature(EngineArgs).parameters
    return told._replace(settings={name: value for name, value in told.settings.items() if name in known})


class Compared(NamedTuple):
    """What came of a seed."""

    wrong: list[str]
    exact: int
    sizes: int


def compare(make: Make, seed: int) -> Compared:
    """Record the scenario of a seed, predict, and run vLLM's scheduler again."""
    from kvhook.whatif.recorded import NotKnown
    from kvhook.whatif.report import what_if
    from kvhook.whatif.runs import run_of, with_block_size

    told = _fitting(scenario(seed))
    least = -(-longest(told) // told.block_size) + 1
    recorded = least + told.recorded_more
    recording = make(ledger=True, blocks=recorded + 1, block_size=told.block_size, **told.settings)
    was = play(recording, told)
    size = told.block_size * told.times
    try:
        requests, run = with_block_size(*run_of(recording.read()), size)
    except NotKnown as error:
        return Compared([f"seed {seed}: {error}"], 0, 0)
    sizes = [-(-longest(told) // size) + 1 + more for more in told.more]
    prediction = what_if(requests, run, blocks=sizes)
    wrong = []
    if told.times == 1 and prediction.hit_tokens != was.hit_tokens:
        wrong.append(f"seed {seed}: the record has {prediction.hit_tokens} and vLLM found {was.hit_tokens}")
    exact = 0
    for one in prediction.sizes:
        other = make(blocks=one.blocks + 1, block_size=size, **told.settings)
        real = play(other, told)
        expected = real.hit_tokens
        exact += one.exact
        if one.exact and (one.hit_tokens, one.num_preemptions) != (expected, real.preemptions):
            wrong.append(
                f"seed {seed}: {one.blocks} blocks: told as exact {one.hit_tokens} and {one.num_preemptions} "
                f"preemptions, vLLM {expected} and {real.preemptions}"
            )
    return Compared(wrong, exact, len(sizes))


class Recordings:
    """Makes recordings of drivers in a folder, and closes them."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder, self.made = model, folder, list[Any]()

    def __call__(self, *, ledger: bool = False, **settings: Any) -> Any:
        from tests.core.conftest import Recording
        from tests.core.scheduler_here import Driver

        rings = self.folder / str(len(self.made))
        rings.mkdir()
        self.made.append(Recording(Driver(self.model, **settings), rings, ledger=ledger))
        return self.made[-1]

    def close(self) -> None:
        """Close their rings."""
        for recording in self.made:
            recording.recorder.stop()
            recording.recorder.close()
            if recording.ledger is not None:
                recording.ledger.close()


def main() -> None:
    """Run the seeds of the command line."""
    from kvhook.demo.model import make_tiny_model, tiny_model_dir

    model = str(make_tiny_model(tiny_model_dir()))
    first, _, last = sys.argv[1].partition("-")
    exact = sizes = 0
    for seed in range(int(first), int(last or first) + 1):
        with tempfile.TemporaryDirectory() as folder:
            recordings = Recordings(model, Path(folder))
            result = compare(recordings, seed)
            recordings.close()
        exact, sizes = exact + result.exact, sizes + result.sizes
        for line in result.wrong:
            print(line, flush=True)
    print(f"{exact} of {sizes} sizes told as exact")


if __name__ == "__main__":
    main()
