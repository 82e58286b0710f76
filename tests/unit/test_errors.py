"""The one line that is told of another library's error."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from ckd_ray.errors import described, last_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: too long", "ValueError: too long"),
        ("CUDA error: illegal access\nFor debugging consider passing a variable.", "CUDA error: illegal access"),
        (
            # as Ray 2.60 writes it
            "1 worker(s) were killed. Memory on the node (IP: 10.0.0.7, ID: 1f) was 63.1GB used / 64GB limit (0.98)\n"
            "OOM kill reason: above the threshold\nRefer to the documentation on how to address this.",
            "1 worker(s) were killed. Memory on the node (IP: 10.0.0.7, ID: 1f) was 63.1GB used / 64GB limit (0.98)",
        ),
        (
            "When reading key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION\nFailed to open input file b/a after"
            " 10/10 attempts (total backoff 120.0s).\nThis may be transient.",
            "When reading key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION",
        ),
        ("Failed to apply it after 1/1 attempts (total backoff 0.0s).\nThis may be transient.", "RuntimeError"),
        ("", "RuntimeError"),
    ],
    ids=["traceback", "CUDA", "memory", "storage", "no message of its own", "nothing"],
)
def test_advice_does_not_hide_what_has_happened(message: str, line: str) -> None:
    assert last_line(RuntimeError(message)) == line
    assert described(RuntimeError(message)) == f"RuntimeError: {line}"


def test_an_error_of_a_task_is_the_one_that_was_raised_there() -> None:
    cause = OSError("no route to the host")
    task_error = RayTaskError("read", "Traceback of the task", cause)
    assert described(task_error) == described(task_error.as_instanceof_cause()) == "OSError: no route to the host"
