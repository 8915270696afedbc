"""Checkpoints in and out: a folder with config.json, model.safetensors and an optional card.md.

The one file of the package that reads and writes.  Torch and fsspec are imported where they are needed, so that a
driver learns a stored tokenizer's config and weight hash without them."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from schemas.errors import CheckpointError, SpecError, nearest_name, printable
from tokenizer.config import PRESETS, BSQViTConfig, preset_config
from tokenizer.weightfile import hash_tensors, read_tensor_entries, weight_sha256_of_buffer

if TYPE_CHECKING:
    import torch

    from tokenizer.bsqvit import BSQViT

CONFIG_FILE, MODEL_FILE, CARD_FILE = "config.json", "model.safetensors", "card.md"
SHIPPED = Path(__file__).parent / "weights"
"""One folder per tokenizer that comes with the package."""
DEFAULT = "vit-small-128-l18"
UNTRAINED = "untrained:"
"""Before a preset's name: that model with weights drawn from seed 0."""
MAX_CONFIG_BYTES = 1 << 20
MAX_MODEL_BYTES = 8 << 30
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHOWN_NAMES = 4
"""Tensor names that an error lists before it only counts."""


class CheckpointFiles(NamedTuple):
    """The two files of a checkpoint, as bytes; written to a folder they are a checkpoint again."""

    config_json: bytes
    model_safetensors: bytes
    where: str
    """Name or place for messages, without credentials."""

    def config(self) -> BSQViTConfig:
        """The architecture; raises CheckpointError where config.json cannot be used."""
        try:
            return BSQViTConfig.from_json_dict(json.loads(self.config_json))
        except (ValueError, RecursionError, SpecError) as error:
            raise CheckpointError(f"{self.where}/{CONFIG_FILE}: {error}") from error

    def weight_sha256(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor in name order."""
        return weight_sha256_of_buffer(self.model_safetensors, f"{self.where}/{MODEL_FILE}")


def from_pretrained(
    source: str | os.PathLike[str] = "default",
    *,
    image_size: int | None = None,
    max_frames: int | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> BSQViT:
    """A tokenizer in eval mode, from a shipped name, a folder or a URL, or `untrained:PRESET`.

    `image_size` and `max_frames` change the stored ones on request: position embeddings are interpolated (bicubic),
    temporal ones are cut or continued with zeros, so that an image tokenizer starts a video one.
    `compute_dtype` is that of `BSQViT`, fp32 unless given; parameters are fp32 whatever the file holds.
    Raises CheckpointError where the source is unknown, unreadable, damaged or of another architecture."""
    files = read_checkpoint(source, storage_options=storage_options)
    return build_model(files, image_size=image_size, max_frames=max_frames, device=device, compute_dtype=compute_dtype)


def read_checkpoint(
    source: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> CheckpointFiles:
    """The files behind a name, folder or URL; nothing of them is believed yet."""
    name = os.fspath(source)
    if name == "default":
        name = DEFAULT if (SHIPPED / DEFAULT).is_dir() else UNTRAINED + DEFAULT
    if name.startswith(UNTRAINED):
        return _untrained(name)
    if name in shipped_names():
        return read_folder(SHIPPED / name, name)
    if "://" in name or "::" in name:
        return read_url(name, storage_options or {})
    if isinstance(source, os.PathLike) or os.sep in name or Path(name).is_dir():
        return read_folder(Path(name), printable(name))
    if name in PRESETS:
        raise CheckpointError(
            f"There are no trained weights named {name!r}; {UNTRAINED + name!r} gives that model with random weights."
        )
    valid = valid_names()
    # Also by the bare name of a preset, which is what people remember.
    suggestion = nearest_name(name, valid) or nearest_name(name, PRESETS).replace("'", f"'{UNTRAINED}", 1)
    raise CheckpointError(
        f"There is no tokenizer {printable(name)!r}.{suggestion} Give one of {', '.join(valid)}, "
        "or the path or URL of a checkpoint's folder."
    )


def shipped_names() -> list[str]:
    """Names of the trained tokenizers that come with the package."""
    if not SHIPPED.is_dir():
        return []
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / CONFIG_FILE).is_file())


def valid_names() -> list[str]:
    """Every name that `from_pretrained` takes besides paths and URLs."""
    return ["default", *shipped_names(), *(UNTRAINED + preset for preset in PRESETS)]


def build_model(
    files: CheckpointFiles,
    *,
    image_size: int | None = None,
    max_frames: int | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
) -> BSQViT:
    """The model of a checkpoint's files, in eval mode; see `from_pretrained`."""
    import torch

    from tokenizer.bsqvit import BSQViT

    config = files.config()
    weights = read_weights(files, expected_shapes(config))
    config, weights = _adapted(config, weights, image_size or config.image_size, max_frames or config.max_frames)

    model = BSQViT(config, seed=None, compute_dtype=compute_dtype or torch.float32)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device).eval()


def save_checkpoint(
    model: BSQViT,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    trained: bool | None = None,
    card: str | None = None,
) -> None:
    """Write a model into a local folder, made if need be; each file appears whole or not at all.

    `dtype` bfloat16 halves the file; fp32 unless given. `trained` replaces the config's flag."""
    config = model.config if trained is None else dataclasses.replace(model.config, trained=trained)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # The config last: a folder without it is not taken for a checkpoint.
    (path / CONFIG_FILE).unlink(missing_ok=True)
    write_whole(path / MODEL_FILE, model_bytes(model.state_dict(), dtype))
    if card is not None:
        write_whole(path / CARD_FILE, card.encode())
    write_whole(path / CONFIG_FILE, _config_bytes(config))


def weight_sha256(weights: torch.nn.Module | Mapping[str, torch.Tensor]) -> str:
    """Weight hash of a model or of its state dict as it is in memory, in the dtype that it has there."""
    import torch

    state: Mapping[str, torch.Tensor] = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    return hash_tensors(
        (name, DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), _tensor_bytes(tensor))
        for name, tensor in sorted(state.items())
    )


def expected_shapes(config: BSQViTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a config."""
    from tokenizer.bsqvit import BSQViT

    return {name: tuple(tensor.shape) for name, tensor in BSQViT(config, seed=None).state_dict().items()}


def read_weights(files: CheckpointFiles, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint in fp32.  Raises CheckpointError where names, shapes or dtypes are others."""
    from safetensors.torch import load

    where = f"{files.where}/{MODEL_FILE}"
    # Names and shapes are compared before any tensor exists: a config cannot make us allocate more than the file holds.
    found = {each.name: (each.dtype, each.shape) for each in read_tensor_entries(files.model_safetensors, where)}
    for name, (dtype, _) in found.items():
        if dtype not in DTYPE_NAMES.values():
            raise CheckpointError(f"{where}: tensor {printable(name)!r} is {dtype}; weights are F32, BF16 or F16.")
    require_matching(expected, {name: shape for name, (_, shape) in found.items()}, where)
    return {name: tensor.float() for name, tensor in load(files.model_safetensors).items()}


def require_matching(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError naming tensors that are missing, unexpected or of another shape."""
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("missing", expected.keys() - found.keys()),
            ("unexpected", found.keys() - expected.keys()),
        )
        if names
    ]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            problems.append(f"{name} has shape {list(found[name])} instead of {list(expected[name])}")
            break
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit the config: {'; '.join(problems)}.")


def shown_url(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _adapted(
    config: BSQViTConfig, weights: dict[str, torch.Tensor], image_size: int, max_frames: int
) -> tuple[BSQViTConfig, dict[str, torch.Tensor]]:
    import torch
    from torch.nn import functional

    new = dataclasses.replace(config, image_size=image_size, max_frames=max_frames)
    for half, width in (("encoder", config.encoder.width), ("decoder", config.decoder.width)):
        position, temporal = f"{half}.transformer.position", f"{half}.transformer.temporal"
        if new.grid != config.grid:
            plane = weights[position].T.reshape(1, width, *config.grid)
            plane = functional.interpolate(plane, new.grid, mode="bicubic", antialias=True)
            weights[position] = plane.reshape(width, -1).T.contiguous()
        old = weights.pop(temporal, torch.zeros(1, width))
        if max_frames > 1:
            weights[temporal] = functional.pad(old[:max_frames], (0, 0, 0, max(0, max_frames - len(old))))
    return new, weights


def _untrained(name: str) -> CheckpointFiles:
    from tokenizer.bsqvit import BSQViT

    preset = name.removeprefix(UNTRAINED)
    try:
        config = preset_config(preset)
    except SpecError as error:
        raise CheckpointError(str(error)) from error
    return CheckpointFiles(_config_bytes(config), model_bytes(BSQViT(config).state_dict(), None), name)


def read_folder(folder: Path, where: str) -> CheckpointFiles:
    """The files of a local folder.  Raises CheckpointError where they cannot be read or are too large."""
    contents = []
    for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (MODEL_FILE, MAX_MODEL_BYTES)):
        try:
            size = (folder / name).stat().st_size
            _require_size(size, limit, f"{where}/{name}")
            contents.append((folder / name).read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{where}: no weights can be read here ({name}: {error.strerror or type(error).__name__}). "
                "Name a folder that has config.json and model.safetensors."
            ) from error
    return CheckpointFiles(contents[0], contents[1], where)


def read_url(url: str, storage_options: Mapping[str, Any]) -> CheckpointFiles:
    """The files of a folder in any store.  Raises CheckpointError, without credentials."""
    import fsspec

    where = shown_url(url.rstrip("/"))
    contents = []
    try:
        fs, folder = fsspec.core.url_to_fs(url.rstrip("/"), **storage_options)
        for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (MODEL_FILE, MAX_MODEL_BYTES)):
            _require_size(int(fs.size(f"{folder}/{name}")), limit, f"{where}/{name}")
            contents.append(bytes(fs.cat_file(f"{folder}/{name}")))
    except CheckpointError:
        raise
    # Every store brings its own family of errors, and their text may hold credentials: only the class is told.
    except Exception as error:  # noqa: BLE001
        raise CheckpointError(f"{where}: the checkpoint cannot be read ({type(error).__name__}).") from None
    return CheckpointFiles(contents[0], contents[1], where)


def _require_size(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise CheckpointError(f"{where}: {size:,} bytes; at most {limit:,} are read.")


def _config_bytes(config: BSQViTConfig) -> bytes:
    return (json.dumps(config.to_json_dict(), indent=2) + "\n").encode()


def model_bytes(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> bytes:
    """A safetensors file of weights, in fp32 unless told."""
    import torch
    from safetensors.torch import save

    return save(
        {name: tensor.detach().to("cpu", dtype or torch.float32).contiguous() for name, tensor in state.items()}
    )


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _some(names: Iterable[str]) -> str:
    ordered = sorted(printable(name) for name in names)
    rest = len(ordered) - SHOWN_NAMES
    return ", ".join(ordered[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
