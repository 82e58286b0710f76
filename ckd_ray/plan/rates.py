"""What a machine does in a second: measured by `measure.py`, kept in a JSON file, and carried over to other hardware.

Rates on a CPU are those of one core while all cores are busy; rates of a GPU are those of one GPU. What is carried over
to hardware that was not measured is an assumption, and is listed as such with the plan.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.plan.hardware import ACCELERATORS, SHAPES

FORMAT = 1
# Share of a GPU's peak rate (dense 16-bit products) that encoding reaches where no GPU was measured: published BERT
# encoders come to 30 to 50 % with long batches; small encoders stay below. Training: forward and backward pass.
ENCODE_SHARE, TRAIN_SHARE, SEARCH_SHARE = 0.3, 0.25, 0.1
# A training step takes at least so long on a GPU: thousands of kernels that start one after the other.
GPU_STEP_S = 0.06


@dataclass(frozen=True)
class StepRate:
    """Seconds of a training step: `fixed_s` + tokens * `token_s`, tokens of all passages and queries encoded in it.

    On a CPU with all cores of the machine, on a GPU with one. padding: tokens encoded a token of the texts.
    """

    fixed_s: float
    token_s: float
    padding: float


@dataclass(frozen=True)
class Rates:
    """Measured rates; times in seconds, "ops" are multiplications and additions a second (2 a multiply-add).

    Attributes:
        machine, cores, device (`cpu` or `cuda`), accelerator: where they were measured.
        backbone, parameters, embedding_parameters, layers, hidden: the encoder; token_flops: operations of
            a token's forward pass.
        encode_token_s: a padded token through the encoder, on a core or a GPU.
        tokenize_token_s: a token through the tokenizer. write_byte_s: a byte of a shard, with its checksums.
        build_passage_s, build_query_s: the collection stage, on the driver; corpus_share: bytes of its files a byte
            of text.
        training: of the `teacher` and of `distill`.
        checkpoint_s: writing one. dense_ops: exact search, all passages. pair_ops, single_ops, pair_exact_ops,
            single_exact_ops: chosen pairs, float32 and float64; many queries a passage, and one.
        nearest_ops, nearest_vector_s: nearest token embeddings, by their number, and what a vector costs beside them.
            assign_ops: faiss' nearest centroid. probe_ops: the same in float64.
        merge_entry_s: merging a ranked entry of a server. rank_row_s: writing a row of a ranking.
        evaluate_row_s: a row of a ranking through run file and measures, on the driver.
        expand_query_s: clusters, votes of the feedback and label files of a query; crowded_query_s: asking the cells.
        add_token_s, pq_train_s, ivf_row_s, ivf_probe_s, ivf_code_s, promising_query_s: faiss: coding a token, training
            the quantiser, a query row, a cell and a code that it looks at, and choosing a query's candidates.
        list_entry_s, list_passage_s: centroids: an entry of an inverted list, and a passage of the range.
        decode_token_s: a row of a residual codec.
        process_start_s: a new process that imports torch, transformers and Ray.
        assumptions: what was carried over.
    """

    machine: str
    cores: int
    device: str
    accelerator: str | None
    backbone: str
    parameters: int
    embedding_parameters: int
    layers: int
    hidden: int
    token_flops: float
    precision: str
    encode_token_s: float
    tokenize_token_s: float
    write_byte_s: float
    build_passage_s: float
    build_query_s: float
    corpus_share: float
    training: dict[str, StepRate]
    checkpoint_s: float
    dense_ops: float
    pair_ops: float
    single_ops: float
    pair_exact_ops: float
    single_exact_ops: float
    nearest_ops: float
    nearest_vector_s: float
    assign_ops: float
    probe_ops: float
    merge_entry_s: float
    rank_row_s: float
    evaluate_row_s: float
    expand_query_s: float
    crowded_query_s: float
    add_token_s: float
    pq_train_s: float
    ivf_row_s: float
    ivf_code_s: float
    ivf_probe_s: float
    promising_query_s: float
    list_entry_s: float
    list_passage_s: float
    decode_token_s: float
    process_start_s: float
    seconds: float = 0.0  # that measuring took
    load: float = 0.0  # processes that wanted to run when it began
    assumptions: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": FORMAT, **asdict(self)}

    def assuming(self, text: str, **changes: Any) -> Rates:
        """These rates with some changed, and the reason noted."""
        return replace(self, assumptions=(*self.assumptions, text), **changes)


def save_rates(rates: Rates, path: str) -> None:
    """Write a rates file. Raises UserError when it cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(rates.to_dict(), file, indent=2)
            file.write("\n")
    except OSError as error:
        raise UserError("the rates cannot be written", where=path, found=error.strerror) from None


def load_rates(path: str) -> Rates:
    """Read a rates file.

    Raises:
        UserError: it cannot be read, is of another format, or a rate is missing or not positive.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError("the rates cannot be read", where=path, found=str(reason), fix=_MAKE) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError("not a rates file", where=path, expected=f"format {FORMAT}", found=str(found), fix=_MAKE)
    known = {f.name: f for f in fields(Rates)}
    optional = {"seconds", "load", "assumptions"}
    missing = [name for name in known if name not in values and name not in optional]
    if missing:
        raise UserError("rates are missing", where=path, expected=", ".join(missing), fix=_MAKE)
    chosen = {name: values[name] for name in known if name in values}
    for name, value in chosen.items():
        wants_number = known[name].type in ("float", "int") and name not in optional
        if wants_number and not (_is_number(value) and value > 0):
            raise UserError("not a rate", where=f"{path}: {name}", expected="a positive number", found=repr(value)[:60])
    try:
        chosen["training"] = {name: StepRate(**step) for name, step in values["training"].items()}
    except (TypeError, AttributeError):
        expected = ", ".join(f.name for f in fields(StepRate))
        raise UserError("not the rate of a step", where=f"{path}: training", expected=expected) from None
    if set(chosen["training"]) != {"teacher", "distill"}:
        found = ", ".join(chosen["training"]) or "nothing"
        raise UserError("rates are missing", where=f"{path}: training", expected="teacher, distill", found=found)
    chosen["assumptions"] = tuple(values.get("assumptions", ()))
    return Rates(**chosen)


_MAKE = "ckd-ray plan --save-rates FILE, on the machine to be measured"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def carried_over(rates: Rates, accelerator: str | None) -> Rates:
    """The rates for a cluster whose GPUs are of this kind (None: it has none).

    The same kind: as measured. Another, or a GPU where a CPU was measured: in the ratio of the peak rates, or at
    `ENCODE_SHARE`, `TRAIN_SHARE` and `SEARCH_SHARE` of the peak. A cluster without GPUs wants rates of a CPU.

    Raises:
        UserError: a GPU that is not in our table, or rates of a GPU for a cluster without any.
    """
    if accelerator is None:
        if rates.device == "cuda":
            raise UserError(
                "these rates are of a GPU, and the cluster has none",
                where="--rates",
                expected="rates measured on a CPU",
                found=f"{rates.accelerator} ({rates.machine})",
            )
        return rates
    if rates.device == "cuda" and rates.accelerator == accelerator:
        return rates
    if accelerator not in ACCELERATORS:
        raise UserError(
            "a GPU that is not known here",
            where="--cluster",
            expected=f"one of {', '.join(ACCELERATORS)}, or rates measured on it (--rates)",
            found=accelerator,
        )
    peak = ACCELERATORS[accelerator]
    if rates.device == "cuda":
        if rates.accelerator not in ACCELERATORS:
            raise UserError("a GPU that is not known here", where="--rates", found=str(rates.accelerator))
        of = ACCELERATORS[rates.accelerator]
        ratio = peak.teraflops / of.teraflops
        steps = {n: replace(s, token_s=s.token_s / ratio) for n, s in rates.training.items()}
        return rates.assuming(
            f"{accelerator} at {ratio:.2f} times the measured {rates.accelerator} (ratio of their peak rates)",
            accelerator=accelerator,
            encode_token_s=rates.encode_token_s / ratio,
            training=steps,
            **{name: getattr(rates, name) * ratio for name in _SEARCH},
        )
    flops = peak.teraflops * 1e12
    token = rates.token_flops / flops
    steps = {
        name: StepRate(GPU_STEP_S, 3 * token / TRAIN_SHARE * _extra(step, rates), step.padding)
        for name, step in rates.training.items()
    }
    return rates.assuming(
        f"no {accelerator} was measured: encoding at {ENCODE_SHARE:.0%}, training at {TRAIN_SHARE:.0%} and search at "
        f"{SEARCH_SHARE:.0%} of its peak of {peak.teraflops:g} TFLOP/s; at least {GPU_STEP_S:g} s a training step",
        device="cuda",
        accelerator=accelerator,
        precision="bf16",
        encode_token_s=token / ENCODE_SHARE,
        training=steps,
        **dict.fromkeys(_SEARCH, flops * SEARCH_SHARE),
    )


def for_backbone(rates: Rates, backbone: str, tokens: float) -> Rates:
    """The rates for another encoder than was measured: times in proportion to the operations of a token.

    Only for encoders whose shape is known here; for others the rates stay as they are (and the plan warns).
    """
    shape = SHAPES.get(backbone.rpartition("/")[2])
    if backbone == rates.backbone or shape is None:
        return rates
    flops = shape.token_flops(tokens)
    ratio = flops / rates.token_flops
    steps = {n: replace(s, fixed_s=s.fixed_s, token_s=s.token_s * ratio) for n, s in rates.training.items()}
    return rates.assuming(
        f"{backbone} was not measured: {ratio:.2f} times the operations a token of {rates.backbone}",
        backbone=backbone,
        parameters=shape.parameters,
        embedding_parameters=shape.embedding_parameters,
        layers=shape.layers,
        hidden=shape.hidden,
        token_flops=flops,
        encode_token_s=rates.encode_token_s * ratio,
        training=steps,
        checkpoint_s=rates.checkpoint_s * shape.parameters / rates.parameters,
    )


# Computed on the server's GPU where it has one (retrieve/exact.py); the rest of retrieval runs on the CPU.
_SEARCH = ("dense_ops", "pair_ops", "single_ops", "pair_exact_ops", "single_exact_ops")


def _extra(step: StepRate, rates: Rates) -> float:
    """What a token of a step costs beside three forward passes of the encoder, as measured on the CPU: 1 at least.

    Scores of a step, the teacher's rows and the optimiser are counted so.
    """
    forward = rates.encode_token_s / rates.cores
    return min(2.0, max(1.0, step.token_s / (3 * forward)))
