"""What sentence-transformers and PyLate share: modules.json, and dense layers in folders of their own.

Shapes: D dimensions of the projection, H hidden numbers of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ckd_ray.errors import UserError
from ckd_ray.model.exchange.detect import MODULES, inside, read_list, read_object, write_json
from ckd_ray.model.exchange.weights import as_matrix, read_tensor

IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class Module:
    """One step of a model: the last part of its class name, its folder, and the whole class name."""

    kind: str
    folder: Path
    type: str


def read_modules(folder: Path, allowed: set[str]) -> list[Module]:
    """The steps of modules.json, the first a Transformer; UserError for a step whose class is not `allowed`."""
    named = [(str(e.get("type", "")), str(e.get("path", ""))) for e in read_list(folder / MODULES)]
    modules = [Module(name.rpartition(".")[2], inside(folder, path), name) for name, path in named]
    strange = [m.type for m in modules if m.kind not in allowed]
    if strange or not modules or modules[0].kind != "Transformer":
        raise UserError(
            "this model has steps that a ColBERT model does not have",
            where=str(folder / MODULES),
            expected=f"Transformer first, then {', '.join(sorted(allowed - {'Transformer'}))}",
            found=", ".join(strange or [m.type for m in modules]) or "nothing",
        )
    return modules


def read_projection(folder: Path, modules: list[Module]) -> Tensor:
    """All dense layers as one matrix (D, H): without bias and activation, a chain of layers is their product.

    Raises:
        UserError: no dense layer, or one that is not linear.
    """
    product: Tensor | None = None
    for module in (m for m in modules if m.kind == "Dense"):
        matrix = _read_dense(module.folder)
        if product is not None and matrix.shape[1] != product.shape[0]:
            raise UserError(
                "dense layers that do not fit one another",
                where=str(module.folder),
                expected=f"{product.shape[0]} inputs",
                found=str(matrix.shape[1]),
            )
        product = matrix if product is None else (matrix.double() @ product.double()).float()
    if product is None:
        raise UserError("no dense layer projects the tokens", where=str(folder / MODULES), expected="a Dense module")
    return product


def _read_dense(folder: Path) -> Tensor:
    config = read_object(folder / "config.json")
    activation = str(config.get("activation_function", IDENTITY))
    reads = config.get("module_input_name", "token_embeddings")
    writes = config.get("module_output_name") or reads
    problems = ["a bias"] if config.get("bias", False) else []
    problems += [] if activation.endswith(".Identity") else [f"the activation {activation}"]
    problems += [] if reads == writes == "token_embeddings" else [f"{reads} as input and {writes} as output"]
    if problems:
        raise UserError(
            "this dense layer is no projection of token embeddings by a matrix alone",
            where=str(folder / "config.json"),
            expected="no bias, the activation Identity, token_embeddings in and out",
            found=", ".join(problems),
        )
    matrix = as_matrix(read_tensor(folder, "linear.weight"), str(folder))
    if config.get("use_residual", False):
        rows, columns = matrix.shape
        rest = torch.eye(rows) if rows == columns else read_tensor(folder, "residual.weight")
        matrix = matrix + as_matrix(rest, str(folder))
    return matrix


def write_modules(folder: Path, modules: list[tuple[str, str]]) -> None:
    """modules.json from (class name, subfolder)."""
    entries = [{"idx": i, "name": str(i), "path": path, "type": name} for i, (name, path) in enumerate(modules)]
    write_json(folder / MODULES, entries)


def write_dense(folder: Path, weight: Tensor, config: dict[str, Any]) -> None:
    """A dense layer of this weight (D, H); `config` is added to what all libraries read."""
    folder.mkdir()
    rows, columns = weight.shape
    write_json(
        folder / "config.json",
        {"in_features": columns, "out_features": rows, "bias": False, "activation_function": IDENTITY, **config},
    )
    save_file({"linear.weight": weight.detach().float().cpu().contiguous()}, folder / "model.safetensors")


def read_transformer(folder: Path) -> dict[str, Any]:
    """The settings of the Transformer step; versions of the library gave the file different names."""
    for name in ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json"):
        if (folder / name).is_file():
            return read_object(folder / name)
    return {}


def check_case(settings: dict[str, Any], hf: Any, where: Path) -> None:
    """Raises UserError when texts are lowered by `do_lower_case` of the Transformer step and not by the tokenizer."""
    if settings.get("do_lower_case") and hf.tokenize("Aa B") != hf.tokenize("aa b"):
        problem = "the model lowers the case of texts outside of its tokenizer"
        raise UserError(problem, where=str(where), expected="do_lower_case false")
