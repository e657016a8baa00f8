"""``kvhook run``."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvhook.errors import KvhookError
from kvhook.streams import say

if TYPE_CHECKING:
    from kvhook.launch.textfile import Textfile
    from kvhook.recording.launched import LaunchedRun

#: Bytes that must be free where a trace is to be written.
_TRIED = 1 << 16


class RunCommand:
    """Run a program and record its vLLM engines, without a change to it.

    COMMAND is what you would type: python script.py, vllm bench throughput ..., lm_eval .... Its output, input, signals
    and exit code are its own. kvhook writes to standard error when it has ended: the summary, and what to type next,
    also if it was killed. Processes that it starts are recorded into files of their own beside the trace.

    vLLM loads kvhook as a plug-in, so kvhook has to be installed in the Python that the command runs in.

    Example:
      $ kvhook run --trace run.kvh -- python generate.py
      ...
      recorded in run.kvh
        kvhook summary run.kvh         # these numbers again
        kvhook cache run.kvh           # where hits come from, and what misses and preemptions cost
        kvhook export run.kvh run.csv  # every step and every request as tables
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        from kvhook.options import CORE_LEVELS, LEVELS

        parser.usage = "kvhook run [OPTIONS] -- COMMAND ..."
        parser.add_argument(
            "--trace",
            metavar="FILE",
            help="record into this .kvh file, or this folder (default: kvhook-PROGRAM-PID.kvh in this folder)",
        )
        parser.add_argument("--level", choices=LEVELS, default="full", help="light: no latencies, and costs less")
        parser.add_argument(
            "--core", choices=CORE_LEVELS, default="steps", help="what is recorded inside the engine core"
        )
        parser.add_argument("--label", metavar="NAME", help="label every request, for summaries of several runs")
        parser.add_argument(
            "--anonymous",
            action="store_true",
            help="leave out what could name somebody: model, program, paths; request ids are hashed",
        )
        parser.add_argument(
            "--textfile",
            metavar="FILE",
            help="while it runs, write what vLLM's /metrics lacks into this file, for node_exporter's textfiles",
        )
        parser.add_argument("--quiet", action="store_true", help="print nothing when the program has ended")
        parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the program to run")

    def run(self, args: argparse.Namespace) -> int:
        """Run it, and tell what was recorded."""
        from kvhook.launch.child import NotStarted, end_like, run, threads_without_signals

        with threads_without_signals():
            import numpy  # noqa: F401 (it is needed below, and starts threads)

        from kvhook.launch.interpreter import command_of
        from kvhook.launch.textfile import LOOK
        from kvhook.recording.core_side import PLUGIN_OFF, is_kept_out
        from kvhook.recording.launched import LaunchedRun

        words = args.command[1:] if args.command[:1] == ["--"] else args.command
        if not words:
            raise KvhookError("say what to run: kvhook run -- python script.py")
        command = command_of(words)
        textfile = _textfile(args.textfile)  # before a folder is made
        place = _place_of(args.trace, command, args.anonymous)
        launched = LaunchedRun()
        environment = _environment(args, place, launched)
        if is_kept_out(environment):
            say(f"kvhook run: {PLUGIN_OFF}: VLLM_PLUGINS={environment['VLLM_PLUGINS']},kvhook")
        look = (lambda: _unharmed(textfile.look)) if textfile else lambda: None
        try:
            code = run(command, environment, look, LOOK if textfile else 60.0)
            if textfile is not None:
                _unharmed(textfile.close)
            if not args.quiet:
                _unharmed(lambda: _tell(place, launched, code, command))
        except NotStarted as error:
            say(f"kvhook run: {error}")
            return error.code
        finally:
            launched.end()
        return end_like(code)


def _unharmed(act: Callable[[], None]) -> None:
    """Do something beside the program: whatever happens, `kvhook run` ends as the program does."""
    from kvhook.cli import internal

    try:
        act()
    except (KvhookError, OSError) as error:
        say(f"kvhook run: {error}")
    except KeyboardInterrupt:
        say("")
    except Exception as error:
        say(f"kvhook run: {internal(error)}")


class Place(NamedTuple):
    """What is recorded into: a file, or a folder for a file of each process. Absolute: the program may go elsewhere."""

    path: Path
    is_folder: bool = False


def _place_of(asked: str | None, command: list[str], anonymous: bool) -> Place:
    """Where to record, once it is known that something can be written there."""
    from kvhook.options import Options, as_absolute, as_path
    from kvhook.recording.from_environment import check_folder, is_folder, stem_of

    if asked is None:
        script = next((word for word in command[1:] if word.endswith(".py")), command[0])
        program = "" if anonymous else f"{stem_of(script)}-"
        return Place(_usual_folder() / f"kvhook-{program}{os.getpid()}.kvh")
    path = Path(os.path.normpath(as_absolute("--trace", as_path("--trace", asked))))
    if is_folder(asked):
        if path.exists() and not path.is_dir():
            raise KvhookError(f"--trace {asked}: there is a file of this name. Name a folder, or a file in .kvh")
        check_folder(f"--trace {asked}", asked)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KvhookError(f"--trace {asked}: the folder cannot be made: {error.strerror or error}") from None
        place = Place(path, is_folder=True)
    else:
        Options(trace=asked).check()
        if os.path.lexists(path):
            raise KvhookError(f"{asked} exists: take another name, or remove it")
        place = Place(path)
    if why := _why_unwritable(place):
        raise KvhookError(f"--trace {asked}: {why}; name a place that can be written")
    return place


def _usual_folder() -> Path:
    """The folder of a trace for which none was asked: the current one, if it can be written."""
    from kvhook.ring.place import history_root, try_out

    try:
        here = Path.cwd()
        try_out(here)
    except OSError:
        return history_root()
    return here


def _why_unwritable(place: Place) -> str:
    """Why no trace can be written now; "" if it can."""
    from kvhook.ring.place import try_out

    folder = place.path if place.is_folder else place.path.parent
    try:
        try_out(folder, _TRIED)
    except OSError as error:
        return f"nothing can be written in {folder} ({error.strerror or error})"
    return ""


def _textfile(asked: str | None) -> Textfile | None:
    """What writes the file for Prometheus, of the engines of this process's children."""
    from kvhook.discovery.watch import descends_from
    from kvhook.files import check_replaceable
    from kvhook.launch.textfile import Textfile
    from kvhook.options import as_absolute, as_path
    from kvhook.ring.directory import directories

    if asked is None:
        return None
    path = Path(os.path.normpath(as_absolute("--textfile", as_path("--textfile", asked))))
    if not path.parent.is_dir():
        raise KvhookError(f"--textfile {asked}: there is no directory {path.parent}; make it first")
    try:
        check_replaceable(path)
    except OSError as error:
        raise KvhookError(f"--textfile {asked}: {error.strerror or error}") from None
    if asked.endswith(os.sep):
        raise KvhookError(f"--textfile {asked}: this names a folder; name a file in it")
    if why := _why_unwritable(Place(path)):
        raise KvhookError(f"--textfile {asked}: {why}; name a place that can be written")
    return Textfile(path, directories, descends_from(os.getpid()))


def _environment(args: argparse.Namespace, place: Place, launched: LaunchedRun) -> dict[str, str]:
    from kvhook.recording.from_environment import (
        ENV_ANONYMOUS,
        ENV_LABEL,
        ENV_ON,
        ENV_OPTIONS,
        ENV_RUN,
        make_absolute,
    )

    chosen = {"trace": f"{place.path}{os.sep * place.is_folder}", "level": args.level, "core": args.core}
    environment = {
        **os.environ,
        ENV_ON: "1",
        ENV_RUN: launched.handed_down(),
        **({ENV_LABEL: args.label} if args.label else {}),
        **({ENV_ANONYMOUS: "1"} if args.anonymous else {}),
        **{ENV_OPTIONS[name]: value for name, value in chosen.items()},
    }
    make_absolute(environment)
    return environment


def _tell(place: Place, launched: LaunchedRun, code: int, command: list[str]) -> None:
    """What was recorded, on standard error."""
    from kvhook.launch.traces import completed, traces_of
    from kvhook.ring.directory import directories
    from kvhook.text.afterwards import next_commands, short
    from kvhook.trace import open_trace

    how = f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
    say(f"\nkvhook run: {Path(command[0]).name} {'was ended' if code < 0 else 'ended'}{how}")
    recorded = [completed(path, directories()) for path in traces_of(launched, place.path)]
    if not recorded:
        say(f"kvhook run: nothing was recorded: {_why_nothing(place, launched, command)}")
        return
    for one in recorded:
        if one.added:
            say(f"{one.added:,} records that process {one.pid} had left in its ring were added to {short(one.path)}")
        if one.runs:
            say(f"process {one.pid} still runs: kvhook tail {one.pid}")
    paths = [one.path for one in recorded]
    say(f"\n{open_trace(*paths).summary()}\n")
    say(next_commands([short(path) for path in paths], ended_badly=code != 0))


def _why_nothing(place: Place, launched: LaunchedRun, command: list[str]) -> str:
    from kvhook.launch.interpreter import interpreter_of, lacks_kvhook
    from kvhook.launch.traces import rings_of
    from kvhook.recording.core_side import PLUGIN_OFF, is_kept_out
    from kvhook.ring.directory import directories

    unwritable = _why_unwritable(place)
    rings, told = rings_of(launched, directories()), launched.told()
    if rings or told:  # an engine was made
        lost = _why_no_trace(told)
        if not rings:
            return lost
        last = rings[-1]
        return (
            f"{lost}. The last of {sum(ring.records for ring in rings):,} records are still in the ring: kvhook "
            f"summary {last.pid}, kvhook export {last.pid} FILE"
        )
    if unwritable:
        return unwritable
    if is_kept_out(os.environ):
        return PLUGIN_OFF
    interpreter = interpreter_of(command)
    if interpreter and lacks_kvhook(interpreter):
        return f"kvhook is not installed for {interpreter}: {interpreter} -m pip install kvhook"
    return (
        "no vLLM engine was made in this program, or in those that it started. kvhook doctor says whether engines are "
        "recorded here"
    )


def _why_no_trace(told: list[Path]) -> str:
    """Why there is no trace though an engine was made. `told` are the files that processes wanted to record into."""
    from kvhook.text.afterwards import short

    if not told:
        return "the program recorded into no file: it took KVHOOK or KVHOOK_TRACE out of its environment"
    # the first name may be another's file
    path = next((path for path in told if not os.path.lexists(path)), told[0])
    if why := _why_unwritable(Place(path)):
        return f"{path} could not be written: {why}"
    return f"{short(path)} is not there: it could not be written, see above, or the program has removed it"
