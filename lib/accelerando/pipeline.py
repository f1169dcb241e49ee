"""From a data version to a pushed model, in one command: each step runs once, until something it depends on changes.

  python tools/pipeline.py --config_path configs/text_trec.yaml --output_dir pipelines/trec --dry_run
  python tools/pipeline.py --output_dir pipelines/trec scripts/text_classify.py --config configs/text_trec.yaml
  python tools/pipeline.py --config_path configs/actions.yaml --output_dir pipelines/actions --dataset_version v1.2 \\
      --distributed_mode ddp --push_to_hub --hub_repo_id me/actions

Flags of the training script stand after the script; without a script, the one
of the five that takes --config_path is taken. The same command again goes on
where it was stopped: a killed training is resumed, exactly.

--dataset_version names a git revision of data under DVC. It is fetched into the
cache, and the work tree is left as it is. Without it the data is trained on as
it lies, if it is what its .dvc files say.

The folder --output_dir has pipeline.json with all results, report.html, logs/,
and in runs/ a run for each training, of which run/ is the last, with its
evaluation/ and export/.

In Python: from accelerando.pipeline import run_pipeline
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from accelerando.base.config import COMMON_ALIASES, Alias, grouped, parse_args
from accelerando.base.errors import Stopped, UserError
from accelerando.base.files import cache_folder, check_can_be_made, is_unused, locked, write_text
from accelerando.base.model_folder import read_json
from accelerando.base.processes import command_line
from accelerando.base.texts import MARK, one_line, without_credentials
from accelerando.data import versions
from accelerando.data.sources import Sources, digest_of, digest_of_path, resolve, sources_of
from accelerando.inference import runs
from accelerando.inference.hub import check_push
from accelerando.inference.outputs import aligned_rows
from accelerando.inference.packages import Formats, Precisions, check_available, check_precisions
from accelerando.inference.scripts import SCRIPT_OF, import_script
from accelerando.launch import (
    Signals,
    accelerate_command,
    default_launcher,
    how_it_ended,
    last_line,
    launch_facts,
    mode_launcher,
    run_script,
    was_stopped,
)
from accelerando.report.pipeline import summary_text, write_page
from accelerando.train.trackers import PACKAGES

if TYPE_CHECKING:
    from types import ModuleType

HERE = Path(__file__).resolve()
ROOT = next(
    (place for place in (HERE.parents[2], HERE.parent) if (place / "tools").is_dir()), HERE.parent
)  # clone, wheel
TOOLS, CONFIGS = ROOT / "tools", ROOT / "accelerate_configs"
ALIASES: dict[str, Alias] = {"config": "config_path", "format": "export_format", "hub_model_id": "hub_repo_id"}
WORDS = "[SCRIPT [FLAG ...]]"
# Settings of the script that change no result, beside those of its section "output".
IGNORED = ("num_workers", "pin_memory", "cache_dir", "dataset_version")
OURS = ("output_dir", "run_name", "overwrite", "resume", "push_to_hub", "hub_repo_id", "dataset_version")
CHANGED = {"data": "the data", "script": "the script", "launch": "the launch", "weights": "the weights",
           "settings": "the settings", "run": "the run", "repository": "the repository"}  # fmt: skip
NAMED_EXPERIMENTS = set(PACKAGES) - {"tensorboard", "wandb"}  # trackers that --experiment_name is for
FOLLOW = 0.2  # seconds between looks at a log that is shown


@dataclass
class Args:
    # -- what is trained --
    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar=WORDS)] = ()  # see above
    config_path: str | None = None  # YAML file of the training script
    task: Literal["clip", "har", "image", "sign", "text"] | None = None  # whose script (default: the one that takes it)
    checkpoint_path: str | None = None  # start from these weights: a run, a model folder; images and signs: a file too
    # -- data --
    dataset_version: str | None = None  # git revision of data under DVC: v1.2, say (default: as it lies)
    data_repo: str | None = None  # its git repository (default: the one that holds the data)
    accept_problems: bool = False  # train although the check of the data found errors
    # -- launch --
    distributed_mode: Literal["none", "ddp", "fsdp"] | None = None  # one process, or one a GPU (default: as configured)
    config_file: str | None = None  # instead: any config of accelerate launch
    num_processes: int | None = None  # of the launch (default: as many as GPUs, or what config_file says)
    # -- evaluation, export, upload --
    export: bool = True  # write the model for deployment
    export_format: Formats = ("onnx",)  # one or several; pt2 is torch.export
    precision: Precisions = ("float32",)  # of the exported weights
    push_to_hub: bool = False  # upload the best weights to the Hugging Face Hub
    hub_repo_id: str | None = None  # where to: user/name
    hub_private: bool = True  # make the repository private
    # -- output --
    output_dir: str = "pipeline"  # folder of runs, results and report
    experiment_name: str | None = None  # title of the report, and experiment of the trackers
    dry_run: bool = False  # print the plan alone


@dataclass
class Job:
    """What a pipeline does: the script, its settings and flags, data and launch."""

    args: Args
    output: Path
    script: Path
    settings: Any  # the script's Args
    flags: list[str]  # of the script, with those that the pipeline adds for its data and weights
    data: Sources
    cache: Path
    launcher: list[str]

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """What the training depends on."""
        return train_inputs(self)

    @property
    def run(self) -> Path:
        """The run, named after what it depends on: another setting makes another run beside it."""
        return self.output / "runs" / digest_of(self.inputs)[:8]

    @property
    def weights(self) -> Path:
        """The folder of the weights that results.json is about."""
        mixed = self.run / "wise_ft"
        return mixed if (mixed / "config.json").is_file() else runs.model_folder(self.run)


@dataclass
class Step:
    """A step: what it does, what it depends on, the command that does it, and what it leaves.

    ``made``: a digest of what it leaves; None: it is not there, or not complete. ``result``: what the results say of
    it. ``keyed``: its place is named after its inputs, so that what is complete there is right.
    """

    name: str
    does: str
    inputs: dict[str, Any]
    command: list[str] | None
    made: Callable[[], str | None]
    result: Callable[[], dict[str, Any]]
    keyed: bool = False
    resumes: bool = False


# --------------------------------------------------------------------------------------------------------- the script


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the pipeline's own flags, the script with its flags) of a command line."""
    at = next((number for number, word in enumerate(words) if word.endswith(".py")), len(words))
    return list(words[:at]), list(words[at:])


def choose_script(args: Args) -> tuple[Path, list[str]]:
    """The script and its flags.

    Raises:
        UserError: none is named, and the config fits none of the five or several; a flag that the pipeline sets.
    """
    script, *flags = args.words or ("",)
    if script and args.task:
        raise UserError(f"--task {args.task} and {script} both name a script: drop one")
    if args.config_path:
        flags = ["--config", args.config_path, *flags]
    if args.task:
        script = str(ROOT / "scripts" / SCRIPT_OF[args.task])
    if not script:
        if not args.config_path:
            raise UserError("nothing to train: give --config_path, or a script with its flags after all others")
        script = str(fitting_script(args.config_path))
    path = Path(script)
    module = import_script(path)
    table = {**COMMON_ALIASES, **getattr(module, "ALIASES", {})}
    for word in flags:
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        name = table.get(name, name)
        if name in OURS:
            raise UserError(
                f"{word} after {path.name}: belongs to the pipeline, which sets it: drop it, or put it before the "
                "script if the pipeline has it"
            )
    return path, flags


def fitting_script(config: str) -> Path:
    """The one of the five scripts that takes all settings of a config."""
    reasons, fitting = {}, {}
    for task, name in SCRIPT_OF.items():
        path = ROOT / "scripts" / name
        module = import_script(path)
        try:
            settings = parse_args(module.Args, module.ALIASES, ["--config", config])
        except UserError as error:
            reasons[task] = str(error)
        else:
            fitting[task] = (path, settings)
    if not Path(config).is_file():
        raise UserError(next(iter(reasons.values())))
    # A key that only some scripts have has been refused by the others; of those left, one whose data is named.
    named = {task: found for task, found in fitting.items() if sources_of(found[1])}
    chosen = named if len(named) == 1 else fitting
    if len(chosen) == 1:
        return next(iter(chosen.values()))[0]
    if chosen:
        raise UserError(f"{config} fits {' and '.join(sorted(chosen))}: name one with --task")
    raise UserError(f"{config} fits none of the five scripts; with --task {next(iter(reasons))} one line says why")


def read_settings(script: Path, flags: list[str]) -> tuple[ModuleType, Any]:
    """The script as a module, and its settings as it checks them itself.

    Raises:
        UserError: it refuses them.
    """
    module = import_script(script)
    settings = parse_args(module.Args, getattr(module, "ALIASES", {}), flags)
    asked = settings.push_to_hub
    settings.push_to_hub = False  # the pipeline's own step
    if hasattr(module, "check_args"):
        module.check_args(settings)
    settings.push_to_hub = asked
    for name in ("resume", "overwrite"):
        if getattr(settings, name):
            raise UserError(
                f"{name} in the config: the pipeline resumes by itself, and starts a new run where something changed: "
                "drop it"
            )
    if getattr(settings, "evaluate_only", False) or getattr(settings, "scenario", "") == "zero_shot":
        raise UserError(f"{script.name} would train nothing with these settings, so there is nothing to export or push")
    return module, settings


def checkpoint_flags(path: str, settings: Any, script: Path) -> list[str]:
    """The flags with which a script starts from earlier weights.

    Raises:
        UserError: the script or these settings cannot.
    """
    known = {one.name for one in dataclasses.fields(settings)}
    place = Path(path)
    if getattr(settings, "from_scratch", False):
        raise UserError(f"--checkpoint_path {path}: the config says from_scratch: drop one of the two")
    if getattr(settings, "architecture", None) == "cnn":
        raise UserError(f"--checkpoint_path {path}: --architecture cnn starts from random weights")
    if getattr(settings, "image_model", None):
        raise UserError(
            f"--checkpoint_path {path}: a whole CLIP, but the config makes one of image_model and text_model"
        )
    if place.is_file():
        if "weights" not in known:
            raise UserError(
                f"--checkpoint_path {path}: is a file; {script.name} takes the folder of a run or of a model"
            )
        return ["--weights", path, *(["--model_name", "None"] if getattr(settings, "model_name", None) else [])]
    if not known & {"model_name", "weights"}:
        raise UserError(f"--checkpoint_path {path}: {script.name} has no flag for earlier weights")
    if place.is_dir():
        path = str(runs.model_folder(place, adapters=True))
    elif "/" not in path or path.startswith((".", "/")) or path.count("/") > 1:  # no name on the Hub either
        raise UserError(f"--checkpoint_path {path}: no such file or folder")
    if "model_name" not in known:
        return ["--weights", path]
    return ["--model_name", path, *(["--weights", "None"] if getattr(settings, "weights", None) else [])]


def launcher_of(args: Args) -> list[str]:
    """The flags for `accelerate launch`.

    Raises:
        UserError: several processes without GPUs, or a config that is not there.
    """
    if args.config_file and args.distributed_mode:
        raise UserError(f"--config_file {args.config_file} and --distributed_mode {args.distributed_mode}: drop one")
    if args.distributed_mode:
        return mode_launcher(CONFIGS, args.distributed_mode, args.num_processes)
    processes = ["--num_processes", str(args.num_processes)] if args.num_processes else []
    if not args.config_file:
        return [*default_launcher(CONFIGS), *processes]
    if not Path(args.config_file).is_file():
        raise UserError(f"--config_file {args.config_file}: no such file; accelerate_configs/ has some")
    return ["--config_file", args.config_file, *processes]


# ----------------------------------------------------------------------------------------------------------- the steps


def make_job(args: Args) -> Job:
    """All that is decided before a step runs.

    Raises:
        UserError: what the script, the data version or the launch do not allow.
    """
    output = Path(args.output_dir)
    check_can_be_made(output, "--output_dir")
    if not TOOLS.is_dir():
        raise UserError(f"{TOOLS}: no such folder; the pipeline runs from a clone of the project (pip install -e .)")
    script, flags = choose_script(args)
    _, settings = read_settings(script, flags)
    if settings.push_to_hub and not args.push_to_hub:  # the config asks for it
        args.push_to_hub = True
    args.hub_repo_id = args.hub_repo_id or settings.hub_repo_id
    if args.push_to_hub and (not args.hub_repo_id or args.hub_repo_id.count("/") != 1):
        raise UserError(f"--push_to_hub needs --hub_repo_id user/name, not {args.hub_repo_id!r}")
    check_formats(args)
    if args.checkpoint_path:
        flags = [*flags, *checkpoint_flags(args.checkpoint_path, settings, script)]
    cache = cache_folder(settings.cache_dir if hasattr(settings, "cache_dir") else None)
    data = resolve(settings, args.dataset_version, args.data_repo, cache, output)
    for name, place in data.places.items():
        flags = [*flags, f"--{name}", place]
    if args.experiment_name and set(settings.report_to) & NAMED_EXPERIMENTS:
        flags = [*flags, "--experiment_name", args.experiment_name]
    _, settings = read_settings(script, flags)
    return Job(args, output, script, settings, flags, data, cache, launcher_of(args))


def check_formats(args: Args) -> None:
    """UserError for a format of export that holds none of the precisions."""
    for kind in args.export_format if args.export else ():
        check_precisions(kind, args.precision)


def data_step(job: Job) -> Step:
    """Fetches a version of the data into the cache; data in the work tree needs nothing."""
    data = job.data

    def result() -> dict[str, Any]:
        record = data.version.record() if data.version else {}
        return {**record, "title": data.title, "digest": data.digest, **({"note": data.note} if data.note else {})}

    title = f"{data.title}; {data.note}" if data.note else data.title
    if not data.fetched:
        return Step("data", title, {"digest": data.digest}, None, lambda: data.digest, result, keyed=True)

    def made() -> str | None:
        return data.digest if versions.is_fetched(data.version, job.cache) else None

    command = versions.fetch_command(data.version, job.cache)
    return Step("data", f"fetches {title}", {"digest": data.digest}, command, made, result, keyed=True)


def validate_step(job: Job) -> Step:
    """Opens all data as the script reads it, and looks for what makes training wrong."""
    values = settings_of(job, lambda section, name: section == "data")
    inputs = {"data": job.data.digest, "script": digest_of_script(job.script), "settings": values}
    file = job.output / "validation" / f"{digest_of(inputs)[:8]}.json"

    def made() -> str | None:
        with contextlib.suppress(UserError):
            if job.args.accept_problems or not read_json(file)["errors"]:
                return digest_of(read_json(file))
        return None

    more = ["--accept_problems"] if job.args.accept_problems else []
    command = [*python(TOOLS / "validate_data.py"), "--json", str(file), *more, str(job.script), *job.flags]
    does = "opens every split, counts classes, looks for damage and copies"
    return Step("validate", does, inputs, command, made, lambda: read_json(file), keyed=True)


def train_inputs(job: Job) -> dict[str, Any]:
    """What a run depends on."""
    models = {
        name: digest_of_path(Path(value))
        for name, value in settings_of(job, lambda section, name: section == "model").items()
        if isinstance(value, str) and Path(value).exists()
    }
    return {
        "data": job.data.digest, "script": digest_of_script(job.script), "launch": launch_facts(job.launcher),
        "weights": models, "settings": settings_of(job, lambda section, name: section != "output"),
    }  # fmt: skip


def train_step(job: Job) -> Step:
    """Trains, or goes on from the last checkpoint."""
    run = job.run
    own = ["--output_dir", str(run.parent), "--run_name", run.name, "--no_push_to_hub"]
    if job.data.version:
        own += ["--dataset_version", job.data.version.text]
    begun = not is_unused(run)
    command = accelerate_command(job.script, [*job.flags, *own, *(["--resume"] if begun else [])], job.launcher)

    def made() -> str | None:
        if not runs.is_finished(run):
            return None
        with contextlib.suppress(UserError):
            return digest_of([digest_of_path(job.weights), digest_of_path(run / "results.json")])
        return None

    def result() -> dict[str, Any]:
        results = runs.read_results(run)
        splits = {split: results[split] for split in ("validation", "test") if split in results}
        return {"run": str(run), "best_step": results["best_step"], "steps": results["steps"],
                "training_seconds": results["seconds"], **splits}  # fmt: skip

    does = f"trains with {job.script.name} into {run}"
    return Step("train", does, job.inputs, command, made, result, keyed=True, resumes=begun)


def weights_digest(job: Job) -> str | None:
    """A digest of the best weights and what belongs to them, without the model card; None: they are not there yet."""
    if not runs.is_finished(job.run):
        return None
    with contextlib.suppress(UserError):
        return digest_of_path(job.weights, without=["README.md"])
    return None


def evaluate_step(job: Job) -> Step:
    """Scores the best weights again, in a process of its own."""
    run, target = job.run, job.run / "evaluation"
    trained = weights_digest(job)
    split = "test" if trained is None or "test" in runs.read_results(run) else "validation"
    command = [*python(TOOLS / "evaluate.py"), str(run), "--split", split, "--output_dir", str(target), "--overwrite"]
    command += of_another_script(job)

    def made() -> str | None:
        return digest_of_path(target) if target.is_dir() else None

    def result() -> dict[str, Any]:
        found = read_json(target / "results.json")
        return {"split": split, "metrics": next(iter(found["runs"].values())), "folder": str(target)}

    does = f"scores the best weights on {split}"
    inputs = {"run": run.name, "weights": trained, "split": split}
    return Step("evaluate", does, inputs, command, made, result)


def export_step(job: Job) -> Step:
    """Writes the best weights for deployment, and compares them with the model."""
    args, target = job.args, job.run / "export"
    trained = weights_digest(job)
    inputs = {
        "run": job.run.name,
        "weights": trained,
        "format": list(args.export_format),
        "precision": list(args.precision),
    }
    source = job.weights if trained else job.run
    command = [*python(TOOLS / "export.py"), "--model_path", str(source), "--output_dir", str(target), "--overwrite",
               "--export_format", *args.export_format, "--precision", *args.precision]  # fmt: skip
    command += of_another_script(job)

    def made() -> str | None:
        return digest_of_path(target) if (target / "export.json").is_file() else None

    def result() -> dict[str, Any]:
        return {"folder": str(target), "files": read_json(target / "export.json")["files"]}

    formats = f"{', '.join(args.export_format)} in {', '.join(args.precision)}"
    return Step("export", f"writes {formats}, compared with the model", inputs, command, made, result)


def of_another_script(job: Job) -> list[str]:
    """What tools are told where the script is none of the five."""
    return ["--script", str(job.script)] if job.script.resolve().parent != ROOT / "scripts" else []


def push_step(job: Job) -> Step:
    """Uploads the run: the best weights, report and results, and what was exported."""
    args, trained = job.args, weights_digest(job)
    inputs = {"weights": trained, "repository": args.hub_repo_id, "private": args.hub_private}
    command = [*python(TOOLS / "push.py"), str(job.run), "--hub_repo_id", str(args.hub_repo_id)]
    command += [] if args.hub_private else ["--no_hub_private"]
    command += ["--add", str(job.run / "export")] if args.export else []

    def result() -> dict[str, Any]:
        return {"repository": args.hub_repo_id, "url": last_line(log_of(job, "push")).removeprefix("Pushed to ")}

    return Step(
        "push", f"uploads weights, report and export to {args.hub_repo_id}", inputs, command, lambda: "uploaded", result
    )


def python(program: str | Path) -> list[str]:
    """The words with which a Python program starts; -P: a file in the current folder hides no package."""
    return [sys.executable, "-P", str(program)]


def makers(job: Job) -> list[Callable[[Job], Step]]:
    """The steps of a job, in order. Each is made when its turn comes: it depends on what those before it leave."""
    last = [*([export_step] if job.args.export else []), *([push_step] if job.args.push_to_hub else [])]
    return [data_step, validate_step, train_step, evaluate_step, *last]


def settings_of(job: Job, wanted: Callable[[str, str], bool]) -> dict[str, Any]:
    """The script's settings on which a result depends, without paths of data: its digest stands for them."""
    paths = sources_of(job.settings)
    return {
        name: value
        for section, group in grouped(job.settings).items()
        for name, value in group.items()
        if wanted(section, name) and name not in IGNORED and name not in paths
    }


def digest_of_script(path: Path) -> str:
    """A digest of a script's code; comments and layout do not count."""
    return hashlib.sha256(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode()).hexdigest()[:32]


# --------------------------------------------------------------------------------------------------- what was done


def read_records(output: Path) -> dict[str, list[dict[str, Any]]]:
    """steps.json: step -> what it was run with and what it made, the newest last. A damaged file counts for none."""
    with contextlib.suppress(UserError):
        return read_json(output / "steps.json")
    return {}


def decide(step: Step, records: Mapping[str, list[dict[str, Any]]]) -> tuple[bool, str]:
    """(whether a step runs, why)."""
    if step.command is None:
        return False, "nothing to do"
    made, own = step.made(), records.get(step.name, [])
    record = next((one for one in reversed(own) if one["inputs"] == plain(step.inputs)), None)
    if record and made is not None and made == record["made"]:
        return False, f"unchanged since {record['finished']}"
    if step.keyed and made is not None and record is None:
        return False, "is there already"
    if step.resumes:
        return True, "goes on from where it was stopped" if record is None else "what it made is damaged or gone"
    if record:
        return True, "what it made is damaged or gone"
    if not own:
        return True, "not done yet"
    reasons = [differences(one["inputs"], plain(step.inputs)) for one in reversed(own)]
    return True, min(reasons, key=len)[0]  # of what it was run with before, the most similar


def plain(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` as JSON gives them back."""
    return json.loads(json.dumps(inputs, default=str))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two inputs of a step differ, in words."""
    found = []
    for name, new in now.items():
        old = before.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
            told = "what {} names changed" if name == "weights" else "{} was {}, is {}"
            found += [told.format(key, shown(old.get(key)), shown(new.get(key))) for key in keys]
        elif isinstance(new, list) and name != "launch":
            found.append(f"{name} was {shown(old)}, is {shown(new)}")
        else:
            found.append(f"{CHANGED.get(name, name)} changed")
    return found or ["what it depends on changed"]


def shown(value: object) -> str:
    """A setting in a line."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, list) else str(value)


def make_plan(job: Job, records: Mapping[str, list[dict[str, Any]]]) -> list[tuple[Step, bool, str]]:
    """(step, whether it runs, why) of all steps. What follows a training runs after it."""
    found: list[tuple[Step, bool, str]] = []
    trains = False
    for make in makers(job):
        step = make(job)
        if trains:
            found.append((step, True, "after the training"))
            continue
        runs_now, why = decide(step, records)
        trains = step.name == "train" and runs_now
        found.append((step, runs_now, why))
    if not any(runs_now for _, runs_now, _ in found[1:]):  # a version that is no longer in the cache
        step, _, why = found[0]
        found[0] = (step, False, why if step.command is None or step.made() else "nothing needs it")
    return found


def plan_text(plan: list[tuple[Step, bool, str]]) -> str:
    """The plan as an aligned table."""
    rows = [("step", "what it does", "")]
    rows += [(step.name, step.does, f"{'runs' if runs_now else 'skipped'}: {why}") for step, runs_now, why in plan]
    return aligned_rows(rows, left=3)


# --------------------------------------------------------------------------------------------------------- running


def run_pipeline(config_path: str | None = None, output_dir: str = "pipeline", **settings: Any) -> dict[str, Any]:
    """Runs the pipeline and returns what pipeline.json holds; ``settings`` are those of :class:`Args`, by name.

    ``words``: the training script and its flags, ("scripts/text_classify.py", "--lr", "1e-4"). With ``dry_run`` only
    the steps of the plan are returned. For the main thread, which gets the signals.

    Raises:
        UserError: a setting, the data version or a step is wrong; the message names the step and its log.
        Stopped: it got a signal to stop, and the training has saved.
    """
    args = Args(config_path=config_path, output_dir=output_dir, **settings)
    job = make_job(args)
    records = read_records(job.output)
    plan = make_plan(job, records)
    print(f"{plan_text(plan)}\n", flush=True)
    if args.dry_run:
        return {"steps": {step.name: {"runs": runs_now, "why": why} for step, runs_now, why in plan}}
    check_before(args, plan)
    job.output.mkdir(parents=True, exist_ok=True)
    with only_one(job.output), Signals() as signals:
        done = run_steps(job, plan, signals)
        results = write_results(job, done)
    print(summary_text(results), flush=True)
    return results


def check_before(args: Args, plan: list[tuple[Step, bool, str]]) -> None:
    """What would fail after hours of training.

    Raises:
        UserError: a package of an export format is missing, or its GPU; not logged in to the Hub.
    """
    names = {step.name for step, runs_now, _ in plan if runs_now}
    if "push" in names:
        check_push(args.push_to_hub, args.hub_repo_id)
    if "export" in names:
        for kind in args.export_format:
            check_available(kind)


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keeps a second pipeline out of the same folder.

    Raises:
        UserError: one is running there.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(output / ".lock", patience=0))
        except BlockingIOError:
            raise UserError(
                f"{output} is in use by another pipeline: wait for it, or name another --output_dir"
            ) from None
        yield


@dataclass
class Done:
    """A step that is done: whether it ran now, why (not), seconds and result."""

    ran: bool
    why: str
    seconds: float
    result: dict[str, Any]


def run_steps(job: Job, plan: list[tuple[Step, bool, str]], signals: Signals) -> dict[str, Done]:
    """Runs the steps one after the other; each is decided again when its turn comes.

    Raises:
        UserError: a step failed.
        Stopped: a signal to stop came.
    """
    done: dict[str, Done] = {}
    makes = makers(job)
    for number, make in enumerate(makes, start=1):
        records, step = read_records(job.output), make(job)
        runs_now, why = decide(step, records)
        if step.name == "data" and not plan[0][1]:
            runs_now, why = False, plan[0][2]
        title = f"Step {number} of {len(makes)}: {step.name}"
        if runs_now:
            print(f"{title} ({why}): {step.does}", flush=True)
            started = time.monotonic()
            result = run_step(job, step, signals)
            seconds = time.monotonic() - started
        else:
            own = [one for one in records.get(step.name, []) if one["inputs"] == plain(step.inputs)]
            result = own[-1]["result"] if own and not step.keyed else step.result()
            seconds = own[-1]["seconds"] if own else 0.0
        if runs_now or (step.command and not own and step.made() is not None):
            keep_record(job.output, step, seconds, result)
        if step.name == "train":
            point_to(job.run, job.output / "run")
        done[step.name] = Done(runs_now, why, seconds, result)
        if signals.received:
            raise Stopped(f"stopped after {step.name}: the same command goes on", 128 + signals.received[0])
    return done


def run_step(job: Job, step: Step, signals: Signals) -> dict[str, Any]:
    """Runs the command of a step, its output in a log and on the console; its result.

    Raises:
        UserError: it failed; Stopped: it was stopped.
    """
    log = log_of(job, step.name)
    log.parent.mkdir(exist_ok=True)
    words = [without_credentials(word, MARK) for word in step.command]
    log.write_text(f"$ {one_line(shlex.join(words))}\n", encoding="utf-8")
    with followed(log):
        code = run_script(step.command, signals, log)
    if signals.received or was_stopped(code):
        saves = step.name == "train" and any(job.run.glob("checkpoints/step_*"))
        saved = " (it has saved)" if saves else ""
        number = 128 + signals.received[0] if signals.received else code
        raise Stopped(f"stopped in {step.name}{saved}: the same command goes on; log: {log}", number)
    reason = last_line(log).removeprefix("error: ")
    if code:
        how = how_it_ended(code) if code > 128 else reason
        raise UserError(f"step {step.name} failed: {how}; log: {log}; the same command goes on from this step")
    if step.made() is None:
        raise UserError(f"step {step.name} ended without what it should have made; log: {log}")
    return step.result()


def log_of(job: Job, name: str) -> Path:
    """The log of a step."""
    return job.output / "logs" / f"{name}.log"


@contextlib.contextmanager
def followed(log: Path) -> Iterator[None]:
    """Shows on the console what a process appends to ``log`` within the block."""
    over = threading.Event()

    def follow() -> None:
        with open(log, encoding="utf-8", errors="replace") as file:
            file.readline()  # the command
            while True:
                ended = over.wait(FOLLOW)
                if text := file.read():
                    with contextlib.suppress(OSError, ValueError):  # the console is gone
                        sys.stdout.write(text)
                        sys.stdout.flush()
                if ended:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def keep_record(output: Path, step: Step, seconds: float, result: dict[str, Any]) -> None:
    """Notes in steps.json what a step was run with and what it made."""
    records = read_records(output)
    inputs = plain(step.inputs)
    own = [one for one in records.get(step.name, []) if one["inputs"] != inputs]
    record = {"inputs": inputs, "made": step.made(), "seconds": round(seconds, 3),
              "finished": time.strftime("%Y-%m-%d %H:%M:%S"), "result": result}  # fmt: skip
    records[step.name] = [*own, record]
    write_text(output / "steps.json", json.dumps(records, indent=1, ensure_ascii=False) + "\n")


def point_to(run: Path, link: Path) -> None:
    """Makes ``link`` beside runs/ point to the run."""
    if link.exists() and not link.is_symlink():
        return  # something of the user's
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(run.relative_to(link.parent))
    os.replace(draft, link)


# ----------------------------------------------------------------------------------------------------------- results


def write_results(job: Job, done: dict[str, Done]) -> dict[str, Any]:
    """Writes pipeline.json and report.html; what the first one holds."""
    trained, evaluated = done["train"].result, done["evaluate"].result
    metrics = {split: trained[split] for split in ("validation", "test") if split in trained}
    metrics[evaluated["split"]] = evaluated["metrics"]
    results = {
        "name": job.args.experiment_name or job.output.resolve().name,
        "script": str(job.script),
        "data": done["data"].result,
        "validation": done["validate"].result,
        "run": trained["run"],
        "best_step": trained["best_step"],
        "metrics": metrics,
        "evaluation": {name: value for name, value in evaluated.items() if name != "metrics"},
        **({"export": done["export"].result} if "export" in done else {}),
        **({"hub": done["push"].result} if "push" in done else {}),
        "steps": {name: {"ran": one.ran, "why": one.why, "seconds": one.seconds} for name, one in done.items()},
        "report": str(job.output / "report.html"),
        "command": command_line(),
    }
    wanted = [job.settings.best_metric, "accuracy", "gloss_accuracy", "recall_mean", "f1_macro", "loss"]
    shown_first = sorted(dict.fromkeys(wanted), key=lambda name: name == "loss")
    write_page(job.output / "report.html", results, grouped(job.settings), shown_first)
    write_text(job.output / "pipeline.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results
