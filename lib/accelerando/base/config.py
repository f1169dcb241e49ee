"""Settings from a dataclass, a YAML file and the command line: default < YAML (``--config``) < command line.

A script's ``Args`` is a flat dataclass. The comment on a field's line is its help text; a comment line of the form
``# -- data --`` starts a section, which groups ``--help`` and the saved ``config.yaml``::

    @dataclass
    class Args:
        # -- training --
        lr: float = 2e-5  # peak learning rate

YAML keys go through the same parser as flags, so an unknown key or an invalid value fails in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import math
import os
import re
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from accelerando.base.errors import UserError, first_line, is_main_rank
from accelerando.base.texts import MARK, MARKED, without_credentials

if TYPE_CHECKING:
    import yaml
    from _typeshed import DataclassInstance

T = TypeVar("T")

# An alias is the name of a field, or that name with a mapping of values: {"true": "fp16"}.
Alias = str | tuple[str, dict[str, str]]

# Names that the five guides and Hugging Face's TrainingArguments use for the shared settings.
COMMON_ALIASES: dict[str, Alias] = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "max_grad_norm": "grad_clip",
    "fp16": ("amp", {"true": "fp16", "false": "no"}),
    "bf16": ("amp", {"true": "bf16", "false": "no"}),
    "mixed_precision": ("amp", {"true": "fp16", "false": "no"}),
    "no_mixed_precision": ("amp", {"true": "no"}),
    "scheduler_type": "scheduler",
    "lr_scheduler_type": "scheduler",
    "step_size": "scheduler_step_size",
    "gamma": "scheduler_factor",
    "optim": "optimizer",
    "warmup_ratio": "warmup_steps",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "early_stopping_patience": "early_stop",
    "early_stopping_threshold": "early_stop_min_delta",
    "dataloader_num_workers": "num_workers",
    "torch_compile": "compile_model",
    "resume_from_checkpoint": "resume",
    "hub_model_id": "hub_repo_id",
    "use_wandb": ("report_to", {"true": "wandb", "false": "none"}),
    "use_mlflow": ("report_to", {"true": "mlflow", "false": "none"}),
    "project_name": "wandb_project",
    "group_name": "wandb_group",
    "wandb.project": "wandb_project",
    "wandb.entity": "wandb_entity",
    "wandb.name": "wandb_name",
    "wandb.group": "wandb_group",
    "wandb.tags": "wandb_tags",
    "wandb.notes": "wandb_notes",
}

TRACKERS = ("wandb.", "mlflow.")  # sections of a YAML file that are those of a tracker
MOST_VALUES = 20_000  # in a YAML file

# The value of a flag that is given without one.
BARE = {"resume": "auto", "amp": "auto"}

# Settings of `accelerate launch` that the replaced scripts had: taken, and compared with the launch once it is known.
LAUNCH_FLAGS = ("distributed_mode", "enable_parallel", "device")
_asked_of_launch: dict[str, str] = {}
_given: set[str] = set()


def parse_args(
    cls: type[T],
    aliases: dict[str, Alias] | None = None,
    argv: list[str] | None = None,
    foreign: Mapping[str, str] | None = None,
) -> T:
    """An instance of ``cls`` from ``argv`` (default: ``sys.argv[1:]``) and the YAML files that ``--config`` names.

    ``foreign``: settings of another program that a shared YAML file may contain, with a message for each.

    Raises:
        UserError: an unknown flag or key (with a suggestion), an invalid value, an invalid YAML file.
    """

    argv = list(sys.argv[1:] if argv is None else argv)
    table = {**COMMON_ALIASES, **(aliases or {})}
    known = {field.name: field for field in dataclasses.fields(cls)}
    # An alias may refer to another alias: per_device_train_batch_size -> batch_size -> micro_batch_size.
    table = {
        name: table.get(target, target) if isinstance(target, str) and target not in known else target
        for name, target in table.items()
    }
    table = {name: target for name, target in table.items() if _target(target) in known}
    if any(token in ("-h", "--help") for token in argv):
        try:
            _print_help(cls, table)
            sys.stdout.flush()
        except BrokenPipeError:  # `--help | head` closes the pipe early
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)

    _asked_of_launch.clear()
    foreign = foreign or {}
    argv = _canonical_argv(argv, known, table, foreign)
    from_yaml: list[str] = []
    for path in _values_of(argv, "--config") + _config_of_resumed_run(argv, known):
        from_yaml += _yaml_argv(Path(path), known, table, foreign)
    _given.clear()
    _given.update(word.partition("=")[0].removeprefix("--") for word in from_yaml + argv if word.startswith("--"))

    args, message = _run_parser(cls, from_yaml + argv)
    if message is None:
        for name, value in dataclasses.asdict(args).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and MARKED.search(text):
                    raise UserError(f"--{name} {text}: was saved without its credentials; give it on the command line")
        return args
    # Parsing the command line alone shows which of the two has the error.
    _, alone = _run_parser(cls, argv)
    raise UserError(message if alone == message or not from_yaml else f"{_values_of(argv, '--config')[-1]}: {message}")


def without_flags(words: Sequence[str], names: Collection[str], aliases: Mapping[str, Alias]) -> list[str]:
    """A script's flags without those called ``names``, in any spelling, and without their values."""
    table, kept, skipping = {**COMMON_ALIASES, **aliases}, [], False
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            skipping = _target(table.get(name, name)) in names
        if not skipping:
            kept.append(word)
    return kept


def asked_of_launch() -> dict[str, str]:
    """The values of ``LAUNCH_FLAGS`` that the last :func:`parse_args` found."""
    return dict(_asked_of_launch)


def by_name(flag: str, words: Sequence[str]) -> dict[str, str]:
    """The values of a setting that is given as ``name=value``, several times: {name: value}.

    Raises:
        UserError: a word has another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UserError(f"--{flag} {word}: write name=value, and several of them after each other")
        if name in found:
            raise UserError(f"--{flag}: {name} is given twice")
        found[name] = value
    return found


def numbers_by_name(flag: str, words: Sequence[str]) -> dict[str, float]:
    """Like :func:`by_name`, for numbers of at least 0.

    Raises:
        UserError: also for a value that is no such number.
    """
    found = {}
    for name, text in by_name(flag, words).items():
        with contextlib.suppress(ValueError):
            if 0 <= float(text) < math.inf:
                found[name] = float(text)
        if name not in found:
            raise UserError(f"--{flag} {name}={text}: a number of at least 0")
    return found


def was_given(name: str) -> bool:
    """Whether the last :func:`parse_args` found the setting ``name`` in a YAML file or on the command line."""
    return name in _given


@functools.cache
def sections(cls: type) -> dict[str, list[tuple[str, str]]]:
    """Section heading -> [(field, help), ...], from the comments in the source of ``cls`` and its parents."""
    found: dict[str, dict[str, str]] = {"": {}}
    fields = {field.name for field in dataclasses.fields(cls)}
    for parent in reversed([each for each in cls.__mro__ if dataclasses.is_dataclass(each)]):
        heading = ""
        for line in inspect.getsource(parent).splitlines():
            if match := re.match(r"\s*# -- (.+?) --\s*$", line):
                heading = match[1]
                found.setdefault(heading, {})
            elif (match := re.match(r"\s+(\w+)\s*:[^#]*(?:#\s*(.*))?$", line)) and match[1] in fields:
                # A field that a subclass redefines, with another default, stays in its section.
                place = next((name for name, rows in found.items() if match[1] in rows), heading)
                found[place][match[1]] = (match[2] or found[place].get(match[1], "")).strip()
    return {name: list(rows.items()) for name, rows in found.items() if rows}


# Settings of one start of a run, which do not belong to what it trains.
NOT_REPEATED = ("config", "resume", "overwrite", "allow_changed_data")


def grouped(args: DataclassInstance) -> dict[str, dict[str, object]]:
    """``args`` by section, tuples as lists: the content of ``config.yaml``, without ``NOT_REPEATED``.

    Credentials are left out, since this is what files, trackers and model cards are made of.
    """
    values = dataclasses.asdict(args)
    return {
        heading: {name: _plain(values[name]) for name, _ in rows if name not in NOT_REPEATED}
        for heading, rows in sections(type(args)).items()
    }


def flat(args: DataclassInstance) -> dict[str, object]:
    """``args`` as one flat mapping, for trackers."""
    return {name: value for group in grouped(args).values() for name, value in group.items()}


def flat_settings(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, from the sections of ``config.yaml`` or of the ``config`` in ``results.json``."""
    settings: dict[str, Any] = {}
    for key, value in groups.items():
        settings.update(value if isinstance(value, dict) else {key: value})
    return settings


# Settings that make no other model: how long a run is and how it is computed, and what is checked against the data.
NOT_COMPARED = (
    "epochs", "max_steps", "early_stop", "early_stop_min_delta", "eval_every", "eval_batch_size", "loss_batch_size",
    "num_workers", "auto_workers", "auto_batch_size", "micro_batch_size", "activation_checkpointing", "pin_memory",
    "compile_model", "deterministic", "cache", "cache_side", "cache_gb", "num_labels", "num_classes", "num_gloss",
    "num_cat", "smoke_test", "noise_seed", "pretrained_backbone",
)  # fmt: skip


def compared_settings(args: DataclassInstance, named: Sequence[str]) -> list[str]:
    """Short texts of the settings that differ from their default, for the name of a run: ``weight_decay0.1``.

    Those that make another model: of the model, the loss and the training, and numbers and switches of the data; not
    those that are ``named`` already.
    """
    fields = {field.name: field for field in dataclasses.fields(args)}
    texts = []
    for heading, rows in sections(type(args)).items():
        for name, _ in rows if heading != "output" else []:
            value, default = getattr(args, name), fields[name].default
            is_text = bool(re.search(r"\bstr\b", str(fields[name].type)))
            is_source = heading == "data" and is_text and name != "dataset_version"
            if value != default and not is_source and name not in (*named, *NOT_COMPARED):
                texts.append(_short(name, value))
    return texts


def _short(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if isinstance(value, float | int):
        return f"{name}{value:g}"
    words = value if isinstance(value, tuple | list) else [value]
    return "-".join([name, *(Path(str(word)).name for word in words)])


# The smallest and largest value of settings that the scripts share; None is always valid.
RANGES: dict[str, tuple[float, float]] = {
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "batch_size": (1, 2**30),
    "early_stop": (1, 2**30),
    "early_stop_min_delta": (0, math.inf),
    "epochs": (1, 2**30),
    "eval_batch_size": (1, 2**30),
    "eval_every": (0, 2**40),
    "gradient_accumulation_steps": (1, 2**30),
    "grad_clip": (1e-12, math.inf),
    "keep_checkpoints": (1, 2**30),
    "log_every": (1, 2**40),
    "lora_alpha": (1e-12, math.inf),
    "lora_dropout": (0, 0.999999),
    "lora_r": (1, 2**20),
    "lr": (0, math.inf),
    "max_bad_steps": (1, 2**20),
    "max_length": (3, 2**20),
    "max_steps": (1, 2**40),
    "momentum": (0, 0.999999),
    "num_workers": (0, 1024),
    "overfit_batches": (1, 2**20),
    "save_every": (0, 2**40),
    "scheduler_factor": (0, 0.999999),
    "scheduler_step_size": (1, 2**30),
    "seed": (0, 2**32 - 1),
    "warmup_steps": (0, 2**40),
    "weight_decay": (0, 1e6),
}


def check_ranges(args: DataclassInstance, **others: tuple[float, float]) -> None:
    """UserError for a number outside its range in ``RANGES``, or in ``others``, the script's own."""
    for name, (low, high) in {**RANGES, **others}.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            wide = high > 2**19 and value < low
            limit = f"at least {low:g}" if wide else f"between {low:g} and {high if high > 2**19 else f'{high:g}'}"
            raise UserError(f"--{name} {value}: {limit}")


# Settings that have an effect only together with another one: {"flag value ...": names}.
ONLY_WITH: dict[str, tuple[str, ...]] = {
    "report_to wandb": ("wandb_project", "wandb_entity", "wandb_name", "wandb_group", "wandb_tags", "wandb_notes"),
    "report_to mlflow": ("experiment_name",),
    "optimizer sgd": ("momentum",),
    "scheduler plateau": ("scheduler_patience",),
    "scheduler step": ("scheduler_step_size",),
    "scheduler plateau step": ("scheduler_factor",),
}


def without_effect(args: DataclassInstance, only_with: Mapping[str, Sequence[str]], **here: bool) -> list[str]:
    """A line for each setting that was changed but has no effect, because the feature it belongs to is not in use.

    ``only_with`` (in addition to ``ONLY_WITH``) maps a condition to the settings that need it: ``"strategy lora"`` (the
    flag has one of the values), ``"cache"`` (it is on), ``"not cache"``, or a key of ``here``, which describes this
    machine or its data.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    lines = []
    for condition, names in [*ONLY_WITH.items(), *only_with.items()]:
        unwanted = condition.startswith("not ")
        word, *values = condition.removeprefix("not ").split()
        if word in here:
            there, shown = here[word], word
        elif not hasattr(args, word):  # a script of the user's own, or ``here`` is not known yet
            continue
        else:
            value = getattr(args, word)
            given = value if isinstance(value, tuple) else (value,)
            there = any(str(one) in values for one in given) if values else bool(value)
            shown = f"--{word}" + (f" {' or '.join(values)}" if values else "")
        if there == unwanted:
            changed = [name for name in names if getattr(args, name) != defaults[name]]
            lines += [f"--{name} has no effect here {'with' if unwanted else 'without'} {shown}" for name in changed]
    return lines


def to_yaml(args: DataclassInstance) -> str:
    """``args`` as YAML grouped by section; passed to ``--config``, it repeats the run."""
    import yaml

    return yaml.safe_dump(grouped(args), sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError names the file and line of a syntax error.

    Aliases may expand to values with further aliases; the expanded size is limited to ``MOST_VALUES``.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_yaml(path, yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{where}: invalid YAML ({getattr(error, 'problem', None) or first_line(error)})"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: invalid YAML (nested too deeply)") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # an invalid date or tagged value
        raise UserError(f"{path}: invalid YAML ({first_line(error)})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(content).__name__}")
    return content


def _check_yaml(path: Path, root: yaml.Node | None) -> None:
    """UserError for a document with more than ``MOST_VALUES`` values, as one with aliases within aliases, or one that
    contains itself; and for a key that a mapping has twice."""
    import yaml

    pending, count = [root] if root else [], 0
    while pending:
        node = pending.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if repeated := [key for key in keys if keys.count(key) > 1]:
                raise UserError(f"{path}, line {node.start_mark.line + 1}: {repeated[0]!r} occurs twice")
            pending += [one for pair in node.value for one in pair]
            count += len(node.value)
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
            count += len(node.value)
        if count > MOST_VALUES:
            raise UserError(f"{path}: more than {MOST_VALUES:,} values after its aliases are expanded")


def _target(alias: Alias) -> str:
    return alias if isinstance(alias, str) else alias[0]


def _plain(value: object) -> object:
    if isinstance(value, str):
        return without_credentials(value, MARK)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _is_bool(field: dataclasses.Field) -> bool:
    return field.type in (bool, "bool")


def _canonical_argv(
    argv: list[str], known: dict[str, dataclasses.Field], table: dict[str, Alias], foreign: Mapping[str, str]
) -> list[str]:
    """Normalizes flags: dashes, aliases, ``--a=b``, ``--flag true`` and a bare ``--resume``."""
    result: list[str] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if token == "--":  # everything after it is positional
            return result + argv[position:]
        if not token.startswith("--"):
            result.append(token)
            continue
        flag, equals, value = token.partition("=")
        name = flag[2:].replace("-", "_")
        follows = position < len(argv) and not argv[position].startswith("--")
        if _is_of_launch(name.removeprefix("no_"), known):
            is_switch = name.endswith("parallel")
            if not equals and follows and (not is_switch or argv[position].lower() in ("true", "false", "yes", "no")):
                value = argv[position]
                position += 1
            value = "false" if name.startswith("no_") else value.lower() or "true"
            _asked_of_launch[name.removeprefix("no_")] = value
            continue
        alias = table.get(name) if name not in known else None
        if isinstance(alias, tuple):
            if not equals and follows:
                value = argv[position]
                position += 1
            _add_translated(result, alias, value or "true")
            continue
        name = alias or name
        negated = name.removeprefix("no_")
        if name in known and _is_bool(known[name]):
            if not equals and follows and argv[position].lower() in ("true", "false", "yes", "no"):
                value = argv[position]
                position += 1
            result.append("--" + name if value.lower() in ("", "true", "yes", "1") else "--no_" + name)
        elif name in known and known[name].type == "bool | None":
            if not equals:
                value = argv[position] if follows else "true"
                position += follows
            result += ["--" + name, value.capitalize()]
        elif name in known:
            if equals and value.startswith("-"):
                result.append(f"--{name}={value}")  # a value that looks like a flag
                continue
            result.append("--" + name)
            if equals:
                result.append(value)
            elif name in BARE and not follows:
                result.append(BARE[name])
        elif negated in known and "bool" in str(known[negated].type):
            result += ["--no_" + negated] if _is_bool(known[negated]) else ["--" + negated, "False"]
        elif name in foreign:
            raise UserError(f"{flag} {foreign[name]}")
        else:
            raise UserError(f"unknown flag {flag}{_suggestion(name, known, table, '--')}")
    return result


def _is_of_launch(name: str, known: dict[str, dataclasses.Field]) -> bool:
    """True for a flag of the launcher that a training script is given; tools have a ``device`` of their own or none."""
    return name in LAUNCH_FLAGS and name not in known and "resume" in known


def _add_translated(argv: list[str], alias: tuple[str, dict[str, str]], value: str) -> None:
    """Adds the flag that an alias refers to. "false" never overrides another value; trackers are combined."""
    flag, word = "--" + alias[0], alias[1].get(value.lower(), value)
    if value.lower() == "false":
        argv[:0] = [flag, word]
    elif alias[0] == "report_to" and flag in argv:
        argv.insert(argv.index(flag) + 1, word)
    else:
        argv += [flag, word]


def _suggestion(name: str, known: dict[str, dataclasses.Field], table: dict[str, Alias], prefix: str) -> str:
    close = difflib.get_close_matches(name, [*known, *table], n=1, cutoff=0.6)
    return f": did you mean {prefix}{close[0]}?" if close else "; --help lists them all"


def _values_of(argv: list[str], flag: str) -> list[str]:
    values: list[str] = []
    for position, token in enumerate(argv):
        if token == flag:
            for value in argv[position + 1 :]:
                if value.startswith("--"):
                    break
                values.append(value)
    return values


def _config_of_resumed_run(argv: list[str], known: dict[str, dataclasses.Field]) -> list[str]:
    """``--resume runs/x`` without ``--config`` uses the configuration of that run."""
    resumed = _values_of(argv, "--resume") if "resume" in known else []
    if not resumed or resumed[0] == "auto" or _values_of(argv, "--config"):
        return []
    path = Path(resumed[0])
    for folder in (path, *path.parents[:2]):
        if (folder / "config.yaml").is_file():
            return [str(folder / "config.yaml")]
    return []


def _yaml_argv(
    path: Path, known: dict[str, dataclasses.Field], table: dict[str, Alias], foreign: Mapping[str, str]
) -> list[str]:
    """The content of a YAML file as flags; keys may be grouped in sections of any name.

    A section of its own for a tracker switches it on, beside the default one, if the file does not set ``report_to``.
    """
    pairs: list[tuple[str, str, Any]] = []  # (section.key, key, value)

    def collect(mapping: dict[Any, Any], section: str) -> None:
        for key, value in mapping.items():
            if isinstance(value, dict) and takes_names(str(key)):
                words = {name: one if isinstance(one, list) else [one] for name, one in value.items()}
                pairs.append((f"{section}{key}", str(key), [f"{n}={','.join(map(str, w))}" for n, w in words.items()]))
            elif isinstance(value, dict):  # a section
                collect(value, f"{key}.")
            elif value is not None or key in known or key in table:  # otherwise an empty section
                pairs.append((f"{section}{key}", str(key), value))

    def takes_names(key: str) -> bool:
        """True for a setting of words, for which a mapping stands: {a: 1} for a=1."""
        name = key.replace("-", "_")
        field = known.get(_target(table.get(name, name)) if name not in known else name)
        return field is not None and field.type == "tuple[str, ...]"

    collect(read_yaml(path), "")
    switches = {dotted.removesuffix(".enabled"): value for dotted, key, value in pairs if dotted.endswith(".enabled")}
    if "enabled" not in known:  # `enabled: false` switches a section off
        pairs = [(dotted, key, value) for dotted, key, value in pairs
                 if key != "enabled" and switches.get(dotted.rpartition(".")[0], True)]  # fmt: skip
    argv: list[str] = []
    trackers = dict.fromkeys(dotted.partition(".")[0] for dotted, _, _ in pairs if dotted.startswith(TRACKERS))
    if trackers and "report_to" in known and not any(_sets_trackers(key, table) for _, key, _ in pairs):
        argv += ["--report_to", *dict.fromkeys([*known["report_to"].default, *trackers])]
    for dotted, key, value in pairs:
        name = key.replace("-", "_")
        alias = table.get(dotted) or (table.get(name) if name not in known else None)
        if isinstance(alias, tuple) and isinstance(value, list):
            argv += ["--" + alias[0], *(alias[1].get(str(each), str(each)) for each in value)]
            continue
        if isinstance(alias, tuple):
            _add_translated(argv, alias, str(value))
            continue
        name = alias or name
        if _is_of_launch(name, known):
            _asked_of_launch.setdefault(name, str(value).lower())  # the command line was read before
            continue
        if name in foreign and name not in known:
            print(f"{path}: {dotted} {foreign[name]}", file=sys.stderr)
            continue
        if name not in known:
            raise UserError(f"{path}: unknown key {dotted!r}{_suggestion(name, known, table, '')}")
        if name in BARE and isinstance(value, bool):  # YAML reads an unquoted `no` as false
            argv += ["--" + name, BARE[name] if value else {"amp": "no"}.get(name, "None")]
            continue
        if _is_bool(known[name]):
            if not isinstance(value, bool):
                raise UserError(f"{path}: {dotted} must be true or false, not {value!r}")
            argv.append("--" + name if value else "--no_" + name)
        elif isinstance(value, list):
            argv += ["--" + name, *map(str, value)]
        elif str(value).startswith("-"):
            argv.append(f"--{name}={value}")
        else:
            argv += ["--" + name, str(value)]
    return argv


def _sets_trackers(key: str, table: dict[str, Alias]) -> bool:
    name = str(key).replace("-", "_")
    return _target(table.get(name, name)) == "report_to"


@functools.cache
def _with_sections(cls: type) -> tuple[type, dict[str, str]]:
    """A nested copy of ``cls`` (one inner dataclass per section), from which tyro makes its groups and help."""
    import tyro

    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    outer, home = [], {}
    for heading, rows in sections(cls).items():
        key = re.sub(r"\W+", "_", heading or "options")
        inner = []
        for name, text in rows:
            home[name] = key
            default = {
                "default": fields[name].default,
                "default_factory": fields[name].default_factory,
            }
            default = {k: v for k, v in default.items() if v is not dataclasses.MISSING}
            inner.append((name, Annotated[hints[name], tyro.conf.arg(help=text)], dataclasses.field(**default)))
        outer.append((key, dataclasses.make_dataclass(key, inner)))
    return dataclasses.make_dataclass(cls.__name__, outer), home


def _run_parser(cls: type[T], argv: list[str]) -> tuple[T | None, str | None]:
    import tyro

    nested, home = _with_sections(cls)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            # Its own search for help in the source takes a third of the time.
            config = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
            parsed = tyro.cli(nested, args=argv, config=config, use_underscores=True)
    except SystemExit:
        return None, _one_line(printed.getvalue())
    return cls(**{name: getattr(getattr(parsed, key), name) for name, key in home.items()}), None


def _one_line(box: str) -> str:
    """The message in tyro's framed error: the text between the title and the next rule."""
    lines = [line.strip(" │\t") for line in box.splitlines() if line.strip()]
    rules = [number for number, line in enumerate(lines) if line and set(line) <= set("-─")]
    start = 1 if lines and lines[0].startswith("╭") else (rules[0] + 1 if rules else 0)
    end = next((number for number in rules if number > start), len(lines))
    message = " ".join(lines[start:end])
    return message.removeprefix("Error parsing ") or "invalid arguments; --help lists them all"


def _print_help(cls: type, table: dict[str, Alias]) -> None:
    import tyro

    if not is_main_rank():
        return
    nested, _ = _with_sections(cls)
    text = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip()
    with contextlib.suppress(SystemExit):
        tyro.cli(nested, args=["--help"], config=(tyro.conf.OmitArgPrefixes,), description=text, use_underscores=True)
    spelled = [f"--{name} = --{_target(alias)}" for name, alias in sorted(table.items()) if "." not in name]
    if spelled:
        import textwrap

        width = min(100, max(40, int(os.environ.get("COLUMNS", "80"))))
        print("Other spellings (with dashes or underscores):")
        print(textwrap.fill(", ".join(spelled), width, initial_indent="  ", subsequent_indent="  "))
