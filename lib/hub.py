"""The model card, and uploading a folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib.errors import UserError, first_line

if TYPE_CHECKING:
    from lib.run import Run


def write_model_card(
    folder: Path,
    run: Run,
    task: str,
    base_model: str | None,
    metrics: dict[str, float],
    usage: str,
) -> None:
    """Writes ``README.md`` with the Hub's metadata: task, base model, measured metrics, how to load, how it was made.

    ``task`` is the Hub's pipeline tag; ``metrics`` are those of the validation rows, if any.
    """
    import yaml

    from lib.config import command_line, to_yaml

    name = run.directory.name
    metadata: dict = {"library_name": "transformers", "pipeline_tag": task, "tags": ["accelerando"]}
    # The Hub takes names of its own as a base model, not folders of somebody's disk.
    if base_model and not Path(base_model).exists():
        metadata["base_model"] = base_model
    measured = ""
    if metrics:
        results = [{"type": key, "value": round(value, 6), "name": key} for key, value in metrics.items()]
        metadata["model-index"] = [
            {
                "name": name,
                "results": [
                    {"task": {"type": task}, "dataset": {"name": "validation", "type": "custom"}, "metrics": results}
                ],
            }
        ]
        table = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items())
        measured = f"Validation at step {run.state.step}:\n\n| metric | value |\n|---|---:|\n{table}\n\n"
    card = f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {name}

{measured}## Use

```python
{usage.strip()}
```

## Training

```bash
{command_line()}
```

```yaml
{to_yaml(run.args).strip()}
```
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_push(push_to_hub: bool, repo_id: str | None) -> None:
    """UserError before training when a later upload could not work: no repository named, or nobody logged in."""
    if not push_to_hub:
        return
    if not repo_id or repo_id.count("/") != 1:
        raise UserError(f"--push_to_hub needs --hub_repo_id user/name, not {repo_id!r}")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--push_to_hub: nobody is logged in; run `hf auth login` or set HF_TOKEN")


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads ``folder`` in one commit and returns its address.

    Raises:
        UserError: the Hub cannot be reached or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{folder.parent.name}")
    except Exception as error:  # the Hub client lets through the errors of the libraries below it
        raise UserError(
            f"--push_to_hub {repo_id}: {first_line(error)}; {folder} is complete and can be uploaded later"
        ) from None
    return str(address)
