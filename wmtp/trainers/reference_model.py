"""The reference model of rho1-wmtp: anything that maps input_ids to next-token logits.

An `MTPTransformer` of one head, and a Hugging Face causal language model whose logits are its
output embeddings times its last hidden state and nothing else, come apart into `LinearReference`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from wmtp.cross_entropy import next_token_cross_entropy
from wmtp.data.tokenizer import vocabulary_size
from wmtp.digests import what_is_wrong
from wmtp.files import digest_of, shown
from wmtp.linear import linear_next_token_cross_entropy
from wmtp.models import MTPOutput, MTPTransformer
from wmtp.models.storage import is_model_folder, load_model_folder
from wmtp.models.transformer import positions_within
from wmtp.once import warn_once
from wmtp.trainers.config import ConfigError
from wmtp.trainers.losses import logits_backend
from wmtp.trainers.reference_tokenizer import check_same_tokenizer

# input_ids [B, S] -> logits [B, S, V], or [B, S, 1, V], or an object with such `.logits`.
Reference = Callable[[Tensor], Any]


@dataclass(frozen=True)
class LinearReference:
    """A reference in two parts: logits = lm_head(hidden_states(input_ids))."""

    hidden_states: Callable[..., Tensor]  # input_ids [B, S] -> [B, S, D]
    lm_head: nn.Linear
    knows_documents: bool = False  # hidden_states takes document_ids, too

    def states(self, input_ids: Tensor, document_ids: Tensor | None) -> Tensor:
        """Of documents that do not see each other, where it can tell them apart."""
        known = () if document_ids is None else (document_ids,)
        return self.hidden_states(input_ids, *known)

    def __call__(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """The logits [B, S, V]."""
        states = self.states(input_ids, document_ids)
        return F.linear(states, self.lm_head.weight, self.lm_head.bias)


@dataclass(frozen=True)
class WholeReference:
    """One of which nothing is known but its logits, and that it tells documents apart."""

    logits: Callable[..., Any]  # of input_ids [B, S] and document_ids [B, T >= S]

    def __call__(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Any:
        return self.logits(input_ids, document_ids)


@torch.no_grad()
def reference_ce(
    reference: Reference,
    input_ids: Tensor,
    target_ids: Tensor,
    way: str = "linear",
    document_ids: Tensor | None = None,
) -> Tensor:
    """Its cross entropy [B, T-1] in nats, without gradient: position t about target_ids[t + 1].

    Args:
        reference: from `prepare_reference`.
        input_ids: [B, T-1] or [B, T]. target_ids: [B, T].
        document_ids: [B, T] of packed rows; a model that cannot tell documents apart reads a row
            as one text, which is said once.
        way: of `TrainConfig.loss`; "linear" makes no logits tensor of a `LinearReference`.

    Raises:
        ConfigError: what it returns is no logits.
    """
    if document_ids is not None and not _knows_documents(reference):
        warn_once(
            "the reference reads packed documents as one text: where one begins, it knows the one "
            "before; train without --pack, or use another reference"
        )
        document_ids = None
    if way == "linear" and isinstance(reference, LinearReference):
        return linear_next_token_cross_entropy(
            reference.states(input_ids, document_ids),
            reference.lm_head.weight,
            target_ids,
            lm_head_bias=reference.lm_head.bias,
        )
    known = () if document_ids is None else (document_ids,)
    logits = _logits(reference(input_ids, *known))
    return next_token_cross_entropy(logits, target_ids, backend=logits_backend(way))


def _knows_documents(reference: Reference) -> bool:
    return getattr(reference, "knows_documents", isinstance(reference, WholeReference))


def _logits(output: Any) -> Tensor:
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
    return logits


def prepare_reference(reference: Reference, device: torch.device, way: str = "linear") -> Reference:
    """On the device, in evaluation mode, frozen; a plain callable stays as it is.

    Returns:
        A `LinearReference` of a model of ours, and under way="linear" of a Hugging Face model that
        is one; a `WholeReference` of another that tells documents apart; else what was given.

    Raises:
        ConfigError: a model of ours with several heads.
    """
    if not isinstance(reference, nn.Module):
        return reference
    reference.to(device).eval().requires_grad_(False)
    if isinstance(reference, MTPTransformer):
        return _own_parts(reference)
    if (base := getattr(reference, "base_model", None)) is None:
        return reference
    knows = _tells_documents_apart(base)
    parts = _hugging_face_parts(reference, knows) if way == "linear" else None
    if parts is None and knows:
        return WholeReference(_with_documents(reference))
    return reference if parts is None else parts


def _own_parts(model: MTPTransformer) -> LinearReference:
    _check_one_head(model, "the reference")

    def states(input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        output: MTPOutput = model(input_ids, document_ids)
        return output.head_hidden_states[:, :, 0]

    return LinearReference(states, model.unembed, knows_documents=True)


def _with_documents(model: Any) -> Callable[..., Any]:
    """The model, called with documents as its library knows them: by positions that begin anew."""

    def call(input_ids: Tensor, document_ids: Tensor | None = None) -> Any:
        if document_ids is None:
            return model(input_ids=input_ids)
        positions = positions_within(document_ids[:, : input_ids.shape[1]])[:, 0]
        return model(input_ids=input_ids, position_ids=positions, use_cache=False)

    return call


@torch.no_grad()
def _tells_documents_apart(base: Any) -> bool:
    """Whether a document gets the same states behind another as alone: tried on a few ids."""
    device = next(base.parameters()).device
    ids = torch.arange(8, device=device)[None] % getattr(base.config, "vocab_size", 8)
    try:
        packed = _with_documents(base)(ids, torch.arange(8, device=device)[None] // 5)
        alone = base(input_ids=ids[:, 5:])
        packed, alone = packed.last_hidden_state[:, 5:], alone.last_hidden_state
    except (TypeError, AttributeError):  # it takes no position_ids, or returns something else
        return False
    return bool((packed - alone).abs().max() <= 1e-2 * alone.abs().max())


def _hugging_face_parts(model: Any, knows_documents: bool) -> LinearReference | None:
    """None where there is more between the last hidden state and the logits, or it is not seen."""
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")):
        return None
    base, head = model.base_model, model.get_output_embeddings()
    if type(head) is not nn.Linear or not _is_linear(model, base, head):  # not a quantised one
        return None
    outputs = _with_documents(base)
    return LinearReference(lambda *ids: outputs(*ids).last_hidden_state, head, knows_documents)


@torch.no_grad()
def _is_linear(model: Any, base: Any, head: nn.Linear) -> bool:
    """Whether the model's logits are its last hidden state times the head: tried on a few ids.

    The logits of these may be so small that a soft cap hardly moves them. So the head is made to
    say large whole numbers, too, which must come out as they are.
    """
    vocab_size, device = head.weight.shape[0], head.weight.device
    ids = torch.arange(min(8, vocab_size), device=device)[None]
    hidden = getattr(base(input_ids=ids), "last_hidden_state", None)
    if hidden is None or (hidden.shape[-1], hidden.dtype) != (head.in_features, head.weight.dtype):
        return False
    product = F.linear(hidden, head.weight, head.bias).float()
    logits = _logits(model(input_ids=ids)).float()
    large = torch.arange(vocab_size, device=device) % 257 - 128  # exact in bfloat16
    with head.register_forward_hook(
        lambda _head, _inputs, output: large.to(output.dtype).expand_as(output), prepend=True
    ):
        untouched = _logits(model(input_ids=ids)).float()
    if logits.shape != product.shape or not (untouched == large).all():
        return False
    return bool((logits - product).abs().max() <= 1e-3 * logits.abs().max())


def _check_one_head(model: MTPTransformer, name: str) -> None:
    if model.config.horizon != 1:
        raise ConfigError(
            f"{name} predicts {model.config.horizon} tokens ahead: a reference is trained with "
            "--horizon 1"
        )


def find_reference(name: str) -> Path:
    """The folder of a reference model: itself, or where the hub's cache has a model of this id.

    Raises:
        ConfigError: neither.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"no folder {shown(name)}, and no model of this id in the hub's cache: pass a folder, "
            f"or fetch the model first"
        ) from error


def reference_digests(folder: Path) -> dict[str, str]:
    """Of the files that a reference is loaded from, by their names.

    Raises:
        ConfigError: there is no model.
    """
    files = sorted(file for file in _model_in(folder).iterdir() if file.is_file())
    return {file.name: digest_of(file) for file in files}


def _model_in(folder: Path) -> Path:
    if is_model_folder(folder / "final"):
        return folder / "final"
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no model in {folder}: pass a run folder with final/, or a Hugging Face model folder"
        )
    return folder


def load_reference(folder: Path, tokenizer: Tokenizer, seq_len: int) -> nn.Module:
    """Load a run folder of ours (or its `final`), or a Hugging Face causal language model.

    Args:
        folder: where it is.
        tokenizer: of the training data; the reference must have been trained with the same.
        seq_len: S, how many tokens it will be given at once.

    Raises:
        ConfigError: nothing there that can be loaded, or of another tokenizer, or shorter than S.
    """
    place = _model_in(folder)
    ours = is_model_folder(place)
    if ours and (wrong := what_is_wrong(place)):
        raise ConfigError(f"{place} is damaged ({wrong}): restore it, or train it again")
    check_same_tokenizer(place, tokenizer)
    if ours:
        own = load_model_folder(place)
        _check_one_head(own, str(folder))
        return own
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(place)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"transformers cannot load a model from {place}: {error}") from error
    _check_size(model.config.get_text_config(), place, vocabulary_size(tokenizer), seq_len)
    return model


def _check_size(config: Any, folder: Path, vocab_size: int, seq_len: int) -> None:
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"{folder} knows {config.vocab_size} tokens, the tokenizer has {vocab_size}: pass the "
            "model's own tokenizer.json with --tokenizer"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < seq_len:
        raise ConfigError(
            f"the reference in {folder} reads {longest} tokens at once, --seq-len is {seq_len}: "
            f"pass --seq-len {longest}, or a longer reference"
        )
