"""What arrives at the Hub: a server here that speaks as much of its protocol as uploads need, file by file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, results, script_module, weights
from hub_server import Hub, serve_hub

from accelerando.base.errors import UserError
from accelerando.report.model_card import card_with_results, licence_of, read_front_matter


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A server to which runs and tools of this process push."""
    with serve_hub() as address:
        point_at(address, monkeypatch)
        yield Hub


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process push to this address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")


push = script_module(ROOT / "tools" / "push.py")
PUSH = ("--push_to_hub", "--hub_repo_id", "me/model")
OPEN = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, report = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("a text", return_tensors="pt")
assert model(**tokens).logits.shape[1] == len(model.config.id2label)
assert not [name for name in sys.modules if name.startswith("accelerando")]
print("opened")
"""


def test_a_run_pushes_the_best_weights_so_far_and_then_all_of_it(hub, train_here, capsys, tmp_path: Path) -> None:
    """Each commit is what it says; what arrives last opens in a process that never saw this repository."""
    flags = ("--epochs", "3", "--save_every", "3", "--eval_every", "3", *PUSH, "--dataset_version", "v1.2")
    run = train_here(*flags, "--hub_strategy", "every_save", name="run")
    said = "".join(capsys.readouterr())
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private", hub.created
    assert len(hub.commits) >= 2
    (first, early), (last, files) = hub.commits[0], hub.commits[-1]
    assert first == "step 3" and last == "run"
    assert "report.html" not in early and {"model.safetensors", "tokenizer.json", "README.md"} <= set(early)
    assert files["model.safetensors"] == weights(run / "best")
    assert {path.name for path in (run / "best").iterdir()} <= set(files)
    for name in ("report.html", "results.json", "config.yaml", "plots/curves.png"):
        assert files[name] == (run / name).read_bytes(), name
    metadata, card = read_front_matter(files["README.md"].decode())
    _, test = metadata["model-index"][0]["results"]
    assert test["dataset"]["split"] == "test" and test["dataset"]["revision"] == "v1.2"
    shown = {metric["type"]: metric["value"] for metric in test["metrics"]}
    assert shown["accuracy"] == pytest.approx(results(run)["test"]["accuracy"], abs=1e-6)
    assert f"| accuracy | {results(run)['test']['accuracy']:.4f} |" in card
    assert "text_classify.py" in card
    assert "v1.2" in (run / "summary.txt").read_text() and '"v1.2"' in (run / "results.json").read_text()
    assert "Pushed" in said and "hf_x" not in said
    assert not list(run.glob(".hub*"))
    target = tmp_path / "arrived"
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, str(target)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert opened.stdout.strip() == "opened", opened.stderr


def test_a_hub_that_refuses_is_reported_once_and_later_weights_arrive(hub, train_here, capsys) -> None:
    """Training goes on; the end pushes what could not be pushed before."""
    hub.refuses = 2
    flags = ("--max_steps", "9", "--save_every", "3", "--eval_every", "3", *PUSH, "--hub_strategy", "every_save")
    run = train_here(*flags, name="run")
    (line,) = [line for line in "".join(capsys.readouterr()).splitlines() if "not pushed to me/model" in line]
    assert "training goes on, and later weights are pushed again" in line
    assert hub.commits[-1][1]["model.safetensors"] == weights(run / "best")


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_run_is_complete(train_here, tmp_path, monkeypatch) -> None:
    """The line has the command that pushes later; the run has ended as it does without a push."""
    point_at("http://127.0.0.1:9", monkeypatch)
    command = "is complete: python tools/push.py runs/run --hub_repo_id me/model"
    with pytest.raises(UserError, match=f"not pushed to me/model: .*; runs/run {command}"):
        train_here("--max_steps", "2", *PUSH, name="run")
    run = tmp_path / "runs" / "run"
    assert results(run)["steps"] == 2 and (run / "report.html").is_file()
    assert not list(run.glob(".hub*"))


def test_the_tool_pushes_a_finished_run_with_what_is_added(hub, train_here, call_tool, tmp_path: Path) -> None:
    """An export stands in its own folder, the licence in the card; mistakes are one line each."""
    run = train_here("--max_steps", "2", name="run")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").write_bytes(b"graph")
    target = ("runs/run", "--hub_repo_id", "me/model")
    code, out, _ = call_tool(push, *target, "--licence", "mit", "--add", "export", "--no-hub_private")
    assert code == 0 and out.startswith("Pushed to ")
    _, files = hub.commits[0]
    assert files["export/model.onnx"] == b"graph"
    assert read_front_matter(files["README.md"].decode())[0]["license"] == "mit"
    assert "license" not in read_front_matter((run / "best" / "README.md").read_text())[0]  # the run is as it was
    assert hub.created[0].get("private") is False or hub.created[0].get("visibility") == "public"
    for flags, message in (
        (("runs", *target[1:]), "error: runs: no best/config.json: not the folder of a run"),
        ((*target, "--add", "nowhere"), "error: --add nowhere: no such file or folder"),
        (("runs/run",), "error: --push_to_hub needs --hub_repo_id user/name, not None"),
        ((), "error: no run: name one"),
    ):
        code, _, err = call_tool(push, *flags)
        assert code == 2 and err.startswith(message), err


def test_a_card_states_the_licence_of_its_base_model(tmp_path: Path) -> None:
    """Read from the base model's own card, and from the Hub's cache; unknown, it is left out."""
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    assert licence_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("# base\n")
    assert licence_of(str(tmp_path)) is None
    assert licence_of("nobody/has-this") is None
    assert licence_of("no name/of a/model") is None


def test_a_card_that_somebody_has_edited_is_left_as_it_is() -> None:
    """Without our metadata only a given licence is added."""
    assert card_with_results("# mine\n", {"test": {"accuracy": 0.5}}) == "# mine\n"
    card = card_with_results("# mine\n", {"test": {"accuracy": 0.5}}, "mit")
    assert card == "---\nlicense: mit\n---\n# mine\n"
