"""`.ci/advisories`: pinned versions against a hand-made copy of the advisory database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = """
id: PYSEC-1
aliases: [CVE-1]
affected:
- package: {ecosystem: PyPI, name: Some_Package}
  ranges:
  - type: GIT
    events: [{introduced: "0"}]
  - type: ECOSYSTEM
    events:
    - introduced: "1.2"
    - fixed: "1.4"
    - introduced: "2.0"
    - last_affected: "2.1"
  versions: ["0.9"]
"""


def ask(database: Path, folder: Path, *pins: str) -> tuple[int, list[str]]:
    constraints = folder / "constraints.txt"
    constraints.write_text("# pinned\n" + "".join(f"{pin}\n" for pin in pins))
    command = [sys.executable, str(ROOT / ".ci" / "advisories"), str(database), str(constraints)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines()


def test_versions_in_a_range_or_a_list_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "database" / "vulns" / "some-package"
    folder.mkdir(parents=True)
    (folder / "PYSEC-1.yaml").write_text(RECORD)
    (folder / "PYSEC-2.yaml").write_text("withdrawn: '2024-01-01'\n" + RECORD.replace("PYSEC-1", "PYSEC-2"))
    database = tmp_path / "database"
    for version, affected in {
        "0.9": 1, "1.1": 0, "1.2": 1, "1.3.9": 1, "1.4": 0, "1.4rc1": 1, "2.0": 1, "2.1": 1, "2.1.1": 0
    }.items():  # fmt: skip
        status, lines = ask(database, tmp_path, f"some.package=={version}", "other==1.3")
        assert (status, len(lines)) == (affected, 1 + affected), version
        assert lines[-1] == f"2 packages, 2 advisories of them, {affected} of a pinned version"
        if affected:
            assert lines[0] == f"some-package {version}: PYSEC-1 CVE-1"


def test_a_clone_without_files_is_read_from_its_newest_commit(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "vulns" / "some-package"
    folder.mkdir(parents=True)
    (folder / "PYSEC-1.yaml").write_text(RECORD)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, "-C", str(tmp_path / "work"), *command], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(tmp_path / "work"), str(tmp_path / "bare")], check=True)
    assert ask(tmp_path / "bare", tmp_path, "some-package==1.3")[0] == 1
    assert ask(tmp_path / "bare", tmp_path, "some-package==1.5") == (
        0,
        ["1 packages, 1 advisories of them, 0 of a pinned version"],
    )
