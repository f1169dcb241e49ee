"""The image demo's digits: what scikit-learn has, the same bytes each time, whole or not at all."""

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from harness import ROOT, launch
from PIL import Image

SCRIPT = ROOT / "data" / "make_image_demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_image_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_image_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make(demo: ModuleType, folder: Path, *flags: str) -> str:
    """What the program says when it makes ``folder``."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["make_image_demo.py", "--output_dir", str(folder), *flags])
        demo.main()
    return out.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, demo: ModuleType) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("image") / "digits"
    return SimpleNamespace(folder=folder, out=make(demo, folder))


@pytest.fixture
def copied(made: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "digits"))


@pytest.fixture(scope="module")
def split(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The images with splits/, and what the splitter said."""
    folder = Path(shutil.copytree(made.folder, tmp_path_factory.mktemp("split") / "digits"))
    done = launch(ROOT / "tools" / "split_folds.py", "--raw_data", str(folder / "raw"), "--folds", "5", cwd=folder)
    return SimpleNamespace(folder=folder, out=done.out + done.err)


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_images_are_scikit_learns_digits(made: SimpleNamespace) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows, small = [], []
    for path in sorted((made.folder / "raw").rglob("*.png")):
        rows.append(int(path.stem))
        assert path.parent.name == str(digits.target[rows[-1]])
        with Image.open(path) as image:
            assert image.mode == "L" and image.size == (40, 40)
            small.append(np.asarray(image, float).reshape(10, 4, 10, 4)[:, 1:3, :, 1:3].mean((1, 3)))
    assert sorted(rows) == [*range(1797)]
    ink = 16 * (1 - np.array(small)[:, 1:-1, 1:-1].reshape(1797, 64) / 255)
    expected = digits.data[rows]
    assert np.abs(ink - expected).mean() < 0.5 and np.abs(ink - expected).max() < 3  # of 16: what is smooth is smoother
    # Each is nearer to its own digit than to any of the others.
    distance = (ink**2).sum(1)[:, None] - 2 * ink @ expected.T + (expected**2).sum(1)
    assert (distance.argmin(1) == np.arange(1797)).all()


def test_ink_is_dark_and_paper_white(demo: ModuleType) -> None:
    ink = np.zeros((8, 8))
    ink[:, 2:6] = 16
    image = np.asarray(demo.draw(ink))
    assert (image[:, :6] == 255).all() and (image[:2] > 250).all()  # a margin on every side
    assert (image[8:32, 14:26] == 0).all()
    half = np.asarray(demo.draw(np.full((8, 8), 8.0)))
    assert (half[12:28, 12:28] == 128).all()


def test_counts_of_classes(made: SimpleNamespace) -> None:
    counts = {path.name: len(list(path.iterdir())) for path in sorted((made.folder / "raw").iterdir())}
    known = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # as the set's own description says
    assert counts == {str(digit): count for digit, count in enumerate(known)}
    assert made.out == f"1,797 images of 10 digits: written to {made.folder / 'raw'}\n"
    assert [path.name for path in made.folder.parent.iterdir()] == ["digits"]  # no draft


@pytest.mark.launch
def test_same_bytes_from_the_command_line(made: SimpleNamespace, tmp_path: Path) -> None:
    done = launch(SCRIPT, "--output_dir", "again", cwd=tmp_path)
    assert done.out.endswith("written to again/raw\n") and not done.err
    assert hashes(tmp_path / "again") == hashes(made.folder)


def test_again_rewrites_nothing(copied: Path, demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "raw" / "3" / "mine.png").write_bytes(b"the user's own")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copied.rglob("*")}
    monkeypatch.setattr(demo, "write_images", None)  # a call would fail
    assert "already in" in make(demo, copied)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copied.rglob("*")} == before


def test_images_of_an_older_version_are_made_anew(copied: Path, demo: ModuleType) -> None:
    before = hashes(copied)
    (copied / "made.json").write_text(json.dumps({**demo.MADE_WITH, "version": 0}))
    (copied / "raw" / "3" / "old.png").write_bytes(b"")
    assert "written to" in make(demo, copied)
    assert hashes(copied) == before and [path.name for path in copied.parent.iterdir()] == ["digits"]


def test_interrupted_leaves_nothing(tmp_path: Path, demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def some() -> object:
        yield "raw/0/0000.png", Image.new("L", (40, 40))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "images", some)
    with pytest.raises(KeyboardInterrupt):
        make(demo, tmp_path / "digits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "harm, what",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is corrupted"),
        (lambda path: path.write_bytes(b"nothing"), "is corrupted"),
        (lambda path: Image.new("L", (40, 40)).save(path), "was changed"),
    ],
)
def test_a_damaged_image_is_one_line(copied: Path, demo: ModuleType, harm, what: str) -> None:
    path = next((copied / "raw" / "7").iterdir())
    harm(path)
    with pytest.raises(demo.UserError, match=what) as error:
        make(demo, copied)
    assert str(path) in str(error.value) and f"delete {copied}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [("notes.txt", "keep"), ("made.json", '{"version": 1}'), ("made.json", "[")])
def test_a_foreign_folder_is_one_line(tmp_path: Path, demo: ModuleType, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(demo.UserError, match="not made by this program"):
        make(demo, tmp_path)
    with pytest.raises(demo.UserError, match="not made by this program"):
        make(demo, tmp_path / name)
    assert hashes(tmp_path).keys() == {name} and (tmp_path / name).read_text() == content


def test_an_output_that_cannot_be_made_is_one_line(tmp_path: Path, demo: ModuleType) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(demo.UserError, match=r"--output_dir .*digits: Not a directory"):
        make(demo, tmp_path / "file" / "digits")


def test_without_scikit_learn(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.modules['sklearn'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr == "error: the digits come with scikit-learn: pip install scikit-learn\n"


@pytest.mark.exhaustive
@pytest.mark.launch
def test_baseline_of_the_test_images(split: SimpleNamespace, demo: ModuleType) -> None:
    assert "copies" not in split.out and not (split.folder / "splits" / "duplicates.txt").exists()
    assert "Logistic" not in make(demo, split.folder, "--no_baseline")
    out = make(demo, split.folder)
    found = json.loads((split.folder / "baseline.json").read_text())
    assert 0.93 < found["logistic_regression"] < 0.97 and found["chance"] == 0.1
    assert out.endswith(f"Logistic regression on the test images: {100 * found['logistic_regression']:.1f} %\n")
    # Trained on all that is not test, and scored on the test images.
    classes = {str(digit): digit for digit in range(10)}
    inputs, labels = demo.read_flat(split.folder, "test.txt", classes)
    assert inputs.shape == (270, 100) and inputs.min() == 0 and 15 < inputs.max() <= 16
    assert [*np.bincount(labels)] == [27] * 10
    (split.folder / "splits" / "test.txt").write_text("raw/4/0000.png\n")
    with pytest.raises(demo.UserError, match=r"test\.txt: line 1"):
        make(demo, split.folder)
