"""vLLM's own scheduler, KV cache manager and block pool, without a model: what the model would say is played.

Everything that kvhook's core recorder looks at is vLLM's code of this environment, whatever its release; thousands of
steps take seconds, because nothing is computed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

EOS = 1
#: Arguments of `Driver.add` that belong to the request and not to its sampling parameters.
OF_REQUESTS = ("cache_salt", "priority", "lora_request", "mm_features", "resumable", "client_index")
#: vLLM's name of each kind of KV cache group.
SPECS = {
    "full": "FullAttentionSpec",
    "sliding": "SlidingWindowSpec",
    "mamba": "MambaSpec",
    "cross": "CrossAttentionSpec",
}
#: Tokens that a layer with a sliding window looks back.
WINDOW = 32


def was_preempted(request: Any) -> bool:
    """Whether a request that is looked up has run before. Up to 0.10 vLLM does not count preemptions of a request."""
    return bool(getattr(request, "num_preemptions", request.status.name == "PREEMPTED"))


class Driver:
    """A scheduler and what drives it: requests come, are scheduled, "computed" and updated, step by step.

    Args:
        model: folder of a model, of which only the configuration is read.
        blocks: KV blocks of the pool, the null block included.
        groups: kind of each KV cache group: "full", "sliding", "mamba" or "cross".
        change: changes vLLM's configuration before the scheduler is made.
        cache: gives vLLM's ``KVCacheConfig`` for its configuration, in place of `groups`.
        settings: arguments of vLLM's ``EngineArgs``.
    """

    def __init__(
        self,
        model: str,
        *,
        blocks: int,
        block_size: int = 16,
        seed: int = 0,
        groups: tuple[str, ...] = ("full",),
        change: Callable[[Any], None] = lambda config: None,
        cache: Callable[[Any], Any] | None = None,
        **settings: Any,
    ) -> None:
        config = _config(model, settings)
        config.cache_config.block_size = block_size
        config.cache_config.num_gpu_blocks = blocks
        if hasattr(config.scheduler_config, "async_scheduling"):  # where there is a GPU it is on
            config.scheduler_config.async_scheduling = False
        change(config)
        self.config, self.block_size, self.random = config, block_size, random.Random(seed)
        self.scheduler = self._make_scheduler(cache(config) if cache else self._cache(blocks, groups))
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self._hasher = self._make_hasher()
        self.outputs: list[Any] = []
        self.made = 0
        #: what the worker tells of KV transfers with the next update: "finished_recving", "finished_sending" (ids of
        #: requests) and "invalid_block_ids"
        self.transfers: dict[str, set[Any]] = {}

    def _spec(self, kind: str) -> Any:
        """How the cache of one group is laid out; all take as many bytes for a block."""
        import torch
        from vllm.v1 import kv_cache_interface as interface

        cls = getattr(interface, SPECS[kind])
        return cls(
            **_fitting(
                cls,
                {
                    "block_size": self.block_size,
                    "num_kv_heads": 1,
                    "head_size": 8,
                    "dtype": torch.float32,
                    "use_mla": False,
                    **({"sliding_window": WINDOW} if kind == "sliding" else {}),
                    "shapes": ((16, self.block_size),),
                    "dtypes": (torch.float32,),
                },
            )
        )

    def _cache(self, blocks: int, kinds: tuple[str, ...]) -> Any:
        from vllm.v1 import kv_cache_interface as interface

        groups = [interface.KVCacheGroupSpec([f"layer{i}"], self._spec(kind)) for i, kind in enumerate(kinds)]
        tensors: dict[str, Any] = (
            {"kv_cache_tensors": []} if _takes(interface.KVCacheConfig, "kv_cache_tensors") else {"tensors": {}}
        )
        return interface.KVCacheConfig(num_blocks=blocks, kv_cache_groups=groups, **tensors)

    def _make_scheduler(self, cache: Any) -> Any:
        from vllm.v1.structured_output import StructuredOutputManager

        name = self.config.scheduler_config.scheduler_cls
        cls = _scheduler_class(name)
        more = {"block_size": self.block_size, "hash_block_size": self.block_size}
        return cls(
            vllm_config=self.config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(self.config),
            log_stats=True,
            # another class hands on whatever it is given
            **{n: v for n, v in more.items() if _takes(_scheduler_class(None), n)},
        )

    def _make_hasher(self) -> Any:
        from vllm.v1.core import kv_cache_utils as utils

        if not hasattr(utils, "get_request_block_hasher"):
            return None
        try:
            from vllm.utils.hashing import get_hash_fn_by_name
        except ImportError:
            from vllm.utils import get_hash_fn_by_name  # type: ignore[attr-defined,no-redef,unused-ignore]
        hash_fn = get_hash_fn_by_name("sha256")
        utils.init_none_hash(hash_fn)
        return utils.get_request_block_hasher(self.block_size, hash_fn)

    def add(self, prompt: list[int], max_tokens: int = 8, name: str | None = None, **params: Any) -> Any:
        """A request comes to the scheduler; gives vLLM's object."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        own: dict[str, Any] = {k: params.pop(k) for k in OF_REQUESTS if k in params}
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
        if hasattr(sampling, "update_from_generation_config"):
            sampling.update_from_generation_config({}, EOS)
        arguments: dict[str, Any] = {
            "request_id": name if name is not None else str(self.made),
            "prompt_token_ids": list(prompt),
            "multi_modal_inputs": None,
            "multi_modal_hashes": None,
            "multi_modal_placeholders": None,
            "multi_modal_kwargs": None,
            "sampling_params": sampling,
            "pooling_params": None,
            "eos_token_id": EOS,
            "arrival_time": float(self.made),
            "lora_request": None,
            "block_hasher": self._hasher,
            **own,
        }
        request = Request(**{n: v for n, v in arguments.items() if _takes(Request, n)})
        self.made += 1
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> Any:
        """``Scheduler.schedule``."""
        output = self.scheduler.schedule()
        self.outputs.append(output)
        return output

    def update(self, output: Any) -> Any:
        """``Scheduler.update_from_output``, with one random token for each request that gets one."""
        return self.scheduler.update_from_output(output, self.result_of(output))

    def result_of(self, output: Any) -> Any:
        """What a model runner would give."""
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for request_id in ids:
            request = self.scheduler.requests.get(request_id)
            # after schedule, num_computed_tokens counts what is being computed
            done = request is not None and request.num_computed_tokens >= request.num_tokens
            sampled.append(_Row([self.random.randrange(2, 500)] if done else []))
        made: dict[str, Any] = {
            "req_ids": ids,
            "req_id_to_index": {r: i for i, r in enumerate(ids)},
            "sampled_token_ids": sampled,
            "spec_token_ids": None,
            "logprobs": None,
            "prompt_logprobs_dict": {},
            "pooler_output": [],
        }
        transfers, self.transfers = self.transfers, {}
        if transfers and "kv_connector_output" in _fields(ModelRunnerOutput):
            from vllm.v1.outputs import KVConnectorOutput

            made["kv_connector_output"] = KVConnectorOutput(**transfers)
        else:  # up to 0.10.1
            made |= transfers
        return ModelRunnerOutput(**{n: v for n, v in made.items() if n in _fields(ModelRunnerOutput)})

    def step(self) -> Any:
        """One step; gives what was scheduled."""
        output = self.schedule()
        self.update(output)
        return output

    def run(self, most: int = 100_000) -> Iterator[Any]:
        """Steps until nothing is left to be done."""
        for _ in range(most):
            if not self.scheduler.has_unfinished_requests():
                return
            yield self.step()
        raise AssertionError("the scheduler does not come to an end")

    def abort(self, *names: str) -> None:
        """Requests are aborted from outside."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)


#: Configurations that have been made, by their arguments: making one takes a second.
_CONFIGS: dict[str, Any] = {}


def _config(model: str, settings: dict[str, Any]) -> Any:
    """vLLM's configuration with these arguments, to be changed at will."""
    key = repr((model, sorted(settings.items())))
    if key not in _CONFIGS:
        _CONFIGS[key] = _new_config(model, settings)
    return copy.deepcopy(_CONFIGS[key])


def _new_config(model: str, settings: dict[str, Any]) -> Any:
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"enforce_eager": True, "dtype": "bfloat16", "disable_log_stats": False, **settings}
    # what the CPU platform takes; the scheduler is given the block size that the test wants
    old = vllm.__version__.startswith("0.8.")
    engine_args: Any = EngineArgs(model=model, block_size=16 if old else 32, **arguments)
    if old:
        engine_args._is_v1_supported_oracle = lambda *_: True  # it refuses V1 on a CPU; nothing is computed here
    return engine_args.create_engine_config()


class _Row(list[int]):
    """Tokens of one request: a list, which some releases (0.11.2) take for an array."""

    def tolist(self) -> list[int]:
        return list(self)


def _scheduler_class(name: Any) -> Callable[..., Any]:
    from vllm.v1.core.sched.scheduler import Scheduler

    return name if isinstance(name, type) else Scheduler


@functools.cache
def _takes(call: Any, name: str) -> bool:
    return name in inspect.signature(call).parameters


@functools.cache
def _fields(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _fitting(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in arguments.items() if n in _fields(cls)}
