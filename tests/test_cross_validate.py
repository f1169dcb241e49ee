"""tools/cross_validate.py: the numbers are those of the folds, what is finished stays, and it goes on after a stop."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import CLIP, IMAGE, ROOT, TEXT, launch, run_in_this_process, start, weights
from sklearn.metrics import accuracy_score, f1_score

from accelerando.base.errors import Stopped, UserError
from accelerando.launch import Signals, default_launcher

TOOL = ROOT / "tools" / "cross_validate.py"
METRICS = ("accuracy", "f1_macro", "loss")


def load_tool():
    spec = importlib.util.spec_from_file_location("cross_validate", TOOL)
    module = sys.modules["cross_validate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tool:
    """The tool in this process, in ``folder``; each fold is trained in this process too, without the launcher."""

    def __init__(self, folder: Path, run, patch: pytest.MonkeyPatch) -> None:
        self.module, self.folder, self.run, self.patch = load_tool(), folder, run, patch
        self.commands: list[list[str]] = []
        self.code = None  # what a fold ends with at once, instead of being trained
        patch.setattr(self.module, "run_script", self.train)

    def train(self, command: list[str], signals: Signals) -> int:
        flags = command[next(at for at, word in enumerate(command) if word.endswith(".py")) + 1 :]
        self.commands.append(flags)
        if self.code is not None:
            return self.code
        self.run(*flags, base=[], name="unused")
        return 0

    def __call__(self, *flags: object, before: tuple[str, ...] = (), script: Path = IMAGE) -> Path:
        """The folder of the result. ``before``: flags before the script; the launcher's are not used here."""
        launcher = () if "--config_file" in before else ("--cpu",)
        self.patch.setattr(sys, "argv", [str(TOOL), *launcher, *before, str(script), *map(str, flags)])
        self.commands.clear()
        self.module.main()
        return self.folder / "runs" / "x_cv"


@pytest.fixture
def tool(tmp_path: Path, image_here, monkeypatch: pytest.MonkeyPatch) -> Tool:
    return Tool(tmp_path, image_here, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, image_args: list[str]):
    """A folder in which all three folds were trained as ``x``, for a copy of each test's own; with what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        script = run_in_this_process(IMAGE, image_args, folder, patch)
        Tool(folder, next(script), patch)(*image_args, "--run_name", "x")
        next(script, None)
    return folder


@pytest.fixture
def flags(image_args: list[str], finished: Path, tmp_path: Path) -> list[str]:
    """The flags of the finished folds, which are copied to where the test runs."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return [*image_args, "--run_name", "x"]


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def predictions(run: Path, split: str) -> dict[str, dict[str, str]]:
    rows = list(csv.DictReader((run / f"predictions_{split}.csv").read_text().splitlines()))
    assert len({row["file"] for row in rows}) == len(rows)
    return {row["file"]: row for row in rows}


def probabilities(row: dict[str, str]) -> np.ndarray:
    return np.array([float(row[f"p_{name}"]) for name in ("chair", "lamp", "table")])


def lines_of(data: Path, name: str) -> list[str]:
    return (data / "splits" / f"{name}.txt").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------- numbers


def test_mean_deviation_and_ensemble_are_those_of_the_folds(finished: Path, image_set: Path) -> None:
    cv = finished / "runs" / "x_cv"
    runs = [finished / "runs" / f"x_fold{fold}" for fold in range(3)]
    found, folds = results(cv), [results(run) for run in runs]
    assert [row["fold"] for row in found["folds"]] == [0, 1, 2]
    summary = (cv / "summary.txt").read_text()
    for split in ("validation", "test"):
        for name in (*METRICS, "recall_weighted"):
            values = [fold[split][name] for fold in folds]
            assert [row[split][name] for row in found["folds"]] == values
            assert found["mean"][split][name] == pytest.approx(sum(values) / 3)
            assert found["std"][split][name] == pytest.approx(np.std(values, ddof=1))
        assert len({fold[split]["loss"] for fold in folds}) == 3  # otherwise the above would say little
    for title, row in (("mean", found["mean"]), ("± std", found["std"]), ("fold 1", folds[1])):
        line = next(line for line in summary.splitlines() if line.startswith(title + " "))
        numbers = [f"{row[split][name]:.4f}" for split in ("validation", "test") for name in METRICS]
        assert line.removeprefix(title).split() == numbers
    assert max(map(len, summary.split("Repeat it")[0].splitlines())) <= 80

    tests, together = [predictions(run, "test") for run in runs], predictions(cv, "test")
    assert list(together) == lines_of(image_set, "test")
    for file, row in together.items():
        mean = np.mean([probabilities(one[file]) for one in tests], axis=0)
        assert probabilities(row) == pytest.approx(mean, abs=1e-6)
        assert row["label"] == file.split("/")[1]
    labels, predicted = [[row[column] for row in together.values()] for column in ("label", "predicted")]
    assert found["ensemble"]["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["ensemble"]["f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    own = [-np.log(float(row[f"p_{row['label']}"])) for row in together.values()]
    assert found["ensemble"]["loss"] == pytest.approx(np.mean(own), abs=1e-4)
    assert found["ensemble"]["count"] == len(together) == np.sum(found["confusion_matrix"])
    assert found["seconds"] == pytest.approx(sum(fold["seconds"] for fold in folds), abs=1e-3)
    assert found["label_names"] == ["chair", "lamp", "table"]


def test_each_image_that_is_not_test_is_answered_once_by_the_fold_that_did_not_train_on_it(
    finished: Path, image_set: Path
) -> None:
    together = predictions(finished / "runs" / "x_cv", "validation")
    images = {path.relative_to(image_set).as_posix() for path in image_set.glob("raw/*/*")}
    assert set(together) == images - set(lines_of(image_set, "test"))
    for fold in range(3):
        own = predictions(finished / "runs" / f"x_fold{fold}", "validation")
        assert set(own) == set(lines_of(image_set, f"fold_{fold}_val"))
        assert all(together[file] == row for file, row in own.items())
    count = results(finished / "runs" / "x_cv")["out_of_fold"]
    right = [row["label"] == row["predicted"] for row in together.values()]
    assert (count["count"], count["accuracy"]) == (len(together), pytest.approx(np.mean(right)))


def test_what_else_the_result_holds(finished: Path) -> None:
    cv = finished / "runs" / "x_cv"
    words = (cv / "classification_report_test.txt").read_text().split()
    assert words[words.index("accuracy") + 1] == f"{results(cv)['ensemble']['accuracy']:.4f}"
    assert (cv / "plots" / "confusion_test.png").read_bytes().startswith(b"\x89PNG")
    page = (cv / "report.html").read_text()
    assert f"{100 * results(cv)['mean']['test']['accuracy']:.2f} %" in page
    assert f"± {100 * results(cv)['std']['test']['accuracy']:.2f} over 3 folds" in page
    assert f"{100 * results(cv)['ensemble']['accuracy']:.2f} %" in page
    assert "Confusion matrix, test, ensemble" in page
    assert not list((finished / "runs").glob("*.draft"))


def test_without_a_test_set_the_validation_is_summed_up(tool, image_args, image_set: Path, capsys) -> None:
    """Also: some of the folds alone, and an image that cannot be read."""
    shutil.copytree(image_set, "data")
    Path("data/splits/test.txt").unlink()
    broken = Path("data") / lines_of(image_set, "fold_0_val")[3]
    broken.write_bytes(broken.read_bytes()[:90])
    more = ("--data_dir", "data", "--run_name", "x", "--max_steps", 1)
    cv = tool(*image_args, *more, before=("--folds", "2", "0")).with_name("x_cv_folds_0_2")
    found = results(cv)
    assert [row["fold"] for row in found["folds"]] == [0, 2]
    assert set(found["mean"]) == {"validation"}
    assert "ensemble" not in found
    shown = capsys.readouterr().out.split("Cross-validation: ")[1]
    assert "ensemble" not in shown
    assert "which no number includes: 1" in shown
    assert not (cv / "predictions_test.csv").exists()
    for name in ("classification_report_validation.txt", "plots/confusion_validation.png", "report.html"):
        assert (cv / name).is_file()
    count = sum(len(lines_of(image_set, f"fold_{fold}_val")) for fold in (0, 2)) - 1
    assert np.sum(found["confusion_matrix"]) == found["out_of_fold"]["count"] == count


# ----------------------------------------------------------------------------------------------------- once and again


def test_the_same_command_again_only_prints(tool, flags, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    cv = tool(*flags)
    assert tool.commands == []
    assert (cv / "summary.txt").read_text() in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    tool(*flags, "--num_workers", 2, "--log_every", 7)  # which change no result
    assert tool.commands == []


def test_the_result_is_made_again_where_it_is_not_of_these_runs(tool, flags) -> None:
    """And a loss of another kind, as label smoothing makes it, is not set beside that of the ensemble's probabilities."""
    right = results(Path("runs/x_cv"))
    content = results(Path("runs/x_fold1"))
    content["test"] |= {"accuracy": 0.125, "loss": 1.1 * content["test"]["loss"]}
    Path("runs/x_fold1/results.json").write_text(json.dumps(content))
    cv = tool(*flags)
    found, summary = results(cv), (cv / "summary.txt").read_text()
    assert tool.commands == []
    before = [row["test"]["accuracy"] for row in right["folds"]]
    assert found["mean"]["test"]["accuracy"] == pytest.approx((before[0] + 0.125 + before[2]) / 3)
    assert found["ensemble"] == {**right["ensemble"], "loss": None}
    assert "no loss: that of the folds is not the plain cross-entropy" in summary
    assert next(line for line in summary.splitlines() if line.startswith("ensemble ")).split()[-1] == "–"


def test_only_what_is_missing_is_trained(tool, flags, capsys) -> None:
    before = {fold: weights(Path(f"runs/x_fold{fold}/last")) for fold in range(3)}
    right = results(Path("runs/x_cv"))
    shutil.rmtree("runs/x_fold0")
    Path("runs/x_fold2/results.json").unlink()
    found = results(tool(*flags))
    assert [[word for word in command[-5:] if word != "none"] for command in tool.commands] == [
        ["--fold", "0", "--run_name", "x_fold0"],
        ["--fold", "2", "--run_name", "x_fold2", "--resume"],
    ]
    out = capsys.readouterr().out
    for line in (
        "Fold 1 of 3: runs/x_fold0 starts",
        "Fold 2 of 3: runs/x_fold1 is finished",
        "Fold 3 of 3: runs/x_fold2 is resumed",
    ):
        assert line in out
    assert "Resumed from runs/x_fold2/checkpoints/step_000010" in out
    assert {fold: weights(Path(f"runs/x_fold{fold}/last")) for fold in range(3)} == before
    assert found["mean"] == right["mean"]
    assert found["ensemble"] == right["ensemble"]


def test_a_run_that_was_prolonged_and_stopped_is_not_finished(tool, flags) -> None:
    """Its results are of the shorter run; its config.yaml is of now."""
    for fold in range(3):
        path = Path(f"runs/x_fold{fold}/config.yaml")
        path.write_text(path.read_text().replace("epochs: 2", "epochs: 3"))
    tool.code = 1
    with pytest.raises(Stopped):
        tool(*flags, "--epochs", 3)
    assert tool.commands[0][-1] == "--resume"


def test_a_fold_that_fails_ends_it_with_its_code(tool, flags) -> None:
    shutil.rmtree("runs/x_fold1")
    shutil.rmtree("runs/x_cv")
    for code, words in ((2, "Fold 2 of 3 ended with the error above"), (137, "Fold 2 of 3 was killed by signal 9"),
                        (143, "Fold 2 of 3 was stopped: the same command resumes")):  # fmt: skip
        tool.code = code
        with pytest.raises(Stopped, match=words) as stopped:
            tool(*flags)
        assert stopped.value.exit_code == code
        assert len(tool.commands) == 1
    assert not Path("runs/x_cv").exists()
    assert Path("runs/x_fold0/results.json").exists()


def test_overwrite_starts_all_again(tool, flags) -> None:
    tool.code = 0
    tool(*flags, "--lr", "1e-3", "--overwrite")  # other settings, which would be refused without it
    assert [command[-1] for command in tool.commands] == ["--overwrite"] * 3
    shutil.rmtree("runs/x_fold0")
    tool.code = 143
    with pytest.raises(Stopped, match="the same command without --overwrite resumes"):
        tool(*flags, "--overwrite")
    assert tool.commands[0][-4:] == ["--fold", "0", "--run_name", "x_fold0"]


# -------------------------------------------------------------------------------------------------------- names, flags


def test_names_are_the_scripts_own(tool, image_args, image_set: Path) -> None:
    plan = tool.module.plan
    folds, commands, target, overwrite = plan(IMAGE, image_args, ())
    script = sys.modules["script_image_classify"]
    assert [fold.directory.name for fold in folds] == [script.default_name(fold.args) for fold in folds]
    assert [fold.args.fold for fold in folds] == [0, 1, 2]
    assert target.name == folds[1].directory.name.replace("_fold1", "") + "_cv"
    assert not overwrite
    assert all("--run_name" not in command for command in commands)

    Path("recipe.yaml").write_text(f"data_dir: {image_set}\noutput_dir: out\nrun_name: y\nfold: 2\nlr: 0.5\n")
    folds, commands, target, _ = plan(IMAGE, ["--config", "recipe.yaml", "--lr", "0.1"], (2, 0))
    assert [str(fold.directory) for fold in folds] == ["out/y_fold0", "out/y_fold2"]
    assert (folds[1].args.lr, folds[1].args.fold) == (0.1, 2)
    assert str(target) == "out/y_cv_folds_0_2"
    assert commands[1] == ["--config", "recipe.yaml", "--lr", "0.1", "--fold", "2", "--run_name", "y_fold2"]

    name = "default_run_name(args, data_title(args), model_title(args), *settings, named=named)"
    source = IMAGE.read_text().replace(name, '"mine"')
    Path("copy.py").write_text(source)
    folds, commands, target, _ = plan(Path("copy.py"), image_args, ())
    assert [fold.directory.name for fold in folds] == ["mine_fold0", "mine_fold1", "mine_fold2"]
    assert target.name == "mine_cv"
    assert commands[2][-2:] == ["--run_name", "mine_fold2"]


def test_flags_of_one_run_are_not_passed_on(tool) -> None:
    words = ["--run-name=x", "--lr", "1", "--resume_from_checkpoint", "--overwrite", "true", "--bf16"]
    assert tool.module.without_flags(words, {"run_name", "resume", "overwrite"}, {}) == ["--lr", "1", "--bf16"]


def test_words_are_for_the_tool_the_launcher_or_the_script(tool) -> None:
    words = ["accelerate", "launch", "--cpu", "--folds", "0", "2", "--num_processes", "1", str(IMAGE), "--lr", "1"]
    assert tool.module.split_words(words) == (
        ["--folds", "0", "2"], ["--cpu", "--num_processes", "1"], IMAGE, ["--lr", "1"],
    )  # fmt: skip


def test_a_config_of_the_users_own_comes_first(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it is cpu.yaml, which the last test of this file sees."""
    monkeypatch.setenv("HF_HOME", str(Path("home").absolute()))
    Path("home/accelerate").mkdir(parents=True)
    shutil.copy(ROOT / "accelerate_configs" / "cpu.yaml", "home/accelerate/default_config.yaml")
    assert default_launcher(ROOT / "accelerate_configs") == []


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--lr", "1e-3"), "runs/x_fold0: --lr was 0.003 there and is 0.001 now; --overwrite starts all folds again"),
        (("--progressive_sizes", "24"), "--progressive_sizes was empty there and is 24 now"),
        (("--fold", "1"), "--fold: all folds are trained; --folds 0 2, before"),
        (("--folds", "1"), "--folds: all folds are trained; --folds 0 2, before"),
        (("--resume", "runs/x_fold0"), "names one run"),
        (("--push_to_hub",), "each fold would overwrite the one before it"),
        (("--data_dir", "nowhere"), "tools/split_folds.py --raw_data nowhere/raw"),
        (("--data_dir", ""), "--data_dir is missing"),
        (("--lr", "-1"), "--lr -1.0: at least 0"),
        (("--epohcs", "1"), "did you mean --epochs"),
    ],
)
def test_what_cannot_be_is_one_line(more, words: str, tool, flags) -> None:
    tool.code = 1
    with pytest.raises(UserError, match=re.escape(words)) as error:
        tool(*flags, *more)
    assert "\n" not in str(error.value)
    assert tool.commands == []


def test_arguments_without_a_script_or_with_another(tool, flags) -> None:
    for words, message in (
        (["--cpu"], "no script among the arguments; give one, as in: python tools/cross_validate.py scripts/"),
        (["nowhere.py"], "nowhere.py: no such file"),
        ([str(CLIP)], "clip_finetune.py: its Args have no fold"),
        ([str(TEXT), "--train_file", "a.json"], "--num_folds is missing"),
        (["--folds", "0", "7", str(IMAGE), *flags], "--folds 7: there are folds 0, 1, 2"),
        (["--folds", "x", str(IMAGE), *flags], "--folds"),
        (["train", str(IMAGE)], "'train' before"),
    ):
        tool.patch.setattr(sys, "argv", [str(TOOL), *words])
        with pytest.raises(UserError, match=re.escape(message)):
            tool.module.main()


def test_a_plain_pair_of_folders_has_no_folds(tool, image_args, image_set: Path) -> None:
    for side in ("train", "val"):
        shutil.copytree(image_set / "raw", Path("pair") / side)
    with pytest.raises(UserError, match=r"^pair: train/ and val/ are one split, .*split_folds.py --raw_data pair/raw"):
        tool(*image_args, "--data_dir", "pair")


def test_folds_that_do_not_part_the_images_are_refused(tool, image_args, image_set: Path) -> None:
    def damaged(name: str, lines: list[str]) -> None:
        shutil.rmtree("data", ignore_errors=True)
        shutil.copytree(image_set, "data")
        Path(f"data/splits/{name}.txt").write_text("\n".join(lines) + "\n")

    first, test = lines_of(image_set, "fold_0_val"), lines_of(image_set, "test")
    for name, extra, words in (
        ("fold_1_val", first[:1], "fold_1_val.txt: .* is in fold_0_val.txt too"),
        ("fold_1_val", test[:1], "fold_1_val.txt: .* is in test.txt too"),
        ("fold_2_train", test[:1], "fold_2_train.txt: .* is in test.txt too"),
        ("fold_0_train", first[:1], "fold_0_train.txt: .* is in fold_0_val.txt too"),
    ):
        damaged(name, lines_of(image_set, name) + extra)
        with pytest.raises(UserError, match=words):
            tool(*image_args, "--data_dir", "data")
    damaged("fold_1_val", lines_of(image_set, "fold_1_val")[1:])
    with pytest.raises(UserError, match=r"_train.txt: .* is in no fold"):
        tool(*image_args, "--data_dir", "data")


def test_runs_of_other_data_are_refused(tool, flags, image_set: Path) -> None:
    """Splits that were made again, a test set that changed in between, files that are gone or broken."""

    def predictions_of(fold: int, split: str, change) -> None:
        path = Path(f"runs/x_fold{fold}/predictions_{split}.csv")
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    def refused(words: str) -> None:
        tool.code = 1
        with pytest.raises(UserError, match=words) as error:
            tool(*flags)
        assert "\n" not in str(error.value)
        assert tool.commands == []
        shutil.rmtree("runs")
        shutil.copytree("kept", "runs")

    shutil.rmtree("runs/x_cv")
    shutil.copytree("runs", "kept")
    other = lines_of(image_set, "fold_0_val")[0]
    predictions_of(1, "validation", lambda lines: [*lines[:-1], f"{other},{lines[-1].split(',', 1)[1]}"])
    refused(f"x_fold1/predictions_validation.csv: {other} is not in that part of the splits")
    predictions_of(2, "test", lambda lines: lines[:-1])
    refused(r"x_fold2 and runs/x_fold0 were tested on different images \(raw/.*: the data changed in between")
    predictions_of(0, "test", lambda lines: [*lines[:2], lines[2].replace(",0.", ",zero.")])
    refused(r"x_fold0/predictions_test.csv: row 2 .*: unknown label or not a number; remove runs/x_fold0")
    Path("runs/x_fold0/predictions_test.csv").unlink()
    refused("x_fold0/predictions_test.csv: no such file")
    Path("runs/x_fold1/results.json").write_text('{"test": ')
    refused("x_fold1/results.json: invalid JSON .Expecting value")
    Path("runs/x_fold1/config.yaml").unlink()
    refused("runs/x_fold1: not a run .no config.yaml in it")
    Path("runs/x_fold1").rename("runs/x")
    Path("runs/x_fold0").rename("runs/x_fold1")
    Path("runs/x").rename("runs/x_fold0")
    refused("runs/x_fold0: --fold was 1 there and is 0 now")
    Path("runs/x_cv").mkdir()
    Path("runs/x_cv/notes.txt").write_text("mine")
    refused("runs/x_cv: exists and is no result of this tool")


# ------------------------------------------------------------------------------------------------- the launcher, signals


# A script like image_classify.py as far as stopping goes: it starts at once, and takes a second to save.
PATIENT = """
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from accelerando.base.config import parse_args, to_yaml
from accelerando.base.processes import command_line
from accelerando.train import stop


@dataclass
class Args:
    # -- all --
    data_dir: str = ""  # data
    fold: int = 0  # fold
    output_dir: str = "runs"  # where
    run_name: str | None = None  # what
    resume: str | None = None  # go on
    overwrite: bool = False  # again


def default_name(args):
    return f"fold{args.fold}"


if __name__ == "__main__":
    args = parse_args(Args)
    folder = Path(args.output_dir) / args.run_name
    if args.resume:
        sys.exit(5 if (folder / "saved.txt").exists() else 1)
    stop.listen_for_signals()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(args))
    print("training:", command_line(), flush=True)
    while not stop.stop_noted():
        time.sleep(0.05)
    time.sleep(1)
    (folder / "saved.txt").write_text(str(int(stop._received)))
    sys.exit(128 + stop._received)
"""


@pytest.mark.launch
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="interrupted"),
        pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.exhaustive),
    ],
)
def test_it_stops_at_a_signal_and_the_same_command_goes_on(
    number: int, image_set: Path, tmp_path: Path, monkeypatch
) -> None:
    """The command line as it is typed. What reaches the tool alone reaches the script too, and is waited for."""
    import torch

    monkeypatch.setitem(harness.ENVIRONMENT, "HF_HOME", str(tmp_path))
    (tmp_path / "patient.py").write_text(PATIENT)
    words = ("patient.py", "--data_dir", image_set, "--run_name", "x")
    process = start(TOOL, *words, cwd=tmp_path)
    output, saved, deadline = (
        tmp_path / "stdout.txt",
        tmp_path / "runs" / "x_fold0" / "saved.txt",
        time.monotonic() + 90,
    )
    while "training:" not in output.read_text():
        assert process.poll() is None, (tmp_path / "stderr.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    if number == signal.SIGINT:
        assert process.wait(60) == 130
        last = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
        assert last == "Fold 1 of 3 was stopped: the same command resumes"
    else:
        process.wait(60)
        while not saved.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert saved.read_text() == str(int(signal.SIGTERM))
    config = "" if torch.accelerator.is_available() else f"--config_file {ROOT}/accelerate_configs/cpu.yaml "
    expected = f"accelerate launch {config}patient.py --data_dir {image_set} --fold 0 --run_name x_fold0"
    assert re.search(rf"training: (\w+=\S+ )*{re.escape(expected)}\n", output.read_text())
    if number == signal.SIGINT:
        done = launch(TOOL, *words, cwd=tmp_path, check=False)
        assert done.code == 5
        assert done.out.splitlines() == ["Fold 1 of 3: runs/x_fold0 is resumed"]
        assert (
            done.err.splitlines()[-1]
            == "Fold 1 of 3 ended with the error above: once that is fixed, the same command resumes"
        )


@pytest.mark.launch
@pytest.mark.exhaustive
def test_ctrl_z_lets_the_fold_rest_too(image_set: Path, tmp_path: Path, monkeypatch) -> None:
    import psutil

    monkeypatch.setitem(harness.ENVIRONMENT, "HF_HOME", str(tmp_path))
    (tmp_path / "patient.py").write_text(PATIENT)
    process = start(TOOL, "patient.py", "--data_dir", image_set, "--run_name", "x", cwd=tmp_path)
    deadline = time.monotonic() + 90

    def wait_until(what) -> None:
        while not what():
            assert process.poll() is None, (tmp_path / "stderr.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def resting() -> list[bool]:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) >= 3  # the tool, the launcher and the script
        return [member.status() == psutil.STATUS_STOPPED for member in family]

    wait_until(lambda: "training:" in (tmp_path / "stdout.txt").read_text())
    os.kill(process.pid, signal.SIGTSTP)
    wait_until(lambda: all(resting()))
    os.kill(process.pid, signal.SIGCONT)
    wait_until(lambda: not any(resting()))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert (tmp_path / "runs" / "x_fold0" / "saved.txt").exists()


def test_what_a_setting_stands_for_is_the_same_in_every_fold(image_set: Path) -> None:
    """Otherwise the same command would find its own finished folds to have been trained with others."""
    flags = ["--data_dir", str(image_set), "--trainer_type", "mixed_precision"]
    folds, *_ = load_tool().plan(IMAGE, flags, ())
    assert [fold.args.amp for fold in folds] == ["auto"] * 3
