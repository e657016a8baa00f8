"""Reads and writes traces of requests as JSON lines, in the form that the Mooncake project's traces have.

A line is a request: ``timestamp`` in milliseconds, ``input_length`` and ``output_length`` in tokens, and ``hash_ids``,
a number for each block of the prompt together with all blocks before it. The last block counts too if it is not full;
nobody else has its number here. AIPerf, Dynamo's mocker and GuideLLM read such files. How many tokens a block has
stands nowhere in them: it follows from the lengths, as far as these tell.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvhook.errors import TraceFormatError
from kvhook.facts import printable
from kvhook.records.text_lines import lines_of
from kvhook.ring.place import open_regular
from kvhook.whatif.requests import BlockRequests, requests_from

try:
    import orjson
except ImportError:
    _loads: Callable[[bytes], Any] = json.loads
else:
    _loads = orjson.loads

#: Names that other writers have for the same.
_ALIASES = {"input_tokens": "input_length", "output_tokens": "output_length", "created_time": "timestamp"}
#: What else is written of a request where it is known. The name of a recording is not called ``session_id``: AIPerf
#: takes requests with the same one for the turns of a conversation, and each for what comes on top of the turns before.
NAMES = ("session", "label")
#: How such files are called.
REQUEST_SUFFIXES = (".jsonl", ".json")
#: Tokens of a block in the Mooncake project's own traces.
BLOCK_SIZE = 512
#: Milliseconds: in nanoseconds they are a number of 63 bits.
_LONGEST_MS = 9e12


def lines(requests: BlockRequests) -> Iterator[str]:
    """The requests as lines, in the order in which they came."""
    size, ids, offsets = requests.block_size, requests.ids, requests.offsets.tolist()
    prompt, generated = requests.num_prompt_tokens.tolist(), requests.num_generation_tokens.tolist()
    order = np.lexsort((requests.arrival, requests.t_ns)).tolist()
    begin = int(requests.t_ns.min()) if len(requests) else 0
    # numbers are given out as they come, so that they are small and the file compresses well
    numbers: dict[int, int] = {}
    following = 0
    for i in order:
        chain = []
        for block in ids[offsets[i] : offsets[i] + prompt[i] // size].tolist():
            if block not in numbers:
                numbers[block] = following
                following += 1
            chain.append(numbers[block])
        if prompt[i] % size:
            chain.append(following)
            following += 1
        line = {
            "timestamp": (int(requests.t_ns[i]) - begin) // 1_000_000,
            "input_length": prompt[i],
            "output_length": generated[i],
            "hash_ids": chain,
        }
        line |= {name: values[i] for name, values in requests.names.items() if values[i] is not None}
        yield json.dumps(line)


def looks_like_requests(path: Path) -> bool:
    """Whether a file is such a trace, by its first line."""
    try:
        with open(open_regular(path), "rb") as file:
            first = _loads(file.readline(1 << 24) or b"null")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "hash_ids" in _named(first) and "input_length" in _named(first)


def read(path: Path, block_size: int | None = None) -> BlockRequests:
    """The requests of a file.

    Args:
        path: the file.
        block_size: tokens of a block, if that is known.

    Raises:
        TraceFormatError: it is not such a file, or the block size does not go with its lengths.
        OSError: it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        return _parse(lines_of(file, path), str(path), block_size)


def _parse(file: Iterable[bytes], name: str, block_size: int | None) -> BlockRequests:
    flat, counts, inputs, outputs, times = array("q"), array("q"), array("q"), array("q"), array("d")
    more: dict[str, list[Any]] = {name: [] for name in NAMES}
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = _named(_loads(line))
            chain = row["hash_ids"]
            flat.extend(chain)
            counts.append(len(chain))
            inputs.append(int(row["input_length"]))
            generated, at = row.get("output_length"), row.get("timestamp")
            outputs.append(1 if generated is None else int(generated) or 1)
            times.append(0.0 if at is None else float(at))
            if min(inputs[-1], outputs[-1]) < 0 or not abs(times[-1]) < _LONGEST_MS:
                raise ValueError("a length or a time that cannot be")
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
            raise TraceFormatError(
                f"{name}, line {number}: not a request with input_length and hash_ids: {printable(repr(error))[:300]}"
            ) from None
        for key, values in more.items():
            values.append(row.get(key))
    if not counts:
        raise TraceFormatError(f"{name}: no requests")
    length, count = np.frombuffer(inputs, np.int64), np.frombuffer(counts, np.int64)
    size = block_size or _block_size(length, count, name)
    full = length // size
    wrong = np.flatnonzero((count < full) | (count > -(-length // size)))
    if len(wrong):
        at = int(wrong[0])
        raise TraceFormatError(
            f"{name}: request {at + 1} has {inputs[at]} tokens and {count[at]} blocks, which does not go with "
            f"blocks of {size} tokens: say how long a block is"
        )
    ids = np.frombuffer(flat, np.int64)
    within = np.arange(len(ids)) - np.repeat(np.cumsum(count) - count, count)
    order = np.argsort(np.frombuffer(times), kind="stable")
    return (
        requests_from(
            size,
            ids[within < np.repeat(full, count)],
            full,
            length,
            np.frombuffer(outputs, np.int64),
            t_ns=(np.frombuffer(times) * 1e6).astype(np.int64),
            names={key: values for key, values in more.items() if any(values)},
        )
        .select(order)
        .in_this_order()
        .checked()
    )


def _named(row: Any) -> dict[str, Any]:
    return {_ALIASES.get(name, name): value for name, value in row.items()}


def _block_size(length: Any, count: Any, name: str) -> int:
    """Tokens of a block: with the last one, full or not, each request has as many blocks as it needs.

    Raises:
        TraceFormatError: no size goes with all lengths.
    """
    some = count > 0
    least = int((-(-length[some] // count[some])).max(initial=1))
    several = count > 1
    most = int(((length[several] - 1) // (count[several] - 1)).min(initial=1 << 30))
    if least > most:
        raise TraceFormatError(
            f"{name}: the numbers of blocks and tokens go together with no block size: say how long a block is"
        )
    if least <= BLOCK_SIZE <= most:
        return BLOCK_SIZE
    for unit in (32, 16, 8, 4, 2, 1):
        fits = [size for size in (1 << n for n in range(20)) if least <= size <= most and not size % unit]
        if fits:
            return fits[0]
        if (first := -(-least // unit) * unit) <= most:
            return first
    return least
