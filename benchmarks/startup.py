"""How long it takes until a script trains: from the start of the process to the end of the first optimizer step.

  python benchmarks/startup.py [--tasks text image sign clip har multitask --rounds 3 --imports]

Runs of one step, with tiny models and data that is made here, in turn with `python -c "import torch"`, of which the
figures are multiples. `first step` is `python scripts/x.py`, `launched` the same under `accelerate launch`, `whole run`
includes the evaluation, the report and leaving. --imports shows which packages the time goes to (their modules' own
time, by python -X importtime, which slows imports down by about a fifth).

Prints tables and ends with one line of JSON; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "text": "text_classify.py", "image": "image_classify.py", "sign": "sign_train.py", "clip": "clip_finetune.py",
    "har": "clip_har.py", "multitask": "text_multitask.py",
}  # fmt: skip
KINDS = ("first step", "launched", "whole run")
STARTED = "STARTUP_BENCHMARK_STARTED"
STDLIB = {name.strip("_") for name in sys.stdlib_module_names}


class Watcher:
    """Sees when accelerate is imported, and has torch call back after the first optimizer step."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "accelerate.optimizer":
            from torch.optim.optimizer import register_optimizer_step_post_hook

            register_optimizer_step_post_hook(self.ended)

    def ended(self, *_: object) -> None:
        if STARTED in os.environ:
            print(f"first step after {time.time() - float(os.environ.pop(STARTED)):.3f} s", flush=True)
            os._exit(0)


def train_here(command: list[str]) -> None:
    """Runs a script in this process until its first step has ended, and prints the seconds."""
    sys.meta_path.insert(0, Watcher())
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def make_data(folder: Path) -> dict[str, list[str]]:
    """Data and tiny models of all tasks, and the flags that name them."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "lib")]
    import made_data as made

    places = {name: folder / name for name in ("texts", "bert", "pairs", "clip", "signs", "images", "resnet", "media")}
    for place in places.values():
        place.mkdir()
    made.make_text_set(places["texts"])
    made.make_tiny_bert(places["bert"], places["texts"])
    made.make_pair_set(places["pairs"])
    made.make_tiny_clip(places["clip"])
    made.make_sign_set(places["signs"])
    made.make_image_set(places["images"])
    made.make_tiny_resnet(places["resnet"])
    made.make_media_set(places["media"])
    files = made.make_task_files(folder, places["texts"])
    texts, signs = places["texts"], places["signs"]
    flags = {
        "text": ["--train_file", texts / "train.json", "--validation_file", texts / "validation.json", "--model_name",
                 places["bert"], "--max_length", "48", "--batch_size", "16"],
        "image": ["--data_dir", places["images"], "--model_name", places["resnet"], "--image_size", "32",
                  "--batch_size", "16"],
        "sign": ["--keypoints-train", signs / "train", "--keypoints-val", signs / "val", "--batch_size", "16",
                 "--hidden_size", "32", "--num_layers", "2", "--num_attention_heads", "4"],
        "clip": ["--data_dir", places["pairs"], "--model_name", places["clip"], "--effective_batch_size", "16",
                 "--scenario", "full"],
        "har": ["--data_dir", places["media"], "--model_name", places["clip"], "--strategy", "visual", "--frames", "2",
                "--batch_size", "16"],
        "multitask": ["--train_files", *files["train"], "--validation_files", *files["validation"], "--model_name",
                      places["bert"], "--max_length", "48", "--batch_size", "16"],
    }  # fmt: skip
    return {task: [*map(str, own)] for task, own in flags.items()}


def command_of(task: str, flags: list[str], folder: Path) -> list[str]:
    script = str(ROOT / "scripts" / SCRIPTS[task])
    run = ["--max_steps", "1", "--output_dir", str(folder / "runs"), "--run_name", task, "--overwrite"]
    return [script, *flags, *run, "--report_to", "none", "--num_workers", "0", "--cache_dir", str(folder / "cache")]


def seconds(kind: str, command: list[str], options: Sequence[str] = ()) -> tuple[float, str]:
    """Seconds of one start, and what the process wrote to stderr."""
    here = [sys.executable, *options, __file__, "--train", *command]
    whole = {
        "torch": [sys.executable, "-c", "import torch"],
        "first step": here,
        "launched": [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
                     str(ROOT / "accelerate_configs" / "cpu.yaml"), *here[1:]],
        "whole run": [sys.executable, *options, *command],
    }[kind]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "lib"), os.environ.get("PYTHONPATH")]))
    started = time.time()
    if kind in ("first step", "launched"):
        environment[STARTED] = repr(started)
    done = subprocess.run(whole, capture_output=True, text=True, env=environment)
    taken = time.time() - started
    found = re.search(r"first step after ([\d.]+) s", done.stdout)
    if done.returncode or (STARTED in environment and not found):
        sys.exit(f"{' '.join(whole)}\n{done.stdout}{done.stderr}")
    return float(found[1]) if found else taken, done.stderr


def import_seconds(command: list[str]) -> Counter[str]:
    """Seconds that the modules of each package take to be imported before the first step."""
    _, stderr = seconds("first step", command, ["-X", "importtime"])
    spent: Counter[str] = Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", stderr, re.MULTILINE):
        package = name.split(".")[0]
        spent["the standard library" if package.strip("_") in STDLIB else package] += int(own) / 1e6
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=SCRIPTS, default=[*SCRIPTS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--imports", action="store_true", help="show which packages the time goes to")
    if sys.argv[1:2] == ["--train"]:
        train_here(sys.argv[2:])
        return
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = make_data(folder)
        commands = {task: command_of(task, flags[task], folder) for task in args.tasks}
        for command in commands.values():
            seconds("first step", command)  # fills the caches of bytecode and of the disk
        taken: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            taken.setdefault("torch", []).append(seconds("torch", [])[0])
            for task, command in commands.items():
                for kind in args.kinds:
                    taken.setdefault(f"{task} {kind}", []).append(seconds(kind, command)[0])
        medians = {what: statistics.median(values) for what, values in taken.items()}
        torch = medians["torch"]
        print(f'python -c "import torch": {torch:.2f} s (median of {args.rounds})\n')
        print("seconds, and multiples of that\n" + " " * 10 + "".join(f"{kind:>14}" for kind in args.kinds))
        for task in args.tasks:
            own = [medians[f"{task} {kind}"] for kind in args.kinds]
            print(f"{task:<10}" + "".join(f"{value:8.2f} ({value / torch:3.1f})" for value in own))
        if args.imports:
            spent = {task: import_seconds(command) for task, command in commands.items()}
            total = sum(spent.values(), Counter())
            print("\nseconds of imports before the first step\n" + " " * 28 + "".join(f"{task:>10}" for task in spent))
            for package, _ in total.most_common(22):
                print(f"{package:<28}" + "".join(f"{own[package]:10.2f}" for own in spent.values()))
            print(f"{'all':<28}" + "".join(f"{sum(own.values()):10.2f}" for own in spent.values()))
        print(json.dumps({"torch_s": torch, "s": medians}))


if __name__ == "__main__":
    main()
