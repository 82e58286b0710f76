"""`ckd-ray report RUN`: one HTML file with everything in it. It needs no network and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from ckd_ray.errors import UserError
from ckd_ray.evaluate.table import SYSTEMS
from ckd_ray.files import is_folder, write_atomic
from ckd_ray.inspection.inspect import by_depth
from ckd_ray.progress import duration, without_secrets
from ckd_ray.report import curves, plots, trials
from ckd_ray.report.facts import Facts, gather
from ckd_ray.runs.finished import FinishedRun, reading

# Each is a template of this name; one that has nothing to show is left out.
_SECTIONS = {
    "labels": "What the labels look like",
    "wins": "Queries won and lost",
    "table": "Student against the others",
    "comparison": "Objectives compared",
    "search": "Search for settings",
    "curves": "Training",
    "stages": "Stages",
    "environment": "Environment and configuration",
}


def write_report(run: FinishedRun, out: str | None = None) -> str:
    """Write the page of a run to `out`, by default `RUN/report.html`. Returns where it is.

    Raises:
        UserError: a file of the run is missing, or is not what ckd-ray writes; or `out` is a folder.
    """
    where = out or run.paths.report
    if is_folder(where):
        raise UserError("this is a folder", where=f"--out {where}", expected="a file to write", fix="--out FILE.html")
    with reading(run.paths.folder):
        page = render_page(gather(run)).encode()
    write_atomic(where, lambda stream: stream.write(page))
    return where


def render_page(facts: Facts) -> str:
    """The page as text. Its policy lets no script run but ours, which it names by its hash.

    Raises:
        ValueError: a value that the page needs is missing in the files of the run.
    """
    templates, script = _templates(), _asset("page.js")
    try:
        bodies = {name: templates.get_template(f"{name}.html").render(facts=facts) for name in _SECTIONS}
        # Markup: the templates have escaped it.
        sections = [(name, title, Markup(bodies[name])) for name, title in _SECTIONS.items() if bodies[name].strip()]  # noqa: S704
        page = templates.get_template("page.html").render(
            facts=facts,
            sections=sections,
            style=_asset("page.css"),
            script=script,
            script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    except TemplateError as error:
        raise ValueError(str(error)) from error
    return without_secrets(page)  # a page is passed on


class _Missing(StrictUndefined):
    """A value that the files of a run lack: an error that names it, in a number's format as well."""

    def __format__(self, spec: str) -> str:
        return str(self)


def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("ckd_ray.report"),
        autoescape=True,
        undefined=_Missing,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "fixed": "{:.4f}".format,
        "signed": "{:+.4f}".format,
        "percent": "{:.0%}".format,
        "count": "{:,}".format,
        "number": plots.number,
        "in_words": trials.in_words,
        "duration": duration,
        "system": lambda name: SYSTEMS.get(name, name),  # as people read it
        "yaml": _as_yaml,
    }
    found.filters |= filters
    found.globals |= {"plots": plots, "curves": curves, "trials": trials, "by_depth": by_depth}
    return found


def _as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))


def _asset(name: str) -> Markup:
    """A file beside the templates that is no template: braces in it mean nothing to Jinja."""
    return Markup(resources.files("ckd_ray.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8"))  # noqa: S704
