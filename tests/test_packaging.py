"""The wheel, its commands, a copied script, `uv run` of a script by its own metadata, and the shell wrappers."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from harness import ROOT, results

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UV = Path(sys.executable).parent / "uv"
LIBRARIES = sysconfig.get_path("purelib")


def run(*command: object, cwd: Path, environment: dict[str, str], timeout: int = 240) -> subprocess.CompletedProcess:
    """A command that must succeed, in an environment that knows nothing of this clone."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, built from a copy of what is committed."""
    pytest.importorskip("build")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("lib", "scripts", "tools", "configs", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment without this clone, in which the installed libraries can be imported."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {
        **kept, "PYTHONPATH": LIBRARIES, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "UV_CACHE_DIR": str(tmp_path_factory.mktemp("uv")), "UV_OFFLINE": "1", "UV_PYTHON": sys.executable,
        "UV_LINK_MODE": "copy",
    }  # fmt: skip


def rows(folder: Path) -> Path:
    """Texts of two classes that differ in one word."""
    path = folder / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"a {word} day number {number % 7}", word] for number in range(24) for word in ("wet", "dry"))
    return path


def flags(folder: Path) -> list[str]:
    """A training run of two seconds."""
    return [
        "--train_file", str(rows(folder)), "--architecture", "cnn", "--vocab_size", "60", "--epochs", "2",
        "--batch_size", "8", "--lr", "3e-3", "--run_name", "run", "--report_to", "none",
    ]  # fmt: skip


def test_the_wheel_has_one_package_with_everything_in_it(wheels: Path) -> None:
    """No module called lib, tools or scripts; each folder with files is a package that is listed."""
    (wheel,) = wheels.glob("accelerando-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"accelerando", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}
    for folder, package in (
        ("lib/accelerando", "accelerando"), ("scripts", "accelerando/scripts"), ("tools", "accelerando/tools"),
        ("configs", "accelerando/configs"), ("accelerate_configs", "accelerando/accelerate_configs"),
    ):  # fmt: skip
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names, path


@pytest.mark.launch
def test_an_installed_wheel_has_commands_and_a_script_to_copy(wheels: Path, outside, tmp_path: Path) -> None:
    """`accelerando-text` answers and trains; a copy of the script with another loss trains too."""
    environment = {**outside, "UV_PYTHON": str(tmp_path / "venv" / "bin" / "python")}
    run(UV, "venv", "-q", tmp_path / "venv", cwd=tmp_path, environment=outside)
    install = (UV, "pip", "install", "-q", "--no-index", "--no-deps", "--find-links", wheels, "accelerando")
    run(*install, cwd=tmp_path, environment=environment)
    commands = tmp_path / "venv" / "bin"
    for name in PYPROJECT["project"]["scripts"]:
        if name != "accelerando-copy":
            assert "--batch_size" in run(commands / name, "--help", cwd=tmp_path, environment=environment).stdout
    run(commands / "accelerando-text", *flags(tmp_path), cwd=tmp_path, environment=environment)
    assert results(tmp_path / "runs" / "run")["epochs"] == 2
    copy = tmp_path / "mine.py"
    run(commands / "accelerando-copy", "text", copy, cwd=tmp_path, environment=environment)
    assert copy.read_text() == (ROOT / "scripts" / "text_classify.py").read_text()
    line = "return class_losses(logits, labels, "
    assert line in copy.read_text()
    copy.write_text(copy.read_text().replace(line, line.replace("class_losses(", "class_losses(0.5 * ")))
    python = commands / "python"
    run(python, copy, *flags(tmp_path), "--run_name", "mine", cwd=tmp_path, environment=environment)
    losses = [results(tmp_path / "runs" / name)["validation"]["loss"] for name in ("run", "mine")]
    assert losses[0] != losses[1]
    run(python, "-m", "accelerando.tools.predict", "runs/run", "a wet day", cwd=tmp_path, environment=environment)
    place = run(python, "-c", "import accelerando; print(accelerando.__file__)", cwd=tmp_path, environment=environment)
    assert place.stdout.startswith(str(tmp_path / "venv"))
    again = subprocess.run(
        [commands / "accelerando-copy", "text", copy], env=environment, capture_output=True, text=True
    )
    assert again.returncode == 1 and again.stderr == f"error: {copy} exists already\n"


@pytest.mark.launch
@pytest.mark.exhaustive
def test_uv_runs_a_script_in_an_empty_folder_by_its_own_metadata(wheels: Path, outside, tmp_path: Path) -> None:
    """With the wheel at hand, and wheels without content in place of the libraries, which stand on the path here."""
    shutil.copytree(wheels, tmp_path / "index")
    for requirement in (ROOT / "requirements.txt").read_text().splitlines():
        name = requirement.partition("#")[0].partition(">=")[0].partition("[")[0].strip().replace("-", "_")
        if name:
            stub(tmp_path / "index", name, importlib.metadata.version(name))
    script = tmp_path / "text_classify.py"
    shutil.copyfile(ROOT / "scripts" / "text_classify.py", script)
    command = (UV, "run", "-q", "--no-index", "--find-links", tmp_path / "index", script, *flags(tmp_path))
    run(*command, cwd=tmp_path, environment=outside)
    assert results(tmp_path / "runs" / "run")["epochs"] == 2


def stub(folder: Path, name: str, version: str) -> None:
    """A wheel that installs nothing."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")


@pytest.mark.launch
@pytest.mark.exhaustive
def test_the_wrappers_choose_task_and_config(tmp_path: Path) -> None:
    """train.sh trains what TASK names with the CONFIG; preprocess.sh makes what it is trained on."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    (tmp_path / "raw").mkdir()
    rows(tmp_path / "raw")
    prepare = ("bash", ROOT / "scripts" / "preprocess.sh", "--input_dir", "raw", "--output_dir", "processed")
    run(*prepare, cwd=tmp_path, environment=environment)
    train = ("bash", ROOT / "scripts" / "train.sh", *flags(tmp_path), "--train_file", "processed/train.json")
    run(*train, cwd=tmp_path, environment={**environment, "CONFIG": "cpu"})
    assert results(tmp_path / "runs" / "run")["epochs"] == 2
    for variables, message in (
        ({"TASK": "none"}, "error: TASK=none: choose clip, har, sign, image, text or multitask\n"),
        ({"CONFIG": "none"}, "error: CONFIG=none: no such file, and no none.yaml in accelerate_configs/\n"),
    ):
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "train.sh")],
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr == message
