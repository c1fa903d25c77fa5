"""A trained model as a folder: model.safetensors, config.json, tokenizer.json, their digests; of
critic-wmtp value_head.safetensors, too."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer

from wmtp.digests import write_digests
from wmtp.models.transformer import MTPConfig, MTPTransformer
from wmtp.models.value_head import ValueHead

MODEL_TYPE = "wmtp-mtp-transformer"


def save_model_folder(
    model: MTPTransformer,
    tokenizer: Tokenizer,
    folder: Path,
    value_head: ValueHead | None = None,
    run: str = "",
) -> None:
    """Write the files into `folder`, which exists; `run` is the digest of whose model it is."""
    save_model(model, str(folder / "model.safetensors"))  # knows tied weights
    config = {"model_type": MODEL_TYPE, **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    if value_head is not None:
        save_model(value_head, str(folder / "value_head.safetensors"))
    write_digests(folder, run=run)


def is_model_folder(folder: Path) -> bool:
    """Whether `save_model_folder` wrote this folder."""
    file = folder / "config.json"
    return file.is_file() and f'"{MODEL_TYPE}"' in file.read_text(errors="replace")


def load_model_folder(folder: Path) -> MTPTransformer:
    """The model that `save_model_folder` wrote, on the CPU."""
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    model = MTPTransformer(MTPConfig(**config))
    load_model(model, str(folder / "model.safetensors"))
    return model
