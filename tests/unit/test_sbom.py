"""The bill of materials: which extras it covers, and the weights that are no Python package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from ckd_ray.model.sources import PINNED

ROOT = Path(__file__).parents[2]
DEVELOPMENT = {"test"}


def test_it_covers_every_extra_that_a_user_installs() -> None:
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([a-z0-9]+) = ", table, re.M))
    installed = re.search(r"'\.\[([a-z0-9,]+)\]'", (ROOT / ".ci" / "sbom").read_text())
    assert installed is not None and set(installed[1].split(",")) == extras - DEVELOPMENT
    assert {"serve", "onnx", "tracking", "gcp"} < extras


def test_the_pinned_weights_are_added_with_their_digest(tmp_path: Path) -> None:
    """Beside what the file holds, and in an order that is the same each time."""
    path = tmp_path / "bom.json"
    path.write_text(json.dumps({"specVersion": "1.6", "components": [{"type": "library", "name": "torch"}]}))
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "sbom_weights.py"), str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    bom = json.loads(path.read_text())
    first, *weights = bom["components"]
    assert first == {"name": "torch", "type": "library"} and bom["specVersion"] == "1.6"
    pinned = {
        f"{source}/{name}": digest
        for source, files in PINNED.items()
        for name, digest in files.items()
        if name.endswith(".safetensors")
    }
    assert pinned and {one["name"]: one["hashes"][0]["content"] for one in weights} == pinned
    assert all(one["type"] == "machine-learning-model" and one["bom-ref"] == one["name"] for one in weights)
    assert all(re.fullmatch("[0-9a-f]{64}", one["hashes"][0]["content"]) for one in weights)
    assert f"{path}: {len(pinned) + 1} components" in done.stderr
