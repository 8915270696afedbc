"""Says what a .bsq file holds and what it takes."""

from __future__ import annotations

from jobs.display import counted, field_line
from pipeline.storage import Storage
from schemas.bsqfile import ARITHMETICS, MAX_FILE_BYTES, BsqFile, CodedItem, parse_bsq
from schemas.errors import StreamError, printable

SHOWN_ITEMS = 5


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
        field_line("tokens", f"{file.num_tokens:,} of {file.bits} bits, {file.grid[0]} x {file.grid[1]} for each frame "
                   f"of {file.tile_px[1]} x {file.tile_px[0]} px; clips of up to {counted(file.clip_frames, 'frame')}"),
        field_line("size", f"{num_bytes:,} bytes: header {overhead:,}, payload {file.payload_bytes:,}"),
        field_line("rate", f"{8 * file.payload_bytes / file.num_tokens:.3f} bits per token, "
                   f"{8 * num_bytes / file.num_pixels:.3f} bits per pixel "
                   f"({8 * file.payload_bytes / file.num_pixels:.3f} for the payload alone)"),
        field_line("tokenizer", f"weights {file.tokenizer.hex()[:8]}"),
        field_line("prior", f"weights {file.prior.hex()[:8]}"),
        field_line("arithmetic", f"{ARITHMETICS[file.arithmetic]}, {file.lanes} lanes, from lane {file.first_lane} on"),
        field_line("checksum", f"{file.tokens_crc32:08x} of the tokens"),
    ]  # fmt: skip
    if file.is_pack:
        lines += [f"  {printable(item.name)}: {_describe_item(file, item)}" for item in file.items[:SHOWN_ITEMS]]
        if len(file.items) > SHOWN_ITEMS:
            lines.append(f"  and {len(file.items) - SHOWN_ITEMS:,} more")
    return "\n".join(lines)


def _describe_item(file: BsqFile, item: CodedItem) -> str:
    rows, columns = file.tiles(item)
    tiles = f", in {rows} x {columns} tiles" if rows * columns > 1 else ""
    size = f"{item.width} x {item.height} px{tiles}"
    if item.frames == 1:
        return f"a picture of {size}"
    rate = f" at {1e6 / item.step_us:.4g} fps" if item.step_us else ""
    return f"a clip of {item.frames} frames{rate} from {item.start_ms / 1e3:.3f} s, {size}"
