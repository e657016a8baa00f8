"""``kvhook run``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.errors import KvhookError

if TYPE_CHECKING:
    from kvhook.launch.textfile import Textfile


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
            type=Path,
            help="while it runs, write what vLLM's /metrics lacks into this file, for node_exporter's textfiles",
        )
        parser.add_argument("--quiet", action="store_true", help="print nothing when the program has ended")
        parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the program to run")

    def run(self, args: argparse.Namespace) -> int:
        """Run it, and tell what was recorded."""
        from kvhook.launch.child import NotStarted, end_like, run
        from kvhook.launch.interpreter import command_of
        from kvhook.launch.textfile import LOOK
        from kvhook.recording.core_side import PLUGIN_OFF, is_kept_out

        words = args.command[1:] if args.command[:1] == ["--"] else args.command
        if not words:
            raise KvhookError("say what to run: kvhook run -- python script.py")
        command = command_of(words)
        trace = _trace_of(args.trace, command, args.anonymous)
        environment = _environment(args, trace)
        if is_kept_out(environment):
            _say(f"kvhook run: {PLUGIN_OFF}: VLLM_PLUGINS={environment['VLLM_PLUGINS']},kvhook")
        begun = time.time_ns()
        textfile = _textfile(args.textfile)
        try:
            code = run(command, environment, textfile.look if textfile else lambda: None, LOOK if textfile else 60.0)
            if textfile is not None:
                textfile.close()
        except NotStarted as error:
            _say(f"kvhook run: {error}")
            return error.code
        if not args.quiet:
            try:
                _tell(trace, begun, code, command)
            except (KvhookError, OSError) as error:
                _say(f"kvhook run: {error}")
        return end_like(code)


def _trace_of(asked: str | None, command: list[str], anonymous: bool) -> Path:
    """The file or folder that is recorded into, as an absolute path: the program may go elsewhere."""
    from kvhook.options import Options
    from kvhook.recording.from_environment import is_folder

    if asked is None:
        script = next((word for word in command[1:] if word.endswith(".py")), command[0])
        here = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path("/var/tmp")
        program = "" if anonymous else f"{Path(script).stem}-"
        return here / f"kvhook-{program}{os.getpid()}.kvh"
    path = Path(os.path.abspath(asked))
    if not is_folder(asked):
        Options(trace=path).check()
        if path.exists():
            raise KvhookError(f"{asked} exists: take another name, or remove it")
    return path


def _textfile(path: Path | None) -> Textfile | None:
    """What writes the file for Prometheus, of the engines of this process's children."""
    from kvhook.discovery.rings import directories
    from kvhook.discovery.watch import descends_from
    from kvhook.launch.textfile import Textfile

    if path is None:
        return None
    if not path.absolute().parent.is_dir():
        raise KvhookError(f"--textfile {path}: there is no directory {path.absolute().parent}; make it first")
    return Textfile(path.absolute(), directories, descends_from(os.getpid()))


def _environment(args: argparse.Namespace, trace: Path) -> dict[str, str]:
    from kvhook.recording.from_environment import ENV_ANONYMOUS, ENV_LABEL, ENV_ON, ENV_OPTIONS, ENV_RUN

    folder = trace.suffix != ".kvh"
    chosen = {"trace": f"{trace}{os.sep * folder}", "level": args.level, "core": args.core}
    return {
        **os.environ,
        ENV_ON: "1",
        ENV_RUN: str(os.getpid()),
        **({ENV_LABEL: args.label} if args.label else {}),
        **({ENV_ANONYMOUS: "1"} if args.anonymous else {}),
        **{ENV_OPTIONS[name]: value for name, value in chosen.items()},
    }


def _tell(trace: Path, begun: int, code: int, command: list[str]) -> None:
    """What was recorded, on standard error."""
    from kvhook.discovery.rings import directories
    from kvhook.launch.traces import completed, traces_since
    from kvhook.text.afterwards import next_commands
    from kvhook.trace import open_trace

    how = f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
    _say(f"\nkvhook run: {Path(command[0]).name} {'was ended' if code < 0 else 'ended'}{how}")
    recorded = [completed(path, directories()) for path in traces_since(trace, begun)]
    if not recorded:
        _say(f"kvhook run: nothing was recorded: {_why_nothing(command)}")
        return
    for one in recorded:
        if one.added:
            _say(f"{one.added:,} records that process {one.pid} had left in its ring were added to {_shown(one.path)}")
        if one.runs:
            _say(f"process {one.pid} still runs: kvhook tail {one.pid}")
    paths = [one.path for one in recorded]
    _say(f"\n{open_trace(*paths).summary()}\n")
    _say(next_commands([_shown(path) for path in paths], ended_badly=code != 0))


def _why_nothing(command: list[str]) -> str:
    from kvhook.launch.interpreter import interpreter_of, lacks_kvhook
    from kvhook.recording.core_side import PLUGIN_OFF, is_kept_out

    if is_kept_out(os.environ):
        return PLUGIN_OFF
    interpreter = interpreter_of(command)
    if interpreter and lacks_kvhook(interpreter):
        return f"kvhook is not installed for {interpreter}: {interpreter} -m pip install kvhook"
    return (
        "no vLLM engine was made in this program, or in those that it started. kvhook doctor says whether engines are "
        "recorded here"
    )


def _shown(path: Path) -> str:
    """A path as short as it can be typed."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
