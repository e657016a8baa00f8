"""``python -m tests.golden --write``: write the generated publishers down again."""

from __future__ import annotations

import argparse

from tests.golden.publishers import GENERATED, HERE, generate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the files; without it, only say which differ")
    write = parser.parse_args().write
    differ = 0
    for name, publisher in GENERATED.items():
        path, source = HERE / name, generate(publisher)
        if not path.exists() or path.read_text() != source:
            differ += 1
            print(f"{'written' if write else 'differs'}: {name}")
            if write:
                path.write_text(source)
    return int(bool(differ) and not write)


if __name__ == "__main__":
    raise SystemExit(main())
