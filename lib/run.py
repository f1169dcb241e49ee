"""The run directory, its log and trackers, the Accelerator and the seeds: everything around the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import logging
import logging.handlers
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.checkpoint import (
    StopSignal,
    find_checkpoint,
    is_sharded,
    load_checkpoint,
    remove_later_checkpoints,
    restore_best,
    save_checkpoint,
    step_folders,
)
from lib.config import flat, launcher_command, read_yaml, to_yaml
from lib.errors import Stopped, UserError, first_line, is_main_rank

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lib.batches import TrainBatches, Window
    from lib.ema import Ema
    from lib.optim import Schedule

log = logging.getLogger("accelerando")
SUCCESS = 25
logging.addLevelName(SUCCESS, "SUCCESS")


# ----------------------------------------------------------------------------------------------------- accelerator


def make_accelerator(seed: int, amp: str | None, deterministic: bool = False, changing: bool = False) -> Accelerator:
    """The Accelerator (precision from ``amp``, or from the launch config where it is None), with seeds set.

    ``deterministic``: on a GPU, see :func:`choose_deterministic_kernels`; a CPU's are deterministic anyway.
    ``changing``: which parameters are trained changes during the run, which DDP has to look for in each step.

    "auto" is bf16 where the hardware computes it, else fp16 on a GPU and float32 on a CPU.

    Accumulation stays with the script, so Accelerate divides no loss. Raises UserError for fp16 without a GPU.
    """
    start_log()
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading and saving weights; ours are shown only on a terminal
    # Accelerate's launcher sets one thread unless told otherwise; without a GPU that would waste the other cores.
    told = any(word.startswith("--num_cpu_threads_per_process") for word in launcher_command())
    if not torch.cuda.is_available() and os.environ.get("OMP_NUM_THREADS") == "1" and not told:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if amp == "auto":
        amp = "bf16" if computes_bf16() else "fp16" if torch.cuda.is_available() else "no"
    wanted = amp or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wanted == "bf16" and not computes_bf16():
        log.warning("bf16 is many times slower than float32 on this hardware: --amp auto takes what it computes")
    if wanted == "fp16" and not torch.cuda.is_available():
        raise UserError("fp16 needs a CUDA GPU: --amp bf16 is the mixed precision of a CPU, --amp no the full one")
    try:
        # The others wait while the main process tokenises or writes; ten minutes, the default, can be too short.
        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))
        handlers = [patience, DistributedDataParallelKwargs(find_unused_parameters=changing)]
        accelerator = Accelerator(mixed_precision=amp, gradient_accumulation_steps=1, kwargs_handlers=handlers)
    except ValueError as error:
        raise UserError(f"--amp {amp}: {error}") from None
    if is_sharded(accelerator) and not accelerator.is_fsdp2:
        raise UserError("FSDP version 1: the launch config needs fsdp_version: 2, see accelerate_configs/fsdp.yaml")
    if is_sharded(accelerator):
        # Autocast as under DDP. Accelerate's policy would also cast the outputs, the temperature and the gradients that
        # are added up to half precision.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    set_seed(seed)
    if deterministic and accelerator.device.type == "cuda":
        choose_deterministic_kernels()
    return accelerator


def choose_deterministic_kernels() -> None:
    """Has torch use what gives the same bits each time; where there is nothing such, it warns and names the operation.

    Without it, the gradients of convolutions on a GPU differ in the last bits from one run to the next.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help for finding bugs, which costs time


def computes_bf16() -> bool:
    """Whether GPU or CPU multiply bf16 numbers themselves; others emulate it (a CPU with AVX2 alone: 20 x slower)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's


def seed_processes_apart(seed: int, accelerator: Accelerator) -> None:
    """After the model is built alike everywhere, each process draws its own dropout masks."""
    from accelerate.utils import set_seed

    set_seed(seed + 1000 * accelerator.process_index)


def choose_sharded_layers(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Under FSDP, names the layer classes that are sharded one by one: the model's own list, less two kinds.

    Accelerate shards the token embedding by itself and fails where a listed layer contains it (BERT), or where a listed
    class does not occur in this model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap is not None:
        return
    try:
        embedding = model.get_input_embeddings()
    except AttributeError:
        embedding = None
    except NotImplementedError:  # two towers have no one embedding; Accelerate asks the same and fails
        embedding = None
        model.get_input_embeddings = lambda: None
    usable = {
        type(module).__name__
        for module in model.modules()
        if embedding is None or all(child is not embedding for child in module.modules())
    }
    names = getattr(model, "_no_split_modules", None) or []
    plugin.transformer_cls_names_to_wrap = sorted(set(names) & usable)


# --------------------------------------------------------------------------------------------------- run directory


@dataclass
class TrainState:
    """Where the run is; saved in every checkpoint."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0
    position: int = 0  # samples of this epoch already used
    samples: int = 0  # samples used in all
    best_value: float | None = None
    best_step: int = 0
    patience_value: float | None = None  # what an evaluation has to beat by early_stop_min_delta
    bad_evaluations: int = 0  # evaluations in a row without an improvement
    evaluated_step: int = -1
    finished: bool = False
    loss_sum: float = 0.0  # of the samples since the last evaluation
    loss_count: int = 0
    log_loss_sum: float = 0.0  # of the samples since the last line of the log
    log_loss_count: int = 0
    seconds: float = 0.0  # of training, over all restarts
    wait_seconds: float = 0.0  # of these, spent waiting for data
    epoch_size: int = 0  # samples of an epoch
    micro_batch_size: int = 0  # as it was found; a run that goes on keeps it, since dropout masks depend on it
    trackers: dict[str, str] = field(default_factory=dict)  # ids under which trackers go on
    spent: list[list[float]] = field(default_factory=list)  # privacy: noise multiplier, sample rate, steps
    noise_seed: int | None = None  # privacy: of the noise and the sampling

    @property
    def epochs_done(self) -> float:
        """Epochs with their fraction, for the log."""
        return self.epoch + (self.position / self.epoch_size if self.epoch_size else 0.0)


@dataclass
class Run:
    """One run: its folder, its processes, the numbers it recorded.

    ``resumed`` is the checkpoint it goes on from; ``remote`` the URL under which checkpoints are kept too.
    """

    directory: Path
    accelerator: Accelerator
    args: Any
    state: TrainState
    history: list[dict[str, Any]] = field(default_factory=list)
    resumed: Path | None = None
    remote: str | None = None
    trackers: list[Any] = field(default_factory=list)
    stop: StopSignal | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def checkpoints(self) -> Path:
        """Where exact resume finds what it needs."""
        return self.directory / "checkpoints"


def choose_directory(args: Any, default_name: str) -> Path:
    """The folder of this run; nothing is written yet.

    Raises:
        UserError: it exists and neither ``resume`` nor ``overwrite`` was given; ``resume`` names no run.
    """
    if args.resume and args.resume != "auto":
        path = Path(args.resume)
        for folder in (path, *path.parents[:2]):
            if (folder / "checkpoints").is_dir():
                return folder
        hint = (
            "; --resume without a folder looks in the bucket" if getattr(args, "enable_s3_checkpoints", False) else ""
        )
        raise UserError(
            f"--resume {path}: no run there; give a folder with checkpoints/ in it, such as runs/<name>{hint}"
        )
    directory = Path(args.output_dir) / (args.run_name or default_name)
    if directory.is_file():
        raise UserError(f"{directory} is a file: choose another --output_dir or --run_name")
    if not is_unused(directory) and not args.resume:
        if not args.overwrite:
            raise UserError(
                f"{directory} exists: --resume goes on with it, --overwrite starts it again, --run_name names another"
            )
        if not (directory / "config.yaml").is_file():
            raise UserError(f"--overwrite {directory}: not a run (no config.yaml in it), so it is left alone")
    return directory


def short_name(model_name: str) -> str:
    """What to call a model: the last part of its path that says more than ``best`` does."""
    path = Path(model_name)
    return path.parent.name if path.name in ("model", "best", "last") and path.parent.name else path.name


def join_name(*parts: str) -> str:
    """A name for a folder, from parts of any characters."""
    return "_".join(parts).replace("/", "-").replace(" ", "-")


def start_run(accelerator: Accelerator, args: Any, default_name: str, remote: str | None = None) -> Run:
    """Makes the run directory (or opens it again), starts log and trackers; called when data and model are ready.

    A run that is resumed gets its counters and its history from the checkpoint it will go on from. ``remote`` is the
    URL of a folder where each run keeps its checkpoints too, and finds them if they are newer than those here.
    """
    directory = choose_directory(args, default_name)
    accelerator.wait_for_everyone()  # every process has looked before the main one makes the folder
    run = Run(directory, accelerator, args, TrainState(), remote=remote and f"{remote}/{directory.name}")
    if accelerator.is_main_process and directory.is_dir():
        hold(directory)
    if remote and accelerator.is_main_process:
        _look_for_remote_checkpoint(run)
    accelerator.wait_for_everyone()
    if args.resume:
        named = Path(args.resume) if re.fullmatch(r"step_\d+", Path(args.resume).name) else None
        run.resumed = find_checkpoint(accelerator, named or run.checkpoints, log.warning)
        if named and not run.resumed:
            there = ", ".join(path.name for path in step_folders(run.checkpoints)) or "none"
            raise UserError(f"--resume {named}: no complete checkpoint; there are {there}")
    if accelerator.is_main_process:
        try:
            _prepare_directory(run)
        except OSError as error:
            raise UserError(f"cannot make {directory}: {error.strerror}") from None
    accelerator.wait_for_everyone()
    if run.resumed:
        if accelerator.is_main_process:
            remove_later_checkpoints(run.resumed, log.warning)
            if run.remote:
                from lib.remote import remove_remote_after

                remove_remote_after(run.remote, int(run.resumed.name[5:]))
            restore_best(run.resumed, directory / "best")
        content = json.loads((run.resumed / "state.json").read_text(encoding="utf-8"))
        run.state = TrainState(**content["state"])
        run.history = _read_history(run.resumed / "metrics.jsonl")
    if accelerator.is_main_process:
        _write_history(run)
        attach_log_file(directory / "logs" / "train.log")
    log.info("Run directory %s", directory)
    log.info("%s", describe_processes(accelerator))
    if args.resume and not run.resumed:
        log.warning("No checkpoint in %s yet: starting from the beginning", directory)
    _start_trackers(run)
    run.stop = StopSignal()
    return run


def _look_for_remote_checkpoint(run: Run) -> None:
    """Fetches the newest remote checkpoint of a run that is resumed, if it is newer than those here.

    Raises:
        UserError: there are some and the run is to start anew; the bucket is missing or cannot be reached.
    """
    from lib.remote import fetch_checkpoint, newest_remote_checkpoint, remove_remote_after

    newest = newest_remote_checkpoint(run.remote)
    if newest is None:
        return
    if run.args.resume:
        here = [int(path.name[5:]) for path in step_folders(run.checkpoints)]
        if int(newest[5:]) > max(here, default=-1):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            path = fetch_checkpoint(run.remote, newest, run.checkpoints, log.warning)
            log.info("Fetched %s from %s", path.name, run.remote)
    elif run.args.overwrite:
        remove_remote_after(run.remote, -1)
    else:
        raise UserError(
            f"{run.remote} has checkpoints of a run of this name: --resume goes on with it, --overwrite starts it "
            "again, --run_name names another"
        )


def describe_processes(accelerator: Accelerator) -> str:
    """One line on what this runs on."""
    import torch

    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1].replace("NO", "single process")
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else str(accelerator.device)
    number = torch.get_num_threads()
    threads = f", {number} thread{'s' if number > 1 else ''} each" if accelerator.device.type == "cpu" else ""
    count = accelerator.num_processes
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{count} process{'es' if count > 1 else ''} ({kind}) on {device}{threads}, precision {precision}"


def _prepare_directory(run: Run) -> None:
    directory, args = run.directory, run.args
    if directory.exists() and args.overwrite and not args.resume:
        # All but the lock, which is held; last what marks it as a run, should this be interrupted.
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "config.yaml"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    for name in ("checkpoints", "logs", "plots"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    hold(directory)
    config = directory / "config.yaml"
    if run.resumed and config.is_file():
        before = {key: value for group in read_yaml(config).values() for key, value in group.items()}
        for key, value in flat(args).items():
            if key in before and before[key] != value:
                log.warning("Resumed with another %s: %s instead of %s", key, value, before[key])
    write_text(config, to_yaml(args))


LOCK = ".lock"
LOCK_PATIENCE = 5.0  # seconds: a process that was told to stop needs some to save
_held: dict[Path, Any] = {}


def hold(directory: Path) -> None:
    """Keeps other processes from training in ``directory`` until the run is finished or this process ends.

    A lock of POSIX: workers do not inherit it, and it goes with the process, however that ends. Where the file system
    has none, nothing is kept out.

    Raises:
        UserError: another process has it, and still has after ``LOCK_PATIENCE``.
    """
    import fcntl
    import socket

    path = directory.resolve() / LOCK
    if path in _held:  # closing any file of it would give the lock away
        return
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError:  # not writable, which the first save says
        return
    limit = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > limit:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{directory} is in use by {holder}: wait for its end or stop it, or give another --run_name"
                ) from None
            time.sleep(0.2)
        except OSError:
            return
    _held[path] = file
    with contextlib.suppress(OSError):  # a full disk, which the first save says
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def is_unused(directory: Path) -> bool:
    """Whether a folder is not there, or has nothing in it but the lock of a run that did not come to begin."""
    return not directory.exists() or (directory.is_dir() and all(path.name == LOCK for path in directory.iterdir()))


def write_text(path: Path, text: str) -> None:
    """Replaces a text file whole."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


# -------------------------------------------------------------------------------------------------------------- log


COLOURS = {"WARNING": "33", "ERROR": "31", "SUCCESS": "32"}  # ANSI codes: yellow, red, green


class _LineFormatter(logging.Formatter):
    """``2026-01-31 12:00:00 | INFO     | ...``; with colours on a terminal."""

    def __init__(self, colour: bool) -> None:
        super().__init__("%(asctime)s | %(levelname)-8s | %(message)s", "%Y-%m-%d %H:%M:%S")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if not self.colour:
            return line
        stamp, level, message = line.split(" | ", 2)
        code = COLOURS.get(record.levelname)
        message = f"\033[{code}m{message}\033[0m" if code else message
        if not code:
            message = re.sub(r"\b(epoch \S+)", "\033[33m\\1\033[0m", message, flags=re.IGNORECASE)
            message = re.sub(r"^(train)\b", "\033[34m\\1\033[0m", message)
            message = re.sub(r"^(validation|test)\b", "\033[35m\\1\033[0m", message)
            message = re.sub(r"((?:loss|accuracy) +)(\d\S*)", "\\1\033[33m\\2\033[0m", message)
        return f"\033[36m{stamp}\033[0m | {level} | {message}"


class _ConsoleHandler(logging.StreamHandler):
    """Writes above a progress bar instead of into it; ``only_file`` records stay out of the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "only_file", False):
            return
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=sys.stderr):
                super().emit(record)
        else:
            super().emit(record)


def start_log() -> None:
    """Console output on the main process; lines are kept for the file that :func:`attach_log_file` opens later."""
    quiet_libraries()
    for handler in log.handlers[:]:
        log.removeHandler(handler)
    log.propagate = False
    logging.raiseExceptions = False  # a full disk is reported once, by the save that fails, not by each line
    log.setLevel(logging.INFO if is_main_rank() else logging.CRITICAL)
    if not is_main_rank():
        return
    console = _ConsoleHandler(sys.stdout)
    console.setFormatter(_LineFormatter(colour=on_terminal()))
    log.addHandler(console)
    log.addHandler(logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def attach_log_file(path: Path) -> None:
    """Opens ``path`` and writes into it what was logged so far."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(_LineFormatter(colour=False))
    for handler in log.handlers[:]:
        if isinstance(handler, logging.handlers.MemoryHandler):
            for record in handler.buffer:
                file.handle(record)
            log.removeHandler(handler)
    log.addHandler(file)


def success(message: str, *values: Any) -> None:
    """A line about something that went well."""
    log.log(SUCCESS, message, *values)


def on_terminal() -> bool:
    """True when a person watches: colours and progress bars; otherwise plain lines."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def quiet_libraries() -> None:
    """Keeps the console for what the user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    warnings.filterwarnings("ignore", message=".*implicitly creating a replicated DTensor.*")
    warnings.filterwarnings("ignore", message=".*Paged optimizers are not supported on CPU.*")
    warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores.*")  # float32 was asked for
    warnings.filterwarnings("ignore", message=".*Full backward hook is firing.*")  # Opacus' hooks at the first layer
    for name in ("transformers", "datasets", "peft", "bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def progress_bar(total: int, initial: int, unit: str, description: str = "") -> Any:
    """A bar on a terminal, nothing elsewhere; shown when it takes longer than two seconds."""
    from tqdm import tqdm

    hidden = not (is_main_rank() and on_terminal())
    return tqdm(
        total=total, initial=initial, unit=unit, desc=description, disable=hidden, delay=2, leave=False, ncols=80,
        file=sys.stderr, dynamic_ncols=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ metrics, trackers


def record(run: Run, kind: str, values: dict[str, Any]) -> None:
    """Adds one line to ``metrics.jsonl`` and sends the numbers to the trackers as ``kind/name``.

    ``kind`` is "train" (every ``log_every`` steps), "validation" (every evaluation; these also make ``metrics.csv``)
    or "test".
    """
    row = {"kind": kind, "step": run.state.step, "epoch": round(run.state.epochs_done, 4), **values}
    run.history.append(row)
    if not run.accelerator.is_main_process:
        return
    with open(run.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if kind != "train":
        _write_csv(run)
    group = f"{kind}_{values['split']}" if "split" in values else kind
    numbers = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
    for tracker in run.trackers:
        tracker.log(numbers, step=run.state.step)


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` that come from an evaluation on the validation set."""
    return [row for row in run.history if row["kind"] == "validation"]


def _read_history(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_history(run: Run) -> None:
    write_text(run.directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))
    _write_csv(run)


def _write_csv(run: Run) -> None:
    import csv
    import io

    rows = [row for row in run.history if row["kind"] != "train"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["kind", "step", "epoch"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(run.directory / "metrics.csv", text.getvalue())


def check_trackers(names: tuple[str, ...]) -> None:
    """UserError when a tracker named by ``report_to`` is unknown or not installed."""
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "none": None}
    for name in names:
        if name not in packages:
            raise UserError(f"--report_to {name}: choose from {', '.join(packages)}")
        if packages[name] and importlib.util.find_spec(packages[name]) is None:
            raise UserError(f"--report_to {name} needs a package: pip install {packages[name]}")


def _start_trackers(run: Run) -> None:
    """Accelerate's own trackers, each under a name of its own choosing; ids are kept so that a resumed run goes on."""
    args, names = run.args, [name for name in run.args.report_to if name != "none"]
    if not run.accelerator.is_main_process:
        return
    from accelerate import tracking

    run_name = run.directory.name
    if "tensorboard" in names:
        purge = {"purge_step": run.state.step + 1} if run.resumed else {}
        run.trackers.append(tracking.TensorBoardTracker("tensorboard", str(run.directory), **purge))
    if "wandb" in names:
        identity = run.state.trackers.get("wandb")
        run.trackers.append(
            tracking.WandBTracker(
                args.wandb_project,
                entity=args.wandb_entity,
                name=args.wandb_name or run_name,
                tags=list(args.wandb_tags) or None,
                notes=args.wandb_notes,
                dir=str(run.directory),
                **({"id": identity, "resume": "allow"} if identity else {}),
            )
        )
    if "mlflow" in names:
        run.trackers.append(
            tracking.MLflowTracker(args.experiment_name, run_id=run.state.trackers.get("mlflow"), run_name=run_name)
        )
    for tracker in run.trackers:
        try:
            tracker.start()
            if tracker.name == "wandb":
                run.state.trackers["wandb"] = tracker.run.id
            if tracker.name == "mlflow":
                run.state.trackers["mlflow"] = tracker.active_run.info.run_id
            if tracker.name != "tensorboard" and not run.resumed:  # TensorBoard shows the settings as text instead
                tracker.store_init_configuration(flat(args))
        except Exception as error:  # a tracker's own errors have no common base class
            raise UserError(f"--report_to {tracker.name}: {first_line(error)}") from error
    for tracker in run.trackers:
        if tracker.name == "tensorboard" and not run.resumed:
            tracker.writer.add_text("config", "```yaml\n" + to_yaml(args) + "```", 0)


# ------------------------------------------------------------------------------------------------- saving and ending


def save(
    run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, keep: int,
    ema: Ema | None = None,
) -> Path:  # fmt: skip
    """A checkpoint of this moment, on every process; see :func:`lib.checkpoint.save_checkpoint`."""
    state = dataclasses.asdict(run.state)
    path = save_checkpoint(
        run.accelerator, run.checkpoints, run.state.step, model, optimizer, schedule, state, keep,
        run.directory / "best", ema, run.history,
    )  # fmt: skip
    log.info("Saved %s", path, extra={"only_file": on_terminal()})
    if run.remote and run.accelerator.is_main_process:
        from lib.remote import prune_remote, upload_checkpoint

        try:
            upload_checkpoint(path, run.remote)
            prune_remote(run.remote, keep)
            log.info("Uploaded to %s/%s", run.remote, path.name, extra={"only_file": on_terminal()})
        except UserError as error:
            log.warning("Not uploaded: %s; %s is complete, and the next checkpoint will be tried", error, path)
    return path


def restore(
    run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, ema: Ema | None = None
) -> None:
    """Goes on from the checkpoint that :func:`start_run` found, if there is one."""
    if run.resumed is None:
        return
    load_checkpoint(run.accelerator, run.resumed, model, optimizer, schedule, ema)
    log.info(
        "Resumed from %s: step %d, epoch %d, %d samples into it",
        run.resumed, run.state.step, run.state.epoch + 1, run.state.position,
    )  # fmt: skip


def leave_after_stop(run: Run, checkpoint: Path | None) -> None:
    """Ends the run after a stop signal; never returns."""
    for tracker in run.trackers:
        tracker.finish()
    if checkpoint is None:
        raise Stopped("stopped by a signal", run.stop.exit_code)
    log.warning("Stopped by a signal: %s is complete; the same command with --resume goes on", checkpoint)
    raise Stopped("", run.stop.exit_code)


def finish_run(run: Run) -> None:
    """Closes trackers and processes, and lets others into the folder."""
    for tracker in run.trackers:
        tracker.finish()
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if file := _held.pop(run.directory.resolve() / LOCK, None):
        file.close()


def peak_memory_mb(accelerator: Accelerator) -> float:
    """The most memory this process has used, in MB (10^6 bytes): the GPU's where there is one, else resident."""
    import resource

    if accelerator.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process does the work of the block; the others do it after, finding it cached."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    yield
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()


# -------------------------------------------------------------------------------------------------- inside the loop


def after_step(run: Run, window: Window, loss_sum: torch.Tensor) -> bool:
    """Counts the optimizer step over ``window``; True when some process was asked to stop.

    ``loss_sum`` is the sum of this process's sample losses; one collective adds them up and carries the stop signal.
    """
    import torch

    stop = float(run.stop.received is not None)
    totals = torch.stack([loss_sum.detach().double(), loss_sum.new_tensor(stop, dtype=torch.float64)])
    loss, stop = run.accelerator.reduce(totals, reduction="sum").tolist()
    state = run.state
    state.step += 1
    state.position = window.position
    state.samples += window.num_samples
    state.loss_sum += loss
    state.loss_count += window.num_samples
    state.log_loss_sum += loss
    state.log_loss_count += window.num_samples
    return stop > 0


def stop_requested(run: Run) -> bool:
    """True on every process when one of them was asked to stop; a collective."""
    if run.accelerator.num_processes == 1:
        return run.stop.received is not None
    import torch

    flag = torch.tensor([float(run.stop.received is not None)], device=run.accelerator.device)
    return run.accelerator.reduce(flag, reduction="sum").item() > 0


def plan_steps(run: Run, batches: TrainBatches, epochs: int, max_steps: int | None) -> int:
    """The optimizer steps of the whole run: those taken and those left of ``epochs``, but ``max_steps`` at most."""
    state = run.state
    state.epoch_size = len(batches.dataset)
    left = sum(
        batches.num_windows(state.position if epoch == state.epoch else 0) for epoch in range(state.epoch, epochs)
    )
    return state.step + left if max_steps is None else min(state.step + left, max_steps)


def log_step(run: Run, bar: Any, total_steps: int, lr: float, grad_norm: float) -> None:
    """One line on the steps since the last one: mean loss, learning rate, gradient norm, samples per second."""
    state = run.state
    loss = state.log_loss_sum / max(1, state.log_loss_count)
    state.log_loss_sum, state.log_loss_count = 0.0, 0
    record(run, "train", {"loss": loss, "lr": lr, "grad_norm": grad_norm})
    if loss != loss:
        log.warning("The loss is nan: lower --lr, set --warmup_steps, keep --grad_clip")
    bar.set_postfix_str(f"loss {loss:.4f}")
    log.info(
        "train step %d/%d  epoch %.2f  loss %.4f  lr %.3g  grad norm %.3f  %.0f samples/s",
        state.step, total_steps, state.epochs_done, loss, lr, grad_norm, state.samples / state.seconds,
    )  # fmt: skip


def speed(run: Run) -> dict[str, float]:
    """Seconds of training, samples per second, the share of waiting for data, and memory, for the records."""
    state = run.state
    values = {
        "seconds": state.seconds,
        "samples_per_second": state.samples / state.seconds,
        "data_wait_share": state.wait_seconds / state.seconds,
        "peak_memory_mb": peak_memory_mb(run.accelerator),
    }
    if run.accelerator.device.type == "cuda":
        import torch

        values["gpu_allocated_mb"] = torch.cuda.memory_allocated() / 1e6
        values["gpu_reserved_mb"] = torch.cuda.memory_reserved() / 1e6
    return values


def take_train_loss(state: TrainState) -> float:
    """The mean loss of the samples since the last evaluation; the count starts anew."""
    loss = state.loss_sum / max(1, state.loss_count)
    state.loss_sum, state.loss_count = 0.0, 0
    return loss


def count_evaluation(state: TrainState, value: float, min_delta: float, higher_is_better: bool) -> bool:
    """Notes what an evaluation found, for the best weights and for patience; True when ``value`` is the best so far."""
    state.evaluated_step = state.step
    state.bad_evaluations += 1
    if is_improvement(value, state.patience_value, min_delta, higher_is_better):
        state.patience_value, state.bad_evaluations = value, 0
    best = is_improvement(value, state.best_value, 0.0, higher_is_better)
    if best:
        state.best_value, state.best_step = value, state.step
    return best


def evaluation_was_stopped(state: TrainState, eval_every: int, total_steps: int) -> bool:
    """Whether the run was stopped inside the evaluation that belongs to its last step."""
    due = is_due(eval_every, state.step, state.position == 0, state.step == total_steps)
    return due and state.step > 0 and state.evaluated_step < state.step


def is_due(every: int, step: int, end_of_epoch: bool, last_step: bool) -> bool:
    """Whether something that happens ``every`` N steps (0: every epoch) happens now; it always does at the end."""
    return last_step or (step % every == 0 if every else end_of_epoch)


def is_improvement(value: float, best: float | None, min_delta: float, higher_is_better: bool) -> bool:
    """Whether ``value`` beats ``best`` by more than ``min_delta``; the first one does, and anything beats nan."""
    if best is None or best != best:
        return True
    return value > best + min_delta if higher_is_better else value < best - min_delta


def out_of_patience(state: TrainState, early_stop: int | None) -> bool:
    """Whether ``early_stop`` evaluations in a row brought no improvement."""
    return early_stop is not None and state.bad_evaluations >= early_stop
