r"""The records of all soaks as Markdown, and several records of one with Ray as a single one.

python -m tests.fault.soak_table tests/fault/faults.json tests/fault/faults_hosts.json tests/fault/faults_parts.json \
    docs/explanation/faults.md
python -m tests.fault.soak_table --together tests/fault/faults.json MONDAY.json TUESDAY.json
"""

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


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several soaks. Seconds of an undisturbed run are those of the last; the machine's, too. A `note` that
    somebody has put into a record, such as what has become of a failure, goes along."""
    faults, first = [], 0
    for record in records:
        faults += [fault | {"run": first + fault["run"]} for fault in record["faults"]]
        first += record["runs"]
    kinds = list(dict.fromkeys(row["kind"] for record in records for row in record["table"]))
    stages = list(records[-1]["undisturbed_seconds"])
    bad = sum((Counter(record.get("bad_answers", {})) for record in records), Counter[str]())
    return {
        **records[-1],
        **({"bad_answers": dict(bad)} if bad else {}),
        **({"note": notes} if (notes := " ".join(record["note"] for record in records if "note" in record)) else {}),
        "command": "; ".join(record["command"] for record in records),
        "runs": first,
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "injected": len(faults),
        "failed": sum(fault["outcome"].startswith("FAILED") for fault in faults),
        "table": rows(faults, kinds, stages),
        "faults": faults,
    }


def table(record: dict[str, Any]) -> str:
    """The record as docs/explanation/faults.md."""
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
        " a traceback of ours (a killed driver says nothing), and the same command, given again, completed. *More time*: seconds"
        f" that the stage took beyond an undisturbed one ({usual}), further commands with their starts included; several"
        " faults of one stage share it, and the machine was not quiet. Where several faults hit one command, its stop is"
        " counted with the last of them.",
        "",
        *_counts(record),
        "",
        f"Stopped processes (SIGSTOP) went on after {stops[0]:g} s, a few after {stops[1]:g} s. A clock jump is one of"
        " `time.time()` in the driver, by a day forth and back; no machine's clock was set. *No memory*: the address space"
        " of an actor (RLIMIT_AS) is cut to what it has at that moment. Disk full: the run lies on a tmpfs of 96 MiB that"
        " is filled; read-only: that is mounted again without writing before the command starts. A shard of another run is a whole one from a run of"
        " the same settings, under the name of another shard. A bit of a file of a finished stage (corpus, queries, teacher,"
        " rankings, labels, student) is turned between two commands.",
        "",
        "What the commands that stopped have said:",
        "",
        *_causes(record),
    ]
    return "\n".join(lines) + "\n"


def table_of_parts(record: dict[str, Any]) -> str:
    """The record of `soak_parts` as a section of docs/explanation/faults.md."""
    lines = [
        "## Without Ray",
        "",
        f"`{record['command']}`: {record['injected']} faults in {record['runs']} runs of the stages without Ray and without"
        " training (collection, embed, retrieve, label and the measures, by the product's own functions in a forked"
        f" process; undisturbed {record['undisturbed_seconds']:g} s), {record['failed']} of them failed. A run is well when"
        " every file of it is that of an undisturbed run, byte by byte, or is a shard that was broken after its last reader"
        " had gone. Stops last a second; *no memory* cuts the address space of the process (RLIMIT_AS) to what it has; disk"
        " full and read-only are those of a small tmpfs, in the middle of a stage.",
        "",
        *_counts(record),
        "",
        "What the processes that stopped have said:",
        "",
        *_causes(record),
    ]
    return "\n".join(lines) + "\n"


def table_of_hosts(record: dict[str, Any]) -> str:
    """The record of `soak_hosts` as a section of docs/explanation/faults.md."""
    usual = ", ".join(f"{stage} {seconds:g} s" for stage, seconds in record["undisturbed_seconds"].items())
    bad = ", ".join(f"{count} {way}" for way, count in record["bad_answers"].items()) or "none"
    machine = record["machine"]
    lines = [
        "## Two hosts and object storage",
        "",
        f"`{record['command']}` on {machine['cpus']} CPU cores ({machine['platform']}), which other work shared:"
        f" {record['injected']} faults in {record['runs']} runs, {record['failed']} of them failed. Two hosts (Linux"
        " namespaces on one bridge) have a Ray node each of one CPU; the head and the command are on the first, and a third"
        " comes and goes. The run lies in a bucket of an S3 server (moto) outside of the hosts. Collection, settings and"
        " the test of equality, to the bit, are those above; every other run has servers for its stores, which are"
        " small enough to do without.",
        "",
        f"An undisturbed run takes {usual}. A host that loses its power is killed with its cable cut, so nobody is told;"
        " another one with an empty disk takes its place after 5 to 15 s, and its Ray node joins. A node that does not"
        " answer Ray's head is dead after half a minute here (by default it takes more than one). *Network*: of the second"
        " host. *Storage out of reach*: what the hosts send to it is lost. *Slow*: 0.2 s before every answer for 20 s."
        " *Failing*: 30 % of the answers for 15 s are errors, break off, or are half of the object as if it were all"
        f" ({bad}). *Killed*: the server dies with what it was doing, and is back after 3 s. *Clock of a host*:"
        " `time.time()` in all Python processes of one host is a day off for 20 s. *Disk full*: that of one host, with"
        " Ray's session, temporary files and the cache, for 15 s. *Short of memory*: Ray's monitor ends every"
        " process on the host that comes. *Head of Ray*: its raylet or its GCS is killed; Ray is started anew, and the"
        " command is given again.",
        "",
        *([record["note"], ""] if "note" in record else []),
        *_counts(record),
        "",
        "What the commands that stopped have said:",
        "",
        *_causes(record),
    ]
    return "\n".join(lines) + "\n"


def _counts(record: dict[str, Any]) -> list[str]:
    lines = [
        "| kind | stage | injected | went on | stopped, then completed | failed | more time, median / most |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["table"]:
        seconds = [row.get(f"extra_seconds_{which}") for which in ("median", "most")]
        extra = "" if None in seconds else "{:g} / {:g} s".format(*seconds)
        cells = [row[name] for name in ("kind", "stage", "injected", "went_on", "stopped", "failed")]
        lines.append(f"| {' | '.join(map(str, cells))} | {extra} |")
    return lines


def _causes(record: dict[str, Any]) -> list[str]:
    lines = ["| kind | times | message |", "|---|---|---|"]
    causes = Counter((f["kind"], f["cause"]) for f in record["faults"] if f["cause"] and f["cause"] != "killed")
    for (kind, cause), count in causes.most_common(40):
        text = cause.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {kind} | {count} | {text} |")
    return lines


if __name__ == "__main__":
    if sys.argv[1] == "--together":
        record = together([json.loads(Path(name).read_text()) for name in sys.argv[3:]])
        Path(sys.argv[2]).write_text(json.dumps(record, indent=1) + "\n")
        sys.exit()
    whole, hosts, parts = (json.loads(Path(name).read_text()) for name in sys.argv[1:4])
    Path(sys.argv[4]).write_text("\n".join([table(whole), table_of_hosts(hosts), table_of_parts(parts)]))
