"""What the trackers really received: TensorBoard's files, MLflow's database and server, wandb's folder, trackio's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
from harness import TEXT, history, launch, results, start, wait_for_step

from accelerando.base.errors import UserError
from accelerando.inference.runs import read_settings
from accelerando.train.tracking import add_to_trackers


def tensorboard_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_curves_report_and_confusion_matrix(train_here) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_here("--report_to", "tensorboard", name="run")
    scalars = tensorboard_scalars(run)
    expected = [(row["step"], pytest.approx(row["loss"])) for row in history(run, "train")]
    assert scalars["train/loss"] == expected
    assert {"train/lr", "train/grad_norm", "validation/accuracy", "validation/f1_macro", "test/accuracy"} <= set(
        scalars
    )
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert "test/confusion_matrix" in events.Tags()["images"]
    assert any("classification_report" in tag for tag in events.Tags()["tensors"])


@pytest.mark.launch
def test_tensorboard_goes_on_without_a_second_copy_of_a_step(text_args, tmp_path: Path) -> None:
    args = [*text_args, "--run_name", "run", "--report_to", "tensorboard", "--epochs", "6", "--save_every", "4"]
    run = tmp_path / "runs" / "run"
    process = start(TEXT, *args, cwd=tmp_path)
    wait_for_step(run, 9, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    launch(TEXT, *args, "--resume", cwd=tmp_path)
    steps = [step for step, _ in tensorboard_scalars(run)["train/loss"]]
    assert steps == list(range(1, 43))


@pytest.mark.exhaustive
def test_mlflow_and_wandb_together_and_the_same_run_after_a_resume(train_here, tmp_path: Path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    database = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = (
        "--report_to", "wandb", "mlflow", "--experiment_name", "exp", "--wandb_project", "proj", "--wandb_tags", "a", "b",
        "--wandb_notes", "about this", "--wandb_name", "title", "--wandb_entity", "team", "--group_name", "together",
        "--dataset_version", "v1.2",
    )  # fmt: skip
    run = train_here(*flags, "--max_steps", "7", name="run")
    train_here(*flags, "--resume", str(run), "--max_steps", "14", name="run")
    client = mlflow.tracking.MlflowClient(database)
    (experiment,) = [e for e in client.search_experiments() if e.name == "exp"]
    (found,) = client.search_runs([experiment.experiment_id])  # one run, not two
    losses = sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss"))
    assert [step for step, _ in losses] == list(range(1, 15))
    assert found.data.params["lr"] == "0.003" and found.data.params["dataset_version"] == "v1.2"
    # Offline, a resumed wandb run is a second folder with the same id; `wandb sync` joins them.
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1
    content = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    for word in (
        b"proj",
        b"title",
        b"about this",
        b"team",
        b"together",
        b"v1.2",
        b"train/loss",
        b"validation/accuracy",
    ):
        assert word in content, word


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real MLflow server on SQLite: its address, and its process, which leads a group of its own."""
    pytest.importorskip("mlflow")
    tmp_path = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            time.sleep(0.2)
        yield address, server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def read_mlflow(
    address: str, experiment: str
) -> tuple[dict[str, str], dict[str, float], set[str], Callable[[str], bytes]]:
    """Params, last metrics and files of the only run of an experiment, and how a file is read."""
    import mlflow

    client = mlflow.tracking.MlflowClient(address)
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    names, folders = set(), [""]
    while folders:
        for file in client.list_artifacts(found.info.run_id, folders.pop() or None):
            folders.append(file.path) if file.is_dir else names.add(file.path)
    return (
        found.data.params,
        found.data.metrics,
        names,
        lambda name: Path(client.download_artifacts(found.info.run_id, name)).read_bytes(),
    )


@pytest.mark.launch
def test_three_trackers_hold_settings_metrics_and_files(mlflow_server, text_args, tmp_path: Path, monkeypatch) -> None:
    """MLflow on a server, wandb offline and trackio, at once; what they hold is read back with their own packages."""
    pytest.importorskip("trackio")
    address, _ = mlflow_server
    more = {
        "MLFLOW_TRACKING_URI": address, "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }  # fmt: skip
    monkeypatch.setattr(harness, "ENVIRONMENT", {**harness.ENVIRONMENT, **more})
    flags = ("--report_to", "mlflow", "wandb", "trackio", "--experiment_name", "exp", "--run_name", "run")
    run = tmp_path / "runs" / "run"
    launch(TEXT, *text_args, *flags, "--max_steps", "5", cwd=tmp_path)
    done = launch(TEXT, *text_args, *flags, "--max_steps", "9", "--resume", cwd=tmp_path)
    assert "not sent" not in done.out + done.err
    final = {f"test/{name}": value for name, value in results(run)["test"].items() if isinstance(value, float)}
    files = {
        "report.html",
        "results.json",
        "summary.txt",
        "config.yaml",
        "plots/curves.png",
        "plots/confusion_test.png",
    }

    params, metrics, names, read = read_mlflow(address, "exp")
    assert params["lr"] == "0.003"
    assert {name: metrics[name] for name in final} == pytest.approx(final)
    assert files <= names
    assert read("report.html") == (run / "report.html").read_bytes()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (run / "export").mkdir()
    (run / "export" / "model.onnx").write_bytes(b"graph")
    known = {"mlflow": results(run)["trackers"]["mlflow"], "tensorboard": "x"}
    assert add_to_trackers(run, read_settings(run), known, run / "export") == ["mlflow"]
    assert read_mlflow(address, "exp")[3]("export/model.onnx") == b"graph"

    saved = [folder / "files" for folder in sorted((run / "wandb").glob("offline-run-*"))]
    assert files <= {str(path.relative_to(saved[-1])) for path in saved[-1].rglob("*")}
    assert (saved[-1] / "report.html").read_bytes() == (run / "report.html").read_bytes()
    content = b"".join(file.read_bytes() for file in (run / "wandb").rglob("*.wandb"))
    assert all(name.encode() in content for name in (*final, "model_name"))

    script = """if True:
        import json, sys, trackio
        from trackio.sqlite_storage import SQLiteStorage
        rows = SQLiteStorage.get_logs("exp", "run")
        config = SQLiteStorage.get_run_config("exp", "run")
        reader = trackio.init("exp", name="reader", embed=False)
        folder = reader.use_artifact("run:latest").download()
        json.dump({"rows": rows, "config": config, "folder": folder}, open("trackio.json", "w"), default=str)
    """
    environment = {**harness.ENVIRONMENT, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "trackio.json").read_text())
    assert float(found["config"]["lr"]) == 0.003
    assert [row["train/loss"] for row in found["rows"] if "train/loss" in row] == [
        pytest.approx(row["loss"]) for row in history(run, "train")
    ]
    last = {name: row[name] for row in found["rows"] for name in final if name in row}
    assert last == pytest.approx(final)
    assert (Path(found["folder"]) / "report.html").read_bytes() == (run / "report.html").read_bytes()
    assert files <= {str(path.relative_to(found["folder"])) for path in Path(found["folder"]).rglob("*")}


# Runs a script with shorter limits, so that a tracker which hangs is noticed within a test.
WITH_SHORT_LIMITS = """
import runpy, sys
import accelerando.train.trackers as trackers
trackers.SLOW, trackers.PAUSE = 1.0, 0.2
trackers.Tracker.finish.__defaults__ = (2.0,)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.launch
@pytest.mark.exhaustive
def test_a_server_that_hangs_neither_ends_nor_slows_training(
    mlflow_server, text_args, tmp_path: Path, monkeypatch
) -> None:
    """From the step on at which the server stops, steps take as long as before, and one line says that it has stopped."""
    address, server = mlflow_server
    monkeypatch.setattr(harness, "ENVIRONMENT", {**harness.ENVIRONMENT, "MLFLOW_TRACKING_URI": address})
    run = tmp_path / "runs" / "run"
    words = [sys.executable, "-c", WITH_SHORT_LIMITS, str(TEXT), *map(str, text_args), "--report_to", "mlflow"]
    words += ["--run_name", "run", "--epochs", "35", "--save_every", "1000"]
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(words, cwd=tmp_path, env=harness.environment(), stdout=out, stderr=out)
        times = []
        for step in (30, 100, 170):
            wait_for_step(run, step, process)
            times.append(time.monotonic())
            if step == 100:
                os.killpg(server.pid, signal.SIGSTOP)
        assert process.wait(timeout=120) == 0
    text = (tmp_path / "out.txt").read_text()
    assert times[2] - times[1] < 2 * (times[1] - times[0]) + 1, times
    assert len(re.findall("training goes on, and metrics.jsonl has all numbers", text)) == 1, text
    assert len(re.findall(r"mlflow: \d+ of \d+ records were not sent", text)) == 1, text
    assert "Traceback" not in text
    assert results(run)["steps"] == len(history(run, "train")) == 245


def test_a_tracker_that_fails_is_tried_again_and_then_left_out(monkeypatch, caplog) -> None:
    """The numbers of a server that answers again arrive in order; one that refuses a single record gets the rest."""
    from accelerando.train import trackers

    monkeypatch.setattr(trackers, "PAUSE", 0.01)

    class Moody:
        """Refuses the first two tries, and step 3 always."""

        name = "moody"

        def __init__(self) -> None:
            self.tries, self.got = 0, []

        def log(self, values: dict[str, float], step: int) -> None:
            self.tries += 1
            if self.tries < 3 or step == 3:
                raise OSError("refused\nand more")
            self.got.append((step, values["loss"]))

        def finish(self) -> None:
            pass

    moody = Moody()
    tracker = trackers.Tracker(moody)
    assert tracker.start(lambda: "id") == "id"
    for step in range(1, 6):
        tracker.log({"loss": step / 2}, step)
    while tracker._sent < 5:  # the start and four of the five records
        time.sleep(0.005)
    tracker.finish()
    assert moody.got == [(1, 0.5), (2, 1.0), (4, 2.0), (5, 2.5)]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "moody: refused; training goes on, and metrics.jsonl has all numbers",
        "moody: 1 of 7 records were not sent",
    ]


def test_a_tracker_that_cannot_start_ends_the_run_before_training(monkeypatch) -> None:
    """An error, or no answer at all, is one line."""
    from accelerando.base import errors
    from accelerando.train import trackers

    monkeypatch.setattr(errors, "_waits", True)  # back to it after the test
    monkeypatch.setattr(trackers, "START_LIMIT", 0.1)

    class Any:
        name = "any"

    def fails() -> None:
        raise ConnectionError("no route to host")

    def is_told_of_time() -> None:
        raise TimeoutError("timed out")  # by the tracker's own limit, not by ours

    with pytest.raises(UserError, match="--report_to any: no route to host"):
        trackers.Tracker(Any()).start(fails)
    with pytest.raises(UserError, match="--report_to any: timed out"):
        trackers.Tracker(Any()).start(is_told_of_time)
    assert errors._waits
    hanging = threading.Event()
    with pytest.raises(UserError, match="--report_to any: no answer within 0 s; drop it"):
        trackers.Tracker(Any()).start(hanging.wait)
    hanging.set()
