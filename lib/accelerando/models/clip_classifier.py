"""A classifier of images and videos on a CLIP: by the similarity to prompts of the class names, or by a linear head.

Importing this module registers the model type "clip_classifier" with transformers' auto classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from accelerando.base.errors import UserError
from accelerando.models.clip import make_trainable_scale, open_clip_model, open_preprocessing
from accelerando.models.pretrained import add_embeddings, open_config, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PARTS = ("vision_model", "visual_projection")
TEXT_PARTS = ("text_model", "text_projection")
HeadName = Literal["text", "linear"]
FeaturesName = Literal["embedding", "tower"]


class ClipClassifierConfig(PreTrainedConfig):
    """``clip``: the config of the CLIP model. ``head``: text or linear. ``features``, of a linear head: the CLIP's
    embeddings, or the image tower's output before the projection. ``prompts`` and ``prompt_length``: the number of
    prompts, a multiple of that of the classes, and their length in tokens."""

    model_type = "clip_classifier"

    clip: dict[str, Any] | None = None
    head: str = "text"
    features: str = "embedding"
    prompts: int = 0
    prompt_length: int = 0

    @property
    def of_clip(self) -> PreTrainedConfig:
        """The config of the CLIP model."""
        settings = dict(self.clip or {})
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


@dataclass
class ClipClassifierOutput(ModelOutput):
    """``logits`` [V, C] of V views; ``features`` [N, d] of N frames; ``image`` and ``text`` embeddings of unit length
    [V, d] and [T, d]; ``scale`` [1], the factor of their products; ``loss``, the mean cross-entropy, with labels."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    features: torch.Tensor | None = None
    image: torch.Tensor | None = None
    text: torch.Tensor | None = None
    scale: torch.Tensor | None = None


class ClipClassifier(PreTrainedModel):
    """``clip`` is a model with ``get_image_features``, ``get_text_features`` and ``logit_scale``; ``head`` is None
    where the prompts are the classifier. Their tokens are buffers, so that a saved model needs no tokenizer."""

    config_class = ClipClassifierConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules: list[str] = []  # noqa: RUF012  (required by Hugging Face)

    def __init__(self, config: ClipClassifierConfig, clip: nn.Module | None = None) -> None:
        super().__init__(config)
        if clip is None:
            clip = AutoModel.from_config(config.of_clip)
            make_trainable_scale(clip, None, None)
        self.clip = clip
        shape = (config.prompts, config.prompt_length)
        self.register_buffer("prompt_ids", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("prompt_mask", torch.zeros(shape, dtype=torch.int64))
        self.head = nn.Linear(self.feature_width(), config.num_labels) if config.head == "linear" else None
        self._known: torch.Tensor | None = None  # the classes' embeddings, while they cannot change
        self.post_init()
        self._no_split_modules = list(getattr(clip, "_no_split_modules", None) or [])

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the CLIP initialises itself, and torch the head."""

    def get_input_embeddings(self) -> None:
        """None: images are numbers, not tokens."""
        return

    def head_names(self) -> tuple[str, ...]:
        """The name of the linear head, if there is one."""
        return ("head",) if self.head is not None else ()

    def feature_width(self) -> int:
        """The number d of features of an image."""
        if self.config.features == "tower":
            projection = getattr(self.clip, "visual_projection", None)
            if projection is not None:
                first = next(layer for layer in projection.modules() if isinstance(layer, nn.Linear))
                return first.in_features
            return self.clip.config.vision_config.hidden_size
        width = getattr(self.clip.config, "projection_dim", None)
        return width or self.clip.config.text_config.hidden_size

    def train(self, mode: bool = True) -> ClipClassifier:
        """Like ``torch.nn.Module.train``; the classes' embeddings are computed again, unless they cannot change."""
        if not mode or self.trains_text():
            self._known = None
        return super().train(mode)

    def set_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, names: Sequence[str]) -> None:
        """Makes ``names`` [C] the classes, with P prompts each, in the order of the classes: tokens [C P, L]."""
        device = self.prompt_ids.device
        self.prompt_ids, self.prompt_mask = input_ids.to(device), attention_mask.to(device)
        self.config.prompts, self.config.prompt_length = input_ids.shape
        self.config.num_labels = len(names)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: number for number, name in enumerate(names)}
        self._known = None

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frames: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        zero_shot: bool = False,
    ) -> ClipClassifierOutput:
        """Logits of images, or of videos, whose frames' embeddings are averaged (arXiv:2212.03640).

        Args:
            pixel_values: normalised frames [N, 3, S, S], those of a view after each other.
            frames: int64 [V], how many of them belong to each view; None: one each.
            features: instead of pixels, the frames' ``features`` [N, d] of an earlier call.
            input_ids: captions [T, L] to embed, with their ``attention_mask``; then there are no logits.
            labels: int64 [V].
            zero_shot: classify by the prompts, whatever the head.
        """
        output = ClipClassifierOutput(scale=self.clip.logit_scale.exp())
        if input_ids is not None:
            output.text = self.embed_texts(input_ids, attention_mask)
        if pixel_values is not None:
            features = self.embed_frames(pixel_values)
        if features is None:
            return output
        output.features = features
        pooled = segment_means(features, frames)
        if self.config.features == "embedding":
            output.image = pooled = nn.functional.normalize(pooled, dim=-1)
        if input_ids is not None:
            return output
        if self.head is not None and not zero_shot:
            output.logits = self.head(pooled)
        else:
            output.logits = output.scale * pooled @ self.class_embeddings().T
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits, labels)
        return output

    def embed_frames(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The features of frames [N, d]: embeddings of unit length, or the tower's output; float32."""
        if self.config.features == "tower":
            return self.clip.vision_model(pixel_values=pixel_values).pooler_output.float()
        found = self.clip.get_image_features(pixel_values=pixel_values).pooler_output
        return nn.functional.normalize(found.float(), dim=-1)

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The embeddings of texts, of unit length, float32 [T, d]."""
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        found = self.clip.get_text_features(input_ids=input_ids, **mask).pooler_output
        return nn.functional.normalize(found.float(), dim=-1)

    def class_embeddings(self) -> torch.Tensor:
        """The mean of the embeddings of each class's prompts, of unit length, float32 [C, d].

        With gradients while the text tower is trained; otherwise they are kept until ``eval`` is called.
        """
        trained = self.training and self.trains_text()
        if not trained and self._known is not None and self._known.device == self.prompt_ids.device:
            return self._known
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            mask = self.prompt_mask if bool(self.config.prompt_length) and self.prompt_mask.any() else None
            texts = self.embed_texts(self.prompt_ids, mask).unflatten(0, (self.config.num_labels, -1))
            classes = nn.functional.normalize(texts.mean(1), dim=-1)
        if not trained:
            self._known = classes.detach()
        return classes

    def trains_text(self) -> bool:
        """Whether a parameter of the text tower or its projection is trained."""
        parts = [getattr(self.clip, name, None) for name in TEXT_PARTS]
        return any(parameter.requires_grad for part in parts if part is not None for parameter in part.parameters())


def segment_means(values: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The means of consecutive rows of ``values`` [N, d]: of the first ``counts[0]`` rows, of the next, ...: [V, d]."""
    if counts is None or len(counts) == len(values):
        return values
    number = torch.repeat_interleave(counts)
    sums = values.new_zeros(len(counts), *values.shape[1:]).index_add(0, number, values)
    return sums / counts.to(values)[:, None]


def fill_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all classes: ``templates`` with the name for ``{}`` or ``{label}``, underscores as spaces."""
    return [
        template.replace("{label}", "{}").replace("{}", " ".join(name.replace("_", " ").split()))
        for name in names
        for template in templates
    ]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, full_length: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask of prompts, int64 [T, L] each; ``full_length``: padded to ``max_length`` without a mask
    (all 0), as SigLIP was trained."""
    tokens = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        padding="max_length" if full_length else True,
        return_tensors="pt",
    )
    ids = tokens["input_ids"]
    return ids, torch.zeros_like(ids) if full_length else tokens["attention_mask"]


def make_classifier(
    clip: nn.Module,
    head: HeadName,
    features: FeaturesName,
    names: Sequence[str],
    tokens: tuple[torch.Tensor, torch.Tensor],
) -> ClipClassifier:
    """A classifier on ``clip`` (with :func:`clip.make_trainable_scale`) for the classes ``names``, with their prompts'
    ``tokens`` (see :func:`prompt_tokens`)."""
    config = ClipClassifierConfig(
        clip=clip.config.to_dict(),
        head=head,
        features=features,
        prompts=len(tokens[0]),
        prompt_length=tokens[0].shape[1],
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = ClipClassifier(config, clip)
    model.set_prompts(*tokens, names)
    return model


def start_head_from_prompts(model: ClipClassifier) -> None:
    """Makes the linear head compute what the prompts would: the zero-shot classifier is where training starts
    (Wortsman et al. 2021, arXiv:2109.01903)."""
    model.eval()
    with torch.no_grad():
        model.head.weight.copy_(model.clip.logit_scale.exp() * model.class_embeddings())
        model.head.bias.zero_()


def start_head_from_saved(model: ClipClassifier, name: str, trust_remote_code: bool = False) -> None:
    """Makes the linear head that of the classifier saved in ``name``: the image tower is tuned after the head, so that
    a random head does not spoil it (LP-FT, Kumar et al. 2022, arXiv:2202.10054).

    Raises:
        UserError: it is no classifier with such a head, or one for other classes.
    """
    tokens, own = (model.prompt_ids, model.prompt_mask), model.config
    saved = open_trained(name, list(own.id2label.values()), tokens, trust_remote_code)
    if saved.head is None or saved.config.features != own.features:
        has = "no linear head" if saved.head is None else f"a head on the features of the {saved.config.features}"
        raise UserError(f"{name}: it has {has}; --head_init saved needs a head on those of the {own.features}")
    model.head.load_state_dict(saved.head.state_dict())


@contextmanager
def other_classes(
    model: ClipClassifier, tokens: tuple[torch.Tensor, torch.Tensor], names: Sequence[str]
) -> Iterator[None]:
    """``model`` with the prompts of other classes; afterwards with its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.prompt_ids, base.prompt_mask, list(base.config.id2label.values())
    base.set_prompts(*tokens, names)
    try:
        yield
    finally:
        base.set_prompts(*own)


def open_trained(
    name: str, names: Sequence[str], tokens: tuple[torch.Tensor, torch.Tensor], trust_remote_code: bool = False
) -> ClipClassifier:
    """The classifier saved in ``name``; with its prompts, or those of ``tokens`` if ``names`` are other classes.

    Raises:
        UserError: it is no such classifier, or has a linear head for other classes.
    """
    config = open_config(name, trust_remote_code)
    if not isinstance(config, ClipClassifierConfig):
        raise UserError(f"{name}: a CLIP without a classifier: best/ of a run is one (or --evaluate_only --zero_shot)")
    model = open_model(
        AutoModelForImageClassification, name, config, new_head=False, trust_remote_code=trust_remote_code
    )
    own = list(config.id2label.values())
    if own != list(names):
        if config.head == "linear":
            raise UserError(f"{name}: its head was trained on other classes: {', '.join(own[:8])}")
        model.set_prompts(*tokens, names)
    return model


def open_with_classes(
    name: str, names: Sequence[str], templates: Sequence[str], trust_remote_code: bool = False
) -> ClipClassifier:
    """The CLIP in a folder (or that of a classifier saved there) as a classifier of ``names`` by their prompts.

    Raises:
        UserError: it is no such model, or has no tokenizer.
    """
    clip = open_clip_model(name, trust_remote_code=trust_remote_code)
    preprocessing = open_preprocessing(name, None, trust_remote_code)
    add_embeddings(clip, preprocessing.tokenizer)
    make_trainable_scale(clip, None, None)
    prompts = fill_prompts(names, templates)
    tokens = prompt_tokens(preprocessing.tokenizer, prompts, preprocessing.max_length, preprocessing.full_length)
    return make_classifier(clip, "text", "embedding", names, tokens)


AutoConfig.register(ClipClassifierConfig.model_type, ClipClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(ClipClassifierConfig, ClipClassifier, exist_ok=True)
