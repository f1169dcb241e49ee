"""Uploads to the Hugging Face Hub: in the background during training, and of a finished run."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from accelerando.base.errors import UserError, first_line
from accelerando.base.log import log, success
from accelerando.report.model_card import card_with_results
from accelerando.train.state import Run

# What is uploaded beside best/, as far as a run has it.
REPORT_FILES = ("report.html", "summary.txt", "results.json", "metrics.csv", "config.yaml", "plots/*.png")
DRAFT = ".hub.draft"  # in the run's folder: what is being uploaded


class HubArgs(Protocol):
    """The settings of an upload, which every script has."""

    push_to_hub: bool
    hub_repo_id: str | None
    hub_private: bool
    hub_strategy: str


def check_push(push_to_hub: bool, repo_id: str | None) -> None:
    """UserError before training if a later upload could not work: no repository name, or not logged in."""
    if not push_to_hub:
        return
    if not repo_id or repo_id.count("/") != 1:
        raise UserError(f"--push_to_hub needs --hub_repo_id user/name, not {repo_id!r}")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--push_to_hub: not logged in; run `hf auth login` or set HF_TOKEN")


class Hub:
    """The uploads of a run: with ``hub_strategy`` every_save the best weights so far, and at the end all of it."""

    def __init__(self, run: Run, args: HubArgs) -> None:
        self.run, self.args = run, args
        self._thread: threading.Thread | None = None
        self._pushed = 0.0  # modification time of the weights in the last upload
        self._failed = False

    def push_soon(self) -> None:
        """Uploads ``best/`` in the background, unless it is on the Hub already or an upload is running.

        A failure is logged once and does not end training.
        """
        wanted = self.args.push_to_hub and self.args.hub_strategy == "every_save"
        if not wanted or not self.run.accelerator.is_main_process or (self._thread and self._thread.is_alive()):
            return
        weights = self.run.directory / "best" / "model.safetensors"
        if not weights.is_file() or weights.stat().st_mtime == self._pushed:
            return
        self._pushed = weights.stat().st_mtime
        draft = snapshot(self.run.directory, with_report=False)
        self._thread = threading.Thread(target=self._push, args=(draft, f"step {self.run.state.step}"), daemon=True)
        self._thread.start()

    def _push(self, draft: Path, message: str) -> None:
        try:
            push_folder(draft, self.args.hub_repo_id, self.args.hub_private, message)
        except UserError as error:
            self._pushed = 0.0
            if not self._failed:
                log.warning("%s; training goes on, and later weights are pushed again", error)
            self._failed = True

    def push_at_end(self) -> None:
        """Uploads the best weights with report and results, after the run has finished. Main process only.

        Raises:
            UserError: the Hub cannot be reached or refuses; the run is complete and can be pushed later.
        """
        if not self.args.push_to_hub or not self.run.accelerator.is_main_process:
            return
        if self._thread:
            self._thread.join()
        address = push_run(self.run.directory, self.args.hub_repo_id, self.args.hub_private)
        success("Pushed %s to %s", self.run.directory, address)


def push_run(run: Path, repo_id: str, private: bool, licence: str | None = None, further: Sequence[Path] = ()) -> str:
    """Uploads a finished run in one commit: ``best/`` with report and results; returns the repository's URL.

    The model card gets the test metrics of ``results.json``, and ``licence`` (a name of the Hub's list). ``further``:
    files and folders to add under their own names.

    Raises:
        UserError: the Hub cannot be reached or refuses; the run is not changed.
    """
    draft = snapshot(run, with_report=True, further=further)
    try:
        card = draft / "README.md"
        if card.is_file() and (run / "results.json").is_file():
            results = json.loads((run / "results.json").read_text(encoding="utf-8"))
            text = card_with_results(card.read_text(encoding="utf-8"), results, licence)
            card.unlink()  # a hard link of the run's own
            card.write_text(text, encoding="utf-8")
        return push_folder(draft, repo_id, private, run.resolve().name)
    except UserError as error:
        raise UserError(f"{error}; {run} is complete: python tools/push.py {run} --hub_repo_id {repo_id}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def snapshot(run: Path, with_report: bool, further: Sequence[Path] = ()) -> Path:
    """A folder of hard links to what is uploaded, which stays as it is when training replaces ``best/``."""
    draft = run / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    mixed = with_report and (run / "wise_ft" / "config.json").is_file()  # the weights that results.json is about
    weights = run / ("wise_ft" if mixed else "best")
    files = {path: path.relative_to(weights) for path in weights.rglob("*") if path.is_file()}
    if with_report:
        files |= {path: path.relative_to(run) for pattern in REPORT_FILES for path in run.glob(pattern)}
    for added in further:
        inside = [path for path in added.rglob("*") if path.is_file()] if added.is_dir() else [added]
        files |= {path: path.relative_to(added.parent) for path in inside}
    for path, name in files.items():
        target = draft / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another disk, or one without hard links
            shutil.copy2(path, target)
    return draft


def push_folder(folder: Path, repo_id: str, private: bool, message: str) -> str:
    """Uploads ``folder`` in one commit and returns the repository's URL.

    Raises:
        UserError: the Hub cannot be reached or refuses the upload; the folder is not changed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the Hub client passes on errors of the libraries that it uses
        raise UserError(f"not pushed to {repo_id}: {first_line(error)}") from None
    return str(address)
