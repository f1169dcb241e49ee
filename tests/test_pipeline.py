"""tools/pipeline.py and accelerando.data.versions: the right data, each step once, and on from where it was killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import harness
import pytest
from harness import CLIP, ENVIRONMENT, HAR, IMAGE, ROOT, SIGN, TEXT, begin, kill, start, wait_until, weights
from hub_server import Hub, serve_hub
from made_data import make_rows, write_json
from PIL import Image

from accelerando import launch, pipeline
from accelerando.base.errors import Stopped, UserError
from accelerando.data import sources, versions
from accelerando.launch import Signals
from accelerando.pipeline import Args, run_pipeline

TOOL = ROOT / "tools" / "pipeline.py"
CPU = str(ROOT / "accelerate_configs" / "cpu.yaml")
TINY = """
data:
  train_file: data/train.json
  validation_file: data/validation.json
  test_file: data/test.json
  max_length: 48
model:
  architecture: cnn
  embed_size: 16
  num_filters: 8
  vocab_size: 300
training:
  lr: 0.003
  epochs: 2
output:
  report_to: none
  save_every: 3
  log_every: 1
"""
ROWS = {"v1": 203, "v2": 151}  # of the training file


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@y.z", "-c", "core.autocrlf=false")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def made_repository(tmp_path_factory: pytest.TempPathFactory, text_set: Path) -> Path:
    """repo/ with two versions of a training file (tags v1 and v2, v1 checked out) under DVC, the test file in git, and
    remote/, which has both; the paths in it are relative, so that it can be copied."""
    from dvc.repo import Repo

    top = tmp_path_factory.mktemp("versions")
    folder = top / "repo"
    (folder / "data").mkdir(parents=True)
    git(folder, "init", "-q")
    Repo.init(str(folder)).close()
    (folder / ".dvc" / "config").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n    url = ../../remote\n"
    )
    (folder / "config.yaml").write_text(TINY)
    shutil.copy(text_set / "test.json", folder / "data")
    for tag, seed in (("v1", 0), ("v2", 5)):
        write_json(folder / "data" / "train.json", make_rows(ROWS[tag], seed))
        shutil.copy(text_set / "validation.json", folder / "data")
        with contextlib.chdir(folder), Repo() as repo:
            repo.add(["data/train.json", "data/validation.json"])
            repo.push()
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", tag)
        git(folder, "tag", tag)
    git(folder, "checkout", "-q", "v1")
    with contextlib.chdir(folder), Repo() as repo:
        repo.checkout(force=True)
    return top


@pytest.fixture
def repository(made_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository, which is the current folder; the pipeline's cache is cache/ beside it."""
    shutil.copytree(made_repository, tmp_path / "top", symlinks=True)
    monkeypatch.chdir(tmp_path / "top" / "repo")
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(harness.ENVIRONMENT, "ACCELERANDO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "top" / "repo"


Pipe = Callable[..., dict]


@pytest.fixture
def pipe(repository: Path, fast: Kills) -> Pipe:
    """``pipe(*flags, **settings)``: the pipeline in this process, for the tiny config."""

    def run(*flags: object, **settings: object) -> dict:
        settings = {"config_file": CPU, "output_dir": "out", "words": (str(TEXT), "--config", "config.yaml")} | settings
        settings["words"] = (*settings["words"], *map(str, flags))
        return run_pipeline(**settings)

    return run


class Killed(BaseException):
    """The pipeline's own end, where its step was killed."""


Kills = dict[str, Callable[[], bool]]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Kills:
    """The commands of the steps are forked from the server instead of being started; the true ones run in one test.

    What is put into the dictionary, {"export": ready}, kills the process of that script with SIGKILL once it is ready.
    """
    kills: Kills = {}

    def forked(command: list[str], signals: Signals, output: Path) -> int:
        with open(output, "ab") as log:
            at = next((number for number, word in enumerate(command) if word.endswith(".py")), None)
            if at is None:
                return subprocess.run(command, stdout=log, stderr=log).returncode
            script, *words = command[at:]
            process = begin(Path(script), tuple(words), Path.cwd(), 1, False, False, None, log, log)
            if ready := kills.pop(Path(script).stem, None):
                assert wait_until(ready, process, 60), output.read_text()
                kill(process)
                raise Killed
            code = process.wait()
            return code if code >= 0 else 128 - code

    monkeypatch.setattr(pipeline, "run_script", forked)
    return kills


def ran(results: dict) -> list[str]:
    """The steps that ran."""
    return [name for name, step in results["steps"].items() if step.get("ran", step.get("runs"))]


def state_of(folder: Path) -> dict[str, bytes]:
    """What a user has in a repository."""
    files = [path for path in folder.rglob("*") if path.is_file() and not {".git", ".dvc", "out"} & set(path.parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------------ versions


def test_a_version_is_fetched_beside_the_work_tree(repository: Path, tmp_path: Path) -> None:
    before, status = state_of(repository), git(repository, "status", "--porcelain")
    for tag, count in ROWS.items():
        version = versions.version_at(repository, tag, ["data/train.json", "data/test.json"])
        place = versions.fetch(version, tmp_path / "cache")
        assert len(json.loads((place / "data" / "train.json").read_text())) == count
        assert (place / "data" / "test.json").read_bytes() == (repository / "data" / "test.json").read_bytes()
        assert not (place / "data" / "validation.json").exists()
        assert version.commit == git(repository, "rev-parse", tag).strip()
        (tracked,) = version.tracked
        assert tracked.md5 == versions.file_md5(place / "data" / "train.json")
        assert tracked.md5 in git(repository, "show", f"{tag}:data/train.json.dvc")
        assert tracked.md5 in version.text and "data/train.json.dvc" in version.text
    assert (state_of(repository), git(repository, "status", "--porcelain")) == (before, status)
    whole = versions.version_at(repository, "v2", ["data"])
    assert {one.path for one in whole.tracked} == {"data/train.json", "data/validation.json"}
    place = versions.fetch(whole, tmp_path / "cache")
    assert {path.name for path in (place / "data").iterdir()} >= {"train.json", "validation.json", "test.json"}


def test_what_lies_in_the_cache_is_not_fetched_again_unless_it_is_damaged(
    repository: Path, tmp_path: Path, monkeypatch
) -> None:
    version = versions.version_at(repository, "v2", ["data/train.json"])
    assert not versions.is_fetched(version, tmp_path)
    place = versions.fetch(version, tmp_path)
    assert versions.is_fetched(version, tmp_path)
    git(repository, "tag", "same", "v2")
    assert versions.version_at(repository, "same", ["data/train.json"]).key == version.key
    with monkeypatch.context() as patch:
        patch.setattr(versions, "download", lambda *_: pytest.fail("fetched again"))
        assert versions.fetch(version, tmp_path) == place
    (place / "data" / "train.json").write_text("[]")
    assert not versions.is_fetched(version, tmp_path)
    versions.fetch(version, tmp_path)
    assert len(json.loads((place / "data" / "train.json").read_text())) == ROWS["v2"]


def test_a_fetch_that_is_killed_leaves_nothing_that_counts(repository: Path, tmp_path: Path) -> None:
    version, cache = versions.version_at(repository, "v2", ["data/train.json"]), tmp_path / "cache"
    code = (
        "import os, signal; from pathlib import Path; from accelerando.data import versions as v\n"
        "v.check_hashes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"v.fetch(v.version_at(Path({str(repository)!r}), 'v2', ['data/train.json']), Path({str(cache)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert list((cache / "versions").glob(".*.draft"))
    assert not versions.is_fetched(version, cache)
    versions.fetch(version, cache)
    assert versions.is_fetched(version, cache)
    assert not list((cache / "versions").glob(".*.draft"))


def test_folders_and_outputs_of_stages_are_versions_too(repository: Path, tmp_path: Path) -> None:
    """A folder is compared by DVC's own hash of it; dvc.lock names what a stage of dvc.yaml made."""
    from dvc.repo import Repo

    for number in range(5):
        (repository / "images" / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        (repository / "images" / f"c{number % 2}" / f"{number}.txt").write_text(f"picture {number}")
    with Repo(str(repository)) as repo:
        repo.add(["images"])
        repo.push()
    (repository / "made.txt").write_text("made")
    shutil.copy(repository / "made.txt", repository / "copied.txt")
    md5 = versions.file_md5(repository / "made.txt")
    lock = {
        "schema": "2.0",
        "stages": {"make": {"cmd": "true", "outs": [{"path": "made.txt", "hash": "md5", "md5": md5}]}},
    }
    (repository / "dvc.lock").write_text(json.dumps(lock))
    git(repository, "add", "images.dvc", ".gitignore", "dvc.lock")
    git(repository, "commit", "-q", "-m", "more")
    version = versions.version_at(repository, "HEAD", ["images"])
    (tracked,) = version.tracked
    assert tracked.md5.endswith(".dir")
    assert versions.folder_md5(repository / "images") == tracked.md5
    place = versions.fetch(version, tmp_path / "cache")
    assert state_of(place / "images") == state_of(repository / "images")
    assert versions.version_at(repository, "HEAD", ["made.txt"]).tracked[0].file == "dvc.lock"
    one = versions.version_at(repository, "HEAD", ["images/c1"])  # a part of a folder
    place = versions.fetch(one, tmp_path / "other")
    assert [path.name for path in sorted((place / "images").rglob("*.txt"))] == ["1.txt", "3.txt"]


def test_dvc_files_in_folders_below_are_found_recorded_and_fetched(
    pipe: Pipe, repository: Path, tmp_path: Path
) -> None:
    """A file's and two folders' .dvc files, at three depths of the folder that is named."""
    from dvc.repo import Repo

    (repository / "data" / "sub").mkdir()
    write_json(repository / "data" / "sub" / "train.json", make_rows(40, 3))
    for number in range(4):
        place = repository / "data" / "sub" / "images" / f"c{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(place / f"{number}.png")
    with Repo() as repo:
        repo.add(["data/sub/train.json", "data/sub/images/c0", "data/sub/images/c1"])
        repo.push()
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "below")
    git(repository, "tag", "v3")
    below = {"data/sub/train.json", "data/sub/images/c0", "data/sub/images/c1"}
    version = versions.version_at(repository, "v3", ["data"])
    assert {one.path: one.file for one in version.tracked if one.path in below} == {
        path: f"{path}.dvc" for path in below
    }
    assert {one["path"] for one in version.record()["tracked"]} > below
    assert sources.in_place([Path("data")]).digest == version.key
    shutil.rmtree(repository / ".dvc" / "cache")  # from the remote
    place = versions.fetch(version, tmp_path / "elsewhere")
    assert (place / "data/sub/train.json").read_bytes() == (repository / "data/sub/train.json").read_bytes()
    assert {path.name for path in (place / "data/sub/images").iterdir() if path.is_dir()} == {"c0", "c1"}
    assert [path.name for path in sorted((place / "data/sub/images").rglob("*.png"))] == [
        f"{n}.png" for n in (0, 2, 1, 3)
    ]
    part = versions.version_at(repository, "v3", ["data/sub/images"])
    assert {one.path for one in part.tracked} == {"data/sub/images/c0", "data/sub/images/c1"}
    found = pipeline.make_job(
        Args(config_file=CPU, dataset_version="v3",
             words=(str(TEXT), "--config", "config.yaml", "--train_file", "data/sub/train.json"))
    ).data  # fmt: skip
    assert "data/sub/train.json" in {one.path for one in found.version.tracked}
    assert found.places["train_file"].endswith("data/sub/train.json")
    (repository / "data/sub/train.json").write_text("[]")
    refused(r"data/sub/train.json: is not the data that data/sub/train.json.dvc names",
            lambda: pipe("--train_file", "data/sub/train.json", dry_run=True))  # fmt: skip


def refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_cannot_be_had_is_one_line(repository: Path, tmp_path: Path, monkeypatch) -> None:
    """Revisions, paths, remotes: what is wrong, and how to mend it."""
    paths = ["data/train.json"]

    def fetched(revision: str = "v2") -> object:
        return versions.fetch(versions.version_at(repository, revision, paths), tmp_path / "other")

    refused(r"--dataset_version v3: no such revision in .*repo; did you mean v", lambda: fetched("v3"))
    refused(r"no such revision .*; the newest tags are v[12], v[12]", lambda: fetched("release"))
    refused(r"^--dataset_version --help: no such revision", lambda: fetched("--help"))
    refused(r"data/trian.json: neither DVC nor git tracks it in v1 .*\(it tracks data/train.json\); `dvc add data/trian",
            lambda: versions.version_at(repository, "v1", ["data/trian.json"]))  # fmt: skip
    refused("not a DVC repository", lambda: versions.check_repository(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(versions, "is_installed", lambda: False)
        refused("needs DVC: pip install dvc", versions.check_dvc)

    shutil.rmtree(repository / ".dvc" / "cache")
    remote = repository.parent / "remote"
    md5 = versions.version_at(repository, "v2", paths).tracked[0].md5
    stored = remote / "files" / "md5" / md5[:2] / md5[2:]
    content = stored.read_bytes()
    stored.unlink()
    refused(r"data/train.json of v2: the remote store \(.*remote\) does not have all of it", fetched)
    stored.write_bytes(content.replace(b"goal", b"gaol"))
    refused(r"data/train.json of v2: what was fetched has the md5 \w+, but data/train.json.dvc names " + md5, fetched)
    remote.rename(remote.with_name("gone"))
    refused(r"the remote store \(.*remote\) cannot be reached", fetched)
    (repository / ".dvc" / "config").write_text("")
    refused(r"is not in DVC's cache, and .* has no remote to fetch it from: `dvc remote add --default", fetched)
    assert not list((tmp_path / "other").rglob("train.json"))


def test_data_that_is_not_what_its_dvc_file_says_is_refused(pipe: Pipe, repository: Path) -> None:
    """Without --dataset_version; with it the work tree is not looked at."""
    data = repository / "data" / "train.json"
    before = data.read_bytes()
    data.unlink()
    refused(r"data/train.json: is not there, .*`dvc pull data/train.json` brings it, or --dataset_version v1",
            lambda: pipe(dry_run=True))  # fmt: skip
    write_json(data, make_rows(100, 9))
    refused(r"data/train.json: is not the data that data/train.json.dvc names: `dvc add data/train.json` and a commit .*"
            r"--dataset_version v1 trains on a copy", lambda: pipe(dry_run=True))  # fmt: skip
    assert ran(pipe(dry_run=True, dataset_version="v2")) == ["data", "validate", "train", "evaluate", "export"]
    data.unlink()
    data.write_bytes(before)
    found = pipeline.make_job(Args(config_file=CPU, words=(str(TEXT), "--config", "config.yaml"))).data
    assert (found.version.revision, found.version.commit) == ("v1", git(repository, "rev-parse", "v1").strip())
    assert found.version.tracked[0].path == "data/train.json" and not found.places and not found.note


def test_what_lies_in_the_work_tree_has_a_digest(repository: Path, tmp_path: Path, monkeypatch) -> None:
    """That of the version, if it is one; what no version holds is read. A folder's name and place do not matter."""
    from dvc.repo import Repo

    places = [Path("data/train.json"), Path("data/test.json")]
    committed = sources.in_place(places)
    assert committed.digest == versions.version_at(repository, "v1", [str(place) for place in places]).key
    assert (committed.title, committed.note) == (f"v1 (commit {committed.version.commit[:12]})", "")
    extra = tmp_path / "extra.json"
    digests = {committed.digest}
    for text in ("one", "two"):
        extra.write_text(text)
        digests.add(sources.in_place([*places, extra]).digest)
    assert len(digests) == 3
    Path("data/test.json").write_text("[]")  # in git, and changed
    digests.add(sources.in_place(places).digest)
    git(repository, "checkout", "data/test.json")
    write_json(repository / "data" / "train.json", make_rows(50, 8))
    with Repo() as repo:
        repo.add(["data/train.json"])
    added = sources.in_place(places)
    assert added.note == "no commit holds this data yet"
    assert len({*digests, added.digest}) == 5
    shutil.copytree("data", tmp_path / "plain")
    plain = sources.in_place([tmp_path / "plain"])
    assert plain.version is None and plain.title == f"as it lies ({tmp_path / 'plain'})"
    shutil.copytree(tmp_path / "plain", tmp_path / "moved")
    assert sources.in_place([tmp_path / "moved"]).digest == plain.digest
    (tmp_path / "moved" / "test.json").unlink()
    assert sources.in_place([tmp_path / "moved"]).digest != plain.digest
    assert sources.in_place([Path("none.json")]).title == "as it lies (none.json, which is not there)"
    with monkeypatch.context() as patch:  # without DVC nothing is compared
        patch.setattr(versions, "is_installed", lambda: False)
        before = sources.in_place(places)
        write_json(repository / "data" / "train.json", make_rows(51, 8))
        assert sources.in_place(places).digest != before.digest
        assert before.note == "not compared with its .dvc files: DVC is not installed"


def test_settings_that_name_no_version_are_one_line(
    pipe: Pipe, repository: Path, tmp_path: Path, text_set: Path
) -> None:
    for words, settings, message in (
        (("--train_file", text_set / "train.json"), {}, r"train.json: is in no git repository; --data_repo names"),
        ((), {"data_repo": str(tmp_path / "nowhere")}, r"--data_repo .*nowhere: is in no git repository"),
        (("--train_file", "data/none.json"), {}, "data/none.json: neither DVC nor git tracks it in v1"),
        (("--output_dir", "x"), {}, "--output_dir after text_classify.py: belongs to the pipeline"),
        (("--epohcs", "1"), {}, "did you mean --epochs"),
        ((), {"config_file": "none.yaml"}, "--config_file none.yaml: no such file"),
        ((), {"push_to_hub": True}, "--push_to_hub needs --hub_repo_id user/name"),
        (
            (),
            {"export_format": ("pt2", "onnx"), "precision": ("bfloat16",)},
            "--export_format onnx holds float32, .* not bfloat16",
        ),
    ):
        refused(message, lambda words=words, settings=settings: pipe(*words, dataset_version="v1", **settings))
    refused("--data_repo has no effect without --dataset_version", lambda: pipe(data_repo="."))
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.launch
def test_a_version_is_trained_on_once_and_what_depends_on_a_change_again(
    pipe: Pipe, repository: Path, capsys, monkeypatch
) -> None:
    before = state_of(repository)
    results = pipe(dataset_version="v2", experiment_name="Topics")
    assert ran(results) == ["data", "validate", "train", "evaluate", "export"]
    run = Path(results["run"])
    own = harness.results(run)
    assert results["validation"]["splits"]["train"]["count"] == ROWS["v2"]
    assert own["samples"] == 2 * ROWS["v2"]  # two epochs
    md5 = re.search(r"md5: (\w+)", git(repository, "show", "v2:data/train.json.dvc"))[1]
    assert results["data"]["commit"] == git(repository, "rev-parse", "v2").strip()
    assert results["data"]["tracked"][0] == {"path": "data/train.json", "file": "data/train.json.dvc", "md5": md5}
    assert own["dataset_version"].startswith("v2 (commit ") and md5 in own["dataset_version"]
    assert md5 in (run / "summary.txt").read_text() and "v2" in (run / "best" / "README.md").read_text()
    assert results["metrics"]["test"]["accuracy"] == own["test"]["accuracy"]
    assert results["metrics"]["test"]["count"] == 67
    assert results["export"]["files"]["model.onnx"]["largest_difference"] < 1e-4
    assert Path("out/run").resolve() == run.resolve()
    assert json.loads(Path("out/pipeline.json").read_text()) == results
    report = Path("out/report.html").read_text()
    for text in ("<h1>Topics</h1>", md5, "model.onnx", "Samples by label", "sport"):
        assert text in report
    assert state_of(repository) == before
    assert git(repository, "describe", "--tags").strip() == "v1"

    first = weights(run / "best")
    assert ran(pipe(dataset_version="v2")) == []
    assert "skipped: unchanged since" in capsys.readouterr().out
    plan = pipe("--lr", "0.01", dataset_version="v2", dry_run=True)
    assert ran(plan) == ["train", "evaluate", "export"]
    assert plan["steps"]["train"]["why"] == "lr was 0.003, is 0.01"
    other = pipe("--lr", "0.01", dataset_version="v2", export=False)
    assert ran(other) == ["train", "evaluate"]
    assert weights(Path(other["run"]) / "best") != first
    assert weights(run / "best") == first  # stays beside the new run
    again = pipe("--num_workers", "0", "--log_every", "5", dataset_version="v2")  # which change no result
    assert ran(again) == [] and again["run"] == results["run"] and again["metrics"] == results["metrics"]
    assert ran(pipe(dataset_version="v2", precision=("float32", "int8"), dry_run=True)) == ["export"]
    older = pipe(dry_run=True)  # v1, as it lies
    assert ran(older) == ["validate", "train", "evaluate", "export"]
    (run / "best" / "model.safetensors").write_bytes(first[:-1])
    assert pipe(dataset_version="v2", dry_run=True)["steps"]["train"]["why"] == "what it made is damaged or gone"
    mended = pipe(dataset_version="v2")
    assert ran(mended) == ["train"]
    assert weights(run / "best") == first and mended["metrics"] == results["metrics"]

    with serve_hub() as address:
        for name, value in (("HF_ENDPOINT", address), ("HF_TOKEN", "hf_x"), ("HF_HUB_OFFLINE", "0")):
            monkeypatch.setenv(name, value)
            monkeypatch.setitem(ENVIRONMENT, name, value)
        pushed = pipe(dataset_version="v2", push_to_hub=True, hub_repo_id="me/model")
        assert ran(pushed) == ["push"]
        assert pushed["hub"] == {"repository": "me/model", "url": f"{address}/me/model"}
        ((_, files),) = Hub.commits
        assert files["model.safetensors"] == first
        assert files["export/model.onnx"] == (run / "export" / "model.onnx").read_bytes()
        again = pipe(dataset_version="v2", push_to_hub=True, hub_repo_id="me/model")
        assert ran(again) == [] and len(Hub.commits) == 1 and again["hub"] == pushed["hub"]


@pytest.mark.launch
def test_killed_in_any_step_it_goes_on_and_ends_with_the_same(pipe: Pipe, fast: Kills, repository: Path) -> None:
    """SIGKILL in each step, and SIGTERM to the true command in the training; what was done is not done again."""
    runs, flags, settings = repository / "out" / "runs", ("--epochs", "4"), {"dataset_version": "v2"}

    def trains(step: int) -> Callable[[], bool]:
        return lambda: any(f'"step": {step},' in path.read_text() for path in runs.glob("*/metrics.jsonl"))

    def killed_in(script: str, ready: Callable[[], bool], left: list[str]) -> None:
        fast[script] = ready
        with pytest.raises(Killed):
            pipe(*flags, **settings)
        assert not fast
        assert ran(pipe(*flags, **settings, dry_run=True)) == left

    killed_in("validate_data", lambda: True, ["validate", "train", "evaluate", "export"])
    saved = trains(6)  # an epoch, and so the first checkpoint, is behind it
    killed_in("text_classify", saved, ["train", "evaluate", "export"])

    words = ("--config_file", CPU, "--dataset_version", "v2", "--output_dir", "out", TEXT, "--config", "config.yaml")
    process = start(TOOL, *words, *flags, cwd=repository)  # with Accelerate's launcher
    assert wait_until(trains(11), process, 120), (repository / "stderr.txt").read_text()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    last = (repository / "stderr.txt").read_text().splitlines()[-1]
    assert last == "stopped in train (it has saved): the same command goes on; log: out/logs/train.log"
    shown = (repository / "stdout.txt").read_text()
    assert "Step 3 of 5: train (goes on from where it was stopped)" in shown and "Resumed from" in shown
    assert f"accelerate launch --config_file {CPU} {TEXT}" in (repository / "out" / "logs" / "train.log").read_text()

    killed_in("evaluate", lambda: True, ["evaluate", "export"])
    killed_in("export", lambda: any(runs.glob("*/.export*.draft")), ["export"])
    results = pipe(*flags, **settings)
    assert ran(results) == ["export"]
    (run,) = runs.iterdir()
    assert (run / "logs" / "train.log").read_text().count("Resumed from") == 2
    assert not list(run.glob(".export*"))
    unbroken = pipe(*flags, **settings, output_dir="unbroken", export=False)
    assert ran(unbroken) == ["validate", "train", "evaluate"]
    other = Path(unbroken["run"])
    assert weights(run / "best") == weights(other / "best") and harness.numbers(run) == harness.numbers(other)
    assert results["metrics"] == unbroken["metrics"] and results["validation"] == unbroken["validation"]


def test_a_step_that_fails_is_named_with_its_log(pipe: Pipe, repository: Path, monkeypatch) -> None:
    """And what was done before stays done."""
    refused(r"^step validate failed: .*data/test.json: row 1: label 'nothing'.*; log: out/logs/validate.log; the same command "
            "goes on from this step", lambda: pipe("--test_file", bad_rows(repository, "nothing"), dataset_version=None))  # fmt: skip
    assert not Path("out/runs").exists()

    def dies(command: list[str], signals: Signals, output: Path) -> int:
        output.write_text("$ x\nsome words\n")
        return codes[next(name for name in codes if name in " ".join(command))]

    def there() -> dict:
        return pipe(dataset_version="v1")

    monkeypatch.setattr(pipeline, "run_script", dies)
    codes = {"accelerando.data.versions": 0, "validate_data": 137}
    versions.fetch(versions.version_at(repository, "v1", ["data/train.json", "data/validation.json", "data/test.json"]),
                   Path(os.environ["ACCELERANDO_CACHE"]))  # fmt: skip
    refused("step validate failed: was killed by signal 9; log: out/logs/validate.log", there)
    codes = {"validate_data": 0}
    refused("step validate ended without what it should have made", there)
    codes = {"validate_data": 130}
    with pytest.raises(Stopped, match="stopped in validate: the same command goes on; log") as stopped:
        there()
    assert stopped.value.exit_code == 130
    with pipeline.only_one(Path("out")):
        code = f"from pathlib import Path; from accelerando.pipeline import only_one\nwith only_one(Path({str(Path('out').absolute())!r})): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "out is in use by another pipeline" in done.stderr.splitlines()[-1]


def bad_rows(folder: Path, label: str) -> Path:
    """data/test.json with a label that no training row has."""
    return write_json(folder / "data" / "test.json", [{"text": "a b", "label": label}])


# ------------------------------------------------------------------------------------------------- settings and plan


def test_a_dry_run_of_images_prints_the_plan_alone(
    image_args, tiny_resnet: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (str(IMAGE), *image_args)
    plan = run_pipeline(output_dir="out", config_file=CPU, words=words, dry_run=True, precision=("float32", "int8"))
    assert ran(plan) == ["validate", "train", "evaluate", "export"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["step", "data", "validate", "train", "evaluate", "export"]
    assert len({line.index("runs: ") for line in lines[2:6]}) == 1  # aligned
    assert "as it lies" in lines[1] and "image_classify.py" in lines[3] and "onnx in float32, int8" in lines[5]
    assert not list(tmp_path.iterdir())


def test_a_script_is_found_by_its_config(tmp_path: Path) -> None:
    for task, line in (("text", "train_file: rows.json\ntext_column: words"), ("image", "data_dir: d\nfold: 1\ncrop_scale: 0.5"),
                       ("har", "data_dir: d\nzero_shot: false"), ("sign", "keypoints_train: k"), ("clip", "data_dir: d\nlora_r: 4\nmicro_batch_size: 8")):  # fmt: skip
        (tmp_path / "c.yaml").write_text(line + "\n")
        assert pipeline.fitting_script(str(tmp_path / "c.yaml")).name == pipeline.SCRIPT_OF[task]
    (tmp_path / "c.yaml").write_text("data_dir: d\nlr: 0.1\n")
    refused(
        "fits clip and har and image: name one with --task", lambda: pipeline.fitting_script(str(tmp_path / "c.yaml"))
    )
    (tmp_path / "c.yaml").write_text("data_dir: d\nlearning_speed: 0.1\n")
    refused("fits none of the five scripts", lambda: pipeline.fitting_script(str(tmp_path / "c.yaml")))
    refused("none.yaml: No such file", lambda: pipeline.fitting_script(str(tmp_path / "none.yaml")))
    refused("nothing to train", lambda: pipeline.choose_script(Args()))
    path, flags = pipeline.choose_script(Args(config_path="x.yaml", task="har", words=()))
    assert (path.name, flags) == ("clip_har.py", ["--config", "x.yaml"])


def test_the_launch_is_that_of_the_mode(monkeypatch) -> None:
    folder = ROOT / "accelerate_configs"
    for gpus, settings, expected in (
        (0, {"distributed_mode": "none"}, ["cpu.yaml"]),
        (2, {"distributed_mode": "none"}, ["single_gpu.yaml"]),
        (2, {"distributed_mode": "ddp"}, ["multi_gpu.yaml", "--num_processes", "2"]),
        (8, {"distributed_mode": "fsdp", "num_processes": 4}, ["fsdp.yaml", "--num_processes", "4"]),
    ):
        monkeypatch.setattr(launch, "count_gpus", lambda gpus=gpus: gpus)
        name, *more = expected
        assert pipeline.launcher_of(Args(**settings)) == ["--config_file", str(folder / name), *more]
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    refused(
        "ddp is one process for each GPU, and there is none", lambda: pipeline.launcher_of(Args(distributed_mode="ddp"))
    )
    refused("drop one", lambda: pipeline.launcher_of(Args(distributed_mode="none", config_file=CPU)))
    first = launch.launch_facts(["--config_file", CPU])
    assert first != launch.launch_facts(["--config_file", CPU, "--num_processes", "2"])
    assert first[1]["use_cpu"] is True


def test_earlier_weights_have_a_flag_of_each_task(
    tmp_path: Path, tiny_bert, tiny_resnet, tiny_clip_folder, text_set
) -> None:
    (tmp_path / "net.pth").write_bytes(b"x")
    rows = ["--train_file", str(text_set / "train.json")]
    run = tmp_path / "run"
    shutil.copytree(tiny_bert, run / "best")

    def flags(script: Path, words: list[str], path: Path | str) -> list[str]:
        _, settings = pipeline.read_settings(script, words)
        return pipeline.checkpoint_flags(str(path), settings, script)

    assert flags(TEXT, rows, run) == ["--model_name", str(run / "best")]
    assert flags(IMAGE, [], tiny_resnet) == ["--model_name", str(tiny_resnet)]
    assert flags(IMAGE, ["--weights", "DEFAULT"], tiny_resnet)[-2:] == ["--weights", "None"]
    assert flags(IMAGE, [], tmp_path / "net.pth") == ["--weights", str(tmp_path / "net.pth")]
    assert flags(CLIP, ["--train_data", "d"], tiny_clip_folder) == ["--model_name", str(tiny_clip_folder)]
    assert flags(HAR, ["--data_dir", "d"], "openai/clip") == ["--model_name", "openai/clip"]
    refused("starts from random weights", lambda: flags(TEXT, [*rows, "--architecture", "cnn"], run))
    refused("says from_scratch", lambda: flags(TEXT, [*rows, "--from_scratch"], run))
    refused("is a file; clip_har.py takes the folder", lambda: flags(HAR, ["--data_dir", "d"], tmp_path / "net.pth"))
    assert flags(SIGN, ["--smoke_test"], run) == ["--weights", str(run / "best")]
    assert flags(SIGN, ["--smoke_test"], tmp_path / "net.pth") == ["--weights", str(tmp_path / "net.pth")]
    refused("no such file or folder", lambda: flags(TEXT, rows, tmp_path / "none"))


def test_the_sources_of_each_task(tmp_path: Path) -> None:
    """Which settings name data, and what has to be fetched with them."""

    def named(script: Path, *words: str) -> dict[str, tuple[str, str]]:
        _, settings = pipeline.read_settings(script, list(words))
        found = sources.sources_of(settings)
        return {
            name: (str(top), rest) for name, value in found.items() for top, rest in [sources.top_of(value, settings)]
        }

    assert named(TEXT, "--train_file", "d/a.csv", "--text_column", "d") == {"train_file": ("d/a.csv", "")}
    assert named(CLIP, "--train_data", "d/{00..09}.tar") == {"train_data": ("d", "/{00..09}.tar")}
    assert named(CLIP, "--train_data", "d/a.csv") == {"train_data": ("d", "/a.csv")}
    assert named(CLIP, "--train_data", "d/a.csv", "--image_folder", "i") == {
        "train_data": ("d/a.csv", ""),
        "image_folder": ("i", ""),
    }
    assert named(CLIP, "--train_data", "s3://b/d") == {}
    assert named(HAR, "--train_file", "a.csv") == {"train_file": (".", "/a.csv")}
    assert named(SIGN, "--keypoints_train", "k", "--labels_train_csv", "l.csv") == {
        "keypoints_train": ("k", ""),
        "labels_train_csv": ("l.csv", ""),
    }
    assert named(SIGN, "--smoke_test") == {}


def test_the_guides_call_is_understood(pipe: Pipe, repository: Path) -> None:
    """`run_automated_training(config_path=..., ...)` of the guide, under its own names; every flag is a setting of it."""
    guide = {"config_path", "output_dir", "dataset_version", "checkpoint_path", "push_to_hub", "hub_repo_id",
             "experiment_name", "distributed_mode"}  # fmt: skip
    assert guide <= {one.name for one in fields(Args)}
    plan = pipe(
        config_path="config.yaml", words=(), task="text", experiment_name="x", dataset_version="v1", dry_run=True
    )
    assert ran(plan) == ["data", "validate", "train", "evaluate", "export"]
