"""What a summary needs of an engine's finished requests, added up as they come."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from kvhook.analysis.prompt_groups import GroupsOfPrompts
from kvhook.analysis.raw import Rows
from kvhook.analysis.siblings import Siblings
from kvhook.analysis.values import Values
from kvhook.records.tables import reason_texts
from kvhook.schema import FINISH_REASONS, NAMES

_STOP, _ABORT, _ERROR = (FINISH_REASONS.index(name) for name in ("stop", "abort", "error"))

#: Columns of which the sum is wanted, and how many requests do not tell.
_SUMMED = ("num_cached_tokens", "num_generation_tokens")


class Prompts:
    """Prompts of some requests: how many there are, their tokens, and whether one is not known."""

    __slots__ = ("count", "tokens", "unknown")

    def __init__(self) -> None:
        self.count = self.tokens = 0
        self.unknown = False

    def take(self, lengths: npt.NDArray[np.int64]) -> None:
        """Take prompts in."""
        self.count += len(lengths)
        self.tokens += int(lengths.sum())
        self.unknown |= bool((lengths < 0).any())

    def add(self, other: Prompts) -> None:
        """Put others to these."""
        self.count += other.count
        self.tokens += other.tokens
        self.unknown |= other.unknown


class RequestTotals:
    """An engine's finished requests in numbers. Engines, and parts of a run, are put together with `add`.

    Args:
        runs: it will be asked now and then while it grows, see `Values`.
        engine: whose requests they are.

    Attributes:
        count: how many.
        reasons: code of the finish reason -> requests.
        sums: column -> its sum over requests that tell it; `unknown` how many do not.
        prompts: (whether it was aborted or failed, whether a token was generated) -> its prompts.
        aborted: the prompts of the aborted ones.
        e2e, per_token, decode_per_token: values of ``e2e_latency``, ``mean_time_per_output_token``, and of
            ``decode_time`` by the number of tokens; the last two of requests that generated more than one token.
        groups: column of `kvhook.schema.NAMES` -> code -> counts of its requests and tokens; empty where no request has
            one.
        prompt_groups: the samples (``n > 1``) by their prompts.
    """

    def __init__(self, *, runs: bool = False, engine: int = 0) -> None:
        self.count = 0
        self.prompt_groups = GroupsOfPrompts(engine)
        self.reasons: Counter[int] = Counter()
        self.sums: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.generated = 0
        #: prompt tokens of the second and later samples of a prompt, and how many such samples there are
        self.sample_tokens = self.samples = 0
        self.prompts = {(gone, begun): Prompts() for gone in (False, True) for begun in (False, True)}
        self.aborted = Prompts()
        self.e2e, self.per_token, self.decode_per_token, self.all_per_token = (Values(runs=runs) for _ in range(4))
        self.siblings = Siblings()
        self.groups: dict[str, dict[int, Counter[str]]] = {column: {} for column in NAMES}

    def take(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Take in requests; gives the step numbers of those that stopped."""
        self.count += len(rows)
        reason = rows.ints("finish_reason")
        different, counts = np.unique(reason, return_counts=True)
        self.reasons.update(dict(zip(different.tolist(), counts.tolist(), strict=True)))
        for name in _SUMMED:
            values = rows.ints(name)
            known = values >= 0
            self.sums[name] += int(values[known].sum())
            self.unknown[name] += len(values) - int(np.count_nonzero(known))
        generated, prompts = rows.ints("num_generation_tokens"), rows.ints("num_prompt_tokens")
        self.generated += int(generated.sum())
        gone, begun = (reason == _ABORT) | (reason == _ERROR), generated > 0
        for (is_gone, is_begun), found in self.prompts.items():
            found.take(prompts[(gone == is_gone) & (begun == is_begun)])
        self.aborted.take(prompts[reason == _ABORT])
        later = (rows.ints("sample_index") > 0) & (prompts > 0)
        self.samples += int(np.count_nonzero(later))
        self.sample_tokens += int(prompts[later].sum())
        several = generated > 1
        per_token = rows.floats("mean_time_per_output_token")
        self.all_per_token.take(per_token)
        self.per_token.take(per_token[several])
        self.decode_per_token.take(rows.floats("decode_time")[several] / (generated[several] - 1))
        self.e2e.take(rows.floats("e2e_latency"))
        self.siblings.take(rows.ints("request_id"), rows.ints("sample_index"), rows.ints("num_cached_tokens"))
        self._group(rows)
        names = ("prompt_number", "sample_index", "num_prompt_tokens", "num_cached_tokens", "num_generation_tokens")
        if rows.has("prompt_number") and rows.has("sample_index"):
            unknown = np.full(len(rows), -1)
            self.prompt_groups.take(*(rows.ints(name) if rows.has(name) else unknown for name in names))
        stopped: npt.NDArray[np.int64] = rows.ints("step")[reason == _STOP]
        return stopped

    def _group(self, rows: Rows) -> None:
        """Add the requests up by their labels and adapters."""
        for column, groups in self.groups.items():
            if not rows.has(column):
                continue
            codes, where = np.unique(rows.ints(column), return_inverse=True)
            cached = rows.ints("num_cached_tokens") if rows.has("num_cached_tokens") else np.full(len(where), -1)
            tell = cached >= 0
            prompts = rows.ints("num_prompt_tokens")
            sums = {
                "requests": np.bincount(where),
                "tell": np.bincount(where, tell),
                "prompt": np.bincount(where, np.maximum(prompts, 0)),
                "asked": np.bincount(where, np.where(tell, np.maximum(prompts, 0), 0)),
                "cached": np.bincount(where, np.where(tell, cached, 0)),
                "generated": np.bincount(where, np.maximum(rows.ints("num_generation_tokens"), 0)),
            }
            for i, code in enumerate(codes.tolist()):
                group = groups.setdefault(code, Counter())
                group.update({name: int(of[i]) for name, of in sums.items()})

    def add(self, later: RequestTotals) -> None:
        """Put those of another engine, or of a later part of the run, to these; they stay as they are."""
        self.count += later.count
        self.generated += later.generated
        self.samples += later.samples
        self.sample_tokens += later.sample_tokens
        for name in ("reasons", "sums", "unknown"):
            getattr(self, name).update(getattr(later, name))
        for key, prompts in later.prompts.items():
            self.prompts[key].add(prompts)
        self.aborted.add(later.aborted)
        for name in ("e2e", "per_token", "decode_per_token", "all_per_token"):
            getattr(self, name).add(getattr(later, name))
        self.siblings.add(later.siblings)
        self.prompt_groups.add(later.prompt_groups)
        for column, groups in later.groups.items():
            for code, group in groups.items():
                self.groups[column].setdefault(code, Counter()).update(group)

    @property
    def by_reason(self) -> dict[str, int]:
        """Finish reason -> requests, in alphabetical order."""
        codes = np.array(list(self.reasons), np.int64)
        found: Counter[str] = Counter()
        for text, count in zip(reason_texts(codes).tolist(), self.reasons.values(), strict=True):
            found[text] += count
        return dict(sorted(found.items()))
