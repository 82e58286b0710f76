"""A collection of this machine's manual pages, to try ckd-ray on data that nobody has looked at.

    python benchmarks/manual_pages.py FOLDER [--pages N] [--seed S]
    ckd-ray init FOLDER && ckd-ray train --config config.yaml

A query is the one line that says what a page is about (NAME), its answer the text of DESCRIPTION, up to 3,000
characters. Pages whose description repeats that line, and lines that two pages have, are left out. Writes
`pages.jsonl`, `questions.csv` and `answers.csv`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
from pathlib import Path

MANUALS = Path("/usr/share/man")
_MOST_CHARACTERS = 3000
# Requests of roff whose arguments are text; other lines that begin with a dot are layout.
_TEXT = re.compile(r"[.'](?:B|I|BR|IR|RB|RI|BI|IB|SB|SM|Nm|Fl|Ar|Pa|Xr|Dq|Sq|Nd|Li|Em|Sy|Cm|Ev|Va)\s+(.*)")
_SPELLED = [
    (re.compile(r"\\f(\[[^\]]*\]|\(..|.)"), ""),
    (re.compile(r"\\\((em|en)"), "-"),
    (re.compile(r"\\\((aq|cq|oq)"), "'"),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\ "), " "),
    (re.compile(r"\\(&|\[?[a-z]{2}\]?)"), ""),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=4)
    args = parser.parse_args()
    files = sorted(MANUALS.glob("man[1-8]/*"))
    random.Random(args.seed).shuffle(files)
    rows: dict[str, tuple[str, str]] = {}
    seen = set[str]()
    for file in files:
        if len(rows) == args.pages:
            break
        query, passage = read(file)
        sound = 4 <= len(query.split()) <= 25 and len(passage.split()) >= 25
        if sound and query.lower() not in seen and query.lower() not in passage.lower():
            seen.add(query.lower())
            rows[file.name.removesuffix(".gz")] = (query, passage)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"page": page, "body": text}, ensure_ascii=False) for page, (_, text) in rows.items())
    (args.folder / "pages.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write(
        args.folder / "questions.csv", ["question_id", "question"], [(i, q) for i, (q, _) in enumerate(rows.values())]
    )
    write(args.folder / "answers.csv", ["question_id", "page", "relevance"], [(i, p, 1) for i, p in enumerate(rows)])
    print(f"{len(rows):,} of {len(files):,} manual pages -> {args.folder}")


def read(file: Path) -> tuple[str, str]:
    """(what the page is about, its description) of a manual page; empty where it has no such sections."""
    try:
        with gzip.open(file, "rt", errors="replace") if file.suffix == ".gz" else file.open(errors="replace") as source:
            text = source.read()
    except OSError:
        return "", ""
    name, description = section(text, "NAME"), section(text, "DESCRIPTION")
    about = re.search(r"^\.Nd\s+(.*)$", name, re.M)
    query = plain(about[1]) if about else plain(name).split(" - ", 1)[-1]
    return query, plain(description)[:_MOST_CHARACTERS]


def section(text: str, title: str) -> str:
    found = re.search(rf'^\.S[Hh]\s+"?{title}"?\s*\n(.*?)(?=^\.S[Hh]\s|\Z)', text, re.S | re.M)
    return found[1] if found else ""


def plain(text: str) -> str:
    """The words of roff's source, on one line."""
    for pattern, spelled in _SPELLED:
        text = pattern.sub(spelled, text)
    kept = []
    for line in text.split("\n"):
        request = _TEXT.match(line)
        if request:
            kept.append(request[1].replace('"', ""))
        elif not line.startswith((".", "'")):
            kept.append(line)
    return " ".join(" ".join(kept).split())


def write(path: Path, header: list[str], rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
