"""The untrained baseline: an encoder that gives one vector a text, pooled from the last layer's token outputs.

sentence-transformers reads the same folder in this way, so this is what a user has without a distilled student.
Shapes: N texts, L tokens of the longest, H hidden numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import load_bare, load_transformers, read_tokenizer
from ckd_ray.model.settings import ColBERTSettings
from ckd_ray.model.sources import most_tokens, resolve_backbone
from ckd_ray.model.tokenizer import ColBERTTokenizer

Pooling = Literal["mean", "cls"]
POOLED_FILE = "pooled.json"
# sentence-transformers' limit for small encoders, where the folder does not name one.
MAXLEN = 256


class PooledModel(nn.Module):
    """An encoder, its tokenizer and the way its token outputs become one vector.

    Attributes:
        settings: `dim` is H; `doc_maxlen` is the most tokens of a text, [CLS] and [SEP] included; there are no markers.
        pooling: `mean` over the attention mask, or `cls`, the first token.
    """

    def __init__(self, backbone: Any, tokenizer: Any, maxlen: int, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.backbone = backbone
        self.settings = _settings(int(backbone.config.hidden_size), maxlen)
        self.tokenizer = ColBERTTokenizer(tokenizer, self.settings)
        self.pooling = pooling

    @classmethod
    def from_backbone(cls, source: str) -> PooledModel:
        """The encoder of `model.backbone`, with the pooling and the length that sentence-transformers would use.

        Raises:
            UserError: the source cannot be loaded, or is a late-interaction (ColBERT) model, which pools nothing.
        """
        from ckd_ray.model.exchange.detect import encoder_folder, kind_of

        root = Path(resolve_backbone(source))
        folder = str(root)
        if root.exists():
            kind = kind_of(root)
            if kind != "encoder":
                raise UserError(
                    f"a late-interaction (ColBERT) model ({kind}), which has no vector for a whole text",
                    where="model.backbone",
                    found=source,
                )
            folder = str(encoder_folder(root))
        backbone, tokenizer = load_bare(folder, source)
        chosen = _object(folder, "sentence_bert_config.json").get("max_seq_length")
        limits: list[Any] = [chosen if isinstance(chosen, int) and chosen > 2 else MAXLEN]
        limits += [most_tokens(backbone), tokenizer.model_max_length]
        maxlen = min(int(n) for n in limits if isinstance(n, int) and n > 2)
        return cls(backbone, tokenizer, maxlen, _pooling(_object(str(root), "1_Pooling/config.json")))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PooledModel:
        """Load what `save` wrote (local folder)."""
        backbone, tokenizer = load_transformers(str(folder), str(folder))
        values = _object(str(folder), POOLED_FILE)
        return cls(backbone, tokenizer, values["maxlen"], values["pooling"])

    def save(self, folder: str | Path) -> None:
        """Write the encoder, the tokenizer and the pooling into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.hf.save_pretrained(folder)
        values = {"dim": self.settings.dim, "maxlen": self.settings.doc_maxlen, "pooling": self.pooling}
        (folder / POOLED_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")

    def vectors(self, ids_NL: Tensor, mask_NL: Tensor, *, padded: bool = True) -> Tensor:
        """Unit vectors (N, H), float32, of tokenised texts.

        Args:
            padded: False when no text is padded; attention is faster without a mask.
        """
        hidden_NLH = self.backbone(input_ids=ids_NL, attention_mask=mask_NL if padded else None).last_hidden_state
        # In float32: under bf16 autocast a unit vector would otherwise be off by up to 1/256.
        return F.normalize(pool(hidden_NLH.float(), mask_NL, self.pooling), dim=-1)

    def encode_passages(self, ids_NL: Tensor, mask_NL: Tensor) -> tuple[Tensor, Tensor]:
        """One row a text: unit vectors (N, 1, H), and keep (N, 1), all True."""
        vectors_NH = self.vectors(ids_NL, mask_NL)
        return vectors_NH[:, None], torch.ones(len(vectors_NH), 1, dtype=torch.bool)


def pool(hidden_NLH: Tensor, mask_NL: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text (N, H) from its token outputs: their mean over the attention mask, or the first one."""
    if pooling == "cls":
        return hidden_NLH[:, 0]
    weights_NL1 = mask_NL[:, :, None].to(hidden_NLH.dtype)
    return (hidden_NLH * weights_NL1).sum(1) / weights_NL1.sum(1).clamp(min=1e-9)


def load_pooled_tokenizer(folder: str | Path) -> ColBERTTokenizer:
    """The tokenizer of a folder that `PooledModel.save` wrote, without the weights."""
    values = _object(str(folder), POOLED_FILE)
    return ColBERTTokenizer(read_tokenizer(folder), _settings(values["dim"], values["maxlen"]))


def _settings(hidden: int, maxlen: int) -> ColBERTSettings:
    """Texts framed as [CLS] text [SEP]: no markers, and every token counts."""
    return ColBERTSettings(
        dim=hidden, query_maxlen=maxlen, doc_maxlen=maxlen, mask_punctuation=False, query_marker="", doc_marker=""
    )


def _pooling(values: dict[str, Any]) -> Pooling:
    """The mode that 1_Pooling/config.json names: `cls`, else `mean` (other modes are not rebuilt here)."""
    return "cls" if values.get("pooling_mode_cls_token") is True or values.get("pooling_mode") == "cls" else "mean"


def _object(folder: str, name: str) -> dict[str, Any]:
    """The JSON object `name` of a local folder; empty where there is none, or it is no object."""
    try:
        values = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
