"""`ckd-ray export --push OWNER/NAME`: an exported folder as a repository of the hub."""

from __future__ import annotations

from typing import Any

from ckd_ray.errors import UserError, first_line
from ckd_ray.files import local_copy

KINDS = {"model": "model", "labels": "dataset", "vectors": "dataset", "index": "dataset"}


def push_folder(folder: str, repo: str, what: str = "model", *, api: Any = None) -> str:
    """Upload a folder, which may lie at a URI. A repository that is new is private.

    Args:
        what: `model`, which becomes a model; or `labels`, `vectors` or `index`, which become a data set.
        api: a `huggingface_hub.HfApi`; None makes one, with the token of HF_TOKEN or `hf auth login`.

    Returns:
        the address of the repository.

    Raises:
        UserError: the hub refuses or cannot be reached. The export itself is there.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        made = api.create_repo(repo_id=repo, repo_type=KINDS[what], private=True, exist_ok=True)
        with local_copy(folder) as local:
            message = "Upload by ckd-ray export"
            api.upload_folder(
                repo_id=made.repo_id, repo_type=KINDS[what], folder_path=str(local), commit_message=message
            )
    except Exception as error:  # of the network, of the hub, of a wrong name
        raise UserError(
            "the hub did not take the export",
            where=f"--push {repo}",
            expected="OWNER/NAME of a repository that your token may write to",
            found=first_line(error),
            fix=f"hf auth login, or set HF_TOKEN; the export is in {folder}, and hf upload takes it",
        ) from error
    return str(made)
