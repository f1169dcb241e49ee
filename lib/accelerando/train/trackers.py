"""Accelerate's trackers, each in a thread of its own: one that fails or hangs neither ends nor slows a run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError, first_line, leave_without_waiting
from accelerando.base.log import log
from accelerando.base.texts import without_credentials

if TYPE_CHECKING:
    import numpy as np
    from accelerate.tracking import GeneralTracker

PACKAGES = {
    "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio", "swanlab": "swanlab",
    "comet_ml": "comet_ml", "clearml": "clearml", "aim": "aim", "dvclive": "dvclive",
}  # fmt: skip
START_LIMIT = 60.0  # seconds to begin; training has not started yet, so that this is an error
FINISH_LIMIT = 30.0  # seconds for what is left to be sent at the end
SLOW = 30.0  # seconds after which a tracker that has not answered is reported
TRIES = 3  # of each record
PAUSE = 5.0  # seconds between them


def check_trackers(names: tuple[str, ...]) -> None:
    """UserError if a tracker in ``report_to`` is unknown or not installed."""
    for name in names:
        if name not in PACKAGES and name != "none":
            raise UserError(f"--report_to {name}: choose from {', '.join(PACKAGES)}, none")
        if name != "none" and importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"--report_to {name} needs a package: pip install {PACKAGES[name]}")


class Tracker:
    """One tracker and the thread in which everything is sent to it, in order.

    What fails is tried ``TRIES`` times, then left out. The first failure and the first long wait are logged, once.
    """

    def __init__(self, tracker: GeneralTracker) -> None:
        self.name: str = tracker.name
        self.tracker = tracker
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{self.name} tracker", daemon=True)
        self._busy_since: float | None = None  # time.monotonic() when the current job began
        self._problem: str | None = None  # of the first job that failed
        self._reported = False
        self._sent = self._given = 0  # jobs; the difference is what waits or was lost

    def start(self, begin: Callable[[], str | None]) -> str | None:
        """Starts the tracker in its thread with ``begin`` and returns its result: the id under which it continues.

        Raises:
            UserError: it fails, or takes longer than ``START_LIMIT`` seconds.
        """
        result: Future[str | None] = Future()

        def job() -> None:
            try:
                result.set_result(begin())
            except BaseException as error:  # the errors of trackers have no common base class; some exit
                result.set_exception(error)

        self._thread.start()
        self._do(job)
        try:
            return result.result(timeout=START_LIMIT)
        except (Exception, SystemExit) as error:
            if not result.done():  # the time is over
                leave_without_waiting()
                message = f"--report_to {self.name}: no answer within {START_LIMIT:.0f} s; drop it, or try later"
                raise UserError(message) from None
            raise UserError(f"--report_to {self.name}: {first_line(error)}") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers of an optimizer step."""
        self._do(lambda: self.tracker.log(dict(values), step=step))

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Sends an image, uint8 [H, W, 3]; only TensorBoard has images beside files."""
        if self.name == "tensorboard":
            self._do(lambda: self.tracker.writer.add_image(name, image, step, dataformats="HWC"))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Sends a text; only TensorBoard has texts beside files."""
        if self.name == "tensorboard":
            self._do(lambda: self.tracker.writer.add_text(name, text, step))

    def add_files(self, folder: Path, paths: Sequence[Path]) -> None:
        """Sends files under ``folder`` with their paths in it, where the tracker keeps files."""
        names = {path: path.relative_to(folder) for path in paths}
        if self.name == "trackio" and paths:  # one artifact, which has versions
            self._do(lambda: _add_to_trackio(self.tracker.run, folder.name, names))
        if (add := _FILES.get(self.name)) is not None:
            for path, name in names.items():
                self._do(lambda path=path, name=name: add(self.tracker, folder, path, name))

    def finish(self, limit: float = FINISH_LIMIT) -> int:
        """Waits up to ``limit`` seconds for what is not sent yet, closes the tracker, and gives the number of records
        that were not sent."""
        self._do(self.tracker.finish)
        self._jobs.put(None)
        self._ending.set()
        with contextlib.redirect_stdout(io.StringIO()):  # trackio says how it ends
            self._thread.join(limit)
        self._report()
        if self._thread.is_alive():
            leave_without_waiting()  # its package would wait longer when the process ends
        if (missing := self._given - self._sent) > 0:
            log.warning("%s: %d of %d records were not sent", self.name, missing, self._given)
        return missing

    def _do(self, job: Callable[[], object]) -> None:
        self._given += 1
        self._report()
        self._jobs.put(job)

    def _report(self) -> None:
        """Logs, once, that the tracker fails or hangs. Called in training's thread, which owns the terminal."""
        since = self._busy_since
        problem = self._problem
        if problem is None and since is not None and time.monotonic() - since > SLOW:
            problem = f"no answer for {SLOW:.0f} s"
        if problem is not None and not self._reported:
            self._reported = True
            log.warning("%s: %s; training goes on, and metrics.jsonl has all numbers", self.name, problem)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            for attempt in range(TRIES):
                self._busy_since = time.monotonic()
                try:
                    job()
                except Exception as error:
                    self._problem = self._problem or without_credentials(first_line(error))
                    last = attempt == TRIES - 1
                    if last or self._ending.wait(PAUSE):
                        break
                else:
                    self._sent += 1
                    break
            self._busy_since = None


def _add_to_trackio(run: Any, name: str, names: Mapping[Path, Path]) -> None:
    import trackio

    artifact = trackio.Artifact(name=name, type="run")
    for path, inside in names.items():
        artifact.add_file(path, inside.as_posix())
    run.log_artifact(artifact)


# How a file is sent: (tracker, the run's folder, the file, its path in the folder).
_FILES: dict[str, Callable[[Any, Path, Path, Path], object]] = {
    "mlflow": lambda tracker, _, path, name: tracker.log_artifact(
        str(path), name.parent.as_posix() if name.parent.name else None
    ),
    "wandb": lambda tracker, folder, path, _: tracker.run.save(str(path), base_path=str(folder), policy="now"),
    "comet_ml": lambda tracker, _, path, name: tracker.writer.log_asset(str(path), file_name=name.as_posix()),
    "clearml": lambda tracker, _, path, name: tracker.task.upload_artifact(name.as_posix(), artifact_object=str(path)),
}
KEEP_FILES = (*_FILES, "trackio")
