"""`ckd-ray init`: from a folder of files to a configuration that `ckd-ray train` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckd_ray.checks import load_config
from ckd_ray.data.sources import SPLITS
from ckd_ray.errors import UserError, first_line
from ckd_ray.files import exists, is_local, join, last_part, write_atomic
from ckd_ray.init.configuration import configuration
from ckd_ray.init.facts import Facts, gather
from ckd_ray.init.roles import Given, Layout, Texts, recognise
from ckd_ray.init.splits import set_aside, shared_texts
from ckd_ray.init.tables import Table, open_table, scan
from ckd_ray.init.write import Collection, check_places, write_collection


@dataclass(frozen=True)
class Options:
    """What the command is given.

    Attributes:
        corpus, queries, qrels: files, from here or from the folder.
        output: the configuration; new files come into a folder beside it.
    """

    output: str = "config.yaml"
    corpus: str | None = None
    queries: Sequence[str] = ()
    qrels: Sequence[str] = ()
    seed: int = 17
    force: bool = False

    @property
    def data(self) -> str:
        """The folder for new files."""
        return os.path.abspath(os.path.splitext(self.output)[0] + "-data")


@dataclass(frozen=True)
class Draft:
    """What was found and written."""

    layout: Layout
    facts: Facts
    made: Collection
    aside: dict[str, str]
    notes: list[str]
    options: Options


def draft_config(folder: str, options: Options) -> Draft:
    """Look at the files, and write the configuration.

    Raises:
        UserError: something is not recognised, or the files do not fit together; nothing is written then.
    """
    folder = os.path.abspath(os.path.expanduser(folder)) if is_local(folder) else folder
    check_places(options.output, options.data, folder, options.force)
    tables, aside = scan(folder, lambda uri: uri == options.data)
    given = Given(
        corpus=_given(options.corpus, folder, "--corpus") if options.corpus else None,
        queries=[_given(name, folder, "--queries") for name in options.queries],
        qrels=[_given(name, folder, "--qrels") for name in options.qrels],
    )
    try:
        layout = recognise(tables, given)
    except UserError as error:
        raise _with_aside(error, folder, aside) from None
    facts = gather(layout)
    notes = [*layout.notes, *set_aside(facts, options.seed)]
    try:
        made = write_collection(layout, facts, options.data)
        text = configuration(made, facts, folder, options.seed)
        write_atomic(os.path.abspath(options.output), lambda stream: stream.write(text.encode()))
    except OSError as error:  # a full disk is a JobError already
        where, fix = f"--output {options.output}", "--output FILE in a folder of yours"
        raise UserError("cannot be written", where=where, found=first_line(error), fix=fix) from None
    load_config(options.output)
    return Draft(layout, facts, made, aside, notes, options)


def _given(name: str, folder: str, option: str) -> Table:
    """A file that an option names, from where the command runs or from the folder."""
    for uri in (os.path.abspath(os.path.expanduser(name)) if "://" not in name else name, join(folder, name)):
        if exists(uri):
            return open_table(uri, name if uri.startswith(folder) else last_part(uri))
    raise UserError("this file does not exist", where=option, found=name, expected=f"a file here or in {folder}")


def _with_aside(error: UserError, folder: str, aside: dict[str, str]) -> UserError:
    """The error with the folder's name, and the files that could not be read, one of which may be what is missing."""
    also = "".join(f"; {name}: {reason}" for name, reason in list(aside.items())[:8])
    where = folder if error.where == "DIR" else error.where
    found = f"{error.found or ''}{also}".lstrip("; ")
    return UserError(error.problem, where=where, expected=error.expected, found=found or None, fix=error.fix)


def as_json(draft: Draft) -> dict[str, Any]:
    """The object of `--json`."""
    facts = draft.facts
    return {
        "config": draft.options.output,
        "format": draft.made.format,
        "passages": facts.passages,
        "empty_passages": facts.empty,
        "repeated_passages": facts.repeated,
        "splits": {s: {"queries": len(p.queries), "labels": len(p.labels)} for s, p in facts.parts.items()},
        "unknown": {what: {"labels": facts.unknown_count[what], "examples": e} for what, e in facts.unknown.items()},
        "shared_queries": {split: len(found) for split, found in shared_texts(facts).items()},
        "written": draft.made.written,
        "notes": draft.notes,
    }


def render(draft: Draft) -> str:
    """What was assumed, counted and written, in lines for people."""
    layout, facts = draft.layout, draft.facts
    lines = ["read as", f"  corpus   {_texts(layout.corpus)}"]
    lines += [f"  queries  {_texts(layout.queries[split])}" for split in (*SPLITS, None) if split in layout.queries]
    for labels in (layout.qrels[split] for split in (*SPLITS, None) if split in layout.qrels):
        columns = f"query {_column(labels.query)}, passage {_column(labels.passage)}"
        graded = f"grade {_column(labels.grade)}" if labels.grade else "no grades, so each label counts 1"
        lines.append(f"  qrels    {labels.table.name}: {columns}, {graded}")
    lines += [f"  {note}" for note in draft.notes]
    lines += [f"  not read: {name} ({reason})" for name, reason in draft.aside.items()]
    median, most = facts.words
    lines += ["counted", f"  {facts.passages:,} passages; median {median} words, 95 % have at most {most}"]
    for split, part in ((s, facts.parts[s]) for s in SPLITS if s in facts.parts):
        bare = len(part.queries) - len({label.query for label in part.labels})
        more = f", {bare:,} queries without a label" if bare else ""
        lines.append(f"  {split:<5}    {len(part.queries):,} queries, {len(part.labels):,} labels{more}")
    warnings = _warnings(facts)
    lines += ["warnings", *(f"  {warning}" for warning in warnings)] if warnings else []
    output = draft.options.output
    lines += ["written", f"  {output}", *(f"  {path}" for path in draft.made.written)]
    return "\n".join([*lines, f"next: ckd-ray train --config {output} --until collection, then without --until"])


def _texts(texts: Texts) -> str:
    title = f", title {_column(texts.title)} (in front of the text)" if texts.title else ""
    return f"{texts.table.name}: id {_column(texts.id)}, text {_column(texts.text)}{title}"


def _column(name: str) -> str:
    return f"in column {name}" if name.isdigit() else name


def _warnings(facts: Facts) -> list[str]:
    found: list[str] = []
    if facts.empty:
        found.append(f"{facts.empty:,} passages are empty")
    if facts.repeated:
        reason = "of two equal passages one is labelled, and the other counts as wrong"
        found.append(f"{facts.repeated:,} passages repeat the text of another: {reason}")
    for what, examples in facts.unknown.items():
        count, shown = facts.unknown_count[what], ", ".join(map(repr, examples))
        found.append(f"{count:,} labels name a {what} that is not there, such as {shown}; they are left out")
    for split, texts in shared_texts(facts).items():
        reason = "what is measured there was trained on"
        found.append(f"{len(texts):,} queries of {split} are in train, too, such as {texts[0][:60]!r}: {reason}")
    found += [
        f"{count:,} queries of {split} have no text; they are left out" for split, count in (+facts.blank).items()
    ]
    if not any(grade > 0 for grade in facts.grades):
        found.append("no label has a grade of 1 or more, so nothing can be trained on")
    return found
