"""What `hook_cost` makes of its times: rows with medians, noise and ratios, the targets, and the text for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cost_timing import SINGLE, Times, middle, percentile

Json = dict[str, Any]
#: Times of one worker: state -> step -> candidate -> nanoseconds.
Worker = dict[str, dict[str, Times]]

#: what, state, step, figure, at most; from the issue that asked for this benchmark
TARGETS = (
    ("per step, warm, batch 1", "hot", "decode, batch 1", "us", 3.0),
    ("of PrometheusStatLogger.record, batch 1", "hot", "decode, batch 1", "of_prometheus", 1 / 5),
    ("per step, warm, batch 256", "hot", "decode, batch 256", "us", 6.0),
    ("of PrometheusStatLogger.record, batch 256", "hot", "decode, batch 256", "of_prometheus", 1 / 25),
    ("another thread, median, batch 1", "thread", "decode, batch 1", "us", 6.0),
    ("another thread, p99, batch 1", "thread", "decode, batch 1", "p99_us", 30.0),
    ("and busy before each call, median, batch 1", "busy", "decode, batch 1", "us", 6.0),
    ("and busy before each call, p99, batch 1", "busy", "decode, batch 1", "p99_us", 30.0),
)
#: recording, step, at most: the whole path after a forward pass, in us; and of Python's in the same run
AFTER_A_FORWARD_PASS = (
    ("kvhook full", "decode, batch 1", 6.0),
    ("kvhook full", "decode, batch 256", 10.0),
    ("kvhook light", "decode, batch 1", 6.0),
    ("kvhook light", "decode, batch 256", 12.0),
)
OF_PYTHON = 1 / 4
#: What the same recording without the extension is called.
IN_PYTHON = "{}, in Python"


class Names(NamedTuple):
    """What the candidates that matter here are called: the first way to record, all of them, and vLLM's."""

    first: str
    recordings: tuple[str, ...]
    prometheus: str
    build: str


class Report:
    """The figures of all workers together."""

    def __init__(self, names: Names, workers: list[Worker]) -> None:
        self.names, self.workers = names, workers

    def document(self) -> Json:
        """Everything, as JSON can hold it."""
        states: Json = {"hot": [self.hot(step) for step in self.workers[0]["hot"]]}
        for state in SINGLE:
            states[state] = [self.single(state, step) for step in self.workers[0][state]]
        return states | {"targets": self.targets(states)}

    # ---- hot -------------------------------------------------------------------------------------------------------

    def hot(self, step: str) -> Json:
        """One kind of step: each row from figures of the same round."""
        rounds: Times = {}
        for worker in self.workers:
            for name, values in worker["hot"][step].items():
                rounds.setdefault(name, []).extend(values)
        whole = {name: self.whole(rounds, name) for name in self.names.recordings}
        rows = [_row(f"{name}, whole path", values, whole[self.names.first]) for name, values in whole.items()]
        rows[1:1] = [_row(f"  {part}", values, None) for part, values in self.parts(rounds, self.names.first).items()]
        again = f"{self.names.first}: step, again"
        taken = {f"{n}: {p}" for n in whole for p in ("hand over", "hand over and publish", "pack", "store")}
        taken |= {
            again,
            *(f"{n}: {s}" for n in whole for s in ("step", "bare step")),
            "finished requests, bare",
            "finished requests, hooked",
            "only the wrapper: step",
        }
        rows += [_row(n, v, whole[self.names.first]) for n, v in rounds.items() if n not in taken]
        twice = _pairs(lambda a, b: a / b, rounds[again], rounds[f"{self.names.first}: step"])
        shift, spread = middle(twice)
        return {"step": step, "rows": rows, "noise": {"same_twice": shift - 1, "in_a_round": spread}}

    def whole(self, rounds: Times, name: str) -> list[float]:
        """What a way to record adds to a step: with it less without it, and the hook on finished requests."""
        added = _pairs(lambda a, b: a - b, rounds[f"{name}: step"], rounds[f"{name}: bare step"])
        if "finished requests, hooked" in rounds:
            hook = _pairs(lambda a, b: a - b, rounds["finished requests, hooked"], rounds["finished requests, bare"])
            added = _pairs(lambda a, b: a + b, added, hook)
        return added

    def parts(self, rounds: Times, name: str) -> Times:
        """The path of one way to record by part. What is called by itself comes less the empty call."""

        def less(a: str, b: str) -> list[float]:
            return _pairs(lambda x, y: x - y, rounds[a], rounds[b])

        parts = {"wrapper and two clocks": less("only the wrapper: step", f"{name}: bare step")}
        if f"{name}: hand over" in rounds:
            parts["hand over"] = less(f"{name}: hand over", "empty call")
            publish = less(f"{name}: hand over and publish", f"{name}: hand over")
            if f"{name}: pack" in rounds:
                parts["pack a step"] = less(f"{name}: pack", "empty call")
                parts["store a record"] = less(f"{name}: store", "empty call")
                for part in ("pack a step", "store a record"):
                    publish = _pairs(lambda a, b: a - b, publish, parts[part])
            parts["the rest of publish: reading, lists, requests"] = publish
        if "finished requests, hooked" in rounds:
            parts["hook on finished requests"] = less("finished requests, hooked", "finished requests, bare")
        return parts

    # ---- all other states ------------------------------------------------------------------------------------------

    def single(self, state: str, step: str) -> Json:
        """One kind of step in a state where single calls are timed: median and p99 of all of them."""
        rows = []
        reference = self.medians(state, step, f"{self.names.first}: step")
        for name in self.workers[0][state][step]:
            values = [v for worker in self.workers for v in worker[state][step][name]]
            medians = self.medians(state, step, name)
            ratio = middle(_pairs(lambda a, b: a / b, medians, reference))[0]
            row = {"name": name, "us": middle(values)[0] / 1e3, "noise_us": (max(medians) - min(medians)) / 2e3}
            rows.append(row | {"p99_us": percentile(values, 0.99) / 1e3, "calls": len(values), "ratio": ratio})
        return {"step": step, "rows": rows + self.added(state, step)}

    def added(self, state: str, step: str) -> list[Json]:
        """What each way to record adds to a step: calls with it less calls without it, next to each other in time."""
        by_worker = {
            name: [
                _pairs(
                    lambda a, b: a - b, worker[state][step][f"{name}: step"], worker[state][step][f"{name}: bare step"]
                )
                for worker in self.workers
            ]
            for name in self.names.recordings
        }
        rows = []
        for name, workers in by_worker.items():
            values = [v for worker in workers for v in worker]
            medians = [middle(worker)[0] for worker in workers]
            row = {"name": f"{name}, whole path", "us": middle(values)[0] / 1e3}
            row |= {"noise_us": (max(medians) - min(medians)) / 2e3, "p99_us": percentile(values, 0.99) / 1e3}
            python = by_worker.get(IN_PYTHON.format(name))
            if python:
                row["of_python"] = middle(values)[0] / middle([v for worker in python for v in worker])[0]
            rows.append(
                row | {"calls": len(values), "ratio": row["us"] * 1e3 / middle(_flat(by_worker[self.names.first]))[0]}
            )
        return rows

    def medians(self, state: str, step: str, name: str) -> list[float]:
        """The median of each worker."""
        return [middle(worker[state][step][name])[0] for worker in self.workers]

    # ---- targets ---------------------------------------------------------------------------------------------------

    def targets(self, states: Json) -> list[Json]:
        """Each target, and what was found; a step that was not measured has none."""
        found = []
        for what, state, step, figure, most in TARGETS:
            rows = next((table["rows"] for table in states[state] if table["step"] == step), [])
            by_name = {row["name"]: row for row in rows}
            row = by_name.get(f"{self.names.first}, whole path" if state == "hot" else f"{self.names.first}: step")
            value = None
            if row and figure == "of_prometheus":
                other = by_name.get(self.names.prometheus)
                value = 1 / other["ratio"] if other else None
            elif row:
                value = row[figure]
            if value is not None:
                found.append({"what": what, "figure": figure, "at_most": most, "found": value, "met": value <= most})
        return found + self.after_a_forward_pass(states.get("forward", []))

    def after_a_forward_pass(self, tables: list[Json]) -> list[Json]:
        """The targets of the step path after a forward pass."""
        found = []
        for name, step, most in AFTER_A_FORWARD_PASS:
            rows = next((table["rows"] for table in tables if table["step"] == step), [])
            row = next((row for row in rows if row["name"] == f"{name}, whole path"), None)
            for figure, limit in (("us", most), ("of_python", OF_PYTHON)):
                if row and figure in row:
                    what = f"after a forward pass, {name}, {step}{', of Python' if figure == 'of_python' else ''}"
                    met = row[figure] <= limit
                    found.append({"what": what, "figure": figure, "at_most": limit, "found": row[figure], "met": met})
        return found


def _flat(workers: list[list[float]]) -> list[float]:
    return [value for worker in workers for value in worker]


def _pairs(make: Callable[[float, float], float], first: list[float], second: list[float]) -> list[float]:
    return [make(a, b) for a, b in zip(first, second, strict=True)]


def _row(name: str, values: list[float], reference: list[float] | None) -> Json:
    """Median and noise of a row, in microseconds, and its ratio to the reference in the same round."""
    median, noise = middle(values)
    row: Json = {"name": name, "us": median / 1e3, "noise_us": noise / 1e3}
    if reference is not None:
        row["ratio"], row["ratio_noise"] = middle(_pairs(lambda a, b: a / b, values, reference))
    return row


# ---- for people ----------------------------------------------------------------------------------------------------


def text(document: Json) -> str:
    """The tables."""
    lines = [", ".join(f"{k}: {v}" for k, v in document["machine"].items())]
    if document["stand_ins"]:
        lines.append("STAND-INS: no vLLM here. kvhook's own part only, on objects with the fields of vLLM's.")
    lines.append("us a call; hot: x is the ratio to kvhook's whole path in the same round")
    for table in document["hot"]:
        noise = table["noise"]
        own = f"the same twice: {noise['same_twice']:+.1%}, in a round +-{noise['in_a_round']:.1%}"
        lines.append(f"\nhot: {table['step']}   ({own})")
        lines += [_hot_line(row) for row in table["rows"]]
    for state in SINGLE:
        for table in document[state]:
            lines.append(f"\n{state}: {table['step']}   (single calls, with their two clock reads)")
            lines.append(f"  {'':50}{'median':>9}{'':11}{'p99':>9}")
            lines += [_single_line(row) for row in table["rows"]]
    if document["targets"]:
        lines.append("\ntargets")
    for target in document["targets"]:
        share = target["figure"] != "us" and target["figure"] != "p99_us"
        found, most = (f"1/{1 / v:.1f}" if share else f"{v:.2f} us" for v in (target["found"], target["at_most"]))
        lines.append(f"  {target['what']:66}{found:>9}  at most {most:>8}  {'met' if target['met'] else 'MISSED'}")
    return "\n".join(lines)


def _hot_line(row: Json) -> str:
    ratio = f"{row['ratio']:9.2f} x +- {row['ratio_noise']:.2f}" if "ratio" in row else ""
    return f"  {row['name']:50}{row['us']:9.2f} +- {row['noise_us']:6.2f}{ratio}"


def _single_line(row: Json) -> str:
    of_python = f"   {row['of_python']:.2f} of Python's" if "of_python" in row else ""
    figures = f"{row['us']:9.2f} +- {row['noise_us']:6.2f}{row['p99_us']:9.1f}{row['ratio']:9.2f} x"
    return f"  {row['name']:50}{figures}{of_python}"
