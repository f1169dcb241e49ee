"""Distillation: a student learns from the outputs, and if asked from the layers, of a trained teacher.

The teacher is in evaluation mode, has no gradients and is no part of the student: it is neither trained nor saved nor
counted, and each process has its own copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.log import log, progress_bar
from accelerando.data.augment import AugmentedTexts
from accelerando.data.collate import TextCollate
from accelerando.data.targets import PROBLEM_TYPES
from accelerando.data.taught import TaughtRows
from accelerando.data.tokenizer import open_tokenizer
from accelerando.data.tokens import TokenTable, tokenize_table
from accelerando.data.transforms import normalise
from accelerando.models.pretrained import (
    colour_statistics,
    match_tokenizer,
    most_tokens,
    open_classifier,
    open_config,
    open_model,
    own_image_size,
    pads_left,
)
from accelerando.train.batches import evaluation_batches, gather_rows
from accelerando.train.features import cached_features, weights_digest

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from accelerando.data.tables import ProblemType, TextTable

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


# -------------------------------------------------------------------------------------------------------------- losses


def distilled(
    losses: torch.Tensor,
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    alpha: float,
    temperature: float,
    problem_type: ProblemType = "single_label",
    labelled: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1 - alpha) times the student's own ``losses`` plus alpha times :func:`distillation_losses`, [B].

    ``labelled`` float [B]: 0 for a row without a label, which has no loss of its own.
    """
    own = losses if labelled is None else losses * labelled
    return (1 - alpha) * own + alpha * distillation_losses(logits, teacher_logits, temperature, problem_type)


def distillation_losses(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, problem_type: ProblemType = "single_label"
) -> torch.Tensor:
    """How far the student's ``logits`` [B, C] are from the teacher's, [B]; 0 where they agree.

    Of one label a row T^2 KL(softmax(teacher / T) || softmax(student / T)), where T^2 keeps the size of the gradients
    (Hinton et al. 2015, arXiv:1503.02531); of several labels the mean of this for each label's sigmoid; of numbers the
    mean squared difference.
    """
    import torch

    functional = torch.nn.functional
    teacher_logits = teacher_logits.to(logits)
    if problem_type == "regression":
        return functional.mse_loss(logits, teacher_logits, reduction="none").mean(dim=1)
    student, teacher = logits / temperature, teacher_logits / temperature
    if problem_type == "multi_label":
        share = teacher.sigmoid()
        binary = functional.binary_cross_entropy_with_logits
        apart = binary(student, share, reduction="none") - binary(teacher, share, reduction="none")
        return temperature**2 * apart.mean(dim=1)
    goal = teacher.log_softmax(dim=1)
    return temperature**2 * (goal.exp() * (goal - student.log_softmax(dim=1))).sum(dim=1)


def hidden_distances(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """How far the student's embeddings and layers are from the teacher's, [B], from 0 up, the mean over both.

    ``student`` and ``teacher``: the embeddings' output and that of each layer, [B, T, width]; ``mask`` [B, T] is 1 at
    tokens. A student's layer is compared with the teacher's at the same share of its depth (Jiao et al. 2019,
    arXiv:1909.10351). Where the widths are equal, the distance is 1 - cosine of each token (Sanh et al. 2019,
    arXiv:1910.01108). Otherwise the cosines between all pairs of a text's tokens are compared, as their mean squared
    difference (Tung and Mori 2019, arXiv:1907.09682): they have no width, so no projection has to be learned.

    ``student`` may have the batch twice, [2B, ...] (R-Drop): the mean of both counts.
    """
    import torch

    depth, goal_depth = len(student) - 1, len(teacher) - 1
    real = mask.to(torch.float32)
    copies = len(student[0]) // len(real)
    of_layers = []
    for number, own in enumerate(student):
        goal = teacher[round(number * goal_depth / max(1, depth))].float().repeat(copies, 1, 1)
        weight, own = real.repeat(copies, 1), own.float()
        if own.shape[-1] == goal.shape[-1]:
            apart = 1 - torch.nn.functional.cosine_similarity(own, goal, dim=-1)
        else:
            weight = weight[:, :, None] * weight[:, None, :]
            apart = (_cosines(own) - _cosines(goal)) ** 2
        apart, weight = apart.flatten(1), weight.flatten(1)
        of_layers.append((apart * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))
    return torch.stack(of_layers).mean(dim=0).view(copies, -1).mean(dim=0)


def _cosines(hidden: torch.Tensor) -> torch.Tensor:
    """The cosine between each pair of tokens, [B, T, T]."""
    import torch

    unit = torch.nn.functional.normalize(hidden, dim=-1)
    return unit @ unit.transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------- teacher


class Lesson(NamedTuple):
    """What a teacher made of a batch: ``logits`` float32 [B, C] in the student's order of the classes, and the output
    of its embeddings and of each layer, if it was asked for them."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()


@dataclass
class Teacher:
    """A trained classifier of texts or images whose classes are the student's, if perhaps in another order.

    ``order`` [C]: the place of each of the student's classes among its own. As data of a run (it has a length and a
    digest) it is compared when the run is resumed.
    """

    folder: Path
    model: PreTrainedModel
    order: list[int]
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase | None = None
    colours: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())  # images: mean and standard deviation
    side: int = 0  # images: in pixels
    hidden: bool = False  # texts: its layers are asked for too
    unit: str = field(default="classes", init=False)

    def __post_init__(self) -> None:
        self.model = self.model.eval().requires_grad_(False).to(self.accelerator.device)
        self._digest = weights_digest(self.model)
        log.info("Teacher %s: %s parameters", self.folder, f"{sum(each.numel() for each in self.model.parameters()):,}")

    def __len__(self) -> int:
        return len(self.order)

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: resuming with another teacher is refused."""
        return {"weights": self._digest}

    def of_texts(self, batch: Mapping[str, torch.Tensor]) -> Lesson:
        """The teacher's lesson of a batch [B] of tokens: computed earlier (``teacher_logits``), or now, from tokens of
        its own (``teacher_input_ids``) where it has another tokenizer than the student."""
        if "teacher_logits" in batch:
            return Lesson(batch["teacher_logits"])
        start = "teacher_" if "teacher_input_ids" in batch else ""
        inputs = {name: batch[start + name] for name in INPUTS if start + name in batch}
        return self._lesson(inputs, **({"output_hidden_states": True} if self.hidden else {}))

    def of_images(self, pixels: torch.Tensor) -> Lesson:
        """The lesson of uint8 images [B, 3, S, S], resized to the teacher's side if that is another one.

        The student's own augmented images: a teacher that sees others teaches less (Beyer et al. 2021,
        arXiv:2106.05237).
        """
        import torch

        if pixels.shape[-1] != self.side:
            sides = (self.side, self.side)
            resized = torch.nn.functional.interpolate(pixels.float(), sides, mode="bilinear", antialias=True)
            pixels = resized.round_().clamp_(0, 255).to(torch.uint8)
        return self._lesson({"pixel_values": normalise(pixels.contiguous(), *self.colours)})

    def _lesson(self, inputs: Mapping[str, torch.Tensor], **options: bool) -> Lesson:
        import torch

        with torch.no_grad(), self.accelerator.autocast():
            output = self.model(**inputs, **options)
        return Lesson(output.logits.float()[:, self.order], tuple(output.hidden_states or ()) if options else ())


def teacher_folder(name: str) -> Path:
    """The folder with the weights: ``name``, or ``best/`` of the run ``name``.

    Raises:
        UserError: there is no model.
    """
    folder = Path(name)
    for path in (folder, folder / "best"):
        if (path / "config.json").is_file():
            return path
    reason = "no model in it (config.json), nor in best/" if folder.is_dir() else "no such folder"
    raise UserError(f"--teacher {name}: {reason}; name a finished run or the folder of a classifier")


def class_order(
    config: PreTrainedConfig, names: Sequence[str], folder: Path, problem_type: ProblemType = "single_label"
) -> list[int]:
    """The place of each of ``names`` among the classes of a teacher.

    Raises:
        UserError: it has other classes, or answers another kind of question.
    """
    kind = {"single_label_classification": None}.get(config.problem_type, config.problem_type)
    wanted = PROBLEM_TYPES[problem_type]
    number = wanted == "regression" and config.num_labels == len(names) == 1
    if kind != wanted and not (number and kind is None):
        raise UserError(
            f"--teacher {folder}: it was trained for {kind or 'one label a row'}, but these are {problem_type} targets"
        )
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if number:
        return [0]
    if sorted(own) != sorted(names) or len({*own}) < len(own):
        lacking, other = sorted({*names} - {*own}), sorted({*own} - {*names})
        parts = [f"{word} {', '.join(map(repr, found[:3]))}{' ...' * (len(found) > 3)}"
                 for word, found in (("it lacks", lacking), ("it has", other)) if found]  # fmt: skip
        raise UserError(
            f"--teacher {folder}: other classes than the data: {' and '.join(parts) or 'a name stands twice'}; "
            "id2label in its config.json names them"
        )
    return [own.index(name) for name in names]


def open_image_teacher(
    name: str, names: Sequence[str], accelerator: Accelerator, trust_remote_code: bool = False
) -> Teacher:
    """The teacher of an image classifier, with its own normalisation and size of images.

    Raises:
        UserError: there is none, it has other classes, or its weights are not whole.
    """
    import torch

    folder = teacher_folder(name)
    order = class_order(open_config(str(folder), trust_remote_code), names, folder)
    with torch.random.fork_rng(devices=[]):
        model = open_classifier(str(folder), trust_remote_code, new_head=False)
    colours = colour_statistics(str(folder), "", trust_remote_code)
    side = own_image_size(str(folder), "", trust_remote_code)
    return Teacher(folder, model, order, accelerator, colours=colours, side=side)


def open_text_teacher(
    name: str,
    names: Sequence[str],
    accelerator: Accelerator,
    problem_type: ProblemType = "single_label",
    hidden: bool = False,
    trust_remote_code: bool = False,
) -> Teacher:
    """The teacher of a text classifier, with its own tokenizer. ``hidden``: its layers are asked for too.

    Raises:
        UserError: there is none, it has other classes, or its weights are not whole.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = teacher_folder(name)
    config = open_config(str(folder), trust_remote_code)
    order = class_order(config, names, folder, problem_type)
    tokenizer = open_tokenizer(str(folder), trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        model = open_model(
            AutoModelForSequenceClassification, str(folder), config, new_head=False,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        match_tokenizer(model, tokenizer, str(folder))
    return Teacher(folder, model, order, accelerator, tokenizer, hidden=hidden)


# --------------------------------------------------------------------------------------------------------------- texts


def taught_rows(
    rows: TokenTable | AugmentedTexts,
    table: TextTable,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
    cache: Path,
) -> TaughtRows:
    """The training rows with what the teacher says of each, computed once and kept in the folder ``cache``.

    Where that is not enough (the texts change while training, or the teacher's layers are compared) the teacher runs on
    each batch, and a row has the teacher's own tokens if its tokenizer is another than ``tokenizer``, the student's.
    ``table``: the texts of ``rows``. Call it on every process.

    Raises:
        UserError: the layers are to be compared, but the tokens differ; or the cache cannot be written to.
    """
    limit = min(max_length, most_tokens(teacher.model) or max_length)
    same = limit == max_length and same_tokens(tokenizer, teacher.tokenizer)
    live = teacher.hidden or isinstance(rows, AugmentedTexts)
    if teacher.hidden and not same:
        raise UserError(
            "--match_hidden compares token by token, but the teacher has another tokenizer or a smaller length: "
            f"--tokenizer_name {teacher.folder}"
        )
    if live and same:
        return TaughtRows(rows)
    tokens = tokenize_table(table, teacher.tokenizer, limit, cache=cache)
    if live:
        return TaughtRows(rows, tokens=tokens, tokenizer=teacher.tokenizer, max_length=limit)
    return TaughtRows(rows, logits=_cached_logits(teacher, tokens, batch_size, cache))


def teacher_collate(teacher: Teacher) -> TextCollate:
    """What makes batches of the teacher's own tokens."""
    return TextCollate(teacher.tokenizer.pad_token_id or 0, left=pads_left(teacher.model.config))


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True if two tokenizers make the same tokens of every text, and pad with the same one."""
    import json

    def rules(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return repr(tokenizer), tokenizer.pad_token_id, tokenizer.padding_side
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None  # settings of the last call
        return content, tokenizer.pad_token_id, tokenizer.padding_side

    return rules(one) == rules(other)


def _cached_logits(teacher: Teacher, tokens: TokenTable, batch_size: int, cache: Path) -> np.ndarray:
    """The teacher's logits of each row in the student's order of the classes, float32 [n, C]."""
    settings = teacher.model.config.to_dict()
    aside = ("transformers_version", "id2label", "label2id")
    key = {
        "teacher": teacher.digest()["weights"],
        "settings": {k: str(v) for k, v in settings.items() if not k.startswith("_") and k not in aside},
        "tokens": tokens.digest()["texts or tokens"],
        "padding": teacher.tokenizer.pad_token_id,
    }

    def compute() -> np.ndarray:
        accelerator = teacher.accelerator
        batches = evaluation_batches(
            tokens, teacher_collate(teacher), batch_size, lengths=tokens.lengths,
            num_processes=accelerator.num_processes, process_index=accelerator.process_index, device=accelerator.device,
        )  # fmt: skip
        return _logits_of(teacher, batches, len(tokens))

    logits = cached_features(teacher.accelerator, cache, key, compute, "The teacher's logits")[:, teacher.order]
    teacher.model.cpu()  # it is not needed any more
    return logits


def _logits_of(teacher: Teacher, batches: object, count: int) -> np.ndarray:
    import torch

    columns: dict[str, list[torch.Tensor]] = {"index": [], "weight": [], "logits": []}
    with progress_bar(count, 0, " rows", "teacher") as bar, torch.no_grad():
        for batch in batches:
            logits = teacher.model(**{name: batch[name] for name in INPUTS if name in batch}).logits.float()
            for name, values in (("index", batch["index"]), ("weight", batch["weight"]), ("logits", logits)):
                columns[name].append(values)
            bar.update(len(logits) * teacher.accelerator.num_processes)
    gathered = gather_rows(teacher.accelerator, count, {name: torch.cat(parts) for name, parts in columns.items()})
    return gathered["logits"].astype(np.float32)
