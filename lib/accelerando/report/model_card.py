"""The model card beside saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerando.base.config import to_yaml
from accelerando.train.run import repeat_command
from accelerando.train.state import Run


def write_model_card(
    folder: Path,
    run: Run,
    task: str,
    base_model: str | None,
    usage: str,
    data: str,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes ``README.md`` with the Hub's metadata: task, base model and its licence, metrics, usage, training command.

    ``task`` is the Hub's pipeline tag, ``data`` a short name of the data set; the metrics are those of the last
    evaluation, if there was one, or those given.
    """
    name, metrics = run.directory.name, run.state.metrics if metrics is None else dict(metrics)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": ["accelerando"]}
    # The Hub accepts names on the Hub as a base model, not local folders.
    if base_model and not Path(base_model).exists():
        metadata["base_model"] = base_model
    if base_model and (licence := licence_of(base_model)):
        metadata["license"] = licence
    measured = ""
    if metrics:
        found = _measured(task, data, "validation", run.args.dataset_version, metrics)
        metadata["model-index"] = [{"name": name, "results": [found]}]
        table = "\n".join(f"| {key} | {value} |" for key, value in run.written(metrics))
        measured = f"Validation at step {run.state.step}, {data}:\n\n| metric | value |\n|---|---:|\n{table}\n\n"
    card = f"""{_front_matter(metadata)}
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


def card_with_results(card: str, results: Mapping[str, Any], licence: str | None = None) -> str:
    """A card of :func:`write_model_card` with the test metrics of ``results.json``, and with another licence."""
    metadata, text = read_front_matter(card)
    if licence:
        metadata["license"] = licence
    test = {name: value for name, value in results.get("test", {}).items() if isinstance(value, float)}
    index = metadata.get("model-index")
    if test and index:
        first = index[0]["results"][0]
        about = first["dataset"]
        task, revision = first["task"]["type"], about.get("revision")
        index[0]["results"].append(_measured(task, about["name"], "test", revision, test))
        table = "\n".join(f"| {name} | {value:.4f} |" for name, value in test.items())
        count = f"{results['test'].get('count', 0):,} samples"
        shown = f"Test, {count} of {about['name']}:\n\n| metric | value |\n|---|---:|\n{table}\n\n"
        text = text.replace("## Use\n", f"{shown}## Use\n", 1)
    return f"{_front_matter(metadata)}{text}" if metadata else card


def _measured(task: str, data: str, split: str, revision: str | None, metrics: Mapping[str, float]) -> dict[str, Any]:
    """An entry of the Hub's model-index."""
    dataset = {"name": data, "type": "custom", "split": split, **({"revision": revision} if revision else {})}
    values = [{"type": key, "value": round(value, 6), "name": key} for key, value in metrics.items()]
    return {"task": {"type": task}, "dataset": dataset, "metrics": values}


def licence_of(model: str) -> str | None:
    """The licence that a model's own card states, in its folder or in the cache of the Hub; None if unknown."""
    path: Path | str | None = Path(model) / "README.md"
    if not Path(path).is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            path = try_to_load_from_cache(model, "README.md")
        except ValueError:  # no name of a repository
            return None
    if not isinstance(path, str | Path):
        return None
    licence = read_front_matter(Path(path).read_text(encoding="utf-8", errors="replace"))[0].get("license")
    return licence if isinstance(licence, str) else None


def read_front_matter(card: str) -> tuple[dict[str, Any], str]:
    """The YAML metadata at the start of a card, empty if there is none or it is invalid, and the text after it."""
    import yaml

    parts = card.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}, card
    try:
        metadata = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}, card
    return (metadata, parts[2]) if isinstance(metadata, dict) else ({}, card)


def _front_matter(metadata: Mapping[str, Any]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True).strip()}\n---\n"
