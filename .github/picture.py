"""Makes the README's picture: runs `kvhook demo` and draws what it printed. Usage: python .github/picture.py"""

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


def main() -> None:
    """Run the demo in an empty folder, as a reader would, and save the picture beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvhook", "demo"]
        environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
        printed = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    console = Console(record=True, width=108, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ kvhook demo", style="bold green"))
    for line in printed.rstrip().splitlines():
        style = "bold" if line.startswith(("round", "vLLM", "the ")) else "dim" if line.startswith("  (") else ""
        console.print(Text(line, style=style), overflow="crop", no_wrap=True)
    # rich's own template fetches its font from the net; the reader's monospace will do
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code", "monospace").replace(
        "<!-- Generated with Rich https://www.textualize.io -->", ""
    )
    console.save_svg(str(HERE / "demo.svg"), title="kvhook demo", code_format=template)
    print(f"{HERE / 'demo.svg'}: {len(printed.splitlines())} lines")


if __name__ == "__main__":
    main()
