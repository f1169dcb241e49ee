"""Settings that every architecture has under a name of its own, set under one name."""

from __future__ import annotations

from typing import Any

from accelerando.base.errors import UserError

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


def override_config(config: Any, args: Any, has_weights: bool) -> None:
    """Sets on a transformers ``config`` what ``args`` gives for the names in SHAPE and DROPOUT; None leaves it.

    Raises:
        UserError: the architecture has no such setting, or a shape differs from that of weights to be loaded.
    """
    for flag, spellings in {**SHAPE, **DROPOUT}.items():
        value = getattr(args, flag)
        if value is None:
            continue
        name = next((spelling for spelling in spellings if hasattr(config, spelling)), None)
        if name is None:
            raise UserError(f"--{flag}: a {config.model_type} model has no such setting")
        if flag in SHAPE and has_weights and getattr(config, name) != value:
            raise UserError(
                f"--{flag} {value}, but the pretrained model has {getattr(config, name)}: drop it, or --from_scratch"
            )
        setattr(config, name, value)
