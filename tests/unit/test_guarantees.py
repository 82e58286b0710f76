"""guarantees.md promises nothing that no test holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "explanation" / "guarantees.md").read_text()
    promised, _, rest = text.partition("## What is not promised")
    promises = re.findall(r"^- .*$", promised, re.MULTILINE)
    assert len(promises) > 30 and rest
    assert [p for p in promises if not NAMED.search(p)] == []
    missing = []
    for file, name in set(NAMED.findall(text)):
        path = ROOT / file
        tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}::{name}")
    assert missing == []
    # Every mention of a test is one that was looked at.
    assert text.count("tests/") == len(NAMED.findall(text))
