"""Credentials and control characters: removed from everything that is written or shown, in one place."""

from __future__ import annotations

import csv
import functools
import http.server
import io
import json
import logging
import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError
from accelerando.base.files import whole_folder
from accelerando.base.log import _LineFormatter
from accelerando.base.texts import one_line, without_credentials
from accelerando.data.table_formats import formula_safe, without_formula_mark
from accelerando.inference.runs import read_predictions
from accelerando.report.metrics import report_text
from accelerando.report.predictions import write_predictions

pytestmark = pytest.mark.usefixtures("no_figures")

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "awsSECRET/planted+one",
    "WANDB_API_KEY": "wandbPLANTEDkey0123456789",
    "HF_TOKEN": "hf_plantedPLANTEDplanted",
    "MLFLOW_TRACKING_PASSWORD": "mlflowPLANTED",
    "HTTPS_PROXY": "http://me:proxyPLANTED@proxy:3128",
}
WORDS = (*list(SECRETS.values())[:4], "proxyPLANTED", "urlPLANTED", "signaturePLANTED", "notesPLANTED")


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x.tar?version=3&download=1", "runs/x/best and s3://bucket/a?.tar", "has no padding token: set one",
        "--tokenizer_name=bert", "num_tokens: 5, ratio a:b", "https://host:81/a@b", "key 5 = value",
        "models--x/snapshots/" + "0123456789" * 4,
    ],
)  # fmt: skip
def test_what_is_no_credential_stays(text: str) -> None:
    assert without_credentials(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "https://me:PLANTED@host/x", "https://h/x?X-Amz-Signature=PLANTED&a=1", "https://h/x?sv=1&sig=PLANTED",
        "https://h/x?PLANTEDPLANTEDPLANTED", "s3://a:PLAN/TED@b/c", "hf_PLANTEDplantedplanted", "wandb_api_key=PLANTED",
        "password: PLANTED", "Authorization: Bearer PLANTED", "token=PLANTED", "x-security-token: PLANTED",
    ],
)  # fmt: skip
def test_credentials_are_removed(text: str) -> None:
    assert "PLAN" not in without_credentials(text)
    assert "PLAN" not in str(UserError(text))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_that_a_run_writes_has_one_of_eight_planted_secrets(
    clip_here, pair_set: Path, tmp_path: Path, monkeypatch
) -> None:
    """Config, summary, results, report, log, checkpoints, model card, metrics, TensorBoard, wandb and MLflow."""
    pytest.importorskip("mlflow")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(pair_set / "train"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    url = f"http://me:urlPLANTED@{host}/00000.tar?X-Amz-Signature=signaturePLANTED"
    flags = (
        "--data_dir", "None", "--train_data", url, "--validation_data", str(pair_set / "validation"), "--epochs", "1",
        "--report_to", "tensorboard", "wandb", "mlflow", "--wandb_notes", "the password: notesPLANTED", "--wandb_tags",
        SECRETS["HF_TOKEN"],
    )  # fmt: skip
    run = clip_here(*flags, name="run")
    shown = f"http://***@{host}/00000.tar?***"
    assert f"train_data: {shown}" in (run / "config.yaml").read_text()
    assert "the password: ***" in (run / "config.yaml").read_text()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.txt", "results.json", "report.html", "train.log", "README.md", "state.json",
            "mlflow.db"} <= {path.name for path in files}  # fmt: skip
    for path in files:
        content = path.read_bytes()
        for word in WORDS:
            assert word.encode() not in content, (path, word)

    # With the credentials it is resumed, without them it says what is missing; what needs none is repeated.
    clip_here(*flags, "--resume", "--report_to", "none", "--epochs", "2", name="run")
    with pytest.raises(UserError, match=r"--train_data .* was saved without its credentials"):
        clip_here("--config", str(run / "config.yaml"), base=[], name="again")
    again = ("--config", str(run / "config.yaml"), "--train_data", str(pair_set / "train"), "--report_to", "none")
    clip_here(*again, base=[], name="again")
    server.shutdown()


def test_a_written_config_repeats_a_run_whose_settings_only_look_secret(tmp_path: Path) -> None:
    from scripts.text_classify import Args

    from accelerando.base.config import to_yaml

    given = ["--train_file", "https://h/x.json?version=3", "--wandb_notes", "*** important ***: num_tokens=5"]
    args = parse_args(Args, argv=given)
    (tmp_path / "config.yaml").write_text(to_yaml(args))
    again = parse_args(Args, argv=["--config", str(tmp_path / "config.yaml")])
    assert (again.train_file, again.wandb_notes) == (args.train_file, args.wandb_notes)


EVIL = "\x1b[31mred\x1b[0m\nerror: forged\u202e"


def test_names_from_data_cannot_steer_a_terminal_or_forge_a_line() -> None:
    assert one_line(EVIL) == "\\x1b[31mred\\x1b[0m\\nerror: forged\\u202e"
    assert one_line("naïve 😀 \u200dنمونه") == "naïve 😀 \u200dنمونه"
    assert str(UserError(f"row 1: {EVIL}")) == f"row 1: {one_line(EVIL)}"
    record = logging.LogRecord("x", logging.INFO, "", 0, "labels: %s", (EVIL,), None)
    for colour in (False, True):
        line = _LineFormatter(colour).format(record)
        assert "\n" not in line and "\x1b[31m" not in line
    table = logging.LogRecord("x", logging.INFO, "", 0, "Summary\n%s", ("a\nb\x1b[31m",), None)
    assert _LineFormatter(False).format(table).endswith("Summary\na\nb\\x1b[31m")
    assert len(report_text(np.eye(2, dtype=int), [EVIL, "b"]).splitlines()) == 8


def test_labels_with_ansi_codes_reach_neither_log_nor_reports(train_here, tmp_path: Path, capsys) -> None:
    rows = [{"text": f"word {number}", "label": EVIL if number % 2 else "plain"} for number in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = train_here("--train_file", "rows.json", "--validation_file", "None", "--test_file", "None", "--epochs", "1")
    shown = capsys.readouterr()
    written = [path.read_text() for path in (*run.glob("*.txt"), *run.glob("logs/*"))]
    assert len(written) >= 3
    for text in (shown.out, shown.err, *written):
        assert "\x1b[31m" not in text and "\nerror: forged" not in text
    assert json.loads((run / "results.json").read_text())["label_names"] == [EVIL, "plain"]  # for machines: as it is


@pytest.mark.parametrize(
    "cell", ["=HYPERLINK(1)", "+1 day", "-x", "@a", "'=a", "''=a", "\t=a", "plain", "'quoted'", "-1.5", ""]
)
def test_no_cell_is_a_formula_and_each_is_read_as_it_was(cell: str) -> None:
    safe = formula_safe(cell)
    assert safe == cell if cell in ("plain", "'quoted'", "-1.5", "") else safe == f"'{cell}"
    assert without_formula_mark(safe) == cell


def test_predictions_round_trip_through_formula_marks(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "-1", "'=a", "b\nc"]
    files = ["=x.jpg", "+y.jpg", "'@z.jpg", "w.jpg"]
    chances = np.eye(4) * 0.7 + 0.075
    write_predictions(tmp_path / "predictions_test.csv", files, names, chances, np.arange(4))
    rows = list(csv.reader(io.StringIO((tmp_path / "predictions_test.csv").read_text())))[1:]
    assert [row[0][0] for row in rows] == ["'", "'", "'", "w"]
    assert [row[1] for row in rows] == ["'=HYPERLINK(1)", "-1", "''=a", "b\nc"]
    found = read_predictions(tmp_path, "test", names)
    assert found.files == files
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert np.allclose(found.probabilities, chances)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_weights_follow_the_umask(umask: int, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "best") as draft:
            draft.mkdir()
            save_file({"a": np.zeros(3)}, draft / "model.safetensors")
            (draft / "config.json").write_text("{}")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "best").iterdir()}
    finally:
        os.umask(before)
    assert modes == {"model.safetensors": 0o666 & ~umask, "config.json": 0o666 & ~umask}
    shutil.rmtree(tmp_path / "best")


def test_a_runs_files_follow_the_umask(train_here) -> None:
    run = train_here("--max_steps", "2")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*.safetensors")}
    assert modes == {stat.S_IMODE((run / "summary.txt").stat().st_mode)}


def test_a_credential_that_a_list_lacks_is_noticed() -> None:
    from harness import TEXT, script_module

    from accelerando.base.config import parse_args

    with pytest.raises(
        UserError, match="--wandb_tags http://host/x: was saved without its credentials; give it on the command line"
    ):
        parse_args(script_module(TEXT).Args, {}, ["--wandb_tags", "plain", "http://***@host/x"])
