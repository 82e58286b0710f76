"""The one line that is told of another library's error."""

from __future__ import annotations

import pytest

from ckd_ray.errors import described, last_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: too long", "ValueError: too long"),
        ("CUDA error: illegal access\nFor debugging consider passing a variable.", "CUDA error: illegal access"),
        (
            "Task was killed.\n Memory on the node (IP: 10.0.0.7, ID: 1f) was 63.1GB used / 64GB limit (0.98)\n"
            "OOM kill reason: above the threshold\nRefer to the documentation on how to address this.",
            "Memory on the node (IP: 10.0.0.7, ID: 1f) was 63.1GB used / 64GB limit (0.98)",
        ),
        ("", "RuntimeError"),
    ],
    ids=["traceback", "CUDA", "memory", "nothing"],
)
def test_advice_does_not_hide_what_has_happened(message: str, line: str) -> None:
    assert last_line(RuntimeError(message)) == line
    assert described(RuntimeError(message)) == f"RuntimeError: {line}"
