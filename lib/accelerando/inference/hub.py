"""Uploading a folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from accelerando.base.errors import UserError, first_line
from accelerando.base.log import success
from accelerando.train.state import Run


def check_push(push_to_hub: bool, repo_id: str | None) -> None:
    """UserError before training when a later upload could not work: no repository named, or no login."""
    if not push_to_hub:
        return
    if not repo_id or repo_id.count("/") != 1:
        raise UserError(f"--push_to_hub needs --hub_repo_id user/name, not {repo_id!r}")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--push_to_hub: not logged in; run `hf auth login` or set HF_TOKEN")


def push_best(run: Run, push_to_hub: bool, repo_id: str | None, private: bool) -> None:
    """Uploads the best weights where that was asked for. Main process only."""
    if push_to_hub:
        best = run.directory / "best"
        success("Pushed %s to %s", best, push_folder(best, repo_id, private))


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads ``folder`` in one commit and returns its URL.

    Raises:
        UserError: the Hub cannot be reached or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{folder.parent.name}")
    except Exception as error:  # the Hub client lets through the errors of the libraries below it
        raise UserError(
            f"--push_to_hub {repo_id}: {first_line(error)}; {folder} is complete and can be uploaded later"
        ) from None
    return str(address)
