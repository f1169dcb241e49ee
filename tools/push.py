"""Upload a finished run to the Hugging Face Hub.

  python tools/push.py runs/x --hub_repo_id me/trec-classifier
  python tools/push.py runs/x --hub_repo_id me/trec-classifier --no-hub_private --licence apache-2.0
  python tools/push.py runs/x --hub_repo_id me/trec-classifier --add exports/x

One commit has the best weights as `from_pretrained` opens them, tokenizer or
processor, the LoRA adapter where there is one, the report, results and
settings, and a model card with data, metrics, base model, licence and the
training command. Nothing of the run is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from accelerando.base.config import Alias, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.log import quiet_libraries
from accelerando.inference.hub import check_push, push_run

ALIASES: dict[str, Alias] = {"license": "licence", "private": "hub_private"}


@dataclass
class Args:
    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RUN")] = None  # the run's folder
    hub_repo_id: str | None = None  # where to: user/name
    hub_private: bool = True  # make the repository private, if it is new
    licence: str | None = None  # by its name on the Hub: apache-2.0, mit, ... (default: the base model's)
    add: tuple[str, ...] = ()  # further files and folders: one of tools/export.py, say


def main() -> None:
    args = parse_args(Args, ALIASES)
    if args.run is None:
        raise UserError("no run: name one, as in: python tools/push.py runs/x --hub_repo_id user/name")
    run = Path(args.run)
    if not (run / "best" / "config.json").is_file():
        raise UserError(f"{run}: no best/config.json: not the folder of a run, or it has not saved weights yet")
    if missing := [path for path in args.add if not Path(path).exists()]:
        raise UserError(f"--add {missing[0]}: no such file or folder")
    check_push(True, args.hub_repo_id)
    quiet_libraries()
    further = [Path(path) for path in args.add]
    print(f"Pushed to {push_run(run, args.hub_repo_id, args.hub_private, args.licence, further)}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
