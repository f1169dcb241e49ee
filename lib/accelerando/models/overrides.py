"""Common names for config settings that each architecture names differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerando.base.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import PreTrainedConfig

SHAPE = {
    "hidden_size": ("hidden_size", "dim", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
}
DROPOUT = {
    "hidden_dropout_prob": ("hidden_dropout_prob", "dropout", "mlp_dropout"),
    "attention_probs_dropout_prob": ("attention_probs_dropout_prob", "attention_dropout"),
    "classifier_dropout": ("classifier_dropout", "seq_classif_dropout", "pooler_dropout"),
}


def override_config(config: PreTrainedConfig, args: DataclassInstance, has_weights: bool) -> None:
    """Sets the settings in SHAPE and DROPOUT that ``args`` gives on ``config``; None leaves a setting unchanged.

    Raises:
        UserError: the architecture has no such setting, or a shape differs from that of the weights to be loaded.
    """
    for flag, spellings in {**SHAPE, **DROPOUT}.items():
        value = getattr(args, flag, None)  # a script may have some of them
        if value is None:
            continue
        name = next((spelling for spelling in spellings if hasattr(config, spelling)), None)
        if name is None:
            raise UserError(f"--{flag}: a {config.model_type} model has no such setting")
        if flag in SHAPE and has_weights and getattr(config, name) != value:
            raise UserError(
                f"--{flag} {value}, but the pretrained model has {getattr(config, name)}: omit it or use --from_scratch"
            )
        setattr(config, name, value)
