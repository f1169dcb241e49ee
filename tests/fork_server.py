"""Runs scripts without paying for their imports: a server imports torch and the libraries once and forks for each run.

The server is a process of its own with one thread, started by ``ForkServer()`` and ended with it. A run is a real
process: it has its pid, session, signals and exit code as if ``python script.py`` had been called, and several ranks
stand under an agent that behaves as torchrun does. What differs from a fresh interpreter: all runs of one server share
one hash seed, modules are imported already, and a report's figures are one white pixel each, since drawing takes half
of a short run; the process leaves without freeing its objects. Tests that are about any of these launch for real.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Variables that Python or a library reads once, when it starts: a run that wants others cannot be forked.
READ_AT_IMPORT = ("PYTHON", "HF_", "TRANSFORMERS_", "TORCH", "MPL", "LD_", "LC_", "LANG", "HOME", "XDG_", "GOMP_")
READ_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED")
# As the package and its log module set them before torch and transformers are imported.
SET_BEFORE_IMPORTS = {
    "GOMP_SPINCOUNT": "1000", "TRANSFORMERS_VERBOSITY": "error", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # Arrow's allocator would start a thread
}  # fmt: skip
LIBRARIES = (
    "torch", "torch.distributed.fsdp", "torch.distributed.elastic.multiprocessing.errors", "torch.utils.tensorboard",
    "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.checkpoint.state_dict", "torchvision",
    "torchvision.transforms.v2", "torchvision.models", "transformers", "transformers.optimization",
    "transformers:AutoImageProcessor", "transformers:AutoModel", "transformers:AutoModelForImageClassification",
    "transformers:AutoModelForSequenceClassification", "transformers:AutoProcessor", "transformers:AutoTokenizer",
    "transformers:BertForSequenceClassification", "transformers:BertTokenizerFast", "transformers:CLIPModel",
    "transformers:CLIPProcessor", "transformers:CLIPImageProcessor", "transformers:PreTrainedTokenizerFast",
    "transformers:ResNetForImageClassification", "transformers:ViTForImageClassification",
    "transformers:ViTImageProcessor", "accelerate", "accelerate.tracking", "accelerate.utils.fsdp_utils", "peft",
    "datasets", "evaluate", "sklearn.metrics", "scipy.stats", "scipy.sparse", "pandas", "pyarrow.parquet", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "PIL.Image", "safetensors.torch", "simplejpeg", "tqdm", "yaml",
    "tyro", "tyro.conf", "typeguard", "docstring_parser", "logging.handlers", "torch._dynamo.backends.registry",
    "PIL.JpegImagePlugin", "PIL.PngImagePlugin",
)  # fmt: skip
PACKAGE = Path(__file__).resolve().parent.parent / "lib" / "accelerando"
# Its modules that are imported too. Not those of models: whether a run has imported the model that it opens is tested.
OURS = ("base", "data", "train", "report")
ROOM_FOR_COMMAND = 16_384  # bytes of the server's command line that a fork may overwrite with its own
PATIENCE = 30  # seconds torchrun gives its ranks to end
PR_SET_PDEATHSIG = 1


# ------------------------------------------------------------------------------------------------ the tests' side


class ForkServer:
    """Starts the server; ``start`` forks a run."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(None)
        self.environment = {**environment, **SET_BEFORE_IMPORTS}
        self.environment.pop("PYTHONPATH", None)
        self.control, self.lock, self.log = ours, threading.Lock(), tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, __file__, str(theirs.fileno()), str(os.getpid()), "x" * ROOM_FOR_COMMAND]
        self.process = subprocess.Popen(
            command, env=self.environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self.log,
            stderr=self.log, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def takes(self, environment: Mapping[str, str]) -> bool:
        """Whether a run with this environment can be forked: what is read at import is what the server had."""

        def read(variables: Mapping[str, str]) -> dict[str, str]:
            names = [name for name in variables if name.startswith(READ_AT_IMPORT) and name not in READ_LATER]
            return {name: variables[name] for name in names if name not in SET_BEFORE_IMPORTS}

        ours = str(PACKAGE.parent) in environment.get("PYTHONPATH", "").split(os.pathsep)
        return ours and read(environment) == read(self.environment)

    def start(
        self,
        argv: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        stdout: int,
        stderr: int,
        processes: int = 1,
    ) -> Forked:
        """Forks a process that runs ``argv`` (script and arguments), or an agent with ``processes`` ranks of it."""
        umask = os.umask(0o22)
        os.umask(umask)
        request = {"argv": list(argv), "cwd": str(cwd), "environment": dict(environment), "processes": processes,
                   "umask": umask}  # fmt: skip
        content = json.dumps(request).encode()
        ours, theirs = socket.socketpair()
        ours.settimeout(None)
        with self.lock:
            socket.send_fds(self.control, [b"r"], [theirs.fileno(), stdout, stderr])
        theirs.close()
        try:
            ours.sendall(len(content).to_bytes(4, "little") + content)
            return Forked(list(argv), ours)
        except OSError as error:
            self.log.seek(0)
            raise RuntimeError(f"the fork server has ended: {self.log.read().decode()}") from error

    def close(self) -> None:
        """Ends the server, and whatever it runs still."""
        self.control.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Forked:
    """A run of the server, with the parts of ``subprocess.Popen`` that the tests use."""

    def __init__(self, args: list[str], connection: socket.socket) -> None:
        self.args, self.connection = args, connection
        self.returncode: int | None = None
        self.pid = self._receive()

    def _receive(self) -> int:
        content = b""
        while len(content) < 8:
            part = self.connection.recv(8 - len(content))
            if not part:
                raise ConnectionResetError(f"the fork server ended before {self.args} did")
            content += part
        return int.from_bytes(content, "little", signed=True)

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; -N is death by signal N."""
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._receive()
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


# ----------------------------------------------------------------------------------------------- the server's side


def import_libraries() -> None:
    """What the scripts and tools import, down to the modules that load on first use."""
    for name in LIBRARIES:
        module, _, member = name.partition(":")
        imported = importlib.import_module(module)
        if member:
            getattr(imported, member)  # transformers loads the class's module
    from matplotlib.figure import Figure
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("bert")  # a thousand regular expressions are compiled on the first call
    axes = Figure().add_subplot()  # fonts are found and measured once
    axes.set_title("loss")
    axes.figure.savefig(io.BytesIO())
    sys.path.insert(0, str(PACKAGE.parent))
    for folder in OURS:
        for path in sorted((PACKAGE / folder).glob("*.py")):
            importlib.import_module(f"{PACKAGE.name}.{folder}.{path.stem}")


class Request:
    """One run that was asked for, read from its connection."""

    def __init__(self, connection: socket.socket, stdout: int, stderr: int) -> None:
        self.connection, self.stdout, self.stderr = connection, stdout, stderr
        connection.setblocking(True)  # it is not, if a default timeout was set in the tests' process
        with connection.makefile("rb") as file:
            fields = json.loads(file.read(int.from_bytes(file.read(4), "little")))
        self.argv: list[str] = fields["argv"]
        self.cwd: str = fields["cwd"]
        self.environment: dict[str, str] = fields["environment"]
        self.processes: int = fields["processes"]
        self.umask: int = fields["umask"]


def answer(connection: socket.socket, number: int) -> None:
    """Sends a pid or an exit code; whoever asked may have left."""
    with contextlib.suppress(OSError):
        connection.sendall(number.to_bytes(8, "little", signed=True))


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def serve(control: socket.socket) -> Request:
    """Forks for each request and reports each end. Returns in the forks alone; the server ends with its client."""
    waker, woken = socket.socketpair()
    for end in (waker, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                woken.recv(4096)
        for pid in list(running):
            ended, status = wait_without_blocking(pid)
            if ended:
                connection = running.pop(pid)
                answer(connection, os.waitstatus_to_exitcode(status))
                connection.close()
        if control not in ready:
            continue
        word, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        if not word:
            for pid in running:
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        request = Request(socket.socket(fileno=descriptors[0]), *descriptors[1:])
        assert threads() == 1, "a process with threads must not fork"
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.set_wakeup_fd(-1)
            selector.close()
            for held in (control, waker, woken, request.connection, *running.values()):
                held.close()
            return request
        running[pid] = request.connection
        answer(request.connection, pid)
        os.close(request.stdout)
        os.close(request.stderr)


def wait_without_blocking(pid: int) -> tuple[bool, int]:
    """Whether a child has ended, and its status."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return ended == pid, status


def show_command(words: Sequence[str]) -> None:
    """Overwrites this process's command line, which the scripts and ``ps`` read in /proc."""
    start, end = (int(word) for word in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    content = "\0".join(words).encode()[: end - start - 2]
    ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)


def become(request: Request, environment: Mapping[str, str]) -> None:
    """Makes a fork what a fresh interpreter would be: signals, streams, folder, environment, paths."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the only one the server handles; others are as it inherited them
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(request.umask)
    os.chdir(request.cwd)
    script = Path(request.argv[0])
    sys.argv = list(request.argv)
    extra = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(script.resolve().parent), *extra, *sys.path[1:]]
    sys.path_importer_cache.clear()
    draw_nothing()
    os.environ.clear()  # after that import, which sets variables
    os.environ.update(environment)
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = io.FileIO(number, "wb", closefd=False)
        errors = "strict" if name == "stdout" else "backslashreplace"
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw), encoding="utf-8", errors=errors, write_through=unbuffered,
            line_buffering=name == "stderr" or os.isatty(number),
        )  # fmt: skip
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for name in ("multiprocessing.process", "multiprocess.process"):
        if name in sys.modules:
            sys.modules[name].ORIGINAL_DIR = request.cwd
    import numpy as np
    import torch

    np.random.seed()  # as in each fresh process, not as in the server
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def draw_nothing(put: Callable[[object, str, object], None] = setattr) -> None:
    """From here on a report's figures are one white pixel each; ``put`` with a monkeypatch's: until its end."""
    import numpy as np
    from PIL import Image

    from accelerando.report import results, target_reports

    def write_pixel(path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1), "white").save(path)

    def plot_one(path: str | Path | None = None) -> np.ndarray:
        if path is not None:
            write_pixel(path)
        return np.full((1, 1, 3), 255, np.uint8)

    put(results, "plot_curves", lambda history, series, path: write_pixel(path))
    put(results, "plot_confusion", lambda matrix, names, path=None: plot_one(path))
    put(results, "plot_calibration", lambda before, after, coverage, risk, path: write_pixel(path))
    put(target_reports, "plot_numbers", lambda true, predicted, names, path=None: plot_one(path))


def become_ranks(request: Request) -> dict[str, str]:
    """Turns this fork into torchrun's agent with its ranks. Returns a rank's environment, in the ranks alone."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may come before there are handlers
    count = str(request.processes)
    ranks: set[int] = set()
    for rank in range(request.processes):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            listener.close()
            return {
                **request.environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank),
                "GROUP_RANK": "0", "ROLE_NAME": "default", "LOCAL_WORLD_SIZE": count, "WORLD_SIZE": count,
                "GROUP_WORLD_SIZE": "1", "ROLE_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none",
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            }  # fmt: skip
        ranks.add(pid)
    run_agent(ranks, listener, port, signals)


def run_agent(ranks: set[int], listener: socket.socket, port: int, signals: Sequence[int]) -> NoReturn:
    """Keeps the ranks' store, passes signals on, and ends all ranks when one fails; exit code 1 as torchrun's."""
    import torch.distributed as dist

    store: Any = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    failed, deadline = False, float("inf")

    def end_all(number: int) -> None:
        nonlocal failed, deadline
        failed, deadline = True, min(deadline, time.monotonic() + PATIENCE)
        for pid in ranks:
            with contextlib.suppress(OSError):
                os.killpg(pid, number)

    for number in signals:
        signal.signal(number, lambda number, _: end_all(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    while ranks:
        for pid in list(ranks):
            ended, status = wait_without_blocking(pid)
            if ended:
                ranks.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                if code:
                    os.write(2, f"failed (exitcode: {code}) pid: {pid}\n".encode())
                    if not failed:
                        end_all(signal.SIGTERM)
        if time.monotonic() > deadline:
            end_all(signal.SIGKILL)
        time.sleep(0.01)
    del store
    os._exit(1 if failed else 0)


def without_our_frames(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """An uncaught exception's traceback, from the script on."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def prepare() -> types.CodeType:
    """Serves; in a fork, returns the script's code once the process is ready to run it as ``__main__``."""
    # On the death of the client this process has a closed socket and a signal to end by.
    control = socket.socket(fileno=int(sys.argv[1]))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[2]):
        os._exit(0)
    import_libraries()
    if threads() != 1:
        names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        sys.exit(f"the fork server has threads after its imports: {names}")
    gc.collect()
    gc.freeze()  # what the collector does not touch is shared with the forks
    request = serve(control)
    os.dup2(request.stdout, 1)
    os.dup2(request.stderr, 2)
    os.close(request.stdout)
    os.close(request.stderr)
    script = request.argv[0]
    if request.processes == 1:
        show_command([sys.executable, *request.argv])
        environment = request.environment
    else:
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(request.processes)]
        show_command([sys.executable, *words, *request.argv])
        environment = become_ranks(request)
        show_command([sys.executable, "-u", *request.argv])
    become(request, environment)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__, __annotations__={}, __cached__=None)
    # Spawned workers pickle the classes of the script as those of __mp_main__.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    sys.excepthook = without_our_frames
    with io.open_code(script) as file:
        return compile(file.read(), script, "exec")


def run_and_leave(code: types.CodeType) -> NoReturn:
    """Runs the script and ends as the interpreter does, less the freeing of all its objects, which takes a second."""
    number, interrupted = 0, False
    try:
        exec(code, sys.modules["__main__"].__dict__)
    except SystemExit as end:
        number = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        number, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(number & 0xFF)


if __name__ == "__main__":
    run_and_leave(prepare())
