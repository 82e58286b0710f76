"""README and docs/: links, names of files, commands and configurations in them are real, and generated pages are
current."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer.main
import yaml

from ckd_ray.checks import load_config
from ckd_ray.cli import app, reference as cli_reference
from ckd_ray.config import reference as config_reference
from ckd_ray.config.schema import Config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "tests").rglob("*.md")])
# Their text is a record of its time: commands and files of then.
RECORDS = {ROOT / "CHANGELOG.md", DOCS / "log.md"}
GUIDES = [page for page in PAGES if page not in RECORDS]

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text()))


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    found: set[str] = set()
    for heading in headings:
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = sum(other == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", other) is not None for other in found)
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in _LINK.findall(_prose(DOCS / "README.md"))}
    assert set(DOCS.rglob("*.md")) - {DOCS / "README.md"} <= listed


def test_docs_holds_pages_pictures_and_examples_alone() -> None:
    files = {path for path in DOCS.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.suffix for path in files - {DOCS / "pictures" / "make.py"}} <= {".md", ".svg", ".png", ".ipynb"}
    assert all(path.stat().st_size < 200_000 for path in files if path.suffix == ".png")


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    pattern = r"(?<![\w/.])(?:ckd_ray|tests|configs|cluster|benchmarks|docs)/[\w./-]*\w/?"
    named = {name for name in re.findall(pattern, page.read_text()) if re.search(r"\.\w+$|/$", name)}
    assert sorted(name for name in named if "NAME" not in name and not (ROOT / name).exists()) == []


def test_pages_that_the_sources_name_are_there() -> None:
    """By path from the root, or by the name of the file alone."""
    names = {page.name for page in PAGES}
    missing = set()
    for folder in ("ckd_ray", "tests", "configs", "cluster", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".yaml", ".c") or path == Path(__file__):
                continue
            lines = "\n".join(line for line in path.read_text().splitlines() if ".md" in line)
            for page in re.findall(r"""(?<![\w/.{"'`-])[\w/-]+\.md\b""", lines):
                if not ((ROOT / page).exists() if "/" in page else page in names):
                    missing.add(f"{_name(path)}: {page}")
    assert sorted(missing) == []


def test_generated_pages_are_current() -> None:
    for module, page in ((config_reference, "configuration.md"), (cli_reference, "cli.md")):
        fresh = f"python -m {module.__name__} > docs/reference/{page}"
        assert (DOCS / "reference" / page).read_text() == module.page(), fresh


def test_every_key_has_a_meaning() -> None:
    sections: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    for name, section in sections.items():
        assert set(config_reference.meanings_of(section)) == set(section.model_fields), name


def test_the_drawing_has_the_layers_of_the_contract() -> None:
    drawing = (DOCS / "explanation" / "architecture.md").read_text().partition("<!-- layers")[2]
    lines = _FENCE.findall(drawing)[0][1].splitlines()
    drawn = [re.split(r"\s{2,}", line)[0] for line in lines]
    contract = (ROOT / "pyproject.toml").read_text().partition("\nlayers = [")[2].partition("]")[0]
    assert drawn == re.findall(r'"([^"]+)"', contract)


def _commands(page: Path) -> Iterator[list[str]]:
    """The words of every `ckd-ray` command in the page's blocks."""
    for language, block in _FENCE.findall(page.read_text()):
        if language != "bash":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line):
                words = shlex.split(part, comments=True)
                at = next((i for i, word in enumerate(words) if word.endswith("ckd-ray")), None)
                if at is not None and not any("=" not in word for word in words[:at]):
                    yield [word for word in words[at + 1 :] if word != "..."]


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_commands_are_real(page: Path) -> None:
    """They parse, and every key that they set takes its value."""
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    for name, *words in _commands(page):
        if "|" in " ".join(words):  # a choice, written as one
            continue
        given = commands[name].make_context(name, list(words)).params
        config = ROOT / (given.get("config") or "none")
        sets = [re.sub(r"\$\w+", "1", override) for override in given.get("set_") or []]  # of a loop in the shell
        load_config(str(config) if config.exists() else None, sets)


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    for language, block in _FENCE.findall(page.read_text()):
        if language == "yaml":
            assert isinstance(yaml.safe_load(block), dict)
            (tmp_path / "some.yaml").write_text(block)
            load_config(str(tmp_path / "some.yaml"))


def test_the_tutorial_makes_its_example(tmp_path: Path) -> None:
    """The script of the tutorial, as it stands there, makes a collection that the readers take."""
    block = next(b for language, b in _FENCE.findall((DOCS / "tutorial.md").read_text()) if language == "python")
    (tmp_path / "make_example.py").write_text(block)
    subprocess.run(["python3", "make_example.py"], cwd=tmp_path, check=True, capture_output=True)
    from ckd_ray.data import build_collection

    config = load_config(None, ["collection.format=msmarco", f"collection.path={tmp_path / 'mydata'}"])
    built = build_collection(config.collection, str(tmp_path / "run"))
    assert built.num_passages > 300 and set(built.splits) == {"train", "dev", "test"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    picture = (DOCS / "pipeline.svg").read_text()
    assert "prefers-color-scheme: dark" in picture and "<title" in picture
