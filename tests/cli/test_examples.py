"""The tutorial and the notebook, executed as they stand, with a tiny encoder and few steps."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.ray_head import started_head
from tests.support import ALONE, overrides, tiny_bert

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "examples").glob("*.ipynb"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `bin/ckd-ray`, which makes every training tiny, with one process for each purpose, on one Ray."""
    folder = tmp_path_factory.mktemp("examples")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = Counter(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    backbone = tiny_bert(folder / "encoder", [word for word, _ in words.most_common(2000)])
    sizes = overrides("runs", backbone, "x", *ALONE)[5:]  # the run and the collection are those of the example
    settings = " ".join(f"--set {value}" for value in sizes if not value.startswith("evaluate."))
    (folder / "bin").mkdir()
    script = folder / "bin" / "ckd-ray"
    script.write_text(
        f"""#!/bin/bash
case "$1" in
  train | evaluate) exec {sys.executable} -m ckd_ray "$@" --cluster 127.0.0.1:{port} {settings} ;;
  *) exec {sys.executable} -m ckd_ray "$@" ;;
esac
"""
    )
    script.chmod(0o755)
    (folder / "bin" / "python").symlink_to(sys.executable)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with started_head(tmp_path_factory.mktemp("head"), environment, f"--port={port}", "--include-dashboard=false"):
        yield folder


def _run(command: list[str], place: Path) -> str:
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _shrink(data: Path) -> None:
    """Few queries of each split, and their passages: the tutorial trains three students."""
    kept: set[str] = set()
    for split, count in (("train", 24), ("dev", 6), ("test", 6)):
        for name in (f"queries.{split}.tsv", f"qrels.{split}.tsv"):
            lines = (data / name).read_text().splitlines(keepends=True)[:count]
            (data / name).write_text("".join(lines))
            kept |= {line.partition("\t")[0] for line in lines}  # a passage has the id of its query
    lines = (data / "collection.tsv").read_text().splitlines(keepends=True)
    (data / "collection.tsv").write_text("".join(line for line in lines if line.partition("\t")[0] in kept))


@pytest.mark.slow
def test_the_commands_of_the_tutorial_work_in_their_order(place: Path) -> None:
    """All but the installation: the files, the configuration, training, looking inside, a change, search, export."""
    blocks = _FENCE.findall((DOCS / "tutorial.md").read_text())
    first = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    seen = Counter[str]()
    for language, block in blocks[first:]:
        name = {"python": "step.py", "yaml": "mine.yaml", "bash": "step.sh"}.get(language)
        if name is None:
            continue
        if language == "bash":
            queries = place / "mydata" / "queries.train.tsv"
            block = block.replace("QUERY_ID", queries.read_text().partition("\t")[0])
        (place / name).write_text(block)
        if language != "yaml":
            _run([sys.executable, name] if language == "python" else ["bash", "-e", name], place)
        if name == "step.py" and not seen:
            _shrink(place / "mydata")
        seen.update(re.findall(r"ckd-ray (\w+)", block) if language == "bash" else [language])
    commands = {"train", "report", "inspect", "evaluate", "search", "export"}
    assert commands <= set(seen) and seen["python"] == 2 and seen["yaml"] == 1
    for made in ("report.html", "student/model.safetensors", "exports/pylate/README.md"):
        assert (place / "runs" / "mine" / made).exists(), made
    assert (place / "runs" / "mine-2" / "evaluation" / "table.json").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_sound_and_small(notebook: Path) -> None:
    """The form that nbformat 4.5 asks for, and no outputs, which would be of some machine."""
    found = json.loads(notebook.read_text())
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5) and set(found) == {
        "cells", "metadata", "nbformat", "nbformat_minor",
    }  # fmt: skip
    names = [cell["id"] for cell in found["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)
    for cell in found["cells"]:
        more = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | more
        assert all(isinstance(line, str) for line in cell["source"]) and not cell.get("outputs")
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    assert notebook.stat().st_size < 20_000


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(notebook: Path, place: Path) -> None:
    """Its code cells, one after the other; the last value of each is printed, as a notebook shows it."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    (place / "cells.json").write_text(json.dumps(sources))
    (place / "cells.py").write_text(
        """
import ast, json
space = {}
for source in json.load(open("cells.json")):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    print(repr(eval(compile(ast.Expression(last.value), "cell", "eval"), space)) if last else "")
"""
    )
    printed = _run([sys.executable, "cells.py"], place)
    assert "'test': {'queries': 50" in printed and "('distill'," in printed and "'student': 0." in printed
    assert len(re.findall(r"\(-?\d+\.\d+, '", printed.splitlines()[-1])) == 3, "three passages are found"
