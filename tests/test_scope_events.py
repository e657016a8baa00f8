"""Scopes, names and requests out of the events that a file tells of them."""

from __future__ import annotations

from kvhook.records.events import Events, Scope, described, from_meta, scope_events


def test_events_of_a_file_are_believed_only_as_far_as_they_make_sense():
    events = Events()
    events.take(
        [
            ["scope", 0, "a\x1b[2J", "scope", -1, 5, False, [], -1, ""],
            ["scope", "x", "b", "scope", -1, 5, False, [], -1, ""],
            ["scope", 1, "short"],
            ["scope", 2, "c", "scope", 7, 5, 1, ["q"], -1, ""],
            ["end", 0, 9],
            ["end", 0, "never"],
            ["end", 3, 4],
            ["name", "label", 0, "l"],
            ["name", "nonsense", 0, "l"],
            ["request", 0, 1, 2, 3, "x"],
            ["newer", 1],
            [], 7, None, [[]],
        ]
    )  # fmt: skip
    events.take("nothing")
    assert list(events.scopes) == [0]
    assert (events.scopes[0].name, events.scopes[0].ended_ns) == ("a?[2J", 9)
    assert events.names["label"] == {0: "l"}
    assert not events.requests
    events.take([["scope", 3, "late", "scope", -1, 1, False, [], -1, ""]])
    assert events.scopes[3].ended_ns == 4


def test_scopes_come_back_from_their_events_and_from_meta():
    scopes = [Scope(0, "a", began_ns=1, ended_ns=9, warmup=True), Scope(1, "b", "chat", 0, 2, 5, False, (1,), 3, "n=2")]
    events = Events()
    for scope in scopes:
        events.take(scope_events(scope))
    assert list(events.scopes.values()) == scopes
    told = described(events.scopes.values())
    assert [(s.path, s.warmup) for s in told] == [("a", True), ("a/b", True)]
    assert from_meta([s._asdict() for s in told]) == told
    assert from_meta([{"number": "x", "name": "n"}, {"name": "n"}, 5, {"number": 1, "name": "n", "engines": 5}]) == []


def test_putting_later_events_to_earlier_ones_leaves_them_as_they_are():
    one, two, both = Events(), Events(), Events()
    one.take([["scope", 0, "a", "scope", -1, 1, False, [], -1, ""], ["name", "label", 0, "x"]])
    two.take([["end", 0, 7], ["scope", 1, "b", "scope", -1, 8, False, [], -1, ""], ["name", "label", 1, "y"]])
    both.add(one)
    both.add(two)
    assert [(s.name, s.ended_ns) for s in both.scopes.values()] == [("a", 7), ("b", -1)]
    assert both.names["label"] == {0: "x", 1: "y"}
    assert one.scopes[0].ended_ns == -1
    assert one.names["label"] == {0: "x"}
    again = Events()
    again.take(both.as_list())
    assert (again.scopes, again.names) == (both.scopes, both.names)
