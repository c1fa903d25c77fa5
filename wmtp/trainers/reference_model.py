"""The reference model of rho1-wmtp: anything that maps input_ids to next-token logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from wmtp.loss import next_token_cross_entropy
from wmtp.models.storage import is_model_folder, load_model_folder
from wmtp.trainers.config import ConfigError

# input_ids [B, S] -> logits [B, S, V], or [B, S, 1, V], or an object with such `.logits`.
Reference = Callable[[Tensor], Any]


def reference_ce(reference: Reference, input_ids: Tensor, target_ids: Tensor) -> Tensor:
    """Its cross entropy [B, S-1] in nats, without gradient: position t about target_ids[t + 1].

    Raises:
        ConfigError: what it returns is no logits.
    """
    with torch.no_grad():
        output = reference(input_ids)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"the reference must return logits or an object with .logits, "
                f"got {type(output).__name__}"
            )
        if logits.dim() == 4 and logits.shape[2] == 1:
            logits = logits[:, :, 0]
        if logits.dim() != 3:
            raise ConfigError(
                f"the reference must return logits [B, S, V], got {tuple(logits.shape)}: "
                "of a model with several heads, pass the first one's logits"
            )
        return next_token_cross_entropy(logits, target_ids)


def prepare_reference(reference: Reference, device: torch.device) -> Reference:
    """On the device, in evaluation mode, frozen; a plain callable stays as it is."""
    if isinstance(reference, nn.Module):
        reference.to(device).eval().requires_grad_(False)
    return reference


def load_reference(folder: Path, tokenizer: Tokenizer) -> nn.Module:
    """Load a run folder of ours (or its `final`), or a Hugging Face causal language model.

    Args:
        folder: where it is.
        tokenizer: of the training data; the reference must have been trained with the same.

    Raises:
        ConfigError: nothing there that can be loaded, or another vocabulary.
    """
    final = folder / "final" if is_model_folder(folder / "final") else folder
    if is_model_folder(final):
        _check_same_vocabulary(final, tokenizer)
        own = load_model_folder(final)
        if own.config.horizon != 1:
            raise ConfigError(
                f"{folder} predicts {own.config.horizon} tokens ahead: a reference is "
                "trained with --horizon 1"
            )
        return own
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no model in {folder}: pass a run folder with final/, or a Hugging Face model folder"
        )
    from transformers import AutoModelForCausalLM

    _check_same_vocabulary(folder, tokenizer)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"transformers cannot load a model from {folder}: {error}") from error
    if model.config.vocab_size < tokenizer.get_vocab_size():
        raise ConfigError(
            f"{folder} knows {model.config.vocab_size} tokens, the tokenizer has "
            f"{tokenizer.get_vocab_size()}: pass the model's own tokenizer.json with --tokenizer"
        )
    return model


def _check_same_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    if Tokenizer.from_file(str(file)).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the reference in {folder} has another vocabulary than the training data: "
            f"pass --tokenizer {file}"
        )
