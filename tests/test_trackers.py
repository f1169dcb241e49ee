"""What the trackers really received: TensorBoard's files, MLflow's database, wandb's offline folder, the Hub."""

from __future__ import annotations

import base64
import json
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from harness import TEXT, history, launch, start, wait_for_step, weights


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


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload needs; keeps what it is given."""

    files: dict[str, bytes] = {}
    created: list[dict] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            type(self).created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    type(self).files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self.answer({"sha": "1" * 40, "id": "me/model", "siblings": []})

    def answer(self, content: dict, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.launch
def test_push_to_hub_uploads_the_best_folder(text_args, tmp_path: Path, monkeypatch) -> None:
    import harness

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        harness,
        "ENVIRONMENT",
        {**harness.ENVIRONMENT, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"},
    )
    flags = ("--max_steps", "2", "--push_to_hub", "--hub_repo_id", "me/model", "--run_name", "run")
    done = launch(TEXT, *text_args, *flags, cwd=tmp_path)
    server.shutdown()
    best = tmp_path / "runs" / "run" / "best"
    assert Hub.files["model.safetensors"] == weights(best)
    assert {path.name for path in best.iterdir()} <= set(Hub.files)
    assert Hub.created[0].get("private") is True or Hub.created[0].get("visibility") == "private", Hub.created
    assert "Pushed" in done.out
    assert "hf_x" not in done.out + done.err


@pytest.mark.launch
def test_a_hub_that_cannot_be_reached_is_one_line_and_the_run_is_complete(
    text_args, tmp_path: Path, monkeypatch
) -> None:
    import harness

    monkeypatch.setattr(
        harness, "ENVIRONMENT",
        {**harness.ENVIRONMENT, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    flags = ("--max_steps", "2", "--push_to_hub", "--hub_repo_id", "me/model", "--run_name", "run")
    done = launch(TEXT, *text_args, *flags, cwd=tmp_path, check=False)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "can be uploaded later" in done.err
    assert (tmp_path / "runs" / "run" / "results.json").is_file()
