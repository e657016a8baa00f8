"""Makes the README's picture: runs `kvhook demo` and draws what it printed. Usage: python .github/picture.py

The picture has to fit a screen, so it leaves lines out: most live lines of each round, and the end of the summary.
A line of dots stands for them. No line is cut short.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
#: Pixels at which the picture is shown: about 700 of them high.
WIDTH = 770
COLUMNS = 100
#: Live lines of a round that are shown.
LIVE = 4
#: The last line of the summary that is shown begins like this.
LAST = "  end to end"
DOTS = "  ..."


def main() -> None:
    """Run the demo in an empty folder, as a reader would, and save the picture beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvhook", "demo"]
        environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
        printed = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    lines = chosen(printed.rstrip().splitlines())
    (HERE / "demo.svg").write_text(draw(lines), encoding="utf-8")
    print(f"{HERE / 'demo.svg'}: {len(lines)} lines")


def chosen(lines: list[str]) -> list[str]:
    """The lines that are shown."""
    out: list[str] = []
    live: list[str] = []
    # how long vLLM takes to load says nothing about the cache
    for line in [*(line for line in lines if not line.startswith("loading")), ""]:
        if re.match(r"  step +\d+  KV ", line):
            live.append(line)
            continue
        out += thinned(live)
        live = []
        out.append(line)
        if line.startswith(LAST):
            break
    long = [line for line in out if len(line) > COLUMNS]
    if long:
        raise SystemExit(f"these lines are longer than {COLUMNS} characters: {long}")
    return [*out, DOTS]


def thinned(live: list[str]) -> list[str]:
    """A round's live lines: the first and the last ones, with dots between them."""
    if len(live) <= LIVE:
        return live
    half = LIVE // 2
    return [*live[:half], DOTS, *live[-half:]]


def draw(lines: list[str]) -> str:
    """The lines as a terminal in SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ kvhook demo", style="bold green"))
    for line in lines:
        style = "bold" if line.startswith(("round", "vLLM", "the ")) else "dim" if line.startswith("  (") else ""
        console.print(Text(line, style=style), overflow="crop", no_wrap=True)
    # rich's own template fetches its font from the net; the reader's monospace will do
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code", "monospace").replace(
        "<!-- Generated with Rich https://www.textualize.io -->", ""
    )
    svg = console.export_svg(title="kvhook demo", code_format=template, unique_id="kvhook")
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found
    height = round(WIDTH * float(found[2]) / float(found[1]))
    return svg.replace(found[0], f'{found[0]} width="{WIDTH}" height="{height}"', 1)


if __name__ == "__main__":
    main()
