"""Cut a collection in the MS MARCO layout to a part that a small machine can train on many times.

    python benchmarks/part.py --data DIR --out DIR [--train 3200] [--dev 500]

Keeps all test queries with all their judged passages, so that a test measure means the same pool, and the first
training and dev queries with theirs; no other passages. Prints the sizes as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--train", type=int, default=3200, help="training queries")
    parser.add_argument("--dev", type=int, default=500, help="dev queries")
    args = parser.parse_args()
    print(json.dumps(cut(Path(args.data), Path(args.out), {"train": args.train, "dev": args.dev, "test": None})))


def cut(source: Path, out: Path, most: dict[str, int | None], passages: int = 0) -> dict[str, int]:
    """Write the part; `most` queries of each split, None for all, and the first other passages up to `passages` in all.
    Returns its sizes."""
    out.mkdir(parents=True, exist_ok=True)
    wanted: set[str] = set()
    sizes = {}
    for split, count in most.items():
        labels = [line.split("\t") for line in _lines(source / f"qrels.{split}.tsv")]
        known = list(dict.fromkeys(row[0] for row in labels))[:count]
        kept = set(known)
        labels = [row for row in labels if row[0] in kept]
        wanted |= {row[2] for row in labels}
        queries = [line for line in _lines(source / f"queries.{split}.tsv") if line.partition("\t")[0] in kept]
        _write(out / f"qrels.{split}.tsv", ["\t".join(row) for row in labels])
        _write(out / f"queries.{split}.tsv", queries)
        sizes[split] = len(queries)
    others, kept_lines = max(0, passages - len(wanted)), []
    for line in _lines(source / "collection.tsv"):
        labelled = line.partition("\t")[0] in wanted
        others -= not labelled
        if labelled or others >= 0:
            kept_lines.append(line)
    _write(out / "collection.tsv", kept_lines)
    return {**sizes, "passages": len(kept_lines)}


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8").removesuffix("\n")  # which the last line need not have
    return text.split("\n") if text else []


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
