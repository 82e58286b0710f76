"""The model card of a student or an export: measures, settings, how it was trained, how to load it, what to cite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckd_ray import __version__
from ckd_ray.config.schema import DistillConfig
from ckd_ray.evaluate.table import SYSTEMS
from ckd_ray.model.settings import ColBERTSettings
from ckd_ray.model.sources import is_hub_id

TITLE = "Collective Relevance Labeling for Passage Retrieval"
# Keys of `distill` that say where, how fast or how safely a student was trained; the seed has a line of its own.
_NOT_SHOWN = DistillConfig.operational_keys() | {"precision", "teacher_embeddings", "seed"}
_LIBRARIES = {
    "sentence-transformers": "sentence-transformers",
    "pylate": "PyLate",
    "colbert": "colbert-ai",
    "onnx": "onnx",
}
_LOADING = {
    None: """from ckd_ray.model import ColBERT, maxsim
model = ColBERT.from_pretrained("FOLDER").eval()
queries = model.encode_queries(*model.tokenizer.queries(["a question"]))
passages, kept = model.encode_passages(*model.tokenizer.pad(model.tokenizer.passages(["a passage"])))
scores = maxsim(queries, passages, kept, similarity=model.settings.similarity)""",
    "sentence-transformers": """from sentence_transformers import MultiVectorEncoder  # 6 or later
model = MultiVectorEncoder("FOLDER")
scores = model.similarity(model.encode_query(["a question"]), model.encode_document(["a passage"]))""",
    "pylate": """from pylate import models
model = models.ColBERT("FOLDER")
queries = model.encode(["a question"], is_query=True)
passages = model.encode(["a passage"], is_query=False)""",
    "colbert": """from colbert.infra import ColBERTConfig
from colbert.modeling.checkpoint import Checkpoint
checkpoint = Checkpoint("FOLDER", colbert_config=ColBERTConfig())
queries, passages = checkpoint.queryFromText(["a question"]), checkpoint.docFromText(["a passage"])""",
    "onnx": """import json
import numpy as np
import onnxruntime
from tokenizers import Tokenizer
session = onnxruntime.InferenceSession("FOLDER/model.onnx")
tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")
with open("FOLDER/encoding.json") as file:
    encoding = json.load(file)

def encode(text, kind):  # kind: query or passage; the rows of one text, (tokens, dim)
    form = encoding[kind]
    room = form["maxlen"] - len(form["before"]) - len(form["after"])
    ids = form["before"] + tokenizer.encode(text, add_special_tokens=False).ids[:room] + form["after"]
    mask = [1] * len(ids)
    if form["fill"] is not None:
        missing = form["maxlen"] - len(ids)
        ids, mask = ids + [form["fill"]] * missing, mask + [int(form["attend_to_fill"])] * missing
    rows = session.run(["rows"], {"input_ids": np.array([ids]), "attention_mask": np.array([mask])})[0][0]
    return rows[~np.isin(ids, form["skip"])]

score = (encode("a question", "query") @ encode("a passage", "passage").T).max(1).sum()""",
}


@dataclass(frozen=True)
class Facts:
    """What a run knows about a model.

    Attributes:
        name: of the run.
        role: student, teacher, or model when nothing is known.
        config: the run's configuration as a tree; empty when there is none.
        measures: split -> measure -> mean, of this model.
        queries: split -> how many queries were measured.
        table: of all systems of the run, as `ckd_ray.evaluate.table.build_table` makes it; empty when there is none.
    """

    name: str
    role: str = "model"
    config: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)
    table: Mapping[str, Any] = field(default_factory=dict)


def model_card(settings: ColBERTSettings, facts: Facts, fmt: str | None = None, notes: list[str] | None = None) -> str:
    """The card as Markdown.

    Args:
        fmt: the format of an export; None for a checkpoint of ckd-ray.
        notes: what differs from ckd-ray in that format.
    """
    parts = [
        _head(facts, fmt),
        f"# {facts.name}: {facts.role}\n\nA late-interaction (ColBERT) retriever: one vector of {settings.dim} numbers "
        f"a token, scored by MaxSim. Made with ckd-ray {__version__}.",
        _measures(facts),
        _training(facts),
        _settings(settings),
        _scores(settings, fmt, notes or []),
        f"## How to load it\n\n```python\n{_LOADING[fmt]}\n```",
        "## Licence\n\nNot stated. Choose one that the licences of the backbone and of the training data allow, and "
        "put it into the head of this file.",
        f"## Citation\n\nThe method:\n\n```bibtex\n@inproceedings{{collective-relevance-labeling-2022,\n"
        f"  title     = {{{TITLE}}},\n  booktitle = {{NAACL}},\n  year      = {{2022}}\n}}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(facts: Facts, fmt: str | None) -> str:
    """The YAML that hubs read: what the model was made from, and its measures as a model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    data_sets, name = _data_sets(facts.config), _collection_name(facts.config)
    results = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=data_sets[0] if data_sets else name,
            dataset_name=name,
            dataset_split=split,
            metric_type=_metric(measure),
            metric_name=measure,
            metric_value=round(value, 6),
        )
        for split, values in facts.measures.items()
        for measure, value in values.items()
    ]
    start = (facts.config.get("teacher") or {}).get("checkpoint") or (facts.config.get("model") or {}).get("backbone")
    head = ModelCardData(
        model_name=facts.name,
        base_model=start.partition("@")[0] if start and is_hub_id(start) else None,
        datasets=data_sets or None,
        library_name=_LIBRARIES[fmt] if fmt is not None else None,
        pipeline_tag="sentence-similarity",
        tags=["ColBERT", "late-interaction", "multi-vector", "passage-retrieval", "ckd-ray"],
        eval_results=results or None,
    )
    return f"---\n# license: choose one\n{head.to_yaml()}\n---"


def _metric(measure: str) -> str:
    """A measure by the name that hubs give it: nDCG@10 is ndcg_at_10, R@100 is recall_at_100."""
    name, _, cutoff = measure.partition("@")
    return "_at_".join(filter(None, ["recall" if name == "R" else name.lower(), cutoff]))


def _data_sets(config: Mapping[str, Any]) -> list[str]:
    """The data sets of the hub that the collection was read from, OWNER/NAME each."""
    c = config.get("collection") or {}
    places = [c.get("path"), c.get("passages"), *(c.get("queries") or {}).values(), *(c.get("qrels") or {}).values()]
    found = [re.match(r"hf://datasets/([^/@]+/[^/@]+)", str(place)) for place in places]
    return list(dict.fromkeys(match[1] for match in found if match))


def _collection_name(config: Mapping[str, Any]) -> str:
    """The name of the collection, not where it lay: a card is published, and folders mean nothing there."""
    collection = config.get("collection") or {}
    source = collection.get("path") or collection.get("passages") or collection.get("format") or "a collection"
    return str(source).rstrip("/").rpartition("/")[2].partition("@")[0]


def _measures(facts: Facts) -> str:
    if not facts.measures:
        return "## Measures\n\nNone: the run has not evaluated this model."
    rows = _systems(facts) if facts.table.get("splits") else _means(facts)
    exact = facts.config.get("evaluate", {}).get("engine", "exact") == "exact"
    kind = "Exact search" if exact else "Approximate search, with exact scores of the candidates,"
    verdict = facts.table.get("verdict") if facts.role == "student" else None
    sentence = f"{verdict['text']}\n\n" if verdict else ""
    head = f"## Measures\n\n{sentence}{kind} over the collection `{_collection_name(facts.config)}`.\n\n"
    return head + "\n".join(rows)


def _means(facts: Facts) -> list[str]:
    """One row a split, for this model alone."""
    names = list(dict.fromkeys(name for values in facts.measures.values() for name in values))
    rows = [f"| split | queries | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for split, values in facts.measures.items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in names]
        rows.append(f"| {split} | {facts.queries.get(split, '')} | {' | '.join(cells)} |")
    return rows


def _systems(facts: Facts) -> list[str]:
    """One row for each split and system of the run, this model's in bold, with 95 % bootstrap intervals."""
    found: list[str] = []
    for split, measures in facts.table["splits"].items():
        if not found:
            found = [f"| split | queries | system | {' | '.join(measures)} |", "|---" * (3 + len(measures)) + "|"]
        for name in next(iter(measures.values()))["systems"]:
            mine = "**" if name == facts.role else ""
            cells = [row["systems"][name] for row in measures.values()]
            texts = [f"{mine}{c['mean']:.4f}{mine} [{c['low']:.4f}, {c['high']:.4f}]" for c in cells]
            label = f"{mine}{SYSTEMS.get(name, name)}{mine}"
            found.append(f"| {split} | {cells[0]['n']} | {label} | {' | '.join(texts)} |")
    return [*found, "", "In brackets: 95 % bootstrap interval over the queries."]


def _training(facts: Facts) -> str:
    if not facts.config:
        return ""
    model, teacher = facts.config.get("model", {}), facts.config.get("teacher", {})
    lines = ["## Training", "", f"- backbone: `{_public(model.get('backbone'))}`"]
    if teacher.get("checkpoint"):
        lines.append(f"- teacher: the given checkpoint `{_public(teacher['checkpoint'])}`")
    else:
        lines.append(
            f"- teacher: contrastive, {teacher.get('steps')} steps of {teacher.get('batch_size')} queries, "
            f"learning rate {teacher.get('learning_rate')}"
        )
    if facts.role == "student":
        distill = facts.config.get("distill", {})
        shown = [f"{key} {value}" for key, value in distill.items() if key not in _NOT_SHOWN]
        label = facts.config.get("label", {})
        lines.append(f"- distillation: {', '.join(shown)}")
        if "expansion_size" in distill:  # the student reads the labels' expansions
            lines.append(f"- labels: {', '.join(f'{key} {value}' for key, value in label.items())}")
    lines.append(f"- seed: {facts.config.get('run', {}).get('seed')}")
    return "\n".join(lines)


def _public(source: Any) -> str:
    """A hub id or package unchanged; only the last part of a folder."""
    text = str(source)
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", ".", "~")) or text.count("/") > 1 else text


def _settings(settings: ColBERTSettings) -> str:
    rows = [f"| {key} | `{value}` |" for key, value in settings.to_dict().items() if value is not None]
    return "## Settings\n\n| setting | value |\n|---|---|\n" + "\n".join(rows)


def _scores(settings: ColBERTSettings, fmt: str | None, notes: list[str]) -> str:
    if fmt is None:
        return ""
    text = "## Scores\n\nScores are sums over the query's rows of the greatest inner product with a row of the passage."
    if settings.similarity == "l2" and settings.query_expansion:
        text += (
            f" It was trained with minus squared distances: on unit rows that score is "
            f"2 s - 2 · {settings.query_maxlen} for the score s given here, so both rank alike."
        )
    elif settings.similarity == "l2":  # a query's rows differ in number then, and the constant with them
        text += " It was trained with minus squared distances, which on unit rows rank alike."
    return text + "".join(f"\n\nWhat differs from ckd-ray: {note}." for note in notes)
