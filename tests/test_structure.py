"""The structure of the code: imports run one way, the scripts look alike, their mains are short, imports are light."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "lib" / "accelerando"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
FOLDERS = ("base", "data", "models", "train", "report", "inference")
DIFFERENCES = ROOT / "tests" / "script_differences.txt"


def modules() -> dict[str, Path]:
    """Name -> file of each module of the library, packages left out."""
    files = [path for path in LIBRARY.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(LIBRARY).with_suffix("").parts): path for path in files}


def imports() -> dict[str, set[str]]:
    """Module -> the modules that it imports, in functions and for types too."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("accelerando"):
                target = node.module.removeprefix("accelerando").lstrip(".")
                found[name] |= {target} if target in known else {f"{target}.{each.name}" for each in node.names}
            if isinstance(node, ast.Import):
                found[name] |= {
                    each.name.removeprefix("accelerando.") for each in node.names if each.name.startswith("accelerando")
                }
    return found


def test_imports_run_from_right_to_left() -> None:
    """base <- data <- models <- train <- report <- inference <- pipeline.py; launch.py and search.py need base alone."""

    def level(name: str) -> int:
        return (
            FOLDERS.index(name.split(".")[0])
            if "." in name
            else {"launch": 0, "search": 0, "pipeline": len(FOLDERS)}[name]
        )

    wrong = []
    for name, targets in imports().items():
        for target in targets:
            assert target in modules(), f"{name} imports {target}, which is no module"
            if level(target) > level(name):
                wrong.append(f"{name} -> {target}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Modules are removed as soon as all they import is gone; a circle would stay."""
    left = imports()
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert not left


def test_the_library_has_a_folder_for_each_layer_and_no_utils() -> None:
    assert {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert not [name for name in modules() if name.rpartition(".")[2] in ("utils", "helpers", "misc", "common")]


def main_lines(script: Path) -> list[str]:
    """The lines of ``main`` as they stand, without the last blank ones."""
    source = script.read_text()
    start = source.index("\ndef main() -> None:\n") + 1
    return source[start : source.index("\n\n\nif __name__")].split("\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_main_is_short_and_the_loop_is_in_it(script: Path) -> None:
    lines = main_lines(script)
    assert len(lines) <= 110
    loop = "\n".join(lines)
    order = ("in training_steps(run, batches):", "backward", "clip_grad_norm_", "optimizer.step()", "schedule.step(",
             "ema.update()", "finish_step(", "if step.evaluates:", "if step.saves:")  # fmt: skip
    places = [loop.index(part, loop.index("in training_steps")) for part in order[1:]]
    assert places == sorted(places)


def shared_fields(script: Path) -> dict[str, str]:
    """Field -> its line in ``Args``."""
    source = script.read_text()
    body = source[source.index("class Args:") :].partition("\n\n\n")[0]
    return {match[1]: match[0].strip() for match in re.finditer(r"^    (\w+): .*$", body, re.MULTILINE)}


def differences() -> str:
    """What the scripts do not share: lines of main that not all have, and fields of Args that differ."""
    mains = {script.stem: [line.strip() for line in main_lines(script) if line.strip()] for script in SCRIPTS}
    common = set.intersection(*map(set, mains.values()))
    parts = []
    for name, lines in mains.items():
        parts += [f"== main of {name}", *(line for line in lines if line not in common), ""]
    fields = {script.stem: shared_fields(script) for script in SCRIPTS}
    parts.append("== fields of Args that two scripts or more have, and that differ")
    for field in dict.fromkeys(itertools.chain.from_iterable(fields.values())):
        lines: dict[str, list[str]] = {}
        for name, own in fields.items():
            if field in own:
                lines.setdefault(own[field], []).append(name.partition("_")[0])
        if len(lines) > 1:
            parts += [f"{', '.join(names)}: {line}" for line, names in lines.items()]
    return "\n".join(parts) + "\n"


def test_the_scripts_differ_only_where_their_tasks_do() -> None:
    """What is not shared is listed; a change of the list has to be meant: python tests/test_structure.py writes it."""
    assert differences() == DIFFERENCES.read_text()


def test_the_scripts_functions_have_the_same_signatures() -> None:
    expected = {
        "load_data": "(args: Args, accelerator: Accelerator)",
        "evaluate": "(model: torch.nn.Module, data: Data, split: str, run: Run, args: Args)",
        "score": "(found: dict[str, np.ndarray], data: Data, split: str, args: Args)",
        "write_beside_weights": "(folder: Path, run: Run, data: Data, args: Args)",
        "check_args": "(args: Args)",
    }
    for script in SCRIPTS:
        functions = {
            node.name: node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)
        }
        for name, signature in expected.items():
            assert f"({ast.unparse(functions[name].args)})" == signature, (script.name, name)
        first = [argument.arg for argument in functions["build_model"].args.args]
        assert first == ["args", "data", "accelerator"]
        loss = functions.get("compute_loss") or functions["embed"]
        assert [argument.arg for argument in loss.args.args][:4] == ["model", "batch", "data", "args"]


def test_types_are_real_ones() -> None:
    """``Any`` stands only where a value may really be anything."""
    for script in SCRIPTS:
        assert len(re.findall(r"\bAny\b", script.read_text())) == 0, script.name


HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "pandas",
    "pyarrow",
    "matplotlib",
    "peft",
    "PIL",
)


PROGRAMS = sorted([*SCRIPTS, *ROOT.glob("tools/*.py"), *ROOT.glob("data/*.py")])


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.stem)
def test_a_script_imports_nothing_heavy_before_it_is_needed(script: Path) -> None:
    code = f"import runpy, sys; runpy.run_path({str(script)!r}); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    DIFFERENCES.write_text(differences())
