"""Fixtures: small data and models, the flags that train on them, and the scripts' ``main`` in this process."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import made_data
import pytest
from fork_server import draw_nothing
from harness import CLIP, HAR, IMAGE, MULTITASK, SIGN, TEXT, close_fork_server, run_in_this_process

Run = Iterator[Callable[..., Path]]
CallTool = Callable[..., tuple[int, str, str]]
# Groups of tests (see tests/tasks.py for those of the invariants) that take long: they start first.
LONGEST = (
    "text-resume", "clip-parallel", "nodes", "hsdp", "test_parallel", "test_privacy", "test_docs", "clip-resume", "image-resume", "sign-resume", "test_text_options",
    "test_image", "test_sign", "test_clip", "har-resume", "test_har", "text-parallel", "test_cross_validate", "test_remote",
)  # fmt: skip


SLOW = Path(__file__).with_name("slow_tests.txt")


def pytest_configure(config: pytest.Config) -> None:
    """The markers of this suite."""
    config.addinivalue_line("markers", "figures: runs in this process draw their figures")
    config.addinivalue_line("markers", "launch: starts training processes; make test-fast leaves these out")
    config.addinivalue_line(
        "markers", "exhaustive: shows once more what another test shows; left to make test-all (-m 'not exhaustive')"
    )
    config.addinivalue_line("markers", "slow: takes more than a second or so in this process; see tests/slow_tests.py")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job, whose children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``--dist loadgroup``: a file is one group, unless its tests say otherwise; the longest groups start first."""
    slow = {*SLOW.read_text().splitlines()}
    for item in items:
        if item.path.name in slow or f"{item.path.name}::{item.name}" in slow:
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))

    def place(item: pytest.Item) -> int:
        name = item.get_closest_marker("xdist_group").args[0]
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """One fork server for each pytest process, from the first launch to the end of the session."""
    yield
    close_fork_server()


@pytest.fixture
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's figures are one white pixel, unless the test is marked ``figures``: drawing takes half of a short run."""
    if not request.node.get_closest_marker("figures"):
        draw_nothing(monkeypatch.setattr)


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces and wraps the model but generates no code, which takes half a minute."""
    import torch

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture(scope="session")
def text_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_text_set`."""
    return made_data.make_text_set(tmp_path_factory.mktemp("text_set"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, text_set: Path) -> Path:
    """See :func:`made_data.make_tiny_bert`."""
    return made_data.make_tiny_bert(tmp_path_factory.mktemp("tiny_bert"), text_set)


@pytest.fixture(scope="session")
def text_args(text_set: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that train the tiny model on the small set; 7 optimizer steps an epoch at a global batch of 32."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--train_file", str(text_set / "train.json"), "--validation_file", str(text_set / "validation.json")),
        *("--test_file", str(text_set / "test.json"), "--model_name", str(tiny_bert), "--cache_dir", str(cache)),
        *("--max_length", "48", "--lr", "3e-3", "--epochs", "2", "--log_every", "1", "--report_to", "none"),
    ]


@pytest.fixture
def train_here(text_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Run:
    """text_classify.py in this process; see :func:`harness.run_in_this_process`."""
    yield from run_in_this_process(TEXT, text_args, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def multitask_args(text_set: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that train the tiny model on two tasks; 7 optimizer steps an epoch of 203 rows at a batch of 32."""
    files = made_data.make_task_files(tmp_path_factory.mktemp("tasks"), text_set)
    return [
        *(word for split, named in files.items() for word in (f"--{split}_files", *named)),
        *("--model_name", str(tiny_bert), "--cache_dir", str(tmp_path_factory.mktemp("tasks_cache"))),
        *("--max_length", "48", "--lr", "3e-3", "--epochs", "2", "--log_every", "1", "--report_to", "none"),
    ]


@pytest.fixture
def multitask_here(multitask_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Run:
    """text_multitask.py in this process; see :func:`harness.run_in_this_process`."""
    yield from run_in_this_process(MULTITASK, multitask_args, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def pair_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_pair_set`."""
    return made_data.make_pair_set(tmp_path_factory.mktemp("pair_set"))


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_tiny_clip`."""
    return made_data.make_tiny_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def clip_args(pair_set: Path, tiny_clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that fine-tune the tiny CLIP; 4 optimizer steps an epoch of 75 pairs at a batch of 24."""
    cache = tmp_path_factory.mktemp("clip_cache")
    return [
        *("--data_dir", str(pair_set), "--model_name", str(tiny_clip_folder), "--cache_dir", str(cache)),
        *("--effective_batch_size", "24", "--micro_batch_size", "8", "--lr", "3e-3", "--warmup_steps", "2"),
        *("--epochs", "2", "--log_every", "1", "--num_workers", "0", "--report_to", "none", "--early_stop", "None"),
        *("--loss_batch_size", "8"),
    ]


@pytest.fixture
def clip_here(clip_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Run:
    """clip_finetune.py in this process; see :func:`harness.run_in_this_process`."""
    yield from run_in_this_process(CLIP, clip_args, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def sign_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_sign_set`."""
    return made_data.make_sign_set(tmp_path_factory.mktemp("sign_set"))


@pytest.fixture(scope="session")
def sign_args(sign_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that train a tiny Transformer; 3 optimizer steps an epoch of 75 clips at a batch of 32."""
    cache = tmp_path_factory.mktemp("sign_cache")
    return [
        *("--keypoints-train", str(sign_set / "train"), "--keypoints-val", str(sign_set / "val")),
        *("--keypoints-test", str(sign_set / "test"), "--features-train", str(sign_set / "train")),
        *("--features-val", str(sign_set / "val"), "--features-test", str(sign_set / "test")),
        *("--hidden_size", "32", "--num_layers", "2", "--num_attention_heads", "4", "--intermediate_size", "48"),
        *("--cache_dir", str(cache), "--lr", "3e-3", "--epochs", "2", "--log_every", "1", "--report_to", "none"),
    ]


@pytest.fixture
def sign_here(sign_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Run:
    """sign_train.py in this process; see :func:`harness.run_in_this_process`."""
    yield from run_in_this_process(SIGN, sign_args, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_image_set`."""
    return made_data.make_image_set(tmp_path_factory.mktemp("image_set") / "furniture")


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_tiny_vit`."""
    return made_data.make_tiny_vit(tmp_path_factory.mktemp("tiny_vit"))


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_tiny_resnet`."""
    return made_data.make_tiny_resnet(tmp_path_factory.mktemp("tiny_resnet"))


@pytest.fixture(scope="session")
def image_args(image_set: Path, tiny_resnet: Path) -> list[str]:
    """The flags that train the tiny ResNet on small images."""
    return [
        *("--data_dir", str(image_set), "--model_name", str(tiny_resnet), "--image_size", "32"),
        *("--crop_scale", "0.6", "--batch_size", "16", "--lr", "3e-3", "--epochs", "2", "--log_every", "1"),
        *("--report_to", "none"),
    ]


@pytest.fixture
def image_here(image_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Run:
    """image_classify.py in this process; see :func:`harness.run_in_this_process`."""
    yield from run_in_this_process(IMAGE, image_args, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def media_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`made_data.make_media_set`."""
    return made_data.make_media_set(tmp_path_factory.mktemp("media_set") / "actions")


@pytest.fixture(scope="session")
def har_args(media_set: Path, tiny_clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that tune the tiny CLIP on images and videos; 5 optimizer steps an epoch of 66 samples at a batch of 16."""
    cache = tmp_path_factory.mktemp("har_cache")
    return [
        *("--data_dir", str(media_set), "--model_name", str(tiny_clip_folder), "--cache_dir", str(cache)),
        *("--strategy", "full", "--batch_size", "16", "--eval_batch_size", "16", "--lr", "3e-3", "--epochs", "2"),
        *("--frames", "3", "--num_workers", "0", "--log_every", "1", "--report_to", "none", "--early_stop", "None"),
    ]


@pytest.fixture
def har_here(har_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> Run:
    """clip_har.py in this process; see :func:`harness.run_in_this_process`."""
    yield from run_in_this_process(HAR, har_args, tmp_path, monkeypatch)


@pytest.fixture
def call_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CallTool:
    """``call_tool(tool, *arguments, stdin=b"")``: its ``main`` in this process; gives exit code and both outputs."""
    from accelerando.base.errors import errors_in_one_line

    def call(tool: ModuleType, *arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"tools/{Path(str(tool.__file__)).name}", *map(str, arguments)])
        given = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False, close=lambda: None)  # workers close it
        monkeypatch.setattr(sys, "stdin", given)
        code = 0
        capsys.readouterr()
        try:
            with errors_in_one_line():
                tool.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call
