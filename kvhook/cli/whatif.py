"""``kvhook whatif``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.cli.common import file_name

if TYPE_CHECKING:
    from kvhook.whatif.report import Run, WhatIf
    from kvhook.whatif.requests import BlockRequests


#: The largest number that an option takes: blocks of this many tokens, or this many blocks, nobody has.
MOST = 10**12
#: The largest number of engines: for each request the router looks at each of them.
MOST_REPLICAS = 4096


class WhatIfCommand:
    """What a larger or smaller KV cache would have found.

    TRACE is a run that was recorded with kvhook.install(trace=..., core="blocks"), or a file of requests with block
    hashes (see kvhook export --format mooncake). Sizes with a ~ are estimates; without it a real engine with that many
    blocks finds exactly as much.

    Example:
      $ kvhook whatif run.kvh --blocks 30,60,120
      run.kvh: 60 requests, 8,846 tokens looked up, blocks of 32 tokens
        this run        39.8 % found: 3,520 tokens, 1.2 s of prefill
        ...
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "traces",
            metavar="TRACE",
            nargs="+",
            type=file_name,
            help="a .kvh trace, a folder of them, or requests as .jsonl",
        )
        parser.add_argument(
            "--blocks", type=_numbers, metavar="N,N", default=(), help="sizes of the cache: blocks that can be used"
        )
        parser.add_argument(
            "--block-size", type=_number, metavar="N", help="tokens of a block: a multiple of the run's own"
        )
        parser.add_argument("--reorder", action="store_true", help="also in longest-prefix-first order")
        parser.add_argument(
            "--replicas",
            type=_replicas,
            metavar="N,N",
            default=(),
            help=f"also with this many engines behind a router, up to {MOST_REPLICAS:,}",
        )
        parser.add_argument(
            "--max-num-seqs", type=_number, metavar="N", help="most running requests, instead of the run's"
        )
        parser.add_argument(
            "--plot", type=file_name, metavar="FILE", help="draw the curve (.png, .svg); needs matplotlib"
        )
        parser.add_argument("--force", action="store_true", help="replace the picture if it exists")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a page")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        from kvhook.cli.pages import check_out, failed_to_write
        from kvhook.text.whatif import as_text
        from kvhook.whatif.report import what_if

        if args.plot is not None:
            check_out(args.plot, overwrite=args.force)
        requests, run = _load(args)
        found = what_if(requests, run, blocks=args.blocks, reorder=args.reorder, replicas=args.replicas)
        if args.plot is not None:
            from kvhook.text.whatif_plot import plot

            try:
                plot(found, args.plot)
            except OSError as error:
                raise failed_to_write(args.plot, error) from None
        print(json.dumps(as_dict(found), indent=2) if args.json else as_text(found))
        return 0


def as_dict(found: WhatIf) -> dict[str, Any]:
    """For programs: the names are those of `kvhook.whatif.report.WhatIf`."""
    from kvhook.whatif.advice import findings

    values: dict[str, Any] = _plain(found)
    values["findings"] = [finding._asdict() for finding in findings(found)]
    return values


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, and tuples as lists, all the way down."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value


def _load(args: argparse.Namespace) -> tuple[BlockRequests, Run]:
    from kvhook.errors import KvhookError
    from kvhook.whatif.runs import several, with_block_size

    taken: set[Any] = set()
    found = [_open(path, args.block_size, taken) for path in _files(args.traces)]
    runs = [run for run in found if run is not None]
    if len(runs) > 1 and not args.replicas:
        raise KvhookError(f"{len(runs)} runs: say --replicas N to spread their requests over engines, or name one run")
    requests, run = several(runs, ", ".join(map(str, args.traces)))
    if args.block_size:
        requests, run = with_block_size(requests, run, args.block_size)
    if args.max_num_seqs and run.rules is not None:
        run = dataclasses.replace(run, rules=dataclasses.replace(run.rules, max_num_seqs=args.max_num_seqs))
        requests = dataclasses.replace(requests, found=requests.found * 0 - 1)
    return requests, run


def _files(paths: list[Path]) -> list[Path]:
    """The traces themselves, for folders those in them."""
    from kvhook.errors import KvhookError
    from kvhook.records.core_files import is_of_core

    found: list[Path] = []
    for path in paths:
        inside = sorted((*path.glob("*.kvh"), *path.glob("*.jsonl"))) if path.is_dir() else [path]
        found += [one for one in inside if len(paths) == 1 == len(inside) or not is_of_core(one)]
    if not found:
        raise KvhookError(f"{', '.join(map(str, paths))}: there is no trace")
    return found


def _open(path: Path, block_size: int | None, taken: set[Any]) -> tuple[BlockRequests, Run, int] | None:
    """The requests of a file, what is known of the run, and what to add to its times to have them since 1970. None if
    its engine cores have been `taken` with another file: several API servers share one."""
    from kvhook.errors import KvhookError
    from kvhook.records.core_files import is_of_core, open_cores
    from kvhook.ring.trace_file import header_of
    from kvhook.trace import open_trace
    from kvhook.whatif.mooncake import looks_like_requests, read
    from kvhook.whatif.report import Run
    from kvhook.whatif.runs import run_of

    try:
        if path.suffix != ".kvh" and looks_like_requests(path):
            return read(path, block_size), Run(name=str(path)), 0
        header = header_of(path)
    except OSError as error:
        raise KvhookError(f"cannot open {path}: {error.strerror or error}") from None
    cores = open_cores([path], str(path)) if is_of_core(path) else open_trace(path).cores()
    new = [core for core, origin in enumerate(cores.origins) if origin not in taken]
    if len(cores) and not new:
        return None
    taken.update(cores.origins)
    cores = cores.only(new) if len(new) < len(cores) else cores
    requests, run = run_of(cores, str(path))
    return requests, run, header.realtime_ns - header.monotonic_ns


def _replicas(text: str) -> list[int]:
    numbers = _numbers(text)
    if max(numbers) > MOST_REPLICAS:
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r}: up to {MOST_REPLICAS:,} engines, since the router looks at each of them for each request"
        )
    return numbers


def _number(text: str) -> int:
    return _numbers(text)[0]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: say numbers from 1 on, such as 30,60,120")
    if max(numbers) > MOST:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: nobody has more than {MOST:,} of anything here")
    return numbers
