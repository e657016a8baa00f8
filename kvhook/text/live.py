"""What engines do at this moment, as a screen of text: for the live screen, and for a terminal that is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from kvhook.analysis.live import View
from kvhook.records.engine_events import KINDS
from kvhook.text.core_report import LIMITS
from kvhook.text.numbers import count, percent, seconds

#: Heading and width of the columns of the list of engines.
COLUMNS = (
    ("pid", 8),
    ("eng", 3),
    ("state", 6),
    ("run", 5),
    ("wait", 5),
    ("KV", 7),
    ("hits", 7),
    ("prefill/s", 9),
    ("decode/s", 8),
    ("TTFT p50", 9),
)
#: What the list can be sorted by -> the key, largest first; `None` counts as least.
SORTS: dict[str, Callable[[View], float]] = {
    "arrival": lambda view: 0.0,
    "KV usage": lambda view: view.used or 0.0,
    "waiting": lambda view: view.waiting or 0.0,
    "decode/s": lambda view: view.decode_rate or 0.0,
    "TTFT": lambda view: view.ttft[0] if view.ttft else 0.0,
}
HELP = (
    "up, down     choose an engine",
    "+ -          a longer or a shorter window (1 to 60 s)",
    "s            sort by arrival, KV usage, waiting, decode/s, TTFT",
    "p, space     pause and go on",
    "h, ?         this help",
    "q            quit",
    "",
    "The bar: used blocks, those that only the prefix cache still needs, empty ones.",
    "The history: the highest usage of each second in which there were steps.",
    "This run: since its first step. A ring holds only the newest steps: where older",
    "ones were not seen, it says since when it counts, and rates are of that time.",
)
_DETAIL = 12
_MARKS = {False: ("█", "▒", "·", "▁▂▃▄▅▆▇█"), True: ("#", "=", ".", "_.-=*#%@")}
#: What fills a cell of the history's chart, from nothing to all of it.
_LEVELS = {False: " ▁▂▃▄▅▆▇█", True: " .:#"}
#: Most lines of the chart, and characters of its scale.
_CHART, _SCALE = 8, 6


def screen(
    views: Sequence[View],
    selected: int,
    width: int,
    height: int,
    *,
    heading: str = "",
    ascii_only: bool = False,
    nothing: Sequence[str] = (),
) -> list[str]:
    """The whole screen: lines of at most `width` characters, at most `height` of them.

    Args:
        views: the engines, in the order in which they are listed.
        selected: which of them is shown in detail.
        heading: the first line.
        ascii_only: draw without block characters.
        nothing: what is said if there is no engine, see `no_engine`.
    """
    lines = [heading] if heading else []
    if not views:
        lines += ["", *(nothing or no_engine())]
        return [line[:width] for line in lines[:height]]
    selected = min(max(selected, 0), len(views) - 1)
    room = max(1, height - len(lines) - 1 - _DETAIL)
    first = max(0, min(selected - room // 2, len(views) - room))
    last = min(first + room, len(views))
    lines.append("  " + " ".join(f"{name:>{w}}" for name, w in COLUMNS))
    for place in range(first, last):
        mark = ">" if place == selected and len(views) > 1 else " "
        lines.append(f"{mark} {_row(views[place])}")
    listed = f"engines {first + 1} to {last}" if last - first > 1 else f"engine {last}"
    part = f"  {listed} of {len(views)}" if last - first < len(views) else ""
    spare = height - len(lines) - _DETAIL
    lines += detail(views[selected], width, ascii_only=ascii_only, rows=1 + max(0, spare), note=part)
    return [line[:width].rstrip() for line in lines[:height]]


def no_engine(
    pids: Sequence[int] = (), gone: Sequence[int] = (), folder: str = "", others: Sequence[int] = (), there: bool = True
) -> list[str]:
    """Why no engine is shown, and what there is.

    Args:
        pids: the processes that were asked for; all were if there are none.
        gone: those of them that do not run.
        folder: the directory of rings that was asked for.
        others: processes that were not asked for and are being recorded.
        there: whether that directory exists.
    """
    lines = []
    if pids:
        several = len(pids) > 1
        whose = f"process{'es' * several} {_list(pids)}, or of what {'they' if several else 'it'} started,"
        lines.append(f"No engine of {whose} is being recorded.")
        if gone:
            lines.append(f"There is no process {_list(gone)}.")
    if folder:
        lines.append(f"There {'are no rings of engines that work in' if there else 'is no directory'} {folder}")
    if others:
        lines += ["", f"Other processes are being recorded: {_list(others)}", "  kvhook ls tells more of them"]
        lines.append(f"  kvhook top {'without PID ' * bool(pids)}{'without --dir ' * bool(folder)}shows them")
        return lines
    lines += [] if lines else ["No engine is being recorded on this machine yet."]
    lines += ["This screen shows the first one that is:"]
    return [*lines, "", "  kvhook run -- python script.py", "  or kvhook.install() in the script, before LLM(...)"]


def _list(pids: Sequence[int]) -> str:
    return ", ".join(map(str, pids[:8])) + f" and {len(pids) - 8} more" * (len(pids) > 8)


def detail(view: View, width: int, *, ascii_only: bool = False, rows: int = 1, note: str = "") -> list[str]:
    """One engine, some lines.

    Args:
        view: the engine.
        width: characters of a line.
        ascii_only: draw without block characters.
        rows: lines that the history may have.
        note: what else stands at the end of the first line.
    """
    return list(_detail(view, width, ascii_only, rows, note))


def _detail(v: View, width: int, ascii_only: bool, rows: int, note: str) -> Iterator[str]:
    ended = {"closed": "  it has ended", "dead": f"  its process has died: kvhook autopsy {v.pid}"}.get(v.state, "")
    right = ended or note
    model = v.model.rsplit("/", 1)[-1] if v.model.startswith("/") else v.model
    yield f"--- {v.pid} {v.program} {model} {'-' * width}"[: max(0, width - len(right))] + right
    blocks = f" of {v.num_kv_blocks:,} blocks" if v.num_kv_blocks else ""
    parts = [f"used {percent(v.used, 0)}"]
    if v.cached is not None:
        parts += [f"cached {percent(v.cached, 0)}", f"empty {percent(v.empty, 0)}"]
    said = f"{', '.join(parts)}{blocks}"
    yield f"KV cache    {bar(v, max(8, min(60, width - 14 - len(said))), ascii_only=ascii_only)} {said}"
    for n, line in enumerate(_history(v.history, width - 13, rows, ascii_only)):
        yield f"{'' if n else 'history':<12}{line}"
    yield f"requests    {_n(v.running)} running, {_n(v.waiting)} waiting, {_n(v.preempted)} preempted"
    yield f"this run    {_sums(v)}{f'; in scope {v.scope}' if v.scope else ''}"
    yield (
        f"tokens/s    {_rate(v.prefill_rate)} prefill, {_rate(v.decode_rate)} decode;"
        f" hit rate {percent(v.hit_rate)}, {'run' if v.since is None else 'since then'} {percent(v.hit_rate_run)}"
    )
    yield f"latency     TTFT {_two(v.ttft)}; ITL {_two(v.itl)} (p50, p99)"
    yield f"steps       {v.steps:,}; {_rate(v.steps_rate)}/s, {_two(v.step_time)} (p50, p99)"
    often = [(LIMITS.get(why, why), share) for why, share in v.limits if share >= 0.01]
    done = f"{KINDS[v.last_event[0]]}, {seconds(v.last_event[1])} ago" if v.last_event else ""
    yield f"limited by  {', '.join(f'{why} {percent(share, 0)}' for why, share in often) or '-'}"
    yield f"            {advice(v) or done}"
    cost = (
        "not measured yet" if v.cost is None else f"{seconds(v.cost)} a step, {percent(v.cost_share, 2)} of their time"
    )
    yield f"kvhook      {cost}; {v.lost:,} records missed here"


def _sums(v: View) -> str:
    """What is known of the whole run; where steps were not seen, the rest with the time since when it counts."""
    finished = f"{_n(v.finished_run)} finished"
    others = f"{_n(v.aborted_run)} aborted, {_n(v.preempted_run)} preempted"
    if v.since is None:
        return f"{finished}, {others}"
    if v.finished_all is not None:
        return f"{_n(v.finished_all)} finished; {_since(v.since)}: {others}"
    return f"{_since(v.since)}: {finished}, {others}"


def _since(moment: float) -> str:
    """Since when, with the day unless that is today."""
    then, now = time.localtime(moment), time.localtime()
    return time.strftime("since %H:%M:%S" if then[:3] == now[:3] else "since %m-%d %H:%M", then)


def advice(v: View) -> str:
    """What stands out in the window, in one sentence; "" if nothing does."""
    shares = dict(v.limits)
    blocks, places, budget = (shares.get(name, 0.0) for name in ("kv_blocks", "max_num_seqs", "token_budget"))
    if v.state != "alive":
        return ""
    if v.idle is not None and v.idle > v.window:
        return f"no step for {seconds(v.idle)}"
    if v.recomputed and v.preempted:
        return f"too few KV blocks: requests were preempted, and {v.recomputed:,} tokens computed a second time"
    if blocks >= 0.25:
        return f"requests waited for KV blocks in {percent(blocks, 0)} of the steps"
    if places >= 0.25:
        return f"max_num_seqs kept requests waiting in {percent(places, 0)} of the steps"
    if budget >= 0.25:
        return f"max_num_batched_tokens was used up in {percent(budget, 0)} of the steps"
    return ""


def bar(v: View, width: int, *, ascii_only: bool = False) -> str:
    """Used, cached and empty blocks as a bar."""
    full, cached, empty, _ = _MARKS[ascii_only]
    used = round(min(max(v.used or 0.0, 0.0), 1.0) * width)
    more = min(round((v.cached or 0.0) * width), width - used)
    return full * used + cached * more + empty * (width - used - more)


def history(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """The last values from 0 to 1, one character each."""
    marks = _MARKS[ascii_only][3]
    return "".join(marks[min(int(min(max(v, 0.0), 1.0) * len(marks)), len(marks) - 1)] for v in values[-width:])


def chart(values: Sequence[float], width: int, rows: int, *, ascii_only: bool = False) -> list[str]:
    """The last values from 0 to 1 as columns over several lines, the newest at the right; a value above 0 is seen."""
    levels = _LEVELS[ascii_only]
    full = len(levels) - 1
    kept = [min(max(v, 0.0), 1.0) for v in values[-width:]]
    heights = [max(round(v * rows * full), v > 0) for v in kept]
    below = range(full * (rows - 1), -1, -full)
    return ["".join(levels[min(max(h - base, 0), full)] for h in heights).rjust(width) for base in below]


def _history(values: Sequence[float], width: int, rows: int, ascii_only: bool) -> list[str]:
    """The history in one line, or as a chart with its scale where there is room for one."""
    rows = min(rows, _CHART)
    if rows < 3 or width <= 2 * _SCALE:
        return [history(values, width, ascii_only=ascii_only)]
    lines = chart(values, width - _SCALE, rows, ascii_only=ascii_only)
    scale = [f"{text:>{_SCALE}}" for text in ("100 %", *[""] * (rows - 2), "0 %")]
    return [line + mark for line, mark in zip(lines, scale, strict=True)]


def _row(v: View) -> str:
    cells = (
        str(v.pid),
        str(v.engine),
        v.state,
        _n(v.running),
        _n(v.waiting),
        percent(v.used),
        percent(v.hit_rate if v.hit_rate is not None else v.hit_rate_run),
        _rate(v.prefill_rate),
        _rate(v.decode_rate),
        seconds(v.ttft[0]) if v.ttft else "-",
    )
    return " ".join(f"{text:>{w}}" for text, (_, w) in zip(cells, COLUMNS, strict=True))


def _n(value: int | None) -> str:
    return "-" if value is None else count(value)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _two(values: tuple[float, float] | None) -> str:
    return "-" if values is None else f"{seconds(values[0])}, {seconds(values[1])}"
