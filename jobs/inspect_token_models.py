"""Says what a model over tokens is: a prior or a generator."""

from __future__ import annotations

import json

from jobs.display import counted, describe_bytes, field_line
from pipeline.storage import Storage
from tokenizer.checkpoint import CONFIG_FILE, MODEL_FILE, CheckpointFiles
from tokenizer.generator_checkpoint import generator_config
from tokenizer.prior_checkpoint import prior_config
from tokenizer.token_model_config import TokenModelConfig

SHOWN_CLASSES = 10


def describe_token_model(storage: Storage) -> str | None:
    """What the prior or generator in a folder is; None where it is another model.

    Raises CheckpointError for one that cannot be used."""
    config_json = storage.read_bytes(CONFIG_FILE)
    describe = {"prior": _describe_prior, "generator": _describe_generator}.get(_model_of(config_json))
    if describe is None:
        return None
    files = CheckpointFiles(config_json, storage.read_bytes(MODEL_FILE), storage.url)
    return "\n".join([*describe(files), field_line("file", describe_bytes(len(files.model_safetensors)))])


def _model_of(config_json: bytes) -> str:
    try:
        values = json.loads(config_json)
    except (ValueError, RecursionError):
        return ""
    return str(values.get("model", "")) if isinstance(values, dict) else ""


def _describe_prior(files: CheckpointFiles) -> list[str]:
    config = prior_config(files)
    return [
        f"{files.where}: prior over tokens ({config.preset}), {_weights(files, config.trained)}",
        field_line("predicts", f"{config.bits_per_token} bits in groups of {config.group_size}, {config.grid[0]} x "
                   f"{config.grid[1]} tokens for each frame, clips of up to {counted(config.max_frames, 'frame')}"),
        field_line("from", f"the tokens of {counted(config.context_frames, 'frame')} before"),
        *_origin_and_size(config),
    ]  # fmt: skip


def _describe_generator(files: CheckpointFiles) -> list[str]:
    config = generator_config(files)
    classes = ", ".join(config.classes[:SHOWN_CLASSES]) or "none"
    more = f" and {len(config.classes) - SHOWN_CLASSES:,} more" if len(config.classes) > SHOWN_CLASSES else ""
    return [
        f"{files.where}: generator of tokens ({config.preset}), {_weights(files, config.trained)}",
        field_line("fills in", f"{config.bits_per_token} bits in groups of {config.group_size}, {config.grid[0]} x "
                   f"{config.grid[1]} tokens for each picture"),
        field_line("classes", f"{classes}{more}"),
        *_origin_and_size(config),
    ]  # fmt: skip


def _origin_and_size(config: TokenModelConfig) -> list[str]:
    return [
        field_line("tokenizer", f"weights {config.tokenizer_sha256[:8] or 'not known'}"),
        field_line("size", f"width {config.width}, {config.layers} layers"),
    ]


def _weights(files: CheckpointFiles, trained: bool) -> str:
    untrained = "" if trained else ", random weights: it was never trained"
    return f"weights {files.weight_sha256()[:8]}{untrained}"
