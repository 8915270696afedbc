"""Checkpoints of the reference BSQ-ViT (zhaoyue-zephyrus/bsq-vit) become checkpoints of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from schemas.errors import CheckpointError, SpecError, nearest_name, printable
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import expected_shapes, require_matching, save_checkpoint
from tokenizer.config import REFERENCE_LOSSES, BSQViTConfig, QuantizerLossConfig, TransformerConfig
from tokenizer.reference_pickle import StoredTensor, TorchFile

MAX_YAML_BYTES = 1 << 16
MAX_YAML_BRACKETS = 200
"""PyYAML takes minutes for 100,000 brackets that open inside each other; the reference's configs have none."""
WRAPPERS = ("module.", "_orig_mod.")
"""Put before names by DistributedDataParallel, by the EMA copy (once more) and by torch.compile."""
RECOMPUTED = ("quantize.basis", "quantize.group_basis")
"""Powers of two that the reference stores beside its weights."""
RENAMED = (
    # Longer names stand before their own endings.
    ("temporal_positional_embedding", "transformer.temporal"),
    ("positional_embedding", "transformer.position"),
    ("encoder.conv1.", "encoder.patch_embedding."),
    ("coder.ln_pre.", "coder.transformer.norm_in."),
    ("coder.ln_post.", "coder.transformer.norm_out."),
    ("transformer.resblocks.", "transformer.blocks."),
    (".ln_1.", ".attention_norm."),
    (".attn.in_proj_", ".attention.qkv."),
    (".attn.out_proj.", ".attention.out."),
    (".ls_1.gamma", ".attention_scale"),
    (".ln_2.", ".mlp_norm."),
    (".mlp.c_fc.", ".mlp_in."),
    (".mlp.c_proj.", ".mlp_out."),
    (".ls_2.gamma", ".mlp_scale"),
    ("decoder.ffn.0.", "decoder.head_hidden."),
    ("decoder.conv_out.", "decoder.head."),
    ("post_quant_embed.", "from_codes."),
    ("quant_embed.", "to_latents."),
)
MODEL_KEYS = frozenset(
    [
        *("vitconfig", "dvitconfig", "embed_dim", "embed_group_size", "l2_norm", "post_q_l2_norm", "logit_laplace"),
        *("clamp_range", "beta", "gamma0", "gamma", "zeta", "inv_temperature", "persample_entropy_compute"),
        # These hold no part of the model: where training starts from and how it saves memory.
        *("cb_entropy_compute", "ckpt_path", "ignore_keys", "grad_checkpointing", "selective_checkpointing"),
    ]
)
VIT_KEYS = frozenset(
    [
        *("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "num_frames", "cross_frames"),
        *("ls_init_value", "drop_rate", "attn_drop_rate", "drop_path_rate", "ln_pre", "ln_post", "act_layer"),
        *("norm_layer", "mask_type", "mask_block_size", "use_ffn_output", "dim_ffn_output"),
    ]
)
AnyPath = str | os.PathLike[str]


def import_reference_checkpoint(
    reference_pt: AnyPath, config_yaml: AnyPath, out_folder: AnyPath, *, use_ema: bool = True
) -> BSQViTConfig:
    """Write the checkpoint folder `out_folder` from a reference checkpoint and the config it was trained with.

    Takes the averaged weights if `use_ema` and the file has some. Nothing in the file is executed, and nothing is
    written unless every weight fits. Raises CheckpointError in one line for anything else, VQ models included."""
    config = read_reference_config(config_yaml)
    weights, kind = read_reference_weights(reference_pt, config, use_ema=use_ema)
    model = BSQViT(config, seed=None)
    model.load_state_dict(weights, strict=True, assign=True)
    card = f"# Imported from the reference BSQ-ViT\n\nWeights: `{kind}` of `{Path(reference_pt).name}`.\n"
    save_checkpoint(model, out_folder, card=card)
    return config


def read_reference_weights(
    reference_pt: AnyPath, config: BSQViTConfig, *, use_ema: bool = True
) -> tuple[dict[str, Tensor], str]:
    """Weights in fp32 under our names, and the entry of the file that they come from."""
    with TorchFile(Path(reference_pt)) as file:
        root = file.root if isinstance(file.root, dict) else {}
        kind = "ema_state_dict" if use_ema and root.get("ema_state_dict") else "state_dict"
        state = root.get(kind)
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{reference_pt}: holds no state_dict; this is no checkpoint of the reference.")
        stored: dict[str, StoredTensor] = {}
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise CheckpointError(f"{reference_pt}: {kind} holds something that is no named tensor.")
            bare = _unwrapped(name)
            if bare.startswith("quantize.embedding."):
                raise CheckpointError(f"{reference_pt}: a VQ model with a learned codebook; only BSQ models are read.")
            if bare in RECOMPUTED:
                continue
            ours = _our_name(bare)
            if ours in stored:
                raise CheckpointError(f"{reference_pt}: {kind} holds {printable(bare)!r} twice.")
            stored[ours] = value
        # Before any tensor is read: a file cannot make us allocate more than its config says.
        found = {name: value.shape for name, value in stored.items()}
        require_matching(expected_shapes(config), found, str(reference_pt))
        return {name: file.tensor(value, name).float() for name, value in stored.items()}, kind


def read_reference_config(config_yaml: AnyPath) -> BSQViTConfig:
    """Our config for a reference training config. Raises CheckpointError where it asks for what we do not do."""
    import yaml

    path = Path(config_yaml)
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise CheckpointError(f"{path}: over {MAX_YAML_BYTES:,} bytes; this is no config of the reference.")
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MAX_YAML_BRACKETS:
            raise CheckpointError(f"{path}: over {MAX_YAML_BRACKETS} brackets; this is no config of the reference.")
        # A few aliases of aliases make a value that takes for ever to print.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise CheckpointError(f"{path}: aliases (*name) are not read; write the values out.")
        document = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read: {reason}.") from error
    try:
        return _config(_section(document, "model"), _section(document, "data"), path)
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _config(model: dict[str, Any], data: dict[str, Any], path: Path) -> BSQViTConfig:
    target = str(model.get("target", "")).rpartition(".")[2]
    if target != "VITBSQModel":
        _refuse(path, f"model.target is {printable(target)!r}; only VITBSQModel is read, not VQ or other models")
    params = _section(model, "params")
    _require_known(params, MODEL_KEYS, "model.params", path)
    if params.get("logit_laplace", False):
        _refuse(path, "logit_laplace models are not supported")
    if params.get("cb_entropy_compute", "group") != "group":
        _refuse(path, f"cb_entropy_compute {params['cb_entropy_compute']!r} is not supported, only 'group'")
    entropy = params.get("persample_entropy_compute", "group")
    if not isinstance(entropy, str) or entropy not in REFERENCE_LOSSES:
        _refuse(path, f"persample_entropy_compute is {entropy!r}; known: {', '.join(REFERENCE_LOSSES)}")

    encoder = _section(params, "vitconfig")
    decoder = _section(params, "dvitconfig") if params.get("dvitconfig") is not None else encoder
    for name, half in (("vitconfig", encoder), ("dvitconfig", decoder)):
        _require_known(half, VIT_KEYS, f"model.params.{name}", path)
        _require_supported(half, name, path)
    for key in ("image_size", "patch_size", "num_frames"):
        if encoder.get(key, 1) != decoder.get(key, 1):
            _refuse(path, f"{key} differs between encoder and decoder")

    clamp_range = params.get("clamp_range")
    if clamp_range is None:
        # The reference's script adds it when training starts, from the range that its data have.
        if not isinstance(data.get("zero_mean"), bool):
            _refuse(path, "data.zero_mean is missing; the range of the pixels follows from it")
        clamp_range = (-1.0, 1.0) if data["zero_mean"] else (0.0, 1.0)
    losses: dict[str, Any] = {
        key: params[key] for key in ("beta", "gamma0", "gamma", "zeta", "inv_temperature") if key in params
    }
    losses |= REFERENCE_LOSSES[entropy]
    try:
        return BSQViTConfig(
            preset="reference",
            image_size=encoder.get("image_size", 0),
            patch_size=encoder.get("patch_size", 0),
            max_frames=encoder.get("num_frames", 1),
            bits_per_token=params.get("embed_dim", 0),
            group_size=params.get("embed_group_size", 9),
            encoder=_transformer(encoder),
            decoder=_transformer(decoder),
            head_width=decoder.get("dim_ffn_output", 3072) if decoder.get("use_ffn_output", True) else None,
            l2_norm=params.get("l2_norm", False),
            post_q_l2_norm=params.get("post_q_l2_norm", False),
            clamp_range=(float(clamp_range[0]), float(clamp_range[1])),
            losses=QuantizerLossConfig(**losses),
            trained=True,
        )
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: a value of the config has the wrong type: {error}.") from error


def _transformer(half: dict[str, Any]) -> TransformerConfig:
    scale = half.get("ls_init_value")
    return TransformerConfig(
        width=half.get("width", 0),
        layers=half.get("layers", 0),
        heads=half.get("heads", 0),
        mlp_ratio=float(half.get("mlp_ratio", 4.0)),
        layer_scale=None if scale is None else float(scale),
        ln_pre=half.get("ln_pre", True),
    )


def _require_supported(half: dict[str, Any], name: str, path: Path) -> None:
    frames = half.get("num_frames", 1)
    mask = str(half.get("mask_type", "none")).lower()
    for key, value in (("ln_post", True), ("act_layer", "gelu"), ("norm_layer", "layer_norm")):
        if half.get(key, value) != value:
            _refuse(path, f"{name}.{key} is {half[key]!r}; only {value!r} is supported")
    block = half.get("mask_block_size", -1)
    if not isinstance(block, int) or block > 0:
        _refuse(path, f"{name}.mask_block_size is {block!r}; only a frame's tokens (-1) are supported")
    if frames != 1 and not half.get("cross_frames", True):
        _refuse(path, f"{name}.cross_frames is false; frames that do not see each other are not supported")
    if mask not in (("none", "block-causal") if frames == 1 else ("block-causal",)):
        _refuse(path, f"{name}.mask_type is {mask!r}; clips need 'block-causal'")


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _our_name(name: str) -> str:
    for theirs, ours in RENAMED:
        if theirs in name:
            name = name.replace(theirs, ours, 1)
    return name


def _section(parent: object, key: str) -> dict[str, Any]:
    section = parent.get(key) if isinstance(parent, Mapping) else None
    if not isinstance(section, dict):
        raise SpecError(f"the section {key!r} is missing; give the config the model was trained with.")
    return section


def _require_known(section: dict[str, Any], known: frozenset[str], where: str, path: Path) -> None:
    for key in section:
        if key not in known:
            _refuse(path, f"unknown key {printable(str(key))!r} in {where}.{nearest_name(str(key), known)}")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path}: {reason}.")
