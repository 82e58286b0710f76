"""The record of a soak as Markdown: `python -m tests.fault.soak_table docs/faults.json docs/faults.md`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def rows(faults: list[dict[str, Any]], kinds: list[str], stages: list[str]) -> list[dict[str, Any]]:
    """One row a kind and stage."""
    found = []
    for kind in kinds:
        for stage in stages:
            mine = [f for f in faults if (f["kind"], f["stage"]) == (kind, stage)]
            if mine:
                well = [f for f in mine if not f["outcome"].startswith("FAILED")]
                row = {"kind": kind, "stage": stage, "injected": len(mine)}
                row |= {"went_on": sum(f["outcome"] == "went on" for f in well)}
                row |= {"stopped": len(well) - row["went_on"], "failed": len(mine) - len(well)}
                extra = sorted(f["extra"] for f in well)
                if extra:
                    row |= {"extra_seconds_median": extra[len(extra) // 2], "extra_seconds_most": extra[-1]}
                found.append(row)
    return found


def table(record: dict[str, Any]) -> str:
    """The record as docs/faults.md."""
    usual = ", ".join(f"{stage} {seconds:g} s" for stage, seconds in record["undisturbed_seconds"].items())
    machine, stops = record["machine"], record["stop_seconds"]
    lines = [
        "# Faults injected, and what became of them",
        "",
        f"`{record['command']}` on {machine['cpus']} CPU cores ({machine['platform']}): {record['injected']} faults in"
        f" {record['runs']} runs of the whole job on a tiny collection (160 passages, 300 training queries, shards of 16,"
        f" Ray started by the command), {record['failed']} of them failed. A run is well when its rankings, labels, the"
        " weights of teacher and student, its TREC runs and the values of every query are those of an undisturbed run,"
        " to the bit.",
        "",
        "*Went on*: the command ended well by itself. *Stopped*: it ended with exit status 1 or 2 and one message, without"
        " a traceback (a killed driver says nothing), and the same command, given again, completed. *More time*: seconds"
        f" that the stage took beyond an undisturbed one ({usual}), further commands with their starts included; several"
        " faults of one stage share it, and the machine was not quiet.",
        "",
        "| kind | stage | injected | went on | stopped, then completed | failed | more time, median / most |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["table"]:
        extra = (
            ""
            if "extra_seconds_median" not in row
            else f"{row['extra_seconds_median']:g} / {row['extra_seconds_most']:g} s"
        )
        lines.append(
            f"| {row['kind']} | {row['stage']} | {row['injected']} | {row['went_on']} | {row['stopped']} | {row['failed']} |"
            f" {extra} |"
        )
    causes = Counter((f["kind"], f["cause"]) for f in record["faults"] if f["cause"] and f["cause"] != "killed")
    lines += [
        "",
        f"Stopped processes (SIGSTOP) went on after {stops[0]:g} s, a few after {stops[1]:g} s. A clock jump is one of"
        " `time.time()` in the driver, by a day forth and back; no machine's clock was set. *No memory*: the address space"
        " of an actor (RLIMIT_AS) is cut to what it has at that moment. Disk full: the run lies on a tmpfs of 96 MiB that"
        " is filled; read-only: that is mounted again without writing before the command starts. A shard of another run is a whole one from a run of"
        " the same settings, under the name of another shard.",
        "",
        "What the commands that stopped have said:",
        "",
        "| kind | times | message |",
        "|---|---|---|",
    ]
    for (kind, cause), count in causes.most_common(40):
        text = cause.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {kind} | {count} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(table(json.loads(Path(sys.argv[1]).read_text())))
