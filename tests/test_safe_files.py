"""What a user names is opened only if it is a file, and only a file is ever replaced."""

from __future__ import annotations

import ast
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from kvhook.demo.model import MARKER, is_complete
from kvhook.errors import ExportError
from kvhook.export import FORMATS
from kvhook.exported import READERS
from kvhook.launch.interpreter import interpreter_of
from kvhook.launch.textfile import replace_text
from kvhook.whatif.mooncake import REQUEST_SUFFIXES
from tests.hostile import DATA

PACKAGE = Path(kvhook.__file__).parent
SOUND = DATA / "baseline.kvh"


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for a pipe is woken after a while, with an error."""

    def wake(*_: Any) -> None:
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- reading -------------------------------------------------------------------------------------------------------

#: The verbs that read a file that the user names.
READING = {
    "summary": ["summary", "FILE"],
    "several": ["summary", "SOUND", "FILE"],
    "compare": ["compare", "SOUND", "FILE"],
    "cache": ["cache", "FILE"],
    "whatif": ["whatif", "FILE"],
    "report": ["report", "FILE", "-o", "OUT.html"],
    "plot": ["plot", "FILE", "-o", "OUT.svg"],
    "export": ["export", "FILE", "OUT.kvh"],
    "mooncake": ["export", "FILE", "OUT.jsonl", "--format", "mooncake"],
    "autopsy": ["autopsy", "FILE"],
    "recover": ["recover", "FILE"],
}
ENDINGS = sorted({".kvh", ".ring", ".core", "", ".core0-7.kvh", ".blocks0-7.kvh", *READERS, *REQUEST_SUFFIXES})


def said(verb: str, file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    words = {"FILE": str(file), "SOUND": str(SOUND), "OUT": str(file.parent / "out")}
    assert main([next((word.replace(k, v) for k, v in words.items() if k in word), word) for word in READING[verb]])
    return capsys.readouterr().err


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("verb", READING)
def test_no_verb_waits_for_a_pipe(tmp_path: Path, verb: str, ending: str, capsys: pytest.CaptureFixture[str]):
    pipe = tmp_path / f"run{ending}"
    os.mkfifo(pipe)
    (line,) = said(verb, pipe, capsys).splitlines()
    assert "not a file" in line
    assert os.listdir(tmp_path) == [pipe.name]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("name", ["run.jsonl", "run.kvh", "run=a/engine=0/steps.parquet", "run=a/core=0/steps.parquet"])
@pytest.mark.parametrize("verb", READING)
def test_no_verb_waits_for_a_pipe_in_a_folder(tmp_path: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "folder"
    (folder / name).parent.mkdir(parents=True)
    os.mkfifo(folder / name)
    assert len(said(verb, folder, capsys).splitlines()) == 1


@pytest.mark.usefixtures("no_waiting")
def test_what_else_looks_into_a_file_does_not_wait_either(tmp_path: Path):
    os.mkfifo(tmp_path / MARKER)
    assert not is_complete(tmp_path)
    program = tmp_path / "vllm"
    os.mkfifo(program, 0o755)
    assert interpreter_of([str(program)]) == ""


#: Module -> the functions in it that open a file without `open_regular` or `create_file`, and why they may.
OWN_WAYS = {
    "files": {"open_beside", "_usual", "_private"},  # new files under names that nobody can guess
    "ring/place": {"open_regular", "create_file", "_process_stat"},  # the safe openers, and /proc
    "ring/notes": {"_note"},  # appended to; it neither waits nor follows a link
    "recording/launched": {"tell_runs"},  # appended to; the same
    "core/plan": {"publish"},  # a new file
    "exported": {"_read_arrow", "_read_parquet"},  # pyarrow opens it itself, once it is known to be a file
    "demo/engine": {"messages_to"},  # a name that was free
    "demo/model": {"_write_model", "_write_json", "_write_safetensors"},  # in a folder that was just made
    "check/engine": {"output_to"},  # the same
    "check/structure": {"saving"},  # the same
    "report/page": {"asset"},  # of the package
}
READ_OR_WRITTEN = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "fdopen", "savefig"}
READ_OR_WRITTEN |= {"memory_map", "ParquetFile"}


def openings() -> Iterator[tuple[str, str, str]]:
    """Module, function and line of each place in the package that opens a file by its name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = ast.unparse(node)
            if name not in READ_OR_WRITTEN or text.startswith(("self.", "kvhook.")) or "os.devnull" in text:
                continue
            if "open_regular(" in text or "create_file(" in text or "opener(" in text:
                continue
            around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
            yield module, max(around, key=lambda f: f.lineno).name if around else "", f"{path}:{node.lineno}: {text}"


def test_every_file_is_opened_by_the_safe_opener_or_is_known():
    found = list(openings())
    assert {module for module, *_ in found} == set(OWN_WAYS), "what is not needed any more is taken out"
    assert [line for module, function, line in found if function not in OWN_WAYS.get(module, set())] == []


# ---- writing -------------------------------------------------------------------------------------------------------

#: The verbs that write a file that the user names.
WRITING = {
    "report": ["report", str(SOUND), "-o", "OUT.html"],
    "plot": ["plot", str(SOUND), "-o", "OUT.svg"],
    "whatif": ["whatif", str(SOUND), "--plot", "OUT.png"],
    "mooncake": ["export", str(SOUND), "OUT.jsonl", "--format", "mooncake"],
    "compressed": ["export", str(SOUND), "OUT.kvh", "--compress"],
    **{suffix: ["export", str(SOUND), f"OUT{suffix}"] for suffix in FORMATS},
}


def write(verb: str, folder: Path, *more: str) -> tuple[int, Path]:
    words = [word.replace("OUT", str(folder / "out")) for word in WRITING[verb]]
    return main([*words, *more]), Path(next(word for word in words if word.startswith(str(folder))))


def plant(path: Path, what: str) -> None:
    """Put something at a name."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("no device can be made here")
    else:
        path.symlink_to(path.with_name("victim" if what == "link" else "nowhere"))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "device", "directory"])
@pytest.mark.parametrize("verb", ["report", "plot", "whatif", "mooncake", "compressed", ".jsonl"])
def test_only_a_file_is_replaced(tmp_path: Path, verb: str, what: str, force: bool, capsys: Any):
    path = Path(next(w for w in WRITING[verb] if "OUT" in w).replace("OUT", str(tmp_path / "out")))
    (tmp_path / "victim").write_text("dear")
    plant(path, what)
    before, names = path.lstat(), sorted(os.listdir(tmp_path))
    assert write(verb, tmp_path, *(["--force"] if force else []))[0] == 1
    assert str(path) in capsys.readouterr().err
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "victim").read_text() == "dear"
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("verb", WRITING)
def test_a_file_is_replaced_with_force_alone(tmp_path: Path, verb: str, capsys: Any):
    pytest.importorskip("pyarrow")
    pytest.importorskip("matplotlib")
    code, path = write(verb, tmp_path)
    assert code == 0
    whole = path.read_bytes()
    path.write_text("theirs")
    assert write(verb, tmp_path)[0] == 1
    assert "exists" in capsys.readouterr().err
    assert path.read_text() == "theirs"
    assert write(verb, tmp_path, "--force")[0] == 0
    assert abs(len(path.read_bytes()) - len(whole)) < len(whole) / 10


def test_a_picture_without_a_suffix_is_refused_and_gets_no_other_name(tmp_path: Path, capsys: Any):
    assert main(["whatif", str(SOUND), "--plot", str(tmp_path / "curve")]) == 1
    assert ".png" in capsys.readouterr().err
    assert main(["whatif", str(SOUND), "--plot", "/dev/full", "--force"]) == 1
    assert "a device" in capsys.readouterr().err
    assert not os.path.lexists("/dev/full.png")
    assert os.listdir(tmp_path) == []


def test_what_is_put_there_while_an_export_is_written_stays(tmp_path: Path):
    from kvhook.files import written_beside

    def export() -> None:
        with written_beside() as (opener, _):
            opener(tmp_path / "a").write(b"new")
            opener(tmp_path / "b").write(b"new")
            (tmp_path / "b").symlink_to("victim")

    with pytest.raises(OSError, match="only a file is replaced"):
        export()
    assert os.listdir(tmp_path) == ["b"]


def test_a_textfile_replaces_a_file_alone(tmp_path: Path):
    replace_text(tmp_path / "kvhook.prom", "old")
    replace_text(tmp_path / "kvhook.prom", "new")
    assert (tmp_path / "kvhook.prom").read_text() == "new"
    os.mkfifo(tmp_path / "pipe.prom")
    with pytest.raises(OSError, match="a pipe"):
        replace_text(tmp_path / "pipe.prom", "new")
    assert sorted(os.listdir(tmp_path)) == ["kvhook.prom", "pipe.prom"]


def test_a_dump_in_python_does_not_write_over_a_link(tmp_path: Path):
    (tmp_path / "run.csv").symlink_to("nowhere.csv")
    trace = kvhook.open(SOUND)
    with pytest.raises(ExportError, match="exists"):
        trace.dump(tmp_path / "run.csv")
    with pytest.raises(OSError, match="a symbolic link"):
        trace.dump(tmp_path / "run.csv", overwrite=True)
    assert os.listdir(tmp_path) == ["run.csv"]


def test_the_log_of_a_demo_goes_to_a_name_that_is_free(tmp_path: Path):
    from kvhook.cli.demo import _unused
    from kvhook.demo.engine import messages_to

    (tmp_path / "run.log").write_text("theirs")
    (tmp_path / "run-2.log").symlink_to("nowhere")
    assert _unused(tmp_path / "run.log") == tmp_path / "run-3.log"
    for words in (b"first\n", b"second\n"):
        with messages_to(tmp_path / "run-3.log"):
            os.write(2, words)
    assert (tmp_path / "run-3.log").read_text() == "first\nsecond\n"
