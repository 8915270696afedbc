"""Says what a .bsq file holds and what it takes, and what a prior is."""

from __future__ import annotations

import json

from jobs.display import describe_bytes
from pipeline.storage import Storage
from schemas.bsqfile import ARITHMETICS, MAX_FILE_BYTES, BsqFile, CodedItem, parse_bsq
from schemas.errors import StreamError, printable
from tokenizer.checkpoint import CONFIG_FILE, MODEL_FILE, CheckpointFiles
from tokenizer.prior_checkpoint import prior_config

SHOWN_ITEMS = 5
_WIDTH = 14


def describe_bsq(storage: Storage, name: str) -> str:
    """Header and rate of a .bsq file.  Raises StreamError, in one line, where it is damaged."""
    what = storage.printable(name)
    num_bytes = storage.size(name)
    if num_bytes > MAX_FILE_BYTES:
        raise StreamError(f"{what}: {num_bytes:,} bytes; at most {MAX_FILE_BYTES:,} are read.")
    file = parse_bsq(storage.read_bytes(name), what)
    kind = f"a pack of {len(file.items):,} items" if file.is_pack else _describe_item(file, file.items[0])
    overhead = num_bytes - file.payload_bytes
    lines = [
        f"{what}: {kind}",
        _field("tokens", f"{file.num_tokens:,} of {file.bits} bits, {file.grid[0]} x {file.grid[1]} for each frame of "
               f"{file.tile_px[1]} x {file.tile_px[0]} px; clips of up to {file.clip_frames} frames"),
        _field("size", f"{num_bytes:,} bytes: header {overhead:,}, payload {file.payload_bytes:,}"),
        _field("rate", f"{8 * file.payload_bytes / file.num_tokens:.3f} bits per token, "
               f"{8 * num_bytes / file.num_pixels:.3f} bits per pixel ({8 * file.payload_bytes / file.num_pixels:.3f} "
               "for the payload alone)"),
        _field("tokenizer", f"weights {file.tokenizer.hex()[:8]}"),
        _field("prior", f"weights {file.prior.hex()[:8]}"),
        _field("arithmetic", f"{ARITHMETICS[file.arithmetic]}, {file.lanes} lanes, from lane {file.first_lane} on"),
        _field("checksum", f"{file.tokens_crc32:08x} of the tokens"),
    ]  # fmt: skip
    if file.is_pack:
        lines += [f"  {printable(item.name)}: {_describe_item(file, item)}" for item in file.items[:SHOWN_ITEMS]]
        if len(file.items) > SHOWN_ITEMS:
            lines.append(f"  and {len(file.items) - SHOWN_ITEMS:,} more")
    return "\n".join(lines)


def is_prior(config_json: bytes) -> bool:
    """Whether a config.json is that of a prior, not of a tokenizer."""
    try:
        config = json.loads(config_json)
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("model") == "prior"


def describe_prior(storage: Storage) -> str:
    """What the prior in a folder is.  Raises CheckpointError where it cannot be used."""
    files = CheckpointFiles(storage.read_bytes(CONFIG_FILE), storage.read_bytes(MODEL_FILE), storage.url)
    config = prior_config(files)
    trained = "" if config.trained else ", random weights: it was never trained"
    return "\n".join(
        [
            f"{storage.url}: prior over tokens ({config.preset}), weights {files.weight_sha256()[:8]}{trained}",
            _field("predicts", f"{config.bits_per_token} bits in groups of {config.group_size}, {config.grid[0]} x "
                   f"{config.grid[1]} tokens for each frame, clips of up to {config.max_frames} frames"),
            _field("from", f"the tokens of {config.context_frames} frames before"),
            _field("tokenizer", f"weights {config.tokenizer_sha256[:8] or 'not known'}"),
            _field("size", f"width {config.width}, {config.layers} layers, {describe_bytes(storage.size(MODEL_FILE))}"),
        ]
    )  # fmt: skip


def _describe_item(file: BsqFile, item: CodedItem) -> str:
    rows, columns = file.tiles(item)
    tiles = f", in {rows} x {columns} tiles" if rows * columns > 1 else ""
    size = f"{item.width} x {item.height} px{tiles}"
    if item.frames == 1:
        return f"a picture of {size}"
    rate = f" at {1e6 / item.step_us:.4g} fps" if item.step_us else ""
    return f"a clip of {item.frames} frames{rate} from {item.start_ms / 1e3:.3f} s, {size}"


def _field(name: str, text: str) -> str:
    return f"  {name:<{_WIDTH}} {text}"
