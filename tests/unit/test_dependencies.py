"""What the package needs: pinned completely, and installed by names that there are."""

from __future__ import annotations

import re
from collections import deque
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements")
ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()


def listed(name: str) -> list[str]:
    """The requirements of a list in pyproject.toml; Python 3.10 has no reader of TOML."""
    found = re.search(rf"^{name} = \[(.*?)\](?=\s*(#.*)?$)", PROJECT, re.M | re.S)
    assert found is not None, name
    return re.findall(r'^[^#"]*"([^"]+)"', found[1].replace('", "', '",\n"'), re.M)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, set[str]]:
    """The versions of each package for the Python that runs this."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            one = packaging.Requirement(line)
            if one.marker is None or one.marker.evaluate():
                (pin,) = one.specifier
                assert pin.operator == "==", line
                found.setdefault(canonical(one.name), set()).add(pin.version)
    return found


def test_every_package_that_the_tests_install_is_pinned_once() -> None:
    known, seen, missing = pins(), set(), set()
    waiting = deque(packaging.Requirement(text) for name in ("dependencies", "test") for text in listed(name))
    while waiting:
        one = waiting.popleft()
        name = canonical(one.name)
        if (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        if name == "ckd-ray":
            waiting.extend(packaging.Requirement(text) for extra in one.extras for text in listed(extra))
            continue
        if name not in known:
            missing.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:  # of another build, such as CUDA's parts of torch
            continue
        for text in needed:
            other = packaging.Requirement(text)
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                waiting.append(other)
    assert len(seen) > 100 and not missing, f"run .ci/constraints: {sorted(missing)}"
    assert not {name for name, versions in known.items() if len(versions) > 1}


def test_pins_are_within_the_ranges_of_the_package() -> None:
    known = pins()
    for text in listed("dependencies"):
        one = packaging.Requirement(text)
        (version,) = known[canonical(one.name)]
        assert version in one.specifier, f"{text}, pinned to {version}"


def test_ray_and_transformers_have_a_cap() -> None:
    """Their private parts are used (test_private_parts.py), so a version that nobody has tried is not installed."""
    for name in ("ray", "transformers"):
        (text,) = [text for text in listed("dependencies") if re.match(rf"{name}\b", text)]
        assert any(part.operator == "<" for part in packaging.Requirement(text).specifier), text
    ranges = {
        str(packaging.Requirement(t).specifier) for t in (*listed("dependencies"), *listed("cluster")) if t[:3] == "ray"
    }
    assert len(ranges) == 1


def test_old_names_of_extras_still_install() -> None:
    assert listed("datasets") == ["ckd-ray[ir]"] and listed("bm25") == []
    assert [packaging.Requirement(text).name for text in listed("ir")] == ["ir_datasets"]
