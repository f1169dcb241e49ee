"""Easy rows first: what is easy, how the share grows, and that order stays a function of seed and epoch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from harness import TEXT, kill_and_resume, launch, results, weights
from tools import evaluate

from accelerando.base.errors import UserError
from accelerando.data.curriculum import Curriculum, losses_of_predictions, rarity
from accelerando.data.tokens import TokenTable
from accelerando.train.batches import Rows, TrainBatches


def test_the_share_grows_and_only_the_easiest_are_drawn() -> None:
    difficulty = np.random.default_rng(0).permutation(100).astype(float)
    curriculum = Curriculum(difficulty, 0.3, 1.0, 8)
    assert [round(curriculum.share(epoch), 2) for epoch in (0, 1, 7, 20)] == [0.3, 0.4, 1.0, 1.0]
    for epoch in range(9):
        rows = curriculum.rows(5, epoch)
        count = int(np.ceil(curriculum.share(epoch) * 100))
        assert len(rows) == 100 and set(rows.tolist()) == set(np.argsort(difficulty)[:count].tolist())
        drawn = np.bincount(rows, minlength=100)[np.argsort(difficulty)[:count]]
        assert drawn.max() - drawn.min() <= 1
        assert np.array_equal(rows, curriculum.rows(5, epoch))
    assert not np.array_equal(curriculum.rows(5, 7), curriculum.rows(5, 8))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_draws_its_part_of_the_same_rows(processes: int) -> None:
    curriculum = Curriculum(np.arange(50.0), 0.2, 1.0, 3)
    rows = Rows([{"x": row} for row in range(50)], None, None, curriculum)

    def drawn(process: int) -> list[int]:
        batches = TrainBatches(rows, lambda samples: {}, 4, num_processes=processes, process_index=process)
        found = []
        for window in batches.windows(0):
            for batch in window:
                found += [int(row) for row, weight in zip(batch["index"], batch["weight"], strict=True) if weight]
        return found

    everywhere = sorted(row for process in range(processes) for row in drawn(process))
    assert everywhere == sorted(5 * list(range(10)))


def test_rarity_is_the_mean_surprise() -> None:
    table = TokenTable(np.array([1, 1, 1, 2, 1, 3], np.int32), np.array([0, 3, 5, 6]))
    share = {1: 4 / 6, 2: 1 / 6, 3: 1 / 6}
    expected = [-np.log(share[1]), -(np.log(share[2]) + np.log(share[1])) / 2, -np.log(share[3])]
    assert rarity(table) == pytest.approx(expected)


def test_the_share_is_logged_and_short_texts_come_first(train_here, text_set: Path) -> None:
    run = train_here("--curriculum", "length", "--initial_difficulty", "0.2", "--epochs", "3", "--no_length_buckets")
    log = (run / "logs" / "train.log").read_text()
    assert re.findall(r"Curriculum: the easiest (\d+) % of the rows", log) == ["20", "60", "100"]
    assert results(run)["samples"] == 3 * 203
    other = train_here("--curriculum", "rarity", "--epochs", "3", "--no_length_buckets", name="b")
    assert weights(other / "last") != weights(run / "last")


def test_the_losses_of_a_run_decide_what_is_easy(train_here, call_tool, tmp_path: Path) -> None:
    """The predictions of tools/evaluate.py for the training rows; other rows are refused."""
    split = ("--validation_file", "None", "--validation_fraction", "0.2")
    run = train_here(*split, "--epochs", "2", name="first")
    code, _, err = call_tool(evaluate, run, "--split", "train", "--output_dir", tmp_path / "scores")
    assert code == 0, err
    path = tmp_path / "scores" / "predictions.csv"
    again = train_here(*split, "--curriculum", path, "--epochs", "2", name="second")
    assert "Curriculum: the easiest 30 % of the rows" in (again / "logs" / "train.log").read_text()
    with pytest.raises(UserError, match=r"has \d+ rows, but 203 are trained on"):
        train_here("--curriculum", path, name="whole")
    with pytest.raises(UserError, match=r"--curriculum nothing: length, rarity, or a predictions\.csv"):
        train_here("--curriculum", "nothing", name="none")
    with pytest.raises(UserError, match="drop one"):
        train_here("--curriculum", "length", "--balanced", name="both")


def test_losses_are_read_from_the_probabilities(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("label,predicted,confidence,p_a,p_b\na,a,0.75,0.75,0.25\nb,a,0.9,0.9,0.1\n")
    assert losses_of_predictions(str(path), ["a", "b"]) == pytest.approx([-np.log(0.75), -np.log(0.1)])
    with pytest.raises(UserError, match="row 2: the label is 'b', but that row's is 'a'"):
        losses_of_predictions(str(path), ["a", "a"])


@pytest.mark.launch
@pytest.mark.exhaustive
def test_killed_and_resumed(text_args, tmp_path: Path) -> None:
    """The same bytes as undisturbed; two processes see the same shares."""
    args = [*text_args, "--curriculum", "rarity", "--epochs", "3", "--batch_size", "16", "--save_every", "3", "--run_name",
            "run"]  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    launch(TEXT, *args, cwd=whole)
    run = kill_and_resume(tmp_path, TEXT, args, 1, 2, seed=0)
    assert weights(run / "last") == weights(whole / "runs" / "run" / "last")
    args[args.index("--batch_size") + 1] = "8"
    still = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--lr", "1e-3")
    launch(TEXT, *args, *still, "--run_name", "two", cwd=tmp_path, processes=2)
    launch(TEXT, *args, *still, "--batch_size", "16", "--run_name", "one", cwd=tmp_path)
    losses = [
        [row["loss"] for row in map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
         if row["kind"] == "train"] for name in ("one", "two")
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
