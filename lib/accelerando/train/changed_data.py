"""Whether a resumed run still has the data that its checkpoint was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from accelerando.base.errors import UserError
from accelerando.base.log import log
from accelerando.base.processes import gather_objects
from accelerando.data.digest import describe

if TYPE_CHECKING:
    from accelerando.train.state import Run

START_AGAIN = "start again with --overwrite or another --run_name"


def check_data(run: Run, splits: Mapping[str, Sized], classes: Mapping[str, Sequence[str]]) -> None:
    """Compares the data with that of the checkpoint which the run continues from, and notes it for the next one.

    ``splits``: the data sets; those without a digest (see :mod:`data.digest`) are compared by their number of samples.
    ``classes``: the class names of each head. Call it on every process.

    Raises:
        UserError: the classes differ; or the data does, and ``allow_changed_data`` is not set.
    """
    now = {}
    if run.accelerator.is_main_process:  # the others would read the same
        then = run.state.data.get("splits", {}) if run.resumed is not None and run.state.data else {}
        described = {split: describe(data, then.get(split)) for split, data in splits.items()}
        now = {"splits": described, "classes": {head: list(names) for head, names in classes.items()}}
    now = gather_objects(run.accelerator, now)[0]
    before, run.state.data = run.state.data, now
    if run.resumed is None:
        return
    path = run.resumed.path
    if not before:
        log.info("%s does not say which data it was made with: only the number of samples is compared", path)
        count = run.state.epoch_size or len(splits["train"])
        before = {"splits": {"train": {"count": count}}, "classes": {}}
    for head, names in before["classes"].items():
        if names != now["classes"].get(head, names):
            difference = _difference(names, now["classes"][head])
            raise UserError(f"{path} was made with other classes ({difference}): put them back, or {START_AGAIN}")
    changes = changed_splits(before["splits"], now["splits"])
    if changes and not run.args.allow_changed_data:
        raise UserError(
            f"{path} was made with other data: {'; '.join(changes.values())}: put it back, {START_AGAIN}, "
            "or continue anyway with --allow_changed_data"
        )
    for change in changes.values():
        log.warning("Resumed with other data: %s", change)
    # Results on data that has changed are not compared with later ones.
    run.history = [row for row in run.history if row.get("split") not in changes]


def changed_splits(before: Mapping[str, dict[str, Any]], now: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """A sentence for each split that differs. A new split, or no test split any more, is no change."""
    changes = {}
    for split, old in before.items():
        if split not in now:
            if split != "test":
                changes[split] = (
                    f"{split} is missing, the checkpoint was made with {old['count']:,} {old.get('unit', 'samples')}"
                )
            continue
        new = now[split]
        if new["count"] != old["count"]:
            changes[split] = (
                f"{split} has {new['count']:,} {new['unit']}, the checkpoint was made with {old['count']:,}"
            )
        elif different := _different_parts(old, new):
            what = " and ".join(different)
            changes[split] = f"{split} has {new['count']:,} {new['unit']} as before, but other {what} or another order"
    return changes


def _different_parts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The parts whose digests differ; none if one of the two has no digests."""
    aside = ("count", "unit", "times", "content")
    parts = [{name: value for name, value in side.items() if name not in aside} for side in (old, new)]
    if not all(parts):
        return []
    if different := [name for name in parts[1] if new[name] != old.get(name)]:
        return different
    # The same names and sizes: it is what is in the files, or nothing.
    return ["content"] if "content" in old and "content" in new and old["content"] != new["content"] else []


def _difference(old: Sequence[str], new: Sequence[str]) -> str:
    """What differs between two lists of class names, in words."""
    parts = []
    for word, names in (("new", set(new) - set(old)), ("gone", set(old) - set(new))):
        if names:
            shown = ", ".join(map(repr, sorted(names)[:5]))
            parts.append(f"{word}: {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""))
    return "; ".join(parts) or "the same in another order"
