"""Makes the pictures of this folder from a finished run: `python docs/pictures/make.py runs/quickstart`.

Each terminal picture is what the command prints in a terminal of 100 columns, set by rich; the report is its first
screen in Chromium. Needs `ckd-ray` with its dependencies, and Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
COLUMNS = 100
MOST_BYTES = 200_000


def terminal(command: list[str], folder: Path) -> str:
    """What the command prints in a terminal, escape codes included. Raises when it fails."""
    ours, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=its, stderr=its, stdin=its, cwd=folder, env=environment)
    os.close(its)
    printed = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # the end, on Linux
            break
        if not block:
            break
        printed += block
    os.close(ours)
    if process.wait():
        raise SystemExit(f"{shlex.join(command)}: status {process.returncode}\n{printed.decode(errors='replace')}")
    return re.sub(
        r"[^\n]*\r(?!\n)", "", printed.decode().replace("\r\n", "\n")
    )  # a line that is rewritten shows its end


def terminal_page(title: str, printed: str) -> tuple[str, int, int]:
    """A page with the terminal, and its width and height in pixels."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(printed.rstrip()))
        svg = console.export_svg(title=title)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # nothing is fetched from elsewhere
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    width, height = (float(number) for number in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    shown = 1000
    style = f"<style>body {{ margin: 0 }} svg {{ width: {shown}px }}</style>"
    return style + svg, shown, round(height * shown / width)


def screenshot(page: Path, out: Path, width: int, height: int) -> None:
    """A PNG of the page's first screen."""
    with tempfile.TemporaryDirectory() as profile:
        size = f"--window-size={width},{height}"
        command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={profile}", size, f"--screenshot={out}"]
        subprocess.run([*command, f"file://{page}"], check=True, capture_output=True, timeout=300)
    if out.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{out}: {out.stat().st_size:,} bytes, more than {MOST_BYTES:,}")


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--query", default="how do I read a parquet file?", help="of the picture of `search`")
    parser.add_argument("--data", type=Path, help="a folder of files, for the picture of `init`")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("no Chromium and no Chrome on this machine")
    run = arguments.run.resolve()
    ours = [sys.executable, "-m", "ckd_ray"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "runs").mkdir()
        (folder / "runs" / run.name).symlink_to(run)  # so that the pictures show the names of the tutorial
        shown = {"search": ["search", f"runs/{run.name}", arguments.query, "--top", "3"]}
        if arguments.data:
            (folder / arguments.data.name).symlink_to(arguments.data.resolve())
            shown["init"] = ["init", arguments.data.name, "--output", "mine.yaml"]
        for name, words in shown.items():
            html, width, height = terminal_page(f"ckd-ray {shlex.join(words)}", terminal([*ours, *words], folder))
            (folder / f"{name}.html").write_text(html)
            screenshot(folder / f"{name}.html", HERE / f"{name}.png", width, height)
        subprocess.run([*ours, "report", str(run), "--out", str(folder / "report.html")], check=True)
        screenshot(folder / "report.html", HERE / "report.png", 1000, 900)


if __name__ == "__main__":
    main()
