"""README.md and docs/: code that needs no engine runs, links lead somewhere, the tools that check it can fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import documents
from tests.conftest import ROOT

pytest.importorskip("sybil")

WITHOUT_ENGINE = [page for page in documents.PAGES if not documents.needs_engine(page)]


@pytest.mark.parametrize("page", documents.names(WITHOUT_ENGINE))
def test_what_a_page_shows_is_what_its_code_prints(page: Path, fresh: Path):
    documents.run(page, fresh)


@pytest.mark.parametrize("page", documents.names([p for p in documents.PAGES if ROOT / "docs" not in p.parents]))
def test_links_to_files_lead_to_files(page: Path):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert links
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_verb_is_in_the_readme():
    from kvhook.cli import VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [verb for verbs in VERBS.values() for verb in verbs if f"kvhook {verb}" not in text] == []


def test_no_page_mentions_the_machine_it_was_made_on():
    pages = [*documents.PAGES, ROOT / "SECURITY.md", ROOT / ".github/demo.svg"]
    here = [str(ROOT), str(Path.home() / ".cache"), "/tmp/"]
    assert [(page, path) for page in pages for path in here if path in page.read_text(encoding="utf-8")] == []


# The checking itself


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


@pytest.fixture
def small_root(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(documents, "ROOT", fresh)
    monkeypatch.delenv("REWRITE_DOCS", raising=False)
    return fresh


def test_times_and_paths_may_differ_and_numbers_may_not():
    shown = "  step time  p50 2.1 ms, 12 steps of /tmp/a/run.kvh\n"
    assert documents.matches(shown, "  step time p50 340 us, 12 steps of /home/b/run.kvh\n")
    assert not documents.matches(shown, "  step time  p50 2.1 ms, 13 steps of /tmp/a/run.kvh\n")


def test_three_dots_stand_for_lines():
    assert documents.matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert documents.matches("a\n...\n", "a\n")
    assert not documents.matches("a\n...\nd\n", "a\nb\n")


def test_a_wrong_output_is_an_error_that_names_the_line(small_root: Path):
    page = page_of(small_root, "Text\n\n```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:8 .*\n.*\n.*\n.*\n-3\n\+2"):
        documents.run(page, small_root)


def test_an_exception_in_a_block_is_an_error(small_root: Path):
    with pytest.raises(ZeroDivisionError):
        documents.run(page_of(small_root, "```python\n1 / 0\n```\n"), small_root)


def test_a_skipped_block_does_not_run(small_root: Path):
    documents.run(page_of(small_root, '<!-- skip: next "why" -->\n\n```python\n1 / 0\n```\n'), small_root)


def test_a_command_runs_and_its_exit_code_counts(small_root: Path):
    documents.run(page_of(small_root, "```console\n$ echo 1; false\n1\n[exit code 1]\n$ echo 2\n2\n```\n"), small_root)
    with pytest.raises(AssertionError, match="exit code 1, not 0"):
        documents.run(page_of(small_root, "```console\n$ false\n```\n"), small_root)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("kvhook summary run.kvh --json  # a table", ""),
        ("kvhook summary", "required"),
        ("kvhook tail --no-such-option", "unrecognized"),
        ("make demo", ""),
        ("make tea", "no target tea"),
        ("python examples/no.py", "no examples/no.py"),
        ("VLLM_USE_V1=0 python examples/reorder.py", ""),
        ("pip install kvhook", ""),
    ],
)
def test_commands_that_do_not_run_are_checked(line: str, problem: str):
    found = documents.command_problem(line)
    assert problem in found
    assert bool(problem) == bool(found)


def test_outputs_are_replaced_and_what_was_left_out_stays_left_out(small_root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REWRITE_DOCS", "1")
    code = "```python\nprint('one 1')\nprint('two 2')\nprint('three 3')\n```\n"
    page = page_of(small_root, f"{code}\n```text\n...\nfour 4\n```\n\n```console\n$ echo 5\n4\n```\n")
    with pytest.raises(AssertionError, match="no line that is printed begins"):
        documents.run(page, small_root)
    page = page_of(small_root, f"{code}\n```text\n...\ntwo 2, old\n...\n```\n\n```console\n$ echo 5\n4\n```\n")
    documents.run(page, small_root)
    assert (
        page.read_text(encoding="utf-8") == f"{code}\n```text\n...\ntwo 2\n...\n```\n\n```console\n$ echo 5\n5\n```\n"
    )
