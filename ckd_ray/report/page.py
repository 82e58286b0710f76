"""`ckd-ray report RUN`: one HTML file with everything in it, that opens without a network and runs only our script."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources

from ckd_ray.files import write_atomic
from ckd_ray.progress import without_secrets
from ckd_ray.report import sections, trials
from ckd_ray.report.facts import Facts, gather
from ckd_ray.runs.finished import FinishedRun, reading

_SECTIONS = (
    ("table", "Student against the others", sections.table),
    ("comparison", "Objectives compared", sections.comparison),
    ("search", "Search for settings", trials.search),
    ("curves", "Training", sections.curves),
    ("wins", "Queries won and lost", sections.wins),
    ("labels", "Labels", sections.labels),
    ("stages", "Stages", sections.stages),
    ("environment", "Environment and configuration", sections.environment),
)


def write_report(run: FinishedRun, out: str | None = None) -> str:
    """Write the page of a run; `RUN/report.html` unless `out` says where. Returns where it is."""
    where = out or run.path("report.html")
    with reading(run.folder):
        page = render_page(gather(run)).encode()
    write_atomic(where, lambda stream: stream.write(page))
    return where


def render_page(facts: Facts) -> str:
    """The page as text. The policy in its head lets no script run but ours, which is named by its hash."""
    script = _asset("page.js")
    shown = [(name, title, body) for name, title, make in _SECTIONS if (body := make(facts))]
    main = "".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in shown)
    values = {
        "title": escape(f"{facts.run.name}: ckd-ray report"),
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": _asset("page.css"),
        "header": sections.header(facts),
        "nav": "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown),
        "main": main,
        "footer": f"<p>{escape(facts.run.folder)}</p>",
        "script": script,
    }
    # The template is cut once, so that braces in what is filled in mean nothing.
    parts = _asset("page.html").split("{{")
    page = parts[0]
    for part in parts[1:]:
        name, _, rest = part.partition("}}")
        # A page is passed on: keys in URIs are hidden wherever they came from.
        page += (values[name] if name in ("script", "style", "script_hash") else without_secrets(values[name])) + rest
    return page


def _asset(name: str) -> str:
    return resources.files("ckd_ray.report").joinpath(name).read_text(encoding="utf-8")
