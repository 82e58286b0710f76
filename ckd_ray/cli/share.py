"""The command that passes a model, labels, vectors or an index on: export."""

from __future__ import annotations

from typing import Annotated

import typer

from ckd_ray.cli.command import SHARE, command, put
from ckd_ray.progress import say


@command(SHARE)
def export(
    run: Annotated[str, typer.Argument(help="A run directory (run.storage/run.name), or one checkpoint folder.")],
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="sentence-transformers, pylate, colbert or onnx; of labels also flagembedding, tevatron, triples; of"
            " vectors parquet; of an index fast-plaid.",
        ),
    ],
    json_: bool,
    out: Annotated[str | None, typer.Option("--out", help="The folder to write. Default: RUN/exports/FORMAT.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Not of labels: student or teacher. Default: student.")
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            "--what",
            help="model; labels: the scores of all candidates; vectors: the token embeddings of all passages; or an"
            " index of them.",
        ),
    ] = "model",
    width: Annotated[int | None, typer.Option("--width", help="Of labels: candidates a query. Default: 32.")] = None,
    scores: Annotated[
        str | None,
        typer.Option("--scores", help="Of labels: minmax (0 to 1 a query), raw, or auto. Default: auto."),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="Of an index from an fp16 store: 1, 2 or 4 a dimension. Default: 4."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", help="Upload the folder to the hub as OWNER/NAME, which is private if it is new."),
    ] = None,
) -> None:
    """Write a run's model for sentence-transformers, PyLate, colbert-ai or ONNX, its labels as a training set, or the
    token embeddings of its passages for another search engine."""
    from ckd_ray.pipeline.export import export as write
    from ckd_ray.pipeline.export_options import export_options
    from ckd_ray.pipeline.push import check_repository, push_folder

    options = export_options(what, model=model, width=width, scores=scores, bits=bits)
    if push is not None:
        check_repository(push)
    written = write(run, what, fmt, out=out, **options)
    if what == "model":
        source = written["model"]
    elif what == "labels":
        unlabelled = f" ({written['unlabelled']:,} of them without a label)" if written["unlabelled"] else ""
        source = f"labels of {written['queries']:,} queries{unlabelled}, {written['left_out']:,} left out"
    else:
        source = f"{written['tokens']:,} token embeddings of {written['passages']:,} passages"
    for difference in written.get("differences", ()):
        say(f"export: {difference}")
    say(f"export: {source} -> {written['out']}")
    if push is not None:
        written["pushed"] = push_folder(written["out"], push, what)
        say(f"export: {written['out']} -> {written['pushed']}")
    if json_:
        put(written)
