"""The parts of the soaks that need neither hosts nor Ray."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.fault.soak_hosts import KINDS, Later
from tests.fault.soak_table import rows, table_of_hosts
from tests.fault.soaking import HUNG, STAGES, Fault, judge_stop, plan


def test_faults_are_spread_over_kinds_and_stages() -> None:
    faults: list[Fault] = []
    rules = {"not_in": {"actor": {"collection"}}, "ending": {"driver", "head"}, "seldom": {"long": 2}}
    for run in range(6):
        chosen = plan(random.Random(run), faults, ["actor", "driver", "head", "long", "slow"], 3, **rules)
        assert all(len({"driver", "head"} & {*kinds}) <= 1 for kinds in chosen.values())
        faults += [Fault(kind, stage, run, 0.0) for stage, kinds in chosen.items() for kind in kinds]
    counts = Counter((fault.kind, fault.stage) for fault in faults)
    assert ("actor", "collection") not in counts and sum(n for (k, _), n in counts.items() if k == "long") == 2
    assert all(counts["slow", stage] >= 3 for stage in STAGES)


def test_a_stop_needs_a_message_and_no_traceback_of_ours() -> None:
    def judged(code: int, *lines: str, kind: str = "slow") -> tuple[str, Fault]:
        fault = Fault(kind, "embed", 0, 0.0)
        return judge_stop(code, [*lines], [fault], 0, Path("/there")), fault

    trouble, fault = judged(1, "embed: starting", "ckd-ray: /there/run: no room")
    assert (trouble, fault.cause) == ("", "ckd-ray: DIR/run: no room") and fault.outcome.startswith("stopped")
    assert (
        "without a message" in judged(1, "embed: starting")[0] and "without a message" in judged(-11, "ckd-ray: a")[0]
    )
    assert judged(HUNG)[0].startswith("hung")
    assert judged(-9)[0] and not judged(-9, kind="kill driver")[0]
    frame = ["Traceback (most recent call last):", '  File "/x/{}/a.py", line 1', "ValueError: wrong", "ckd-ray: wrong"]
    assert "ValueError" in judged(1, *(line.format("ckd_ray") for line in frame))[0]
    assert not judged(1, *(line.format("ray") for line in frame))[0]


def test_what_is_due_later_is_done_once() -> None:
    later, done, event = Later(), list[str](), threading.Event()
    later.after(60.0, lambda: done.append("soon"))
    later.after(60.0, lambda: done.append("kept"), keep=True)
    later.after(0.01, event.set)
    assert event.wait(10)
    later.now()
    later.now()
    assert done == ["soon"]
    later.now(all_of_them=True)
    assert done == ["soon", "kept"]


def test_the_record_becomes_a_section() -> None:
    faults = [asdict(Fault(kind, "embed", 0, 1.0, "host", "went on", extra=2.0)) for kind in KINDS]
    record = {
        "command": "soak", "machine": {"platform": "Linux", "cpus": 2}, "runs": 1, "injected": len(faults), "failed": 0,
        "undisturbed_seconds": {"embed": 9.0}, "bad_answers": {"error": 3}, "faults": faults,
        "table": rows(faults, [*KINDS], list(STAGES)),
    }  # fmt: skip
    text = table_of_hosts(record)
    assert "3 error" in text and all(f"| {kind} | embed | 1 | 1 | 0 | 0 | 2 / 2 s |" in text for kind in KINDS)
