"""Uploading a folder to the Hugging Face Hub.

``python -m accelerando.inference.hub FOLDER USER/NAME private`` uploads one from a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.base.log import success
from accelerando.train.state import Run


def check_push(push_to_hub: bool, repo_id: str | None) -> None:
    """UserError before training if a later upload could not work: no repository name, or not logged in."""
    if not push_to_hub:
        return
    if not repo_id or repo_id.count("/") != 1:
        raise UserError(f"--push_to_hub needs --hub_repo_id user/name, not {repo_id!r}")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--push_to_hub: not logged in; run `hf auth login` or set HF_TOKEN")


def push_best(run: Run, push_to_hub: bool, repo_id: str | None, private: bool) -> None:
    """Uploads the best weights if ``push_to_hub``. Main process only."""
    if push_to_hub:
        best = run.directory / "best"
        success("Pushed %s to %s", best, push_folder(best, repo_id, private))


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads ``folder`` in one commit and returns its URL.

    Raises:
        UserError: the Hub cannot be reached or refuses the upload; the folder is not changed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{folder.parent.name}")
    except Exception as error:  # the Hub client passes on errors of the libraries that it uses
        raise UserError(
            f"--push_to_hub {repo_id}: {first_line(error)}; {folder} is complete and can be uploaded later"
        ) from None
    return str(address)


if __name__ == "__main__":
    with errors_in_one_line():
        print(push_folder(Path(sys.argv[1]), sys.argv[2], private=sys.argv[3] == "private"))
