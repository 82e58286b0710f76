"""`ckd-ray export --push OWNER/NAME`: an exported folder as a repository of the hub."""

from __future__ import annotations

from typing import Any

from ckd_ray.errors import UserError, first_line
from ckd_ray.files import local_copy

KINDS = {"model": "model", "labels": "dataset", "vectors": "dataset", "index": "dataset"}
# Only ckd-ray reads it, to recognise an export in this folder that it may continue or replace.
_NOT_UPLOADED = "_manifest.json"
_EXPECTED = "OWNER/NAME of a repository that your token may write to"
_TOKEN = "hf auth login, or set HF_TOKEN"


def check_repository(repo: str, *, api: Any = None) -> None:
    """Refuse, before an export is made, what the hub would refuse after it.

    Args:
        api: as `push_folder` takes it.

    Raises:
        UserError: `repo` is no OWNER/NAME, there is no valid token, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    problem, fix = "this is no name of a repository", "name it as OWNER/NAME"
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise ValueError(f"no owner: '{repo}'")
        problem, fix = "the hub does not accept your token", _TOKEN
        (api or HfApi()).whoami()
    except Exception as error:  # of the network, of the hub, of a wrong name
        fix = f"{fix}; nothing is written yet"
        raise UserError(
            problem, where=f"--push {repo}", expected=_EXPECTED, found=first_line(error), fix=fix
        ) from error


def push_folder(folder: str, repo: str, what: str = "model", *, api: Any = None) -> str:
    """Upload a folder, which may lie at a URI. A repository that is new is private.

    Of a data set, what an earlier upload left and this folder has not is deleted there: a part of an earlier export
    would be read with those of this one. Nothing is deleted beside a model.

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
            api.upload_folder(
                repo_id=made.repo_id,
                repo_type=KINDS[what],
                folder_path=str(local),
                commit_message="Upload by ckd-ray export",
                ignore_patterns=_NOT_UPLOADED,
                delete_patterns=None if what == "model" else "*",
            )
    except Exception as error:  # of the network, of the hub, of a wrong name
        raise UserError(
            "the hub did not take the export",
            where=f"--push {repo}",
            expected=_EXPECTED,
            found=first_line(error),
            fix=f"{_TOKEN}; the export is in {folder}, and hf upload takes it",
        ) from error
    return str(made)
