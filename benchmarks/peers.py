"""The recipes of PyLate and sentence-transformers on the data of a finished run, with the same budget.

    python benchmarks/peers.py --run RUN --envs DIR [--library NAME] [--recipe NAME] [--temperature X] [--seeds 1 2 3]

A student is trained in the library itself, from the run's bare encoder, on the run's training queries: the labelled
passage and `--negatives` passages drawn at random from the top of the teacher's ranking. For the recipe `kl`, the
teacher's scores are the MaxSim of its stored rows. The budget is passages encoded in training: steps x queries a step x
(1 + negatives). The checkpoint is embedded and measured by ckd-ray itself, on all splits of the run.

`--envs` holds an environment for each library; `tests/exchange/environments` makes those that are missing. The result
goes to `--out` (RUN/peers by default): NAME/checkpoint, and NAME/evaluation in the form of a run, with one value a
query and measure in `student.SPLIT.per_query.json`. Where the run has a student of its own, the paired test against it
is in the printed object. The same call with other `--splits` measures the checkpoint that is there: choose on dev, then
measure test once. `--graded FILE` are further labels (TSV: query, 0, passage, grade) of the dev queries.

`--temperature default` takes the library's: 1 for every loss. PyLate's Distillation has no argument for it: a given
temperature divides its scores and the teacher's, without its min-max normalisation. `--teacher-scores` are those of
`kl`: `raw` (a sum of cosines, as the student's) or `minmax` (0..1 a query). By default they are raw for
sentence-transformers, and minmax for PyLate at its default temperature, since its loss brings the student's to 0..1.
`--train-maxlen`: most tokens of a passage in training, `distill.doc_maxlen` of the run by default, as its own student
has them. Every checkpoint is measured with `model.doc_maxlen` tokens, as the student is.
`--form`: what a sentence-transformers student is: `plain` is what MultiVectorEncoder makes of an encoder (its example
of contrastive training); `expanded` adds [MASK] tokens to queries and leaves punctuation out (its example of
distillation). `--quick`: 4 steps of 2 queries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import arguments, emit, figure, machine, note

LIBRARIES, RECIPES = ("sentence-transformers", "pylate"), ("contrastive", "kl")
DEPTH = 100  # of the ranking that negatives are drawn from
LIMITS = {
    "contrastive": "every query meets the whole batch; the library has no mask for labelled passages of other queries",
    "kl": "the loss compares the query's own passages alone: it has no in-batch negatives",
}
BF16 = {
    "sentence-transformers": "scores are summed in float32",
    "pylate": "under bf16 autocast the library computes its scores in bfloat16 as well",
}
Values = dict[str, dict[str, dict[str, float]]]  # split -> measure -> query id -> value
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Budget:
    """What a training may spend."""

    steps: int
    queries_per_step: int
    negatives: int

    @property
    def rows(self) -> int:
        """(query, passages) rows that are trained on."""
        return self.steps * self.queries_per_step

    @property
    def passages(self) -> int:
        """Passages encoded in training."""
        return self.rows * (1 + self.negatives)

    def to_dict(self) -> dict[str, int]:
        """For the printed settings."""
        return {**asdict(self), "passages_encoded": self.passages}


def main() -> None:
    args = parsed()
    before = machine()
    budget = Budget(4, 2, 1) if args.quick else Budget(args.steps, args.queries_per_step, args.negatives)
    libraries = [args.library] if args.library else list(LIBRARIES)
    recipes = [args.recipe] if args.recipe else list(RECIPES)
    run, envs = Path(args.run).resolve(), Path(args.envs).resolve()
    out = Path(args.out).resolve() if args.out else run / "peers"
    make_environments(envs, libraries)
    bench = Bench(run, out, args.splits, args.graded)
    of_run = bench.config["distill"].get("doc_maxlen") or bench.config["model"]["doc_maxlen"]
    args.train_maxlen = args.train_maxlen or of_run
    settings: dict[str, Any] = {
        "quick": args.quick,
        "run": run.name,
        "model": bench.config["model"],
        "budget": budget.to_dict(),
        "learning_rate": args.learning_rate,
        "warmup": args.warmup,
        "train_maxlen": args.train_maxlen,
        "schedule": "AdamW, linear, gradients clipped at 1 (the trainer's defaults)",
        "precision": args.precision,
        "threads": args.threads,
        "seeds": args.seeds,
        "negatives_depth": DEPTH,
        "results": [],
    }
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = {seed: bench.export(Path(folder), budget, seed) for seed in args.seeds}
        for library in libraries:
            for recipe in recipes:
                jobs = [job(bench, library, recipe, budget, args, seed, rows[seed]) for seed in args.seeds]
                result, found = bench.result(jobs, envs)
                settings["results"].append(result)
                figures |= found
    emit(settings, figures, before)


def parsed() -> argparse.Namespace:
    """The command line; what cannot be is refused."""
    number: dict[str, Any] = {"type": int}
    args = arguments(
        __doc__ or "",
        run={"metavar": "RUN", "required": True, "help": "a finished run (its rankings and embeddings are enough)"},
        envs={"metavar": "DIR", "required": True, "help": "an environment for each library; missing ones are made"},
        out={"metavar": "DIR", "help": "checkpoints and measures, RUN/peers by default"},
        library={"choices": LIBRARIES, "help": "both by default"},
        recipe={"choices": RECIPES, "help": "both by default"},
        temperature={"type": temperature, "default": None, "metavar": "default|X"},
        teacher_scores={"choices": ("default", "raw", "minmax"), "default": "default"},
        form={"choices": ("documented", "plain", "expanded"), "default": "documented"},
        steps={**number, "default": 120},
        queries_per_step={**number, "default": 8},
        negatives={**number, "default": 3},
        learning_rate={"type": float, "default": 3e-5},
        warmup={"type": float, "default": 0.1, "help": "share of the steps"},
        precision={"choices": ("bf16", "fp32"), "default": "bf16", "help": "of the training, by autocast on the CPU"},
        threads={**number, "default": 2},
        seeds={**number, "nargs": "+", "default": [1]},
        train_maxlen={**number, "metavar": "TOKENS", "help": "of a passage in training"},
        splits={"nargs": "+", "choices": ("dev", "test"), "help": "those of the run by default"},
        graded={"metavar": "FILE", "help": "further labels of the dev queries"},
    )
    if args.temperature is not None and args.teacher_scores == "minmax" and args.library != LIBRARIES[0]:
        raise SystemExit("--teacher-scores minmax: PyLate's loss has no temperature for scores that it normalises")
    return args


def temperature(text: str) -> float | None:
    """None for the library's own."""
    if text == "default":
        return None
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("expected default or a number above 0")
    return value


def make_environments(envs: Path, libraries: Sequence[str]) -> None:
    """Those that are missing, by the script of the exchange tests."""
    script = Path(__file__).parents[1] / "tests" / "exchange" / "environments"
    note(f"environments: {envs}")
    subprocess.run([str(script), str(envs), *libraries], check=True, stdout=2)


def job(
    bench: Bench, library: str, recipe: str, budget: Budget, args: argparse.Namespace, seed: int, rows: Path
) -> dict[str, Any]:
    """One training, as peers_train.py reads it."""
    from ckd_ray.files import sha256_of
    from ckd_ray.model.sources import resolve_backbone

    model, given = bench.config["model"], args.temperature
    scores = args.teacher_scores
    if scores == "default":
        scores = "minmax" if library == "pylate" and given is None else "raw"
    form = args.form if library == "sentence-transformers" else "PyLate's"
    if form == "documented":
        form = "plain" if recipe == "contrastive" else "expanded"
    name = f"{library}-{recipe}-{'default' if given is None else f'{given:g}'}"
    name += f"-{scores}" if recipe == "kl" else ""
    return {
        "name": f"{name}-{form}-{seed}" if library == "sentence-transformers" else f"{name}-{seed}",
        "library": library,
        "recipe": recipe,
        "temperature": given,
        "teacher_scores": scores,
        "form": form,
        "backbone": resolve_backbone(model["backbone"]),
        "dim": model["dim"],
        "query_maxlen": model["query_maxlen"],
        "doc_maxlen": args.train_maxlen,
        "steps": budget.steps,
        "queries_per_step": budget.queries_per_step,
        "learning_rate": args.learning_rate,
        "warmup": args.warmup,
        "precision": args.precision,
        "threads": args.threads,
        "seed": seed,
        "rows": str(rows),
        "rows_sha256": sha256_of(str(rows)),
    }


def draw(
    rankings: Array, labelled: Mapping[int, Sequence[int]], budget: Budget, num_passages: int, seed: int
) -> list[tuple[int, list[int]]]:
    """(query, passages) for every row of the budget: a labelled passage, then negatives.

    Queries come in the order of a permutation an epoch. Negatives are a sample of the first `DEPTH` passages of the
    ranking that are not labelled; where they are too few, of the whole collection.

    Args:
        rankings: (num_queries, depth) passage indices, best first, -1 where a ranking ends.
        labelled: the labelled passages of each query that has some.
    """
    rng = np.random.default_rng(seed)
    queries = np.array(sorted(labelled))
    order: list[int] = []
    while len(order) < budget.rows:
        order += rng.permutation(queries).tolist()
    rows = []
    for query in order[: budget.rows]:
        known = set(labelled[query])
        pool = [p for p in rankings[query].tolist() if p >= 0 and p not in known][:DEPTH]
        if len(pool) < budget.negatives:
            seen = known | set(pool)
            pool += [p for p in rng.permutation(num_passages).tolist() if p not in seen][: budget.negatives]
        chosen = rng.choice(pool, budget.negatives, replace=False).tolist() if budget.negatives else []
        rows.append((query, [int(rng.choice(labelled[query])), *map(int, chosen)]))
    return rows


class Bench:
    """A run, and what is measured on it.

    Attributes:
        config: the configuration of the run.
    """

    def __init__(self, run: Path, out: Path, splits: list[str] | None, graded: str | None) -> None:
        from ckd_ray.data import Collection

        for name in ("run.json", "corpus", "embeddings", "rankings"):
            if not (run / name).exists():
                raise SystemExit(f"{run}: no {name} here; run ckd-ray train first")
        self.run, self.out = run, out
        self.config: dict[str, Any] = json.loads((run / "run.json").read_text())["config"]
        if splits:
            self.config["evaluate"]["splits"] = splits
        self.collection = Collection.open(str(run))
        self.graded = read_labels(Path(graded)) if graded else None

    def export(self, folder: Path, budget: Budget, seed: int) -> Path:
        """The rows of the budget with texts and the teacher's scores, as JSON lines."""
        from ckd_ray.model import maxsim
        from ckd_ray.retrieve.rankings import read_ranking_matrix
        from ckd_ray.store import EmbeddingStore

        labels, labelled = self.collection.qrels("train"), dict[int, list[int]]()
        for query, passage, grade in zip(labels.query_index, labels.passage_index, labels.relevance, strict=True):
            if grade >= self.config["collection"]["positive_grade"]:
                labelled.setdefault(int(query), []).append(int(passage))
        rankings = read_ranking_matrix(str(self.run / "rankings"), "train")
        queries = EmbeddingStore.open(str(self.run / "embeddings" / "queries.train"))
        passages = EmbeddingStore.open(str(self.run / "embeddings" / "passages"))
        texts, path = self.collection.queries("train").texts, folder / f"rows-{seed}.jsonl"
        note(f"export: {budget.rows} rows, seed {seed}")
        with path.open("w", encoding="utf-8") as file:
            for query, chosen in draw(rankings, labelled, budget, self.collection.num_passages, seed):
                rows_QD = queries.gather(np.array([query])).embeddings_TD
                rows_NLD, mask_NL = passages.gather(np.array(chosen)).padded()
                # The libraries' own score: a sum of greatest cosines.
                scores_N = maxsim(rows_QD[None], rows_NLD, mask_NL, similarity="cosine")[0]
                row = {"query": texts[query], "passages": self.collection.texts(chosen)}
                file.write(json.dumps(row | {"scores": [round(s, 5) for s in scores_N.tolist()]}) + "\n")
        return path

    def result(self, jobs: list[dict[str, Any]], envs: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Train and measure one recipe with every seed; an entry of the settings, and the figures."""
        first, trained, found = jobs[0], [], []
        for given in jobs:
            trained.append(self.train(given, envs))
            found.append(self.measure(given["name"]))
        means = {
            split: {m: float(np.mean([np.mean(list(one[split][m].values())) for one in found])) for m in measures}
            for split, measures in found[0].items()
        }
        own = self.own_student()
        keys = ("library", "recipe", "temperature", "form")
        result = {key: first[key] for key in keys}
        result |= {"teacher_scores": first["teacher_scores"]} if first["recipe"] == "kl" else {}
        result |= {"limits": [LIMITS[first["recipe"]]]}
        result["limits"] += [BF16[first["library"]]] if first["precision"] == "bf16" else []
        result |= {"loss": trained[0]["loss"], "versions": trained[0]["versions"], "measures": means}
        timing = ("seconds", "seconds_a_step", "losses")
        result["seeds"] = [
            {"seed": given["seed"], "folder": given["name"], **{key: one[key] for key in timing}}
            for given, one in zip(jobs, trained, strict=True)
        ]
        if own:
            result["student_of_the_run_less_this"] = differences(own, found)
        name = f"{first['library']}_{first['recipe']}"
        figures = {
            f"{name}_{measure}_{split}": figure(value, None, "higher")
            for split, values in means.items()
            for measure, value in values.items()
        }
        return result, figures

    def train(self, given: dict[str, Any], envs: Path) -> dict[str, Any]:
        """Run the job in the library's environment, unless that is done; what peers_train.py says."""
        folder = self.out / given["name"]
        done_before, record = folder / "trained.json", {key: value for key, value in given.items() if key != "rows"}
        if done_before.exists():
            before: dict[str, Any] = json.loads(done_before.read_text())
            if before["job"] == record:
                note(f"trained before: {given['name']}")
                return before["said"]
        note(f"training {given['name']}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path = folder / "job.json"
        path.write_text(json.dumps(given | {"out": str(folder / "checkpoint")}))
        outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        outside |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        python = envs / given["library"] / "bin" / "python"
        command = [str(python), str(Path(__file__).with_name("peers_train.py")), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=outside, cwd=folder)
        (folder / "training.log").write_text(done.stdout + done.stderr)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        if done.returncode:
            raise SystemExit(f"{given['name']}: training failed\n{done.stderr[-3000:]}")
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        done_before.write_text(json.dumps({"job": record, "said": said}))
        note(f"  {said['loss']}: {said['seconds']} s, loss {said['losses'][0]} to {said['losses'][-1]}")
        return said

    def measure(self, name: str) -> Values:
        """Embed the collection with the checkpoint and measure it: a run directory of its own beside the checkpoint,
        which has the run's corpus and queries."""
        from ckd_ray.config import Config
        from ckd_ray.model import ColBERTSettings
        from ckd_ray.model.exchange import load_any
        from ckd_ray.pipeline.embedding import embed_all
        from ckd_ray.pipeline.evaluation import evaluation_splits, measure_system, write_measures
        from ckd_ray.progress import set_quiet
        from ckd_ray.ray_util.session import connected
        from ckd_ray.runs.directory import RunContext

        note(f"measuring {name}")
        folder = self.out / name
        values = {key: self.config[key] for key in ("collection", "model", "embed", "retrieve", "evaluate")}
        values["run"] = {**self.config["run"], "storage": str(self.out), "name": name}
        values["teacher"] = {"checkpoint": str(folder / "checkpoint")}
        config = Config.model_validate(values)
        context = RunContext.of(config)
        for left in ("embeddings", "student", "evaluation/rankings"):
            shutil.rmtree(folder / left, ignore_errors=True)
        for shared in ("corpus", "queries"):
            (folder / shared).unlink(missing_ok=True)
            (folder / shared).symlink_to(self.run / shared, target_is_directory=True)
        model = config.model
        wanted = ColBERTSettings(dim=model.dim, query_maxlen=model.query_maxlen, doc_maxlen=model.doc_maxlen)
        student = load_any(str(folder / "checkpoint"), wanted).model
        student.settings = replace(student.settings, doc_maxlen=model.doc_maxlen)  # of the index, not of the training
        student.save(folder / "student")
        splits = evaluation_splits(config, self.collection)
        embeddings, evaluation = str(folder / "embeddings"), str(folder / "evaluation")
        set_quiet(True)
        with connected("local"):
            embed_all(context, str(folder / "student"), embeddings, name, stage="evaluate", splits=splits)
            found = measure_system(context, "student", embeddings, splits, evaluation)
        measured = {split: {"student": m} for split, m in found.items()}
        write_measures(evaluation, measured, config, self.collection)
        (folder / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
        for large in ("embeddings", "student"):
            shutil.rmtree(folder / large)
        per_query = {split: m.per_query for split, m in found.items()}
        if self.graded is not None and "dev" in splits:
            per_query["graded"] = self.by_graded_labels(folder)
            (folder / "evaluation" / "student.graded.per_query.json").write_text(json.dumps(per_query["graded"]))
        return per_query

    def by_graded_labels(self, folder: Path) -> dict[str, dict[str, float]]:
        """nDCG@10 of the dev rankings below `folder` by the labels of `--graded`."""
        import pandas as pd

        from ckd_ray.evaluate.measures import measure_run
        from ckd_ray.pipeline.evaluation import RankedParts

        assert self.graded is not None
        rankings = str(folder / "evaluation" / "rankings" / "student")
        found = pd.concat(list(RankedParts(rankings, "dev", self.collection.num_queries("dev"))))
        return measure_run(found, self.graded, ["nDCG@10"]).per_query

    def own_student(self) -> Values:
        """What was measured of the run's own student; nothing where there is none."""
        ending = ".per_query.json"
        files = sorted((self.run / "evaluation").glob(f"student.*{ending}"))
        values = {p.name.removeprefix("student.").removesuffix(ending): json.loads(p.read_text()) for p in files}
        if self.graded is not None and (self.run / "evaluation" / "rankings" / "student").is_dir():
            values["graded"] = self.by_graded_labels(self.run)
        return values


def read_labels(path: Path) -> Any:
    """A qrels file as a frame: query_id, doc_id, relevance."""
    import pandas as pd

    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line]
    columns = {"query_id": [r[0] for r in rows], "doc_id": [r[2] for r in rows]}
    return pd.DataFrame({**columns, "relevance": [int(r[3]) for r in rows]})


def differences(own: Values, found: list[Values]) -> dict[str, dict[str, dict[str, float]]]:
    """Of every split and measure that both have: the paired difference, the run's student less the peer's students
    (one a seed), with its p and 95 % interval."""
    from ckd_ray.evaluate.significance import paired_difference

    rows: dict[str, dict[str, dict[str, float]]] = {}
    for split, measures in found[0].items():
        for measure, values in measures.items():
            mine = own.get(split, {}).get(measure)
            if mine is None or set(mine) != set(values):
                continue
            peer_SN = np.array([[one[split][measure][query] for query in mine] for one in found])
            tested = paired_difference(peer_SN, np.array([list(mine.values())]))
            rows.setdefault(split, {})[measure] = {key: round(value, 5) for key, value in asdict(tested).items()}
    return rows


if __name__ == "__main__":
    main()
