"""Invariant 9: what README and docs name exists, their commands run, and --help answers at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import CLIP, ENVIRONMENT, HAR, IMAGE, MULTITASK, ROOT, SIGN, TEXT, launch, weights
from hub_server import serve_hub
from made_data import draw_pair

DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("data/*.md")])
PROGRAMS = sorted(
    [*ROOT.glob("scripts/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("benchmarks/*.py")]
)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def known_flags() -> set[str]:
    import importlib.util

    from accelerando.base.config import COMMON_ALIASES, LAUNCH_FLAGS, sections

    flags = {*COMMON_ALIASES, *LAUNCH_FLAGS}
    for program in PROGRAMS:
        if "benchmarks" in str(program):
            flags |= set(re.findall(r'"--(\w+)"', program.read_text()))
            continue
        spec = importlib.util.spec_from_file_location(f"docs_{program.stem}", program)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        flags |= {name for rows in sections(module.Args).values() for name, _ in rows} | set(
            getattr(module, "ALIASES", {})
        )
    return flags


def test_every_flag_in_the_docs_exists() -> None:
    # Of the launcher, pip, make and the shell.
    others = {"config_file", "num_processes", "quiet", "no-deps", "help"}
    flags = known_flags()
    texts = [path.read_text() for path in [*DOCS, *ROOT.glob("accelerate_configs/*"), *PROGRAMS]]
    named = {flag for text in texts[: len(DOCS)] for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}
    spelled = {flag.replace("-", "_") for flag in named - others}  # dashes or underscores alike
    assert not sorted(spelled - flags)


def test_every_path_in_the_docs_exists() -> None:
    made_by_use = ("data/train.csv", "data/test.csv", "data/raw", "data/processed", "data/demo_", "data/photos",
                   "data/captions.csv", "data/furniture", "data/insects", "data/train", "data/signs", "data/natops", "data/videos", "data/actions", "data/other")  # fmt: skip
    for path in DOCS:
        for word in re.findall(
            r"(?:scripts|tools|lib|configs|accelerate_configs|data|benchmarks|tests)/[\w./-]*\w", path.read_text()
        ):
            assert word.startswith(made_by_use) or (ROOT / word).exists(), f"{path.name} names {word}"


def test_every_field_has_its_line_of_help() -> None:
    import importlib.util

    from accelerando.base.config import sections

    for program in PROGRAMS:
        if "benchmarks" in str(program):
            continue
        spec = importlib.util.spec_from_file_location(f"help_{program.stem}", program)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows = [row for group in sections(module.Args).values() for row in group]
        assert len(rows) == len(module.Args.__dataclass_fields__)
        assert not [name for name, text in rows if not text], program.name


@pytest.mark.launch
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help_answers_at_once(program: Path, tmp_path: Path) -> None:
    seconds: list[float] = []
    while len(seconds) < 3 and min(seconds, default=2) >= 2:  # another try where the machine was busy
        started = time.perf_counter()
        done = launch(program, "--help", cwd=tmp_path, real=True)
        seconds.append(time.perf_counter() - started)
    assert "--" in done.out
    assert min(seconds) < 2


def test_help_may_be_cut_off(tmp_path: Path) -> None:
    for number in range(3):  # whether the reader has left in time is a race
        command = f"{shlex.quote(sys.executable)} {TEXT} --help | head -{1 + number}"
        done = run(command, tmp_path, ENVIRONMENT)
        assert "usage:" in done.stdout and not done.stderr


def test_every_launch_config_is_one_that_accelerate_takes() -> None:
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    for path in ROOT.glob("accelerate_configs/*.yaml"):
        loaded = load_config_from_file(str(path))
        assert loaded.num_processes >= 1
        if path.stem in ("fsdp", "multi_node_hsdp"):
            assert yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_version"] == 2


def test_every_recipe_parses() -> None:
    import importlib.util

    from accelerando.base.config import parse_args

    found = 0
    for script, stem in (
        (TEXT, "text"),
        (MULTITASK, "text_multitask"),
        (CLIP, "clip"),
        (SIGN, "sign"),
        (IMAGE, "image"),
        (HAR, "har"),
    ):
        spec = importlib.util.spec_from_file_location(f"recipes_{stem}", script)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        paths = {*ROOT.glob(f"configs/{stem}*.yaml"), *ROOT.glob(f"configs/demo/{stem}*.yaml")}
        for path in paths - ({*ROOT.glob("configs/text_multitask*.yaml")} if stem == "text" else set()):
            assert parse_args(module.Args, module.ALIASES, ["--config", str(path)]).epochs >= 1
            found += 1
    sweeps = {*ROOT.glob("configs/sweep_*.yaml")}  # settings of a tool
    assert found == len({*ROOT.glob("configs/**/*.yaml")} - sweeps) >= 6


@pytest.fixture
def workshop(
    tmp_path: Path,
    text_set: Path,
    tiny_bert: Path,
    tiny_clip_folder: Path,
    sign_set: Path,
    image_set: Path,
    media_set: Path,
) -> tuple[Path, dict[str, str]]:
    """A copy of the project with small data where the README has the user's, and `accelerate` on the path."""
    import shutil

    for name in ("scripts", "tools", "configs", "accelerate_configs", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("demo_*", "__pycache__"))
    for split in ("train", "test"):
        rows = json.loads((text_set / f"{split}.json").read_text())
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    rows = json.loads((text_set / "train.json").read_text())
    for name, head in {"topics": "text,labels", "pairs": "sentence1,sentence2,score"}.items():
        lines = [head]
        for number, row in enumerate(rows):
            several = row["label"] + "|long" * (len(row["text"]) > 100)
            cells = (row["text"], several) if name == "topics" else (row["text"], "a goal", f"{number % 11 / 2}")
            lines.append(",".join(cells))
        (tmp_path / "data" / f"train_{name}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "data" / "raw").mkdir()
    shutil.copy(text_set / "train.json", tmp_path / "data" / "raw" / "train.json")
    shutil.copytree(sign_set, tmp_path / "data" / "signs")
    shutil.copytree(image_set / "raw", tmp_path / "data" / "insects" / "raw")
    # Folders of these names go before the Hub.
    shutil.copytree(tiny_bert, tmp_path / "bert-base-uncased")
    for name in ("clip-vit-base-patch32", "clip-vit-base-patch16"):
        shutil.copytree(tiny_clip_folder, tmp_path / "openai" / name)
    shutil.copytree(media_set, tmp_path / "data" / "actions")
    rng, lines = np.random.default_rng(2), ["image,caption"]
    (tmp_path / "data" / "photos").mkdir()
    for number in range(60):
        picture, caption = draw_pair(rng)
        (tmp_path / "data" / "photos" / f"{number}.jpg").write_bytes(picture)
        lines.append(f"{number}.jpg,{caption}")
    (tmp_path / "data" / "captions.csv").write_text("\n".join(lines) + "\n")
    tags = [f"{line.partition(',')[0]},{'|'.join(line.split()[1:3])}" for line in lines[1:]]  # its colour and its kind
    (tmp_path / "data" / "train_tags.csv").write_text("\n".join(["image,label", *tags]) + "\n")
    environment = {
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "lib"),
    }
    return tmp_path, {**environment, "ACCELERANDO_CACHE": str(tmp_path / "cache")}


def run(command: str, cwd: Path, environment: dict[str, str], timeout: int = 400) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


SMALL = (
    "--max_length 48 --max_steps 3 --train_file data/train.csv --test_file data/test.csv --model_name bert-base-uncased"
)


def checked_launch(words: list[str]) -> list[str]:
    """Script and arguments of an `accelerate launch`, whose own flags accelerate's parser accepts."""
    from accelerate.commands.launch import launch_command_parser

    flags = launch_command_parser().parse_args(words[2:])
    assert flags.config_file is None or (ROOT / flags.config_file).is_file()
    return [flags.training_script, *flags.training_script_args]


@pytest.mark.launch
def test_the_readmes_commands_run(workshop, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them. For those that need GPUs the launcher's flags are checked, and the script runs on the CPU.

    One is launched for real; the others, and the tools, are forked. tests/test_invariants.py launches every script.
    """
    folder, environment = workshop
    for name in ("PYTHONPATH", "ACCELERANDO_CACHE"):
        monkeypatch.setitem(ENVIRONMENT, name, environment[name])
    launched = False
    text = "\n".join(blocks(ROOT / "README.md", "bash")).replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines() if line.strip()]
    tried = 0
    for command in commands:
        words = shlex.split(command)
        if words[0] in ("uv", "bash"):  # tests/test_packaging.py runs these
            continue
        if words[0] in ("make", "python3.11", "pip"):
            targets = (ROOT / "Makefile").read_text()
            assert words[0] != "make" or f"\n{words[1]}:" in targets
            continue
        if "multi_gpu" in command or "fsdp" in command or "single_gpu" in command or "launch_nodes" in command:
            # The same line on CPU ranks: what is tested elsewhere is the training, here the command.
            command = re.sub(
                r"--config_file \S+", "--cpu --num_machines 1 --num_processes 1 --mixed_precision no", command
            )
            command = re.sub(r"--num_processes 8", "", command)
            command = command.replace("NUM_MACHINES=2", "NUM_MACHINES=1 GPUS_PER_MACHINE=1").replace(
                "10.0.0.1", "127.0.0.1"
            )
            if "launch_nodes" in command:
                command = f"CONFIG=accelerate_configs/cpu.yaml {command}"
        if re.search("text_classify.py|my_experiment.py", command) and "pipeline.py" not in command:
            own = re.search(r"data/train_(topics|pairs)", command)  # rows of its own, which SMALL would replace
            small = SMALL.partition(" --train_file")[0] + " --model_name bert-base-uncased" if own else SMALL
            if "--teacher" in command:  # which brings the student's model
                small = small.replace(" --model_name bert-base-uncased", " --student_layers 1")  # of this teacher's two
            command += f" {small}" if not command.startswith("cp") else ""
            command += f" --run_name run{tried}" if not command.startswith("cp") and "--run_name" not in command else ""
        if "text_multitask.py" in command:
            command += " --max_length 48 --max_steps 3"
        if "clip_lit.yaml" in command:  # whose photos and towers are downloaded
            command += (
                " --train_data data/captions.csv --validation_data None --image_folder data/photos --image_weights None"
                f" --image_model timm/test_efficientnet --text_model {tiny_bert} --run_name photos"
            )
        if "clip_finetune.py" in command:
            command += " --max_steps 2 --effective_batch_size 16 --micro_batch_size 8 --num_workers 0"
            command += "" if "--run_name" in command else " --run_name demo_clip"
        if "clip_har.py" in command:
            name = "zero_shot" if "zero_shot" in command else "visual" if "visual" in command else "probe"
            command += f" --max_steps 2 --num_workers 0 --run_name {name}"
        if "sign_train.py" in command:
            command += " --max_steps 2 --hidden_size 32 --intermediate_size 32 --run_name signs"
        if "sweep.py" in command:  # tests/test_sweep.py has more trials than one
            command = command.replace("sweep.py", "sweep.py --direct --trials 1")
        if "cross_validate.py" in command:
            command = command.replace("cross_validate.py", "cross_validate.py --folds 0")
            command += "" if "--run_name" in command else " --run_name cv"
        if "image_classify.py" in command:
            command += " --max_steps 2 --image_size 32" + ("" if "--run_name" in command else " --run_name images")
        if "pipeline.py" in command:  # the steps run in tests/test_pipeline.py
            command = command.replace(
                "pipeline.py", f"pipeline.py --dry_run --config_file {ROOT}/accelerate_configs/cpu.yaml"
            )
            command += " --model_name bert-base-uncased --max_length 48"
        if "predict.py" in command or "export.py" in command or "push.py" in command:
            command = command.replace("runs/demo_text", "runs/run0")
            command += " --seconds 0.05 --agreement 0" if "export.py" in command else ""
        words = shlex.split(command)
        if words[0] == "python" or (words[0] == "accelerate" and launched):
            words = checked_launch(words) if words[0] == "accelerate" else words[1:]
            with contextlib.ExitStack() as changes:
                if "push.py" in command:
                    changed, address = changes.enter_context(monkeypatch.context()), changes.enter_context(serve_hub())
                    for name, value in {"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}.items():
                        changed.setitem(ENVIRONMENT, name, value)
                done = launch(folder / words[0], *words[1:], cwd=folder, check=False)
            code, said = done.code, (done.out, done.err)
        else:
            done = run(command, folder, environment)
            code, said = done.returncode, (done.stdout, done.stderr)
            launched |= words[0] == "accelerate"
        assert code == 0, "\n".join((command, *said))
        tried += 1
    assert tried >= 12
    assert (folder / "embeddings.parquet").is_file()
    assert (folder / "answers.csv").is_file()
    assert (folder / "runs" / "cv_cv_folds_0" / "report.html").is_file()
    assert (folder / "data" / "processed" / "train.json").is_file()


@pytest.mark.launch
def test_a_copied_script_runs_in_an_empty_folder(tmp_path: Path, text_args) -> None:
    import shutil

    shutil.copy(TEXT, tmp_path / "mine.py")
    source = (tmp_path / "mine.py").read_text()
    # An edit as the README describes it: a flag, and a loss that uses it.
    source = source.replace(
        "    seed: int = 42",
        "    loss_power: float = 1.0  # exponent of each row's loss\n    seed: int = 42",
    )
    edited = source.replace("else (loss(logits), logits)", "else (loss(logits) ** args.loss_power, logits)")
    assert edited != source
    (tmp_path / "mine.py").write_text(edited)
    launch(
        tmp_path / "mine.py",
        *text_args,
        "--loss_power",
        "2",
        "--max_steps",
        "2",
        "--run_name",
        "mine",
        cwd=tmp_path,
    )
    launch(TEXT, *text_args, "--max_steps", "2", "--run_name", "plain", cwd=tmp_path)
    assert weights(tmp_path / "runs" / "mine" / "last") != weights(tmp_path / "runs" / "plain" / "last")


@pytest.mark.launch
def test_the_launcher_keeps_the_exit_code_of_a_stop_and_says_one_line(workshop) -> None:
    folder, environment = workshop
    command = f"accelerate launch --quiet --config_file accelerate_configs/cpu.yaml scripts/text_classify.py {SMALL} --epohcs 3"
    done = run(command, folder, environment)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: unknown flag --epohcs: did you mean --epochs?"
    ]


def test_ruff_is_content() -> None:
    for arguments in (("check", "."), ("format", "--check", ".")):
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
