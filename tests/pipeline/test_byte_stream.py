"""Reading shards: every byte once, through broken connections, compressed or not, and never from two versions."""

import contextlib
import gzip
import http.server
import io
import os
import socket
import tarfile
import threading
import time
import zlib
from email.utils import formatdate

import fsspec
import pytest

from pipeline.byte_stream import RetryPolicy, open_shard
from pipeline.group import group_samples
from pipeline.queues import Stopped
from pipeline.read_faults import may_pass
from pipeline.tar import read_members
from schemas.errors import (
    GzipCorrupt,
    ShardForbidden,
    ShardNotFound,
    ShardUnreadable,
    SourceChanged,
    TarCorrupt,
    TarTruncated,
)

QUICK = RetryPolicy(attempts=6, first_wait_seconds=0.01, longest_wait_seconds=0.05)
PAYLOAD = bytes(range(256)) * 4000 + b"the end"


def read_all(stream, step=100_000):
    return b"".join(iter(lambda: stream.read(step), b""))


def make_tar(num_samples=20, size=20_000):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(num_samples):
            info = tarfile.TarInfo(f"{number:03d}.jpg")
            info.size = size
            archive.addfile(info, io.BytesIO(bytes([number]) * size))
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves one object with ranges; each GET first asks `faults` for something to go wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.tag, self.modified = PAYLOAD, '"1"', formatdate(1_000_000, usegmt=True)
        self.faults, self.ranges, self.takes_ranges, self.says_length, self.refusal = [], [], True, True, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/a.tar"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.reply(only_head=True)

    def do_GET(self):
        self.reply()

    def reply(self, only_head=False):
        server = self.server
        body, status = server.body, 200
        span = self.headers.get("Range")
        if span and server.takes_ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            body, status = body[int(first) : int(last) + 1], 206
            server.ranges.append(int(first))
        fault = server.faults.pop(0) if server.faults and not only_head else None
        if (isinstance(fault, int) and fault >= 400) or server.refusal:
            body, status = b"", server.refusal or fault
        self.send_response(status)
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Last-Modified", server.modified)
        if server.says_length or status != 200:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if only_head:
            return
        if callable(fault):
            body = fault(server, body)
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def open_quickly(url, **arguments):
    return open_shard(url, retry=QUICK, range_bytes=arguments.pop("range_bytes", 200_000), **arguments)


def test_a_local_file_is_read_whole(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(PAYLOAD)
    with open_shard(str(path)) as stream:
        assert (stream.size, stream.etag, stream.compression) == (len(PAYLOAD), "", "")
        assert stream.read(10) == PAYLOAD[:10] and stream.skip(500_000) == 500_000
        assert read_all(stream) == PAYLOAD[500_010:]
        assert stream.skip(5) == 0
        stream.check_source(damaged=True)
    with open_shard(path.as_uri()) as stream:
        assert stream.skip(len(PAYLOAD) + 5) == len(PAYLOAD)


@pytest.mark.parametrize("range_bytes", [1000, 99_999, 200_000, len(PAYLOAD), 1 << 30])
def test_a_remote_object_is_read_in_ranges(server, range_bytes):
    body = server.body = PAYLOAD if range_bytes > 1000 else PAYLOAD[:20_500]
    with open_quickly(server.url, range_bytes=range_bytes) as stream:
        assert (stream.size, stream.etag) == (len(body), '"1"')
        assert read_all(stream) == body
        stream.check_source(damaged=True)
        assert (stream.num_retries, stream.bytes_read) == (0, len(body))
    assert server.ranges[: -(-len(body) // range_bytes)] == list(range(0, len(body), range_bytes))


def test_other_filesystems_and_layers_are_read():
    fsspec.filesystem("memory").pipe_file("/byte_stream/a.tar", PAYLOAD)
    for url in ("memory://byte_stream/a.tar", "simplecache::memory://byte_stream/a.tar"):
        with open_quickly(url) as stream:
            assert read_all(stream) == PAYLOAD and stream.size == len(PAYLOAD)


def test_broken_connections_are_resumed_at_their_byte(server):
    server.faults = [None, "cut", "cut", 503, None, 500, "cut"]
    with open_quickly(server.url) as stream:
        assert read_all(stream) == PAYLOAD
        assert stream.num_retries == 5
        stream.check_source()
    assert server.ranges.count(0) == 1, "the first range came whole and is not asked for again"


def test_retries_end(server):
    server.faults = ["cut"] * 100
    with pytest.raises(ShardUnreadable) as caught:
        open_quickly(server.url)
    assert len(server.faults) == 100 - QUICK.attempts and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "error", "num_requests"), [(404, ShardNotFound, 1), (403, ShardForbidden, 1), (401, ShardForbidden, 1),
                                          (400, ShardUnreadable, 1), (429, ShardUnreadable, QUICK.attempts)],
)  # fmt: skip
def test_refusals_are_told_apart_and_only_passing_ones_repeated(server, status, error, num_requests):
    server.faults = [status] * 20
    with pytest.raises(error) as caught:
        open_quickly(server.url.replace("http://", "http://user:password@") + "?sig=geheim")
    assert 20 - len(server.faults) == num_requests
    assert "password" not in str(caught.value) and "geheim" not in str(caught.value)


@pytest.mark.parametrize(("status", "error"), [(404, ShardNotFound), (403, ShardForbidden), (503, ShardUnreadable)])
def test_refusals_are_told_apart_from_the_first_question_on(server, status, error):
    server.refusal = status
    with pytest.raises(error):
        open_quickly(server.url)


def test_a_source_that_changes_between_ranges_is_never_mixed(server):
    def change(server, body):
        server.body, server.tag = bytes(len(PAYLOAD)), '"2"'
        return body

    server.faults = [None, change]
    with open_quickly(server.url) as stream:
        read_all(stream)
        with pytest.raises(SourceChanged):
            stream.check_source()


def test_a_source_that_changed_is_noticed_when_it_is_opened_again(server):
    def change(server, body):
        server.body, server.tag = bytes(len(PAYLOAD)), '"2"'
        return body

    server.faults = [None, change, "cut"]
    with pytest.raises(SourceChanged), open_quickly(server.url) as stream:
        read_all(stream)


@pytest.mark.parametrize("says_length", [True, False])
def test_a_server_without_ranges_is_read_as_one_stream(server, says_length):
    server.takes_ranges, server.says_length = False, says_length
    with open_quickly(server.url) as stream:
        assert read_all(stream) == PAYLOAD
        assert stream.bytes_read == len(PAYLOAD)


def test_damage_on_the_way_is_another_attempt_and_damage_at_rest_is_reported(server):
    def damage(server, body):
        return bytes([body[0] ^ 1]) + body[1:]

    server.body = make_tar()
    starts = 512 + 20_000 + -20_000 % 512
    server.faults = [None, damage]
    with pytest.raises(ShardUnreadable, match="second time"), open_quickly(server.url, range_bytes=starts) as stream:
        list(read_members(stream))
    server.body = server.body[:starts] + b"X" + server.body[starts + 1 :]
    with pytest.raises(TarCorrupt), open_quickly(server.url, range_bytes=starts) as stream:
        list(read_members(stream))


def test_a_file_that_grows_while_it_is_read_is_no_damaged_archive(tmp_path):
    path, whole = tmp_path / "a.tar", make_tar()
    path.write_bytes(whole[:100_000])
    with open_shard(str(path)) as stream:
        members = read_members(stream)
        next(members)
        path.write_bytes(whole)
        with pytest.raises(SourceChanged):
            list(members)
    path.write_bytes(whole[:100_000])
    with open_shard(str(path)) as stream, pytest.raises(TarTruncated):
        list(read_members(stream))


def test_a_name_that_no_file_can_have_is_not_found_and_not_tried_again(tmp_path):
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    for name in ("x" * 300 + ".tar", "y" * 5000, "loop.tar"):
        with pytest.raises(ShardNotFound) as caught:
            open_shard(str(tmp_path / name))
        assert not may_pass(caught.value.__cause__)


def test_what_cannot_be_opened_is_told_apart(tmp_path):
    with pytest.raises(ShardNotFound):
        open_shard(str(tmp_path / "missing.tar"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardNotFound):
        open_shard(str(tmp_path / "file" / "a.tar"))
    with pytest.raises(ShardUnreadable, match="folder"):
        open_shard(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ShardUnreadable, match="pipe"):
        open_shard(str(tmp_path / "pipe"))
    with pytest.raises(ShardUnreadable, match="nosuch"):
        open_shard("nosuch://b/a.tar")
    with pytest.raises(ShardUnreadable):
        open_shard("http://127.0.0.1:9/a.tar", retry=QUICK)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_file_that_may_not_be_read_is_forbidden(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "a.tar").chmod(0)
    with pytest.raises(ShardForbidden):
        open_shard(str(tmp_path / "a.tar"))


def test_the_stop_flag_is_heard_while_a_server_is_silent(server):
    stop, release = threading.Event(), threading.Event()

    def silence(server, body):
        release.wait(30)
        return body

    server.faults = [silence]
    threading.Timer(0.3, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        open_quickly(server.url, stop=stop)
    assert time.monotonic() - began < 5
    release.set()


def test_the_stop_flag_is_heard_in_a_local_file(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(1 << 20))
    stop = threading.Event()
    with open_shard(str(path), stop=stop) as stream:
        stop.set()
        with pytest.raises(Stopped):
            read_all(stream)


# ---- compression


def test_gzip_is_known_by_its_content_and_may_have_many_members(tmp_path):
    path = tmp_path / "named.tar"
    parts = [PAYLOAD[start : start + 70_000] for start in range(0, len(PAYLOAD), 70_000)]
    path.write_bytes(b"".join(gzip.compress(part) for part in parts) + gzip.compress(b"") + bytes(1000))
    with open_shard(str(path)) as stream:
        assert stream.compression == "gzip" and stream.read(3) == PAYLOAD[:3]
        assert stream.skip(200_000) == 200_000
        assert read_all(stream) == PAYLOAD[200_003:]


def test_thousands_of_tiny_gzip_members_take_no_quadratic_time(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(b"x") * 50_000)
    began = time.monotonic()
    with open_shard(str(path)) as stream:
        assert len(read_all(stream)) == 50_000
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("where", ["trailer", "middle", "cut", "garbage"])
def test_a_damaged_gzip_stream_gives_what_came_before_and_says_where(tmp_path, where):
    whole = bytearray(gzip.compress(PAYLOAD[:300_000] + os.urandom(100_000)))
    if where == "trailer":
        whole[-6] ^= 1
    elif where == "middle":
        whole[len(whole) - 50_000 : len(whole) - 49_000] = b"\xff" * 1000
    elif where == "cut":
        del whole[-30_000:]
    else:
        whole += b"garbage behind the last member"
    path = tmp_path / "a.tar.gz"
    path.write_bytes(whole)
    pieces = []
    with open_shard(str(path)) as stream, pytest.raises(GzipCorrupt) as caught:
        while piece := stream.read(100):
            pieces.append(piece)
    good = b"".join(pieces)
    assert good[:300_000] == PAYLOAD[:300_000]
    assert caught.value.offset - 100 <= len(good) <= caught.value.offset
    assert len(good) >= {"trailer": 399_800, "middle": 340_000, "cut": 360_000, "garbage": 400_000}[where]


def test_a_gzip_bomb_is_passed_over_in_bounded_memory(tmp_path):
    import tracemalloc

    header = tarfile.TarInfo("bomb.jpg")
    header.size = 300 << 20
    compressor = zlib.compressobj(wbits=31)
    path = tmp_path / "a.tar.gz"
    with path.open("wb") as file:
        file.write(compressor.compress(header.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(300):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.compress(bytes(1024)) + compressor.flush())
    from schemas.jobspec import LimitsSpec

    tracemalloc.start()
    with open_shard(str(path)) as stream:
        (sample,) = group_samples(read_members(stream, LimitsSpec(max_member_bytes=1 << 20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(sample.failure).__name__ == "MemberTooLarge" and peak < 16 << 20


def test_a_gzip_shard_survives_broken_connections(server):
    server.body = gzip.compress(PAYLOAD, 1)
    server.faults = ["cut", "cut"]
    with open_quickly(server.url, range_bytes=1500) as stream:
        assert read_all(stream) == PAYLOAD


def test_zstd_is_read_where_its_package_is(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    whole = make_tar()
    path = tmp_path / "a.tar"
    frames = [zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in (whole[:99_999], whole[99_999:])]
    path.write_bytes(b"".join(frames))
    with open_shard(str(path)) as stream:
        assert stream.compression == "zstd" and len(list(group_samples(read_members(stream)))) == 20
    damaged = bytearray(path.read_bytes())
    damaged[len(frames[0]) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with open_shard(str(path)) as stream, pytest.raises((GzipCorrupt, TarCorrupt)):
        list(read_members(stream))
    path.write_bytes(frames[0] + frames[1][: len(frames[1]) // 2])
    with open_shard(str(path)) as stream, pytest.raises((GzipCorrupt, TarTruncated)):
        list(read_members(stream))


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "a.tar"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(ShardUnreadable, match="pip install zstandard"):
        open_shard(str(path))


# ---- S3


class Proxy(threading.Thread):
    """A TCP proxy that breaks each of the first `num_breaks` connections after `num_bytes` of answer."""

    def __init__(self, target, num_breaks=0, num_bytes=0):
        super().__init__(daemon=True)
        self.target, self.num_breaks, self.num_bytes, self.num_broken = target, num_breaks, num_bytes, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        with client, socket.create_connection(self.target) as upstream:
            asking = threading.Thread(target=self.pump, args=(client, upstream, False), daemon=True)
            asking.start()
            self.pump(upstream, client, True)
            asking.join()

    def pump(self, source, sink, is_answer):
        sent = 0
        try:
            while data := source.recv(16_384):
                if is_answer and self.num_broken < self.num_breaks and sent + len(data) > self.num_bytes:
                    self.num_broken += 1
                    break
                sink.sendall(data)
                sent += len(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def moto_server():
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()
    server.stop()


def s3_options(port):
    return {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}


def test_s3_objects_are_read_through_broken_connections(moto_server):
    import s3fs

    store = s3fs.S3FileSystem(**s3_options(moto_server[1]))
    store.mkdir("shards")
    store.pipe_file("shards/a.tar", PAYLOAD)
    proxy = Proxy(moto_server, num_breaks=12, num_bytes=60_000)
    with open_quickly("s3://shards/a.tar", storage_options=s3_options(proxy.port)) as stream:
        assert stream.etag == store.info("shards/a.tar")["ETag"]
        assert read_all(stream) == PAYLOAD
        stream.check_source()
    assert proxy.num_broken == 12
    proxy.listener.close()


def test_an_s3_object_that_is_replaced_while_it_is_read_is_noticed(moto_server):
    import s3fs

    store = s3fs.S3FileSystem(**s3_options(moto_server[1]))
    store.mkdir("changing")
    store.pipe_file("changing/a.tar", PAYLOAD)
    with pytest.raises(SourceChanged), open_quickly(
        "s3://changing/a.tar", storage_options=s3_options(moto_server[1])
    ) as stream:  # fmt: skip
        stream.read(10)
        time.sleep(0.2)
        store.pipe_file("changing/a.tar", bytes(len(PAYLOAD)))
        read_all(stream)
        stream.check_source()
    with pytest.raises(ShardNotFound):
        open_quickly("s3://changing/missing.tar", storage_options=s3_options(moto_server[1]))
