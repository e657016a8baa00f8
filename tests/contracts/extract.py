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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.contracts.extracting.archives import Unreadable, read_folder
from tests.contracts.extracting.drift import report
from tests.contracts.extracting.modules import release_facts
from tests.contracts.extracting.package_index import list_files, read_release, read_release_with_pip, release_of
from tests.contracts.extracting.stored import known, stable, version_key, write


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
