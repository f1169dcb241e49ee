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


SHORT = 128  # tokens up to which spelt-out attention costs little memory


def spell_out_attention(model: Any, precision: str, tokens: int) -> None:
    """On a CPU in bf16: torch's fused attention goes backward several times slower than matrix products do.

    Measured with torch 2.14 at 50 tokens: 40 ms against 6 ms; a whole step of CLIP is 1.3 to 1.4 times as fast.
    """
    if precision == "bf16" and tokens <= SHORT:
        model.set_attn_implementation("eager")


def attention_for_cpu(config: Any, on_cpu: bool) -> dict[str, str]:
    """Keyword arguments for ``from_pretrained``: a CPU has no fused kernel for attention with dropout, and spelt out it
    is faster."""
    dropout = max(getattr(config, name, 0) or 0 for name in DROPOUT["attention_probs_dropout_prob"])
    return {"attn_implementation": "eager"} if on_cpu and dropout else {}
