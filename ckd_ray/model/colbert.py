"""ColBERT on any `transformers` encoder: a projection to D numbers a token, rows of unit length.

Source: method.md steps 1 and 2; Khattab and Zaharia, SIGIR 2020. Shapes: B queries, Q rows a query, N passages,
L rows a passage, D dimensions.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckd_ray.errors import UserError, first_line
from ckd_ray.files import has_digest, sha256_of
from ckd_ray.model.settings import ColBERTSettings
from ckd_ray.model.sources import most_tokens, refuse_remote_code, resolve_backbone, silent_transformers
from ckd_ray.model.tokenizer import ColBERTTokenizer
from ckd_ray.progress import say

SETTINGS_FILE = "colbert.json"
PROJECTION_FILE = "projection.safetensors"
WEIGHTS_DIGESTS = "sha256"  # the key, beside the settings, of the SHA-256 of each file of weights
# Weights of heads (of masked-language models, classifiers and the like), which an encoder does not need.
_HEAD = re.compile(
    r"(^|\.)(cls|pooler|(pre_)?classifier|score|qa_outputs|lm_head|head|decoder|predictions|position_ids|seq_relationship|"
    r"vocab_\w+|mlm_\w+|\w+_predictions)(\.|$)"
)
_PROJECTION = re.compile(r"\w*(linear|proj|dense)\w*\.weight")


class ColBERT(nn.Module):
    """An encoder, its tokenizer and the projection, loaded by `ColBERT.from_pretrained` (a checkpoint) or
    `ColBERT.from_backbone` (a bare encoder and a new projection)."""

    def __init__(self, backbone: Any, tokenizer: Any, settings: ColBERTSettings) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = ColBERTTokenizer(tokenizer, settings)
        self.settings = settings
        self.projection = nn.Linear(backbone.config.hidden_size, settings.dim, bias=False)
        self.skip_ids: Tensor
        self.register_buffer("skip_ids", torch.from_numpy(self.tokenizer.skip_ids).long(), persistent=False)
        self.eval()  # as transformers loads a model; queries differ in training mode (`expands_queries`)

    @classmethod
    def from_backbone(cls, source: str, settings: ColBERTSettings, *, seed: int = 0, dropout: float = 0.0) -> ColBERT:
        """A bare `transformers` encoder with a new orthogonal projection drawn from `seed`.

        Args:
            source: a folder, a hub id, or `package:NAME/FOLDER` for weights inside an installed Python package.
            dropout: probability for every dropout of the encoder. 0 keeps the loss the same for any number of workers.

        Raises:
            UserError: the source cannot be loaded, or cannot hold passages of `doc_maxlen` tokens.
        """
        folder = resolve_backbone(source)
        _check_kind(folder, source)
        backbone, tokenizer = load_bare(folder, source)
        settings = _with_markers(backbone, tokenizer, settings)
        model = cls(backbone, tokenizer, settings)
        model._check_length(source)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            nn.init.orthogonal_(model.projection.weight, generator=generator)
        model.set_dropout(dropout)
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ColBERT:
        """Load a checkpoint that `save` wrote (local folder).

        Raises:
            UserError: a file is missing, the shapes do not fit, or the weights are not those that were saved.
        """
        folder = Path(folder)
        if not all((folder / name).is_file() for name in (SETTINGS_FILE, PROJECTION_FILE, "config.json")):
            raise UserError(
                "not a ckd-ray checkpoint",
                where=str(folder),
                expected=f"a folder with config.json, model.safetensors, {PROJECTION_FILE} and {SETTINGS_FILE}",
                found=", ".join(sorted(p.name for p in folder.glob("*"))[:12]) or "nothing",
            )
        settings = read_settings(folder)
        backbone, tokenizer = load_transformers(str(folder), str(folder))
        weight = _read_projection(folder / PROJECTION_FILE)
        model = cls.from_parts(backbone, tokenizer, settings, weight, where=str(folder / PROJECTION_FILE))
        _check_weights(folder)
        return model

    @classmethod
    def from_parts(
        cls, backbone: Any, tokenizer: Any, settings: ColBERTSettings, weight_DH: Tensor, *, where: str
    ) -> ColBERT:
        """A model of a loaded encoder and its projection (D, H); H hidden numbers.

        Raises:
            UserError: the matrix does not fit, or the encoder cannot hold the lengths; `where` names the source.
        """
        model = cls(backbone, tokenizer, settings)
        model._check_length(where)
        if weight_DH.shape != model.projection.weight.shape:
            raise UserError(
                "the projection does not fit the encoder",
                where=where,
                expected=str(tuple(model.projection.weight.shape)),
                found=str(tuple(weight_DH.shape)),
            )
        with torch.no_grad():
            model.projection.weight.copy_(weight_DH)
        model.set_dropout(0.0)
        return model

    def save(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, the tokenizer, the projection and the settings into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.hf.save_pretrained(folder)
        save_file({"weight": self.projection.weight.detach().float().cpu().contiguous()}, folder / PROJECTION_FILE)
        values = self.settings.to_dict() | {WEIGHTS_DIGESTS: _digests(folder)}
        (folder / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n")

    def set_dropout(self, probability: float) -> None:
        """Set every dropout of the encoder, attention included."""
        for module in self.backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
            for name in ("dropout_prob", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, probability)

    def _check_length(self, source: str) -> None:
        room, longest = most_tokens(self.backbone), max(self.settings.doc_maxlen, self.settings.query_maxlen)
        if room is not None and room < longest:
            raise UserError(
                f"{source} holds {room} tokens at most",
                where="model.doc_maxlen / model.query_maxlen",
                expected=f"at most {room}",
                found=str(longest),
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projection.weight.device

    def rows(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Unit rows (N, L, D), float32, of every position; without a mask all positions are attended to."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        # Normalised in float32: under bf16 autocast a unit row would otherwise be off by up to 1/256.
        return F.normalize(self.projection(hidden).float(), dim=-1)

    @property
    def expands_queries(self) -> bool:
        """Whether the augmentation of queries gives embeddings: always, or in training mode alone."""
        return self.settings.query_expansion or (self.training and self.settings.training_expansion)

    def encode_queries(self, ids_BQ: Tensor, mask_BQ: Tensor, *, as_in_training: bool = False) -> Tensor:
        """Unit rows of shape (B, Q, D), float32; augmentation tokens included (method.md step 1).

        The rows after the text are zero where queries are not augmented (`expands_queries`).

        Args:
            as_in_training: give the rows that training mode gives.
        """
        rows_BQD = self.rows(ids_BQ, mask_BQ)
        if self.expands_queries or (as_in_training and self.settings.training_expansion):
            return rows_BQD
        return rows_BQD * mask_BQ[:, :, None]

    def encode_passages(self, ids_NL: Tensor, mask_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows (N, L, D), float32, and keep_NL, the passage mask of `maxsim`: False on padding and punctuation."""
        return self.rows(ids_NL, mask_NL), self.keep_mask(ids_NL, mask_NL)

    def keep_mask(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Bool (N, L): tokens that are neither padding nor in `skip_ids`."""
        return mask_NL.bool() & ~torch.isin(ids_NL, self.skip_ids)


def is_checkpoint(folder: str | Path) -> bool:
    """True when `folder` holds a checkpoint of ckd-ray."""
    return (Path(folder) / SETTINGS_FILE).is_file()


def read_settings(folder: str | Path) -> ColBERTSettings:
    """The settings of a checkpoint.

    Raises:
        UserError: the file is no JSON object, or a value is of another type than `ColBERTSettings` says.
    """
    path = Path(folder) / SETTINGS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"a {type(values).__name__}, not an object")
        return ColBERTSettings.from_dict(values)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError("not the settings of a checkpoint", where=str(path), found=str(error)[:200]) from error


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(str(path)) for path in sorted(folder.glob("*.safetensors"))}


def _check_weights(folder: Path) -> None:
    """Compare the files of weights with the digests that `save` has noted; checkpoints of 0.1 have none.

    Raises:
        UserError: a file has changed since.
    """
    saved = json.loads((folder / SETTINGS_FILE).read_text()).get(WEIGHTS_DIGESTS)
    for name, digest in saved.items() if isinstance(saved, dict) else ():
        path = folder / name
        if not has_digest(str(path), digest):
            raise UserError(
                "the weights of the checkpoint are not those that were saved",
                where=str(path),
                expected=f"SHA-256 {digest}"[:200],
                fix="in a run: give the same command again, which makes a damaged checkpoint again; of a checkpoint"
                f" that you have changed knowingly: delete {WEIGHTS_DIGESTS} from its {SETTINGS_FILE}",
            )


def _read_projection(path: Path) -> Tensor:
    try:
        weight = load_file(path)["weight"]
    except (SafetensorError, OSError, KeyError) as error:
        found = "no tensor weight" if isinstance(error, KeyError) else str(error)[:200]
        problem = "the projection cannot be read"
        raise UserError(problem, where=str(path), expected="safetensors", found=found) from error
    if not torch.isfinite(weight).all():
        raise UserError("the projection holds numbers that are not finite", where=str(path))
    return weight


def read_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a folder or hub id, as `transformers` loads it; code that comes with it is never run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)


def load_tokenizer(folder: str | Path) -> ColBERTTokenizer:
    """The tokenizer of a checkpoint without its weights."""
    return ColBERTTokenizer(read_tokenizer(folder), read_settings(folder))


def load_transformers(folder: str, source: str) -> tuple[Any, Any]:
    """Encoder (float32, without pooler) and tokenizer of a folder or hub id; `source` is what the user wrote.

    Raises:
        UserError: transformers cannot read it, or weights of the encoder are missing.
    """
    return _load_transformers(folder, source)[:2]


def load_bare(folder: str, source: str) -> tuple[Any, Any]:
    """`load_transformers` of a model that is to be an encoder and nothing else.

    Raises:
        UserError: also when it is a late-interaction model, whose projection would be lost.
    """
    backbone, tokenizer, projections = _load_transformers(folder, source)
    _check_bare(backbone, tokenizer, source)
    if projections:
        raise UserError(
            "a model with a projection of its own, not a bare encoder",
            where=source,
            expected="a folder whose files say how to read it: colbert.json, modules.json or artifact.metadata",
            found=", ".join(projections),
        )
    return backbone, tokenizer


def _load_transformers(folder: str, source: str) -> tuple[Any, Any, list[str]]:
    """Encoder, tokenizer, and the names of the projections that the encoder has no place for. The user is told of other
    weights that it has no place for, except those of heads."""
    from transformers import AutoModel

    _check_weight_index(Path(folder))
    try:
        with silent_transformers():  # it would report the pooler, which is dropped below, as missing at every load
            backbone, loaded = AutoModel.from_pretrained(
                folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = read_tokenizer(folder)
    except Exception as error:  # broken files make transformers and tokenizers raise errors of any kind
        refuse_remote_code(error, source)
        raise UserError(
            "the encoder cannot be loaded",
            where=source,
            expected="a folder or hub id that transformers' AutoModel and AutoTokenizer read",
            found=first_line(error),
        ) from error
    if backbone.config.is_encoder_decoder:
        raise UserError(
            "an encoder with a decoder, which gives no embeddings of a text alone",
            where=source,
            expected="an encoder, such as BERT or ModernBERT",
            found=type(backbone).__name__,
        )
    missing = sorted(name for name in loaded["missing_keys"] if "pooler" not in name)
    if missing:  # transformers would have drawn them at random
        raise UserError(
            "weights of the encoder are missing",
            where=source,
            expected=f"weights named as in a saved {type(backbone).__name__}",
            found=f"no {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} ({len(missing)} in all)",
        )
    dropped = sorted(name for name in loaded["unexpected_keys"] if not _HEAD.search(name))
    projections = [name for name in dropped if _PROJECTION.fullmatch(name)]
    if len(dropped) > len(projections):
        others = [name for name in dropped if name not in projections]
        shown = f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
        say(f"{source}: the encoder has no place for {len(others)} of its weights, which are not used: {shown}")
    return without_pooler(backbone), tokenizer, projections


def without_pooler(backbone: Any) -> Any:
    """Drop the pooler: token embeddings do not depend on it, and a parameter without a gradient stops DDP."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def _check_weight_index(folder: Path) -> None:
    """Refuses an index of weights that names files outside of its own folder: transformers would read them."""
    for index in sorted(folder.glob("*.index.json")) if folder.is_dir() else []:
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            strange = sorted({str(n) for n in names if Path(str(n)).name != str(n)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError("not an index of weights", where=str(index), found=str(error)[:200]) from error
        if strange:
            raise UserError(
                "an index names weights outside of its folder",
                where=str(index),
                expected="names of files beside it",
                found=repr(strange[0][:80]),
            )


def _check_kind(folder: str, source: str) -> None:
    """Refuses a folder whose files say that it is a ColBERT model."""
    from ckd_ray.model.exchange.detect import kind_of

    if (Path(folder) / "config.json").is_file() and (kind := kind_of(Path(folder))) != "encoder":
        raise UserError(
            f"a late-interaction (ColBERT) model ({kind}), not a bare encoder",
            where=source,
            fix="ckd_ray.model.exchange.load_any reads it with its projection",
        )


def _check_bare(backbone: Any, tokenizer: Any, source: str) -> None:
    """Refuses what is left of a ColBERT model of colbert-ai or PyLate without the files that hold its projection."""
    of_colbert_ai = "HF_ColBERT" in (backbone.config.architectures or [])
    if of_colbert_ai or {"[Q] ", "[D] "} <= tokenizer.get_vocab().keys():
        raise UserError(
            "a ColBERT model of another library, not a bare encoder",
            where=source,
            expected="the folder of the whole model, projection included",
            found="the architecture HF_ColBERT" if of_colbert_ai else "PyLate's markers in the vocabulary",
            fix="download the whole model, or name its hub id where the hub can be reached",
        )


def _with_markers(backbone: Any, tokenizer: Any, settings: ColBERTSettings) -> ColBERTSettings:
    """The settings with markers that the vocabulary has; one without [unused0] (RoBERTa, SentencePiece) gets two new
    tokens, [Q] and [D]."""
    vocabulary = tokenizer.get_vocab()
    if settings.query_marker in vocabulary and settings.doc_marker in vocabulary:
        return settings
    tokenizer.add_special_tokens({"additional_special_tokens": ["[Q]", "[D]"]})
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(len(tokenizer))
    return replace(settings, query_marker="[Q]", doc_marker="[D]")
