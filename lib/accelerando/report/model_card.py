"""The model card beside saved weights."""

from __future__ import annotations

from pathlib import Path

from accelerando.base.config import to_yaml
from accelerando.train.run import repeat_command
from accelerando.train.state import Run


def write_model_card(
    folder: Path,
    run: Run,
    task: str,
    base_model: str | None,
    usage: str,
) -> None:
    """Writes ``README.md`` with the Hub's metadata: task, base model, metrics, usage and training command.

    ``task`` is the Hub's pipeline tag; the metrics are those of the last evaluation, if there was one.
    """
    import yaml

    name, metrics = run.directory.name, run.state.metrics
    metadata: dict = {"library_name": "transformers", "pipeline_tag": task, "tags": ["accelerando"]}
    # The Hub accepts names on the Hub as a base model, not local folders.
    if base_model and not Path(base_model).exists():
        metadata["base_model"] = base_model
    measured = ""
    if metrics:
        results = [{"type": key, "value": round(value, 6), "name": key} for key, value in metrics.items()]
        dataset = {"name": "validation", "type": "custom"}
        if run.args.dataset_version:
            dataset["revision"] = run.args.dataset_version
        found = {"task": {"type": task}, "dataset": dataset, "metrics": results}
        metadata["model-index"] = [{"name": name, "results": [found]}]
        table = "\n".join(f"| {key} | {value} |" for key, value in run.written(metrics))
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
{repeat_command(run)}
```

```yaml
{to_yaml(run.args).strip()}
```
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
