"""docs/adapt.md: each change of a copied script applies, trains, is killed and resumes to the same bytes."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest
from harness import ROOT, TEXT, kill, launch, start, wait_until, weights

DOCUMENT = (ROOT / "docs" / "adapt.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", DOCUMENT, flags=re.DOTALL)
CHANGES = dict(zip(("loss", "model", "reader", "metric", "head"), DIFFS, strict=True))  # in the document's order
FLAGS = {
    "loss": ("--poly_epsilon", "1.5"),
    "model": ("--architecture", "bag", "--tokenizer_name", "MODEL"),
    "reader": ("--train_file", "rows.db", "--validation_file", "rows.db", "--test_file", "rows.db"),
    "metric": (),
    "head": (),
}
EXPECTED = {
    "loss": "accuracy_group1",
    "model": "accuracy",
    "reader": "accuracy",
    "metric": "top2",
    "head": "group_accuracy",
}


def changed_script(folder: Path, name: str) -> Path:
    """A copy of the script in ``folder`` with the change of the document, and the module that it imports."""
    diff = CHANGES[name]
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 20
    script, source = folder / "my_experiment.py", TEXT.read_text()
    for hunk in re.split(r"^@@.*@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    script.write_text(source)
    [module] = [
        block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL) if "class BagOfWords" in block
    ]
    (folder / "my_model.py").write_text(module)
    return script


@pytest.fixture
def grouped_args(text_args: list[str], text_set: Path, tmp_path: Path) -> list[str]:
    """The text flags with tables that have a further column, and the same rows in a database."""
    args = list(text_args)
    with sqlite3.connect(tmp_path / "rows.db") as database:
        database.execute("create table rows (text, label, split)")
        for split in ("train", "validation", "test"):
            rows = json.loads((text_set / f"{split}.json").read_text())
            for number, row in enumerate(rows):
                row["group"] = f"g{number % 2}"
            (tmp_path / f"{split}.json").write_text(json.dumps(rows))
            database.executemany(
                "insert into rows values (?, ?, ?)", [(row["text"], row["label"], split) for row in rows]
            )
            args[args.index(str(text_set / f"{split}.json"))] = str(tmp_path / f"{split}.json")
    return args


@pytest.mark.launch
@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_of_the_document_trains_and_resumes_exactly(
    name: str, grouped_args: list[str], tmp_path: Path
) -> None:
    model = grouped_args[grouped_args.index("--model_name") + 1]
    script = changed_script(tmp_path, name)
    flags = [model if word == "MODEL" else word for word in FLAGS[name]]
    args = [*grouped_args, *flags, "--save_every", "3", "--eval_every", "4", "--keep_checkpoints", "9"]
    launch(script, *args, "--run_name", "whole", cwd=tmp_path)
    whole = tmp_path / "runs" / "whole"
    results = json.loads((whole / "results.json").read_text())
    assert 0 <= results["test"][EXPECTED[name]] <= 1
    for file in ("summary.txt", "metrics.csv", "report.html", "best/README.md", "logs/train.log"):
        assert EXPECTED[name] in (whole / file).read_text(), file
    words = (whole, "--script", script, "--format", "json")
    done = launch(ROOT / "tools" / "evaluate.py", *words, cwd=tmp_path)  # no change of ours scores it with its metrics
    (found,) = json.loads(done.out)["runs"].values()
    assert found == pytest.approx(results["test"], abs=1e-4)
    process = start(script, *args, "--run_name", "killed", cwd=tmp_path)
    killed = tmp_path / "runs" / "killed"
    assert wait_until(lambda: any(killed.glob("checkpoints/step_0*")), process)
    kill(process)
    launch(script, *args, "--run_name", "killed", "--resume", cwd=tmp_path)
    for folder in ("best", "last"):
        assert weights(killed / folder) == weights(whole / folder)


@pytest.mark.launch
def test_two_processes_train_the_second_head_as_one_does(grouped_args: list[str], tmp_path: Path) -> None:
    script = changed_script(tmp_path, "head")
    args = [*grouped_args, "--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--epochs", "1"]
    launch(script, *args, "--batch_size", "32", "--run_name", "one", cwd=tmp_path)
    launch(script, *args, "--batch_size", "16", "--run_name", "two", cwd=tmp_path, processes=2)
    one, two = (json.loads((tmp_path / "runs" / name / "results.json").read_text())["test"] for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["group_accuracy"] == one["group_accuracy"]


@pytest.mark.launch
def test_a_plain_module_answers_with_import(grouped_args: list[str], tmp_path: Path) -> None:
    script = changed_script(tmp_path, "model")
    model = grouped_args[grouped_args.index("--model_name") + 1]
    flags = ("--architecture", "bag", "--tokenizer_name", model, "--run_name", "bag", "--max_steps", "4")
    done = launch(script, *grouped_args, *flags, cwd=tmp_path)
    assert "BagOfWords has no save_pretrained: best/ and last/ will have model.safetensors" in done.out
    run = tmp_path / "runs" / "bag"
    answer = launch(ROOT / "tools" / "predict.py", str(run), "goal match team", "--import", "my_model", cwd=tmp_path)
    found = json.loads(answer.out.splitlines()[0])
    assert sum(found["scores"].values()) == pytest.approx(1, abs=1e-3)
    refused = launch(ROOT / "tools" / "predict.py", str(run), "goal", cwd=tmp_path, check=False)
    assert refused.code == 2 and "--import my_model" in refused.err
