"""Models to and from other libraries, without those libraries: folders as they write them, made here by hand.

The libraries themselves are asked in tests/exchange.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings, maxsim
from ckd_ray.model.exchange import FORMATS, load_any, write_export
from ckd_ray.model.exchange.detect import read_list
from ckd_ray.model.sources import signature
from ckd_ray.pipeline.card import Facts, model_card
from ckd_ray.pipeline.export import export_run, write_student_card
from ckd_ray.runs.directory import RunDir
from tests.support import WORDS

SETTINGS = ColBERTSettings(dim=16, query_maxlen=8, doc_maxlen=12)
DEFAULTS = ColBERTSettings(dim=16, query_maxlen=9, doc_maxlen=20)
QUERIES = [" ".join(WORDS[:2]) + " ?", WORDS[5], " ".join(WORDS[:30])]
PASSAGES = [f"{WORDS[0]} , {WORDS[1]} .", " ".join(WORDS[:40]), "! ? .", WORDS[5]]


@pytest.fixture(scope="module")
def model(tiny_backbone: str) -> ColBERT:
    return ColBERT.from_backbone(tiny_backbone, SETTINGS, seed=3).eval()


def scores(model: ColBERT, similarity: str = "cosine") -> Tensor:
    model.eval()
    with torch.no_grad():
        queries = model.encode_queries(*model.tokenizer.queries(QUERIES))
        passages, keep = model.encode_passages(*model.tokenizer.pad(model.tokenizer.passages(PASSAGES)))
    return maxsim(queries, passages, keep, similarity=similarity)  # type: ignore[arg-type]


def with_settings(model: ColBERT, **changes: Any) -> ColBERT:
    settings = replace(model.settings, **changes)
    return ColBERT.from_parts(model.backbone, model.tokenizer.hf, settings, model.projection.weight, where="test")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def exported(model: ColBERT, folder: Path, fmt: str) -> Path:
    """An export as the library itself would have left it: without our file beside it."""
    folder.mkdir()
    write_export(model, folder, fmt)
    (folder / "ckd_ray_export.json").unlink()
    return folder


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "onnx"])
@pytest.mark.parametrize("changes", [{}, {"attend_to_mask": True, "similarity": "cosine"}], ids=["published", "other"])
def test_round_trip(model: ColBERT, tmp_path: Path, fmt: str, changes: dict[str, Any]) -> None:
    """Weights and settings come back bit by bit, and so do scores; the folder passes through the importer of others."""
    mine = with_settings(model, **changes)
    write_export(mine, tmp_path, fmt)
    loaded = load_any(str(tmp_path), replace(DEFAULTS, similarity="l2"))
    again = loaded.model
    assert loaded.kind == {"colbert": "colbert-ai"}.get(fmt, fmt)
    assert again.settings == mine.settings
    for (name, a), (other, b) in zip(mine.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert torch.equal(scores(mine), scores(again))
    # exchange.md: on unit rows l2 is 2 s - 2 Q.
    assert torch.allclose(scores(again, "l2"), 2 * scores(mine) - 2 * 8, atol=1e-5)
    assert not [p.name for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("fmt", ["sentence-transformers", "pylate"])
def test_settings_that_only_some_libraries_hold(model: ColBERT, tmp_path: Path, fmt: str) -> None:
    """No markers, queries as they are, other skipped tokens: kept by two libraries, refused for the third."""
    odd = with_settings(
        model,
        query_marker="",
        doc_marker="",
        query_expansion=False,
        mask_punctuation=False,
        skip_tokens=(".", WORDS[3]),
    )
    write_export(odd, tmp_path, fmt)
    again = load_any(str(tmp_path), DEFAULTS).model
    assert again.settings == odd.settings and torch.equal(scores(odd), scores(again))
    with pytest.raises(UserError, match="colbert-ai cannot hold this model"):
        write_export(odd, tmp_path / "c", "colbert")


def test_expansion_in_training_alone(model: ColBERT, tmp_path: Path) -> None:
    """Training mode gives the rows of `query_expansion`, any other those of the text; exports fill nothing, but for
    colbert-ai, which knows nothing else and is told so."""
    settings = {"query_expansion": False, "training_expansion": True}
    ours, filled, bare = (with_settings(model, **s) for s in (settings, {}, {"query_expansion": False}))
    ids, mask = ours.tokenizer.queries(QUERIES[1:2])
    with torch.no_grad():
        assert torch.equal(ours.encode_queries(ids, mask), bare.encode_queries(ids, mask))
        assert torch.equal(ours.encode_queries(ids, mask, as_in_training=True), filled.encode_queries(ids, mask))
        assert torch.equal(ours.train().encode_queries(ids, mask), filled.encode_queries(ids, mask))
        assert torch.equal(bare.encode_queries(ids, mask, as_in_training=True), bare.encode_queries(ids, mask))
    ours.save(tmp_path / "saved")
    again = ColBERT.from_pretrained(tmp_path / "saved")
    assert not again.training and again.settings == ours.settings
    for fmt in ("pylate", "sentence-transformers", "colbert"):
        (tmp_path / fmt).mkdir()
        notes = write_export(ours, tmp_path / fmt, fmt)
        there = load_any(str(tmp_path / fmt), DEFAULTS).model
        assert there.settings.query_expansion == (fmt == "colbert") == any("[MASK]" in note for note in notes)


def test_queries_without_expansion_score_only_their_own_rows(model: ColBERT) -> None:
    """The rows after a query's text are zero: its cosine score is that of its text's rows alone."""
    bare = with_settings(model, query_expansion=False).eval()
    ids, mask = bare.tokenizer.queries(QUERIES[1:2])
    length = int(mask.sum())
    with torch.no_grad():
        rows = bare.encode_queries(ids, mask)
        passages, keep = bare.encode_passages(*bare.tokenizer.pad(bare.tokenizer.passages(PASSAGES)))
    assert length == 4 and not rows[0, length:].any()
    whole, cut = (maxsim(r, passages, keep, similarity="cosine") for r in (rows, rows[:, :length]))
    assert torch.allclose(whole, cut, atol=1e-6)


def test_pylate_folder_as_pylate_writes_it(model: ColBERT, tmp_path: Path) -> None:
    """Its own class names, no model_type, [MASK] as padding token, two dense layers with a residual."""
    folder = exported(model, tmp_path / "m", "pylate")
    library = json.loads((folder / "config_sentence_transformers.json").read_text())
    del library["model_type"]
    library |= {"query_length": 7, "attend_to_expansion_tokens": True, "skiplist_words": [".", ",", "~nothing~"]}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(library))
    edit(folder / "tokenizer_config.json", pad_token="[MASK]")
    names = [("sentence_transformers.models.Transformer", ""), ("pylate.models.Dense.Dense", "1_Dense")]
    names.append(("pylate.models.Dense.Dense", "2_Dense"))
    entries = [{"idx": i, "name": str(i), "path": p, "type": t} for i, (t, p) in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "2_Dense").mkdir()
    identity = "torch.nn.modules.linear.Identity"
    layer = {
        "in_features": 16,
        "out_features": 16,
        "bias": False,
        "activation_function": identity,
        "use_residual": True,
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(layer))
    second = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    save_file({"linear.weight": second}, folder / "2_Dense" / "model.safetensors")
    got = load_any(str(folder), DEFAULTS).model
    first = model.projection.weight.detach()
    assert torch.allclose(got.projection.weight, second @ first + first, atol=1e-5)
    # A word that is no token stands for [UNK] in PyLate.
    assert got.settings == replace(
        SETTINGS, query_maxlen=7, attend_to_mask=True, mask_punctuation=False, skip_tokens=("[UNK]", ".", ",")
    )
    assert (got.tokenizer.pad_id, got.tokenizer.mask_id) == (0, 4)


def test_sentence_transformers_folder_with_nothing_but_a_backbone(model: ColBERT, tmp_path: Path) -> None:
    """What MultiVectorEncoder(backbone).save writes: no prompts, no lengths, no expansion, nothing skipped."""
    folder = exported(model, tmp_path / "m", "sentence-transformers")
    bert = folder / "sentence_bert_config.json"
    kept = {"transformer_task", "modality_config", "module_output_name"}
    bert.write_text(json.dumps({k: v for k, v in json.loads(bert.read_text()).items() if k in kept}))
    edit(folder / "2_MultiVectorMask" / "config.json", skiplist_words=[])
    edit(folder / "config_sentence_transformers.json", prompts={"document": "", "query": ""})
    got = load_any(str(folder), replace(DEFAULTS, similarity="cosine")).model
    assert got.settings == ColBERTSettings(
        dim=16, query_maxlen=9, doc_maxlen=20, mask_punctuation=False, similarity="cosine", query_marker="",
        doc_marker="", query_expansion=False,
    )  # fmt: skip
    assert got.tokenizer.queries([WORDS[0]])[0][0, :3].tolist() == [2, 16, 3]


def test_colbert_ai_folder_with_its_defaults_and_a_torch_file(model: ColBERT, tmp_path: Path) -> None:
    """An older checkpoint: pytorch_model.bin, null for what was not set, l2."""
    folder = exported(model, tmp_path / "m", "colbert")
    weights = load_file(folder / "model.safetensors")
    assert "linear.weight" in weights and "bert.embeddings.word_embeddings.weight" in weights
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    edit(folder / "artifact.metadata", query_maxlen=None, doc_maxlen=60, similarity="l2", checkpoint=None, nway=2)
    got = load_any(str(folder), DEFAULTS).model
    assert got.settings == replace(SETTINGS, query_maxlen=32, doc_maxlen=60, similarity="l2")
    assert torch.equal(got.projection.weight, model.projection.weight)


@pytest.fixture
def dnn(model: ColBERT, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A published checkpoint, the folder of its encoder, and what the file holds."""
    encoder = exported(model, tmp_path / "encoder", "pylate")
    shutil.rmtree(encoder / "1_Dense")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (encoder / name).unlink()
    state = {f"bert.{name}": t for name, t in model.backbone.state_dict().items()}
    state |= {"linear.weight": model.projection.weight.detach(), "bert.embeddings.position_ids": torch.arange(64)[None]}
    state["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    arguments = {
        "query_maxlen": 8,
        "doc_maxlen": 12,
        "dim": 16,
        "similarity": "l2",
        "mask_punctuation": True,
        "amp": True,
    }
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    saved = {
        "epoch": 0,
        "batch": 5,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer,
        "arguments": arguments,
    }
    (tmp_path / "published").mkdir()
    file = tmp_path / "published" / "colbert.dnn"
    torch.save(saved, file)
    return file, encoder, saved


def test_published_checkpoint(model: ColBERT, dnn: tuple[Path, Path, dict[str, Any]]) -> None:
    file, encoder, saved = dnn
    got = load_any(str(file), DEFAULTS, encoder=str(encoder)).model
    assert got.settings == SETTINGS and torch.equal(scores(got), scores(model))
    saved["model_state_dict"] = {f"module.{name}": t for name, t in saved["model_state_dict"].items()}
    saved["arguments"] = None
    torch.save(saved, file)
    got = load_any(str(file), DEFAULTS, encoder=str(encoder)).model
    assert got.settings == DEFAULTS and torch.equal(got.projection.weight, model.projection.weight)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, file.parent)
    assert load_any(str(file), DEFAULTS).model.settings == DEFAULTS


class _Code:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('the pickle was run')",)


def test_bad_published_checkpoints(dnn: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    file, encoder, saved = dnn
    state = dict(saved["model_state_dict"])
    query = "bert.encoder.layer.0.attention.self.query.weight"

    def refused(contents: Any, message: str) -> None:
        torch.save(contents, file)
        with pytest.raises(UserError, match=message):
            load_any(str(file), DEFAULTS, encoder=str(encoder))

    refused({**saved, "arguments": _Code()}, "this torch file is not read")
    refused([1, 2], "not a ColBERT checkpoint")
    refused({**saved, "model_state_dict": {k: v for k, v in state.items() if k != "linear.weight"}}, "no projection")
    refused({**saved, "model_state_dict": {k: v for k, v in state.items() if k != query}}, "weights of the encoder")
    refused({**saved, "model_state_dict": {**state, query: torch.zeros(3, 3)}}, "does not fit")
    refused({**saved, "model_state_dict": {**state, "linear.weight": torch.zeros(16, 7)}}, "does not fit")
    refused({**saved, "model_state_dict": {**state, "linear.weight": torch.zeros(16)}}, "no usable matrix")
    torch.save(saved, file)
    with pytest.raises(UserError, match="neither tokenizer nor configuration"):
        load_any(str(file), DEFAULTS, encoder=str(tmp_path / "nowhere"))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="this torch file is not read"):
        load_any(str(file), DEFAULTS, encoder=str(encoder))


def test_what_has_no_counterpart_is_refused(model: ColBERT, tmp_path: Path) -> None:
    st = exported(model, tmp_path / "st", "sentence-transformers")
    co = exported(model, tmp_path / "co", "colbert")

    def refused(file: Path, message: str, **changes: Any) -> None:
        before = file.read_text()
        edit(file, **changes)
        with pytest.raises(UserError, match=message):
            load_any(str(file.parents[1] if file.parent.name[0].isdigit() else file.parent), DEFAULTS)
        file.write_text(before)

    refused(st / "1_Dense" / "config.json", "a bias", bias=True)
    refused(st / "1_Dense" / "config.json", "Tanh", activation_function="torch.nn.modules.activation.Tanh")
    refused(st / "2_MultiVectorMask" / "config.json", "choice of rows", skiplist_tasks=["query", "document"])
    refused(st / "3_Normalize" / "config.json", "not normalised", module_input_name="sentence_embedding")
    refused(st / "config_sentence_transformers.json", "several tokens", prompts={"query": "search for: "})
    refused(st / "sentence_bert_config.json", "widening", query_expansion={"strategy": "min", "length": 8})
    with pytest.raises(UserError, match="not a bare encoder"):  # as a hub id would be taken
        ColBERT.from_backbone(str(co), SETTINGS)
    refused(co / "artifact.metadata", "other than MaxSim", interaction="flipr")
    refused(co / "artifact.metadata", "no marker token", query_token_id="[nothing]")
    entries = json.loads((st / "modules.json").read_text())
    entries[1]["path"] = "../co"
    (st / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="outside of the model's folder"):
        load_any(str(st), DEFAULTS)
    weights = load_file(co / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "linear.weight"}, co / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor linear\.weight"):
        load_any(str(co), DEFAULTS)
    save_file({"linear.weight": weights["linear.weight"]}, co / "model.safetensors")
    with pytest.raises(UserError, match="weights of the encoder are missing"):
        load_any(str(co), DEFAULTS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"(?s)no model in this folder.*notes\.txt"):
        load_any(str(tmp_path / "empty"), DEFAULTS)


def test_a_files_change_is_noticed(model: ColBERT, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "m", "pylate")
    before = signature(str(folder))
    (folder / "README.md").write_text("a card is no part of a model")
    assert signature(str(folder)) == before
    save_file({"linear.weight": torch.zeros(16, 32)}, folder / "1_Dense" / "model.safetensors")
    assert signature(str(folder)) != before
    assert signature(str(folder / "config.json"))[0][0] == "config.json"


def test_export_of_a_run(model: ColBERT, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    model.save(run / "student")
    (run / "student" / "_manifest.json").write_text("{}")
    config = {"run": {"name": "mine", "seed": 5}, "model": {"backbone": "/home/someone/secret/bert-tiny"}}
    config |= {"collection": {"path": "/home/someone/data"}, "teacher": {"steps": 7}, "label": {"voters": 10}}
    config |= {"distill": {"objective": "collective", "temperature": 0.25}}
    (run / "run.json").write_text(json.dumps({"config": config}))
    (run / "evaluation").mkdir()
    measures = {"splits": {"dev": {"teacher": {"MRR@10": 0.25}, "student": {"MRR@10": 0.3125}}}}
    (run / "evaluation" / "measures.json").write_text(json.dumps(measures))
    (run / "evaluation" / "student.dev.per_query.json").write_text(json.dumps({"MRR@10": {"a": 0.125, "b": 0.5}}))
    assert export_run(str(run), "pylate")["measures"] == {}, "an unfinished evaluation says nothing"
    write_student_card(RunDir(str(run)))  # at the end of the evaluation, before its manifest
    assert "| dev | 2 | 0.3125 |" in (run / "student" / "README.md").read_text()
    (run / "evaluation" / "_manifest.json").write_text("{}")
    written = export_run(str(run), "pylate")  # over the earlier export
    card = (Path(written["out"]) / "README.md").read_text()
    assert written["out"] == str(run / "exports" / "pylate") and "| dev | 2 | 0.3125 |" in card
    for part in (
        "NAACL",
        "Collective Relevance Labeling",
        "temperature 0.25",
        "models.ColBERT",
        "Licence",
        "bert-tiny",
    ):
        assert part in card
    assert "someone" not in card and "0.2500" not in card
    with pytest.raises(UserError, match="this place is in use"):
        export_run(str(run), "colbert", out=str(run / "student"))
    with pytest.raises(UserError, match="no finished teacher"):
        export_run(str(run), "colbert", role="teacher")
    with pytest.raises(UserError, match="unknown format"):
        export_run(str(run), "gguf")
    single = export_run(str(run / "student"), "colbert", out=str(tmp_path / "single"))
    assert (tmp_path / "single" / "artifact.metadata").is_file() and single["measures"] == {}


def test_import_as_teacher_or_backbone(model: ColBERT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline's own loading: a folder's settings stand and are told, another dimension is an error."""
    from ckd_ray.checks import load_config
    from ckd_ray.pipeline.loading import load_backbone, load_teacher

    folder = str(exported(model, tmp_path / "m", "pylate"))
    config = load_config(None, ["model.dim=16", "model.doc_maxlen=40"])
    backbone = config.model.model_copy(update={"backbone": folder})
    assert torch.equal(load_teacher(folder, config).projection.weight, model.projection.weight)
    loaded = load_backbone(config.model_copy(update={"model": backbone}))
    assert torch.equal(loaded.projection.weight, model.projection.weight)
    told = capsys.readouterr().err
    assert f"model.doc_maxlen: 12 is taken from {folder} (40 in the configuration)" in told
    assert f"model.query_expansion: always is taken from {folder} (training in the configuration)" in told
    with pytest.raises(UserError, match="another dimension"):
        load_teacher(folder, load_config(None, ["model.dim=128"]))


def test_a_card_without_facts(model: ColBERT) -> None:
    card = model_card(SETTINGS, Facts("x"))
    assert card.startswith("---\n") and "has not evaluated" in card and "ColBERT.from_pretrained" in card


@pytest.mark.parametrize("text", ["{", "[" * 200_000], ids=["broken", "too deep"])
def test_a_broken_list_of_modules_is_told_with_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(UserError, match=r"modules\.json: not valid JSON"):
        read_list(tmp_path / "modules.json")
