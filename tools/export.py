"""Export a trained model for deployment, compare it with the original on validation data, and time it.

  python tools/export.py runs/x                                   ONNX, into runs/x/export
  python tools/export.py runs/x --export_format onnx torchscript pt2 --benchmark
  python tools/export.py runs/x --precision float32 int8 --output_dir deploy/x
  python tools/export.py --model_path runs/x/last --samples 0     without its data

The folder has everything that a program needs: preprocessing is part of the
graph where it can be (colours, normalisation of keypoints), tokenizer and
class names lie beside it, and usage.py shows in a few lines how to run it
with numpy and ONNX Runtime alone. tools/predict.py takes the folder, too.

Each file's outputs are compared with the model's own for samples of the run's
validation data. The exit code is 1 if float32 differs by more than
--tolerance, or another precision gives fewer equal predictions than
--agreement.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from accelerando.base.config import Alias, check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import check_can_be_made, whole_folder, write_text
from accelerando.base.log import quiet_libraries
from accelerando.base.model_folder import read_json
from accelerando.inference.named import kind_of
from accelerando.inference.outputs import aligned_rows, printable
from accelerando.inference.packages import PRECISIONS, Formats, Precisions, check_available, check_precisions
from accelerando.inference.runs import model_folder, read_results, read_settings, run_of
from accelerando.inference.scripts import SCRIPT_OF, import_script, settings_of_run
from accelerando.train.trackers import KEEP_FILES
from accelerando.train.tracking import add_to_trackers

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import torch

    from accelerando.inference.exported import Equals, Parity, Runner
    from accelerando.inference.formats import Graph

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
USAGE = Path(__file__).resolve().parent / "usage"  # an example for each task of how a program runs it
TOKENS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}  # of tokenizers
CROPPED = 'ImageOps.fit(image, facts["size"], facts["resample"], facts["margin"])'
SQUEEZED = 'image.resize(facts["size"], facts["resample"])'
BEST_LABEL = r'print(facts["labels"][logits.argmax()], {input}, sep="\t")'
ANSWERS = {  # of models that do not give a single class
    "multi_label_classification": 'print(*[name for name, logit, least in zip(facts["labels"], logits, '
    r'facts["thresholds"]) if 1 / (1 + np.exp(-logit)) >= least], {input}, sep="\t")',
    "regression": r'print(*logits.tolist(), {input}, sep="\t")',
}
# Beside the graph: what a program needs to prepare its inputs, and what predict.py reads.
BESIDE = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
ALIASES: dict[str, Alias] = {"format": "export_format", "import": "import_module"}


@dataclass
class Args:
    # -- what is exported --
    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None  # run, its best/ or last/
    model_path: str | None = None  # the same, as a flag
    script: str | None = None  # the script that trained it, if it is a copy of one of scripts/
    import_module: str | None = None  # module of yours that defines the model's class, as --import my_module
    # -- formats --
    export_format: Formats = ("onnx",)  # one or several; pt2 is torch.export
    precision: Precisions = ("float32",)  # of the weights, in the formats that hold it
    opset: int = 20  # version of ONNX's operators
    # -- comparison --
    samples: int = 64  # of the validation data, to compare on and to calibrate int8_static with; 0: made inputs
    tolerance: float = 1e-4  # largest difference of an output in float32
    agreement: float = 0.99  # share of predictions that other precisions must leave as they were
    # -- benchmark --
    benchmark: bool = False  # time all files and PyTorch in turn
    batch_sizes: tuple[int, ...] = (1, 8, 32)  # that are timed
    seconds: float = 2.0  # for each file and batch size
    num_threads: int = 0  # of the CPU (0: all)
    # -- output --
    output_dir: str | None = None  # default: export in the run's folder
    overwrite: bool = False  # replace an earlier export there
    track: bool = False  # add the files to the run's record in mlflow, wandb, trackio, comet_ml or clearml
    config: tuple[str, ...] = ()  # YAML files with any of these settings


@dataclass
class Exportable:
    """What a task exports: its graphs, and facts for the program that runs them."""

    graphs: list[Graph]
    facts: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- data of the run


@dataclass
class RunData:
    """The script that trained a run, its arguments and its data; a split of it for samples."""

    script: ModuleType
    args: Any
    data: Any
    split: str


def data_of_run(run: Path | None, script: str | None, task: str, wanted: int) -> RunData | None:
    """The data of ``run`` as its script loads them; None: none are ``wanted``.

    Raises:
        UserError: the model belongs to no run, or the data cannot be read where they were.
    """
    if not wanted:
        return None
    if run is None:
        raise UserError("the model belongs to no run, whose data it could be compared on: add --samples 0")
    from accelerate import Accelerator

    module = import_script(Path(script) if script else SCRIPTS / SCRIPT_OF[task])
    args = settings_of_run(module, run)
    try:
        data = module.load_data(args, Accelerator(cpu=True))
    except UserError as error:
        raise UserError(f"{error}; these are the data of {run}: --samples 0 exports without them") from None
    split = next(name for name in ("validation", "test", "train") if name in data.splits)
    return RunData(module, args, data, split)


def spread(total: int, count: int) -> list[int]:
    """``count`` of the rows 0 to ``total``, at even distances, or all of them."""
    count = min(total, count)
    return [row * total // count for row in range(count)]


def batched(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """``rows`` in pieces of ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ------------------------------------------------------------------------------------------------------- text, signs


def text(folder: Path, found: RunData | None, args: Args, module: ModuleType | None) -> Exportable:
    """Token ids in, a logit for each class out."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from accelerando.data.collate import TextCollate
    from accelerando.data.tokenizer import open_tokenizer
    from accelerando.inference.formats import Graph
    from accelerando.inference.graphs import Logits
    from accelerando.inference.saved import open_saved
    from accelerando.models.pretrained import most_tokens, pads_left
    from accelerando.models.text_windows import kept_windows

    model = open_saved(AutoModelForSequenceClassification, folder, module)
    tokenizer = open_tokenizer(str(folder), local_files_only=True)
    longest = found.args.max_length if found else min(most_tokens(model) or 512, 512)
    windows, pooling = kept_windows(read_json(folder / "config.json"))
    longest = windows.size if windows else longest
    collate = TextCollate(tokenizer.pad_token_id or 0, left=pads_left(model.config), window=windows and windows.size)
    if windows:
        how = f"take the {pooling} of the logits of windows that begin every {windows.stride} tokens"
        print(f"note: the graph reads {longest} tokens, and usage.py the first ones of a text; for longer texts {how}, "
              "as tools/predict.py does", file=sys.stderr)  # fmt: skip
    if found:
        table = found.data.splits[found.split]
        rows = [table[row] for row in spread(len(table), args.samples)]
    else:
        made = torch.Generator().manual_seed(0)
        lengths = torch.randint(4, min(longest, 24), (8,), generator=made).tolist()
        rows = [{"input_ids": torch.randint(len(tokenizer), (size,), generator=made).numpy()} for size in lengths]
    names = ("input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in rows[0] else []))
    batches = [{name: collate(part)[name] for name in names} for part in batched(rows, 8)]
    axes = {name: {0: "batch", 1: "length"} for name in names}
    graph = Graph("model", Logits(model), twice(batches[0]), axes, ("logits",), most={"length": longest})
    compare_with(graph, batches, batches, lambda batch: model(**batch).logits)
    facts = answer_facts(graph, model.config, folder) | {
        "max_length": longest,
        "padding": {"pad_id": collate.pad_token_id, "direction": "left" if collate.left else "right"},
        "tokens": {name: TOKENS[name] for name in names},
    }  # fmt: skip
    return Exportable([graph], facts)


def answer_facts(graph: Graph, config: Any, folder: Path) -> dict[str, Any]:
    """What a program needs to read the logits of ``graph``, which is told when two rows of them say the same."""
    from accelerando.inference.saved import label_thresholds

    labels = labels_of(config)
    thresholds = label_thresholds(read_json(folder / "config.json"), labels)
    graph.equals = equals_of(config.problem_type, thresholds)
    facts = {"labels": labels, "problem_type": config.problem_type}
    if config.problem_type == "multi_label_classification":
        facts["thresholds"] = [0.5] * len(labels) if thresholds is None else thresholds.tolist()
    return facts


def equals_of(problem_type: str | None, thresholds: np.ndarray | None) -> Equals | None:
    """When rows of logits predict the same: the same labels, or numbers that differ by a hundredth at most.

    None: the same best class.
    """
    import numpy as np

    from accelerando.report.target_metrics import chosen_labels

    if problem_type == "multi_label_classification":
        return lambda ours, right: (chosen_labels(ours, thresholds) == chosen_labels(right, thresholds)).all(axis=1)
    if problem_type == "regression":
        return lambda ours, right: np.isclose(ours, right, rtol=0.01, atol=0.01).all(axis=1)
    return None


def sign(folder: Path, found: RunData | None, args: Args, module: ModuleType | None) -> Exportable:
    """Frames of clips in, logits of glosses and categories out; keypoints are normalised in the graph."""
    import torch
    from transformers import AutoModel

    import accelerando.models.sign
    from accelerando.data.collate import ClipCollate
    from accelerando.data.sign_clips import normalise, read_clip
    from accelerando.data.sign_labels import read_labels
    from accelerando.inference.formats import Graph
    from accelerando.inference.graphs import sign_graph
    from accelerando.inference.saved import open_saved

    model = open_saved(AutoModel, folder)
    config, collate = model.config, ClipCollate()
    made = torch.Generator().manual_seed(0)
    if found and not found.args.smoke_test:
        places = found.script.folders(found.args)
        where, csv = places.get(found.split, places["train"])
        files = read_labels(csv).files
        clips = [
            read_clip(where / f"{files[row]}.npz", config.input_key, config.input_width)
            for row in spread(len(files), args.samples)
        ]
    else:
        lengths = torch.randint(2, 12, (8,), generator=made).tolist()
        clips = [(torch.rand(size, config.input_width, generator=made).numpy(), None) for size in lengths]
    masked = all(mask is not None for _, mask in clips)
    samples = [{"frames": frames, "gloss": 0, "cat": 0} | ({"mask": mask} if masked else {}) for frames, mask in clips]
    prepared = []
    for frames, mask in clips:
        frames, mask = normalise(frames, mask if masked else None, config.normalisation)
        prepared.append({"frames": frames, "gloss": 0, "cat": 0} | ({} if mask is None else {"mask": mask}))
    names = ("frames", "attention_mask", *(["mask"] if masked else []))
    batches = [{name: collate(part)[name] for name in names} for part in batched(samples, 8)]
    inputs = [
        {name: value for name, value in collate(part).items() if name in ("frames", "attention_mask", "mask")}
        for part in batched(prepared, 8)
    ]
    axes = {name: {0: "batch", 1: "frames"} for name in names}
    gru = isinstance(model, accelerando.models.sign.SignGru)
    graph = Graph("model", sign_graph(model, "torch"), twice(batches[0]), axes, ("gloss", "category"))
    if gru:
        graph.variants = {kind: sign_graph(model, kind) for kind in ("onnx", "pt2")}

    def logits(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        output = model(**batch)
        return output.gloss_logits, output.cat_logits

    compare_with(graph, batches, inputs, logits)
    facts = {"labels": config.gloss_names, "categories": config.cat_names, "key": config.input_key,
             "more": ["mask"] if masked else []}  # fmt: skip
    return Exportable([graph], facts)


# ------------------------------------------------------------------------------------------------------------- images


def image(folder: Path, found: RunData | None, args: Args, module: ModuleType | None) -> Exportable:
    """Pixels 0 to 255 in, a logit for each class out."""
    from transformers import AutoModelForImageClassification

    from accelerando.inference.formats import Graph
    from accelerando.inference.graphs import PixelLogits
    from accelerando.inference.saved import open_saved

    model = open_saved(AutoModelForImageClassification, folder, module)
    transform, colours, facts = preprocessing_of(folder)
    if found:
        dataset = found.script.EvaluationImages(found.data.splits[found.split], transform.size)
        rows = (dataset[row] for row in spread(len(dataset), args.samples))
        pixels = [sample["pixel_values"] for sample in rows if sample["valid"]]
    else:
        pixels = made_images(8, transform.size)
    batches = [{"pixels": stacked(part)} for part in batched(pixels, 8)]
    graph = Graph("model", PixelLogits(model, *colours), twice(batches[0]), {"pixels": {0: "batch"}}, ("logits",))
    compare_with(graph, batches, batches, lambda batch: model(pixel_values=normalised(batch["pixels"], colours)).logits)
    return Exportable([graph], answer_facts(graph, model.config, folder) | facts)


def har(folder: Path, found: RunData | None, args: Args, module: ModuleType | None) -> Exportable:
    """Frames of images and videos, 0 to 255, in; a logit for each class out. The prompts' embeddings are constants."""
    import torch
    from transformers import AutoModelForImageClassification

    from accelerando.inference.formats import Graph
    from accelerando.inference.graphs import FrameLogits
    from accelerando.inference.saved import open_saved

    model = open_saved(AutoModelForImageClassification, folder)
    transform, colours, facts = preprocessing_of(folder)
    if found:
        media, classes = found.data.splits[found.split], found.data.classes[found.split]
        dataset = found.script.EvaluationMedia(media, classes, transform, found.args.frames)
        rows = (dataset[row] for row in spread(len(dataset), args.samples))
        clips = [sample["pixel_values"] for sample in rows if sample["valid"]]
    else:
        clips = [torch.stack(made_images(frames, transform.size)) for frames in (1, 1, 3, 8)]
    batches = [{"pixels": clip[None].contiguous()} for clip in clips]
    example = {"pixels": stacked([stacked(made_images(2, transform.size))] * 2)}
    axes = {"pixels": {0: "batch", 1: "frames"}}
    graph = Graph("model", FrameLogits(model, *colours), example, axes, ("logits",), most={"frames": 32})

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        frames = batch["pixels"][0]
        return model(pixel_values=normalised(frames, colours), frames=torch.tensor([len(frames)])).logits

    compare_with(graph, batches, batches, logits)
    return Exportable([graph], {"labels": labels_of(model.config), **facts})


def clip(folder: Path, found: RunData | None, args: Args, module: ModuleType | None) -> Exportable:
    """Two graphs: pixels 0 to 255, or token ids, in; embeddings of unit length out."""
    import torch

    from accelerando.inference.formats import Graph
    from accelerando.inference.graphs import ImageEmbedding, TextEmbedding
    from accelerando.models.clip import open_clip_model, open_preprocessing

    model = open_clip_model(str(folder)).eval()
    preprocessing = open_preprocessing(str(folder), None)
    transform, colours, facts = preprocessing_of(folder)
    if found:
        from accelerando.data.collate import PairCollate
        from accelerando.data.pairs import PairDataset

        pairs = PairDataset(found.data.splits[found.split], transform)
        rows = [pairs.at(row, 0) for row in spread(len(pairs), args.samples)]
        rows = [sample for sample in rows if sample["valid"]]
        collate = PairCollate(preprocessing.tokenizer, preprocessing.max_length, full_length=preprocessing.full_length)
        batches = [collate(part) for part in batched(rows, 8)]
    else:
        tokens = preprocessing.tokenizer(
            ["a", "a photo", "a photo of a dog and a cat"], truncation=True, max_length=preprocessing.max_length,
            padding="max_length" if preprocessing.full_length else True, return_tensors="pt",
        )  # fmt: skip
        batches = [{"pixel_values": stacked(made_images(3, transform.size)), **tokens}]
    names = ("input_ids", *([] if preprocessing.full_length else ["attention_mask"]))
    images = [{"pixels": batch["pixel_values"]} for batch in batches]
    texts = [{name: batch[name] for name in names} for batch in batches]
    image_graph = Graph(
        "image", ImageEmbedding(model, *colours), twice(images[0]), {"pixels": {0: "batch"}}, ("embedding",),
        classifies=False,
    )  # fmt: skip
    lengths = {0: "batch"} if preprocessing.full_length else {0: "batch", 1: "length"}
    text_graph = Graph(
        "text", TextEmbedding(model), twice(texts[0]), dict.fromkeys(names, lengths), ("embedding",),
        classifies=False, most={"length": preprocessing.max_length},
    )  # fmt: skip

    def unit(output: Any) -> torch.Tensor:
        return torch.nn.functional.normalize(output.pooler_output.float(), dim=-1)

    compare_with(
        image_graph, images, images,
        lambda batch: unit(model.get_image_features(pixel_values=normalised(batch["pixels"], colours))),
    )  # fmt: skip
    compare_with(text_graph, texts, texts, lambda batch: unit(model.get_text_features(**batch)))
    scale = model.logit_scale.exp().item()
    padding = {"pad_id": preprocessing.tokenizer.pad_token_id or 0}
    if preprocessing.full_length:
        padding["length"] = preprocessing.max_length
    if (bias := logit_bias(folder, model)) is not None:
        facts["bias"] = bias
    facts |= {"scale": scale, "max_length": preprocessing.max_length, "padding": padding,
              "tokens": {name: TOKENS[name] for name in names}}  # fmt: skip
    return Exportable([image_graph, text_graph], facts)


def logit_bias(folder: Path, model: torch.nn.Module) -> float | None:
    """SigLIP's bias of the logits: the model's own, or that of the training's loss beside it; None: it has none."""
    from safetensors.torch import load_file

    beside = folder / "model_training_only.safetensors"
    values = load_file(beside).get("logit_bias") if beside.is_file() else getattr(model, "logit_bias", None)
    return None if values is None else float(values)


def preprocessing_of(folder: Path) -> tuple[Any, tuple[tuple[float, ...], tuple[float, ...]], dict[str, Any]]:
    """What turns an image file into pixels, mean and standard deviation of the colours, and both as facts."""
    from accelerando.data.transforms import ImageTransform
    from accelerando.models.processors import described, input_colours, open_processor, resizing_of

    processor = open_processor(str(folder), backend="pil")
    if processor is None:
        raise UserError(f"{folder}: no preprocessor_config.json beside the model; copy it from the base model")
    colours = input_colours(processor)
    if colours.blue_first:
        raise UserError(f"{described(processor)} gives blue before red, which is not supported")
    size, shorter, square, mode = resizing_of(processor)
    facts = {
        "size": [size, size], "resample": {"bilinear": 2, "bicubic": 3}[mode],
        "margin": None if square else (1 - size / shorter) / 2,  # cut off on each of the shorter sides; None: squeezed
    }  # fmt: skip
    return ImageTransform(size, square=square, shorter=shorter, mode=mode), colours[:2], facts


def made_images(count: int, size: int) -> list[torch.Tensor]:
    """Random pixels, uint8 [3, S, S] each."""
    import torch

    made = torch.Generator().manual_seed(0)
    return list(torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=made))


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images as one contiguous tensor [N, 3, S, S]."""
    import torch

    return torch.stack(list(images)).contiguous()


def normalised(pixels: torch.Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    """Pixels as training and evaluation normalise them."""
    from accelerando.data.transforms import normalise

    return normalise(pixels, *colours)


def labels_of(config: Any) -> list[str]:
    """The names of the classes in their order."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def twice(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first two rows of a batch, or its only one twice: torch takes an axis of length 1 for a fixed one."""
    return {name: (value if len(value) > 1 else value.repeat_interleave(2, 0))[:2] for name, value in batch.items()}


def compare_with(
    graph: Graph,
    batches: list[dict[str, torch.Tensor]],
    inputs: list[dict[str, torch.Tensor]],
    outputs: Callable[[dict[str, torch.Tensor]], torch.Tensor | tuple[torch.Tensor, ...]],
) -> None:
    """Gives ``graph`` its samples: ``batches`` of its inputs, and what the model itself makes of ``inputs``."""
    import torch

    with torch.inference_mode():
        for batch, own in zip(batches, inputs, strict=True):
            found = outputs(own)
            found = found if isinstance(found, tuple) else (found,)
            graph.samples.append({name: value.numpy() for name, value in batch.items()})
            graph.expected.append(tuple(each.float().numpy() for each in found))


# --------------------------------------------------------------------------------------------------- writing, timing


@dataclass
class Written:
    """A file that was written: what it holds, how far it is from the model, and how to run it."""

    graph: Graph
    kind: str
    precision: str
    path: Path
    parity: Parity
    run: Runner
    left: list[str] = field(default_factory=list)  # layers that int8 left in float

    def size(self) -> int:
        """Bytes, with those of the files that belong to it."""
        beside = (self.path, self.path.with_suffix(".bin"), self.path.with_name(f"{self.path.name}.data"))
        return sum(path.stat().st_size for path in beside if path.is_file())

    def faults(self, args: Args) -> str | None:
        """What is out of tolerance; None: nothing."""
        if self.precision == "float32":
            if not self.parity.largest <= args.tolerance:
                return f"an output differs by {self.parity.largest:.2g}, more than --tolerance {args.tolerance:g}"
        elif self.parity.equal < args.agreement:
            return f"only {self.parity.equal:.1%} of the predictions are equal (--agreement {args.agreement:g})"
        return None


def write_all(exported: Exportable, folder: Path, args: Args) -> list[Written]:
    """Writes each graph in each format and precision, and compares it."""
    from accelerando.inference.exported import parity
    from accelerando.inference.formats import MADE_OF_ONNX, runner, write

    written: list[Written] = []
    for graph in exported.graphs:
        for kind in args.export_format:
            for precision in PRECISIONS[kind]:
                if precision not in args.precision:
                    continue
                show(f"writing {graph.file_name(kind, precision)}")
                source = folder / graph.file_name("onnx", "float32")
                if kind in MADE_OF_ONNX and not source.exists() and (kind, precision) != ("onnx", "float32"):
                    write(graph, "onnx", "float32", folder, args.opset)
                path, left = write(graph, kind, precision, folder, args.opset, args.agreement)
                run = runner(path, kind, args.num_threads)
                found = parity(run, graph.samples, graph.expected, graph.classifies, graph.equals)
                written.append(Written(graph, kind, precision, path, found, run, left))
    kept = {each.path for each in written}
    for path in [path for path in folder.glob("*.onnx") if path not in kept]:  # from which others were made
        for part in folder.glob(f"{path.name}*"):  # large weights stand beside it
            part.unlink()
    return written


def table_of(written: list[Written], made: bool) -> str:
    """Files, sizes and how far each one is from the model, as text."""
    what = "made inputs" if made else "validation samples"
    rows = [("file", "size", "largest difference", "equal predictions")]
    for each in written:
        equal = f"{each.parity.equal:.1%} of {each.parity.count:,}"
        rows.append((each.path.name, f"{each.size() / 1e6:.1f} MB", f"{each.parity.largest:.1e}", equal))
    return f"Compared with the model on {what}:\n\n{aligned_rows(rows)}"


def write_beside(
    folder: Path, source: Path, task: str, exported: Exportable, written: list[Written], args: Args
) -> None:
    """What a program needs beside the graph: tokenizer, settings, class names, and an example of usage."""
    from accelerando.base.processes import command_line

    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if "padding" in exported.facts:  # so that programs need not know how training cut and padded
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(exported.facts["max_length"])
        tokenizer.enable_padding(**exported.facts["padding"])
        tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        each.path.name: {
            "format": each.kind, "precision": each.precision, "inputs": list(each.graph.inputs),
            "outputs": list(each.graph.outputs), "largest_difference": each.parity.largest,
            "equal_predictions": each.parity.equal, "samples": each.parity.count, "left_in_float": each.left,
        }
        for each in written
    }  # fmt: skip
    facts = {"task": task, **exported.facts, "opset": args.opset, "files": files, "command": command_line()}
    write_text(folder / "export.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    if any(each.kind == "onnx" and each.precision == "float32" for each in written):
        usage = (USAGE / f"{task}.py").read_text(encoding="utf-8")
        answer = ANSWERS.get(exported.facts.get("problem_type"), BEST_LABEL)
        for word in ("text", "name"):  # what the loop over the inputs calls one
            usage = usage.replace(BEST_LABEL.replace("{input}", word), answer.replace("{input}", word))
        squeezed = "margin" in exported.facts and exported.facts["margin"] is None
        write_text(folder / "usage.py", usage.replace(CROPPED, SQUEEZED) if squeezed else usage)


@dataclass
class Timing:
    """Seconds [n] of n calls of a file with a batch."""

    name: str
    batch: int
    seconds: np.ndarray

    def row(self, eager: float) -> tuple[str, ...]:
        """Name, batch, latency in milliseconds, samples per second, and times the speed of PyTorch."""
        import numpy as np

        half, most, nearly = (1000 * value for value in np.percentile(self.seconds, (50, 90, 99)))
        rate = self.batch / np.median(self.seconds)
        return (self.name, f"{self.batch}", f"{half:.2f}", f"{most:.2f}", f"{nearly:.2f}", f"{rate:.1f}",
                f"{eager / np.median(self.seconds):.2f}")  # fmt: skip


HEADER = ("file", "batch", "p50 ms", "p90 ms", "p99 ms", "samples/s", "times PyTorch")


def time_all(written: list[Written], args: Args) -> list[Timing]:
    """Times PyTorch and all files in turn, so that a machine's moods are the same for all."""
    import numpy as np
    import torch

    from accelerando.inference.exported import torch_runner

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    timings = []
    for graph in {id(each.graph): each.graph for each in written}.values():
        runs = {f"{graph.name} in PyTorch": torch_runner(graph.module)}
        runs |= {each.path.name: each.run for each in written if each.graph is graph}
        for batch in args.batch_sizes:
            show(f"timing {graph.name}, batches of {batch}")
            inputs = {name: np.resize(value, (batch, *value.shape[1:])) for name, value in graph.samples[0].items()}
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for run in runs.values():
                run(inputs)
            until = time.perf_counter() + args.seconds * len(runs)
            while time.perf_counter() < until or min(map(len, seconds.values())) < 3:
                for name, run in runs.items():
                    started = time.perf_counter()
                    run(inputs)
                    seconds[name].append(time.perf_counter() - started)
            timings += [Timing(name, batch, np.array(values)) for name, values in seconds.items()]
    return timings


def timing_rows(timings: list[Timing]) -> list[tuple[str, ...]]:
    """The table of the benchmark."""
    import numpy as np

    rows, eager = [HEADER], {}
    for each in timings:
        if each.name.endswith("in PyTorch"):
            eager[each.batch] = float(np.median(each.seconds))
        rows.append(each.row(eager[each.batch]))
    return rows


def plot_timings(timings: list[Timing], path: Path) -> None:
    """Samples per second over the batch size, a line for each file."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(each.name for each in timings):
        own = [each for each in timings if each.name == name]
        rates = [each.batch / np.median(each.seconds) for each in own]
        axes.plot([each.batch for each in own], rates, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch size")
    axes.set_ylabel("samples per second")
    axes.set_xticks(sorted({each.batch for each in timings}), sorted({each.batch for each in timings}))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def show(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- main


def check(args: Args) -> None:
    """UserError for settings that make no sense together."""
    if not (args.run or args.model_path):
        raise UserError("name a run or a model folder: tools/export.py runs/x")
    if args.run and args.model_path:
        raise UserError(f"{args.run} and --model_path {args.model_path}: give one of them")
    check_ranges(args, opset=(18, 30), samples=(0, 100_000), num_threads=(0, 1024))
    if any(size < 1 for size in args.batch_sizes):
        raise UserError("--batch_sizes: use numbers of at least 1")
    for kind in args.export_format:
        check_precisions(kind, args.precision)
        check_available(kind)


def records_of(run: Path | None) -> dict[str, str]:
    """The ids under which trackers hold ``run``; UserError if none of them keeps files."""
    known = read_results(run).get("trackers", {}) if run else {}
    if not any(name in KEEP_FILES for name in known):
        raise UserError(f"--track: no tracker that keeps files has a record of this run ({', '.join(KEEP_FILES)} do)")
    return known


def main() -> None:
    args = parse_args(Args, ALIASES)
    check(args)
    quiet_libraries()
    path = Path(args.run or args.model_path)
    folder = model_folder(path)
    run = run_of(path)
    target = Path(args.output_dir) if args.output_dir else (run or folder) / "export"
    tracked = records_of(run) if args.track else {}
    check_can_be_made(target, "--output_dir")
    if target.exists() and any(target.iterdir()):
        if not (target / "export.json").is_file():
            raise UserError(f"--output_dir {target}: holds files that are no export; name another folder")
        if not args.overwrite:
            raise UserError(f"{target}: there is an export already; --overwrite replaces it")
    from transformers.utils import logging

    from accelerando.inference.saved import import_user_module

    logging.disable_progress_bar()
    module = import_user_module(args.import_module) if args.import_module else None
    task = kind_of(folder, read_json(folder / "config.json"))
    if "executorch" in args.export_format and task in ("sign", "image"):
        what = {"sign": "a sign model", "image": "an image classifier"}[task]
        raise UserError(f"--export_format executorch: {what} cannot vary its batch there; onnx and openvino can")
    show(f"opening {printable(str(folder))}")
    found = data_of_run(run, args.script, task, args.samples)
    exported = {"text": text, "sign": sign, "image": image, "har": har, "clip": clip}[task](folder, found, args, module)
    with whole_folder(target) as draft:
        draft.mkdir(parents=True)
        written = write_all(exported, draft, args)
        summary = table_of(written, found is None)
        for each in written:
            each.path = target / each.path.name
        write_beside(draft, folder, task, exported, written, args)
        if args.benchmark:
            timings = time_all(written, args)
            rows = timing_rows(timings)
            write_text(draft / "benchmark.csv", "".join(f"{','.join(row)}\n" for row in rows))
            plot_timings(timings, draft / "benchmark.png")
            summary += f"\n\n{aligned_rows(rows)}"
        write_text(draft / "summary.txt", summary + "\n")
    print(summary)
    for each in written:
        for name in each.left:
            print(f"{each.path.name}: left in float: {name}")
    shown = "; usage.py there shows how to run it" * (target / "usage.py").is_file()
    print(f"\nWritten to {printable(str(target))}{shown}.")
    if args.track:
        print(f"Added to the run's record: {', '.join(add_to_trackers(run, read_settings(run), tracked, target))}.")
    faults = [f"{each.path.name}: {fault}" for each in written if (fault := each.faults(args))]
    for fault in faults:
        print(f"out of tolerance: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
