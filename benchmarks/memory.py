"""Does memory grow with the number of shards, or with the size of one sample?

Prints the peak resident memory of whole jobs (one process, the stub encoder at 256 px): 1, 10 and 50 shards of
photographs, and one shard that holds a clip of 3840x2160 px among photographs.

    python -m benchmarks.memory"""

from __future__ import annotations

import argparse
import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import av
import numpy as np

from benchmarks.photo_shards import photographs, write_shards

IMAGES_PER_SHARD = 200
_JOB = """
import json, resource, sys
from jobs.start import start_job
from schemas.jobspec import parse_spec
shards, out = json.loads(sys.argv[1]), sys.argv[2]
values = {"shards": shards, "out": out, "tokenizer": "stub", "device": "cpu", "preprocess": {"size": 256}}
outcome = start_job(parse_spec(values, source="benchmark"), runner="in-process")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"peak": peak, "samples": outcome.progress.samples, "failed": outcome.progress.failed_samples}))
"""


def large_clip(num_frames: int = 48) -> bytes:
    """An H.264 clip of 3840x2160 px that pans over a photograph."""
    with av.open(io.BytesIO(photographs()[0])) as container:
        photo = next(container.decode(video=0)).reformat(4096, 2304, format="rgb24").to_ndarray()
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "23"}
        for number in range(num_frames):
            window = np.ascontiguousarray(photo[number * 2 : number * 2 + 2160, number * 4 : number * 4 + 3840])
            for packet in stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return sink.getvalue()


def peak_megabytes(shards: list[str], folder: Path) -> tuple[float, int]:
    """Peak resident memory in MB of a job in a process of its own, and its number of samples."""
    command = [sys.executable, "-c", _JOB, json.dumps(shards), str(folder / f"out-{len(list(folder.iterdir()))}")]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert result["failed"] == 0, result
    return result["peak"], result["samples"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory(prefix="bsqtok-benchmark-") as name:
        folder = Path(name)
        shards = write_shards(folder / "shards", 50 * IMAGES_PER_SHARD, IMAGES_PER_SHARD)
        clip = large_clip()
        with_clip = folder / "with-clip.tar"
        with_clip.write_bytes(Path(shards[0]).read_bytes())
        with tarfile.open(with_clip, "a", format=tarfile.USTAR_FORMAT) as tar:
            member = tarfile.TarInfo("large.mp4")
            member.size = len(clip)
            tar.addfile(member, io.BytesIO(clip))
        print(f"{platform.machine()}, Python {platform.python_version()}, {IMAGES_PER_SHARD} photographs a shard\n")
        print(f"{'job':32}{'samples':>10}{'peak RSS, MB':>14}")
        for label, chosen in [
            ("1 shard", shards[:1]),
            ("10 shards", shards[:10]),
            ("50 shards", shards),
            (f"1 shard with a 4K clip ({len(clip) / 1e6:.1f} MB)", [str(with_clip)]),
        ]:
            peak, samples = peak_megabytes(chosen, folder)
            print(f"{label:32}{samples:10,}{peak:14,.0f}", flush=True)


if __name__ == "__main__":
    main()
