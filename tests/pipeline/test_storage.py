"""Storage: nothing half-written, one winner for a new name, and no credentials in any message."""

import os
import re
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.credentials import printable_error, printable_url
from pipeline.storage import open_storage
from schemas.errors import OutputError, OutputFull, OutputNotWritable, SpecError

SECRET = "wJalrXUtnFEMI/K7MDENG"
TEMPORARY = re.compile(r"\.\w.*\.\d+\.[0-9a-f]{16}\.tmp")


@pytest.fixture(scope="module")
def s3_options():
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "key": "testing",
        "secret": SECRET,
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}"},
    }
    server.stop()


@pytest.fixture(params=["local", "s3", "memory"])
def storage(request, tmp_path):
    if request.param == "local":
        return open_storage(str(tmp_path / "out"))
    if request.param == "memory":
        return open_storage(f"memory://{tmp_path.name}/out")
    options = request.getfixturevalue("s3_options")
    bucket = re.sub("[^a-z0-9]", "", tmp_path.name.lower()) + "bucket"
    store = open_storage(f"s3://{bucket}/out", options)
    store._fs.mkdir(bucket)
    return store


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_published_is_read_listed_and_deleted(storage):
    assert storage.list("tokens") == [] and not storage.exists("tokens/b.bin")
    storage.publish("tokens/b.bin", b"0123456789")
    storage.publish("tokens/a.bin", b"")
    storage.publish("tokens/deep/c.bin", b"c")
    assert storage.read_bytes("tokens/b.bin") == b"0123456789"
    assert storage.read_range("tokens/b.bin", 3, 4) == b"3456"
    assert storage.size("tokens/b.bin") == 10 and storage.exists("tokens/a.bin")
    assert storage.list("tokens") == ["a.bin", "b.bin"]
    assert storage.list("tokens", recursive=True) == ["a.bin", "b.bin", "deep/c.bin"]
    assert abs(storage.modified("tokens/b.bin") - time.time()) < 100
    storage.publish("tokens/b.bin", b"new")
    assert storage.read_bytes("tokens/b.bin") == b"new"
    assert storage.delete("tokens/b.bin") and not storage.delete("tokens/b.bin")
    assert storage.list("tokens") == ["a.bin"]


def test_a_folder_that_a_store_lists_as_itself_holds_no_file(s3_options):
    # As the consoles of object stores make folders.
    storage = open_storage("s3://folders/out", s3_options)
    storage._fs.mkdir("folders")
    for name in ("out/tokens/", "out/tokens/0000/"):
        storage._fs.call_s3("put_object", Bucket="folders", Key=name, Body=b"")
        assert storage.list("tokens", recursive=True) == storage.list("tokens") == []
    assert storage.entries() == ["tokens/"]


def test_reading_what_is_not_there_is_file_not_found(storage):
    for read in (storage.read_bytes, storage.size, storage.modified):
        with pytest.raises(FileNotFoundError):
            read("nothing.bin")
    assert storage.read_with_token("nothing.bin") is None


def test_a_new_name_is_won_once(storage):
    assert storage.create_only("ledger/0.jsonl", b"first")
    assert not storage.create_only("ledger/0.jsonl", b"second")
    assert storage.read_bytes("ledger/0.jsonl") == b"first"
    assert storage.list("ledger") == ["0.jsonl"] and storage.list() == []


def test_of_many_writers_of_a_new_name_one_wins(storage):
    if not storage.fenced:
        pytest.skip("this store cannot decide")
    for name in ("1.jsonl", "2.jsonl", "3.jsonl"):
        wins = race(8, lambda number, name=name: storage.create_only(name, b"writer %d" % number))
        assert wins.count(True) == 1
        assert storage.read_bytes(name) == b"writer %d" % wins.index(True)


def race(num_threads, action):
    results = [None] * num_threads
    gate = threading.Barrier(num_threads)

    def run(number):
        gate.wait()
        results[number] = action(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_a_swap_succeeds_once_for_one_token(storage):
    storage.create_only("lease.json", b"old")
    data, token, modified = storage.read_with_token("lease.json")
    assert data == b"old" and abs(modified - time.time()) < 100
    assert storage.write_if_token("lease.json", b"new", token)
    assert not storage.write_if_token("lease.json", b"late", token)
    assert storage.read_bytes("lease.json") == b"new"
    storage.delete("lease.json")
    assert not storage.write_if_token("lease.json", b"late", token)


def test_of_many_takeovers_one_wins(storage):
    if not storage.fenced:
        pytest.skip("this store cannot decide")
    storage.create_only("lease.json", b"old")
    _, token, _ = storage.read_with_token("lease.json")
    wins = race(6, lambda number: storage.write_if_token("lease.json", b"driver %d" % number, token))
    assert wins.count(True) == 1
    assert storage.read_bytes("lease.json") == b"driver %d" % wins.index(True)


def _create(folder, name, number, queue):
    queue.put((number, open_storage(folder).create_only(name, b"process %d" % number)))


def test_of_two_processes_one_wins_a_new_name(tmp_path):
    context = get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=_create, args=(str(tmp_path), "0.jsonl", n, queue)) for n in range(2)]
    for child in children:
        child.start()
    results = dict(queue.get(timeout=60) for _ in children)
    for child in children:
        child.join(60)
    assert sorted(results.values()) == [False, True]
    winner = next(number for number, won in results.items() if won)
    assert (tmp_path / "0.jsonl").read_bytes() == b"process %d" % winner


def test_stores_that_ignore_the_condition_are_found_out(s3_options, monkeypatch):
    storage = open_storage("s3://unfenced/out", s3_options)
    storage._fs.mkdir("unfenced")
    assert storage.fenced and storage.list() == []
    careless = open_storage("s3://unfenced/out", s3_options)
    put = careless._put
    monkeypatch.setattr(careless, "_put", lambda name, data, mode="overwrite": put(name, data))
    assert not careless.fenced
    assert careless.create_only("a", b"1") and not careless.create_only("a", b"2")
    assert not open_storage("memory://x").fenced


def test_a_put_whose_answer_was_lost_still_counts_as_won(s3_options, monkeypatch):
    storage = open_storage("s3://lost/out", s3_options, first_wait=0.01)
    storage._fs.mkdir("lost")
    assert storage.fenced
    put, calls = storage._put, []

    def lossy(name, data, **conditions):
        put(name, data, **conditions)
        calls.append(name)
        if len(calls) == 1:
            raise ConnectionResetError("the answer never came")

    monkeypatch.setattr(storage, "_put", lossy)
    assert storage.create_only("0.jsonl", b"mine")
    assert not storage.create_only("0.jsonl", b"other")
    assert storage.read_bytes("0.jsonl") == b"mine"


def test_nothing_is_visible_before_the_last_step(tmp_path):
    storage = open_storage(str(tmp_path))
    seen = []

    def look(step):
        (temporary,) = tmp_path.joinpath("tokens").iterdir()
        seen.append((step, storage.exists("tokens/a.bin"), storage.list("tokens"), temporary.read_bytes()))
        assert TEMPORARY.fullmatch(temporary.name)

    storage.publish("tokens/a.bin", b"whole", on_step=look)
    assert seen == [("after_temp", False, [], b"whole")]
    assert names_in(tmp_path / "tokens") == ["a.bin"]


def test_an_error_in_between_leaves_no_temporary(tmp_path):
    def fail(step):
        raise RuntimeError(step)

    storage = open_storage(str(tmp_path))
    with pytest.raises(RuntimeError, match="after_temp"):
        storage.publish("a.bin", b"x", on_step=fail)
    assert names_in(tmp_path) == []


def test_old_temporaries_are_swept_and_nothing_else(tmp_path):
    storage = open_storage(str(tmp_path))
    names = [".a.parquet.12.0123456789abcdef.tmp", "a.parquet", ".hidden", "b.tmp", ".c.tmp"]
    folder = tmp_path / "tokens"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (1000, 1000))
    (folder / ".new.12.0123456789abcdef.tmp").write_bytes(b"")
    assert storage.sweep_temporaries(older_than=time.time() - 100) == 1
    assert sorted(names_in(folder)) == sorted([*names[1:], ".new.12.0123456789abcdef.tmp"])
    assert storage.sweep_temporaries(older_than=0) == 0


def test_a_full_disk_leaves_no_partial_file(tmp_path):
    """A limit on file size stands in for a full disk: the same write fails half-way."""
    program = """
import resource, sys
from pipeline.storage import Storage, open_storage
from schemas.errors import OutputFull
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for write in (open_storage(sys.argv[1]).publish, open_storage(sys.argv[1]).create_only):
    try:
        write("a.bin", bytes(1 << 18))
    except OutputFull as error:
        print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(output) == 2 and all("a.bin" in line and "room" in line for line in output)
    assert names_in(tmp_path / "out") == []


def test_a_folder_that_cannot_be_made_is_not_writable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for url in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/1/nothing"):
        with pytest.raises(OutputNotWritable) as caught:
            open_storage(str(url)).publish("tokens/a.bin", b"x")
        assert len(str(caught.value).splitlines()) == 1 and "a.bin" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_folder_without_write_permission_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputNotWritable):
        open_storage(str(tmp_path)).publish("a.bin", b"x")
    tmp_path.chmod(0o700)


def test_a_name_that_is_a_folder_is_not_writable(tmp_path):
    (tmp_path / "a.bin" / "x").mkdir(parents=True)
    with pytest.raises(OutputNotWritable):
        open_storage(str(tmp_path)).publish("a.bin", b"x")
    assert names_in(tmp_path) == ["a.bin"]


def test_a_missing_bucket_is_named_and_no_secret_with_it(s3_options):
    storage = open_storage("s3://no-such-bucket/out", s3_options, attempts=2, first_wait=0.01)
    with pytest.raises(OutputNotWritable) as caught:
        storage.publish("a.bin", b"x")
    assert "no-such-bucket" in str(caught.value) and SECRET not in str(caught.value)


def test_objects_too_large_for_one_put_are_refused(monkeypatch):
    monkeypatch.setattr("pipeline.storage.object_store.MAX_PUT_BYTES", 10)
    with pytest.raises(OutputError, match="smaller shards"):
        open_storage("memory://x").publish("a.bin", bytes(11))


def test_names_never_leave_the_output(tmp_path):
    for name in ("../a", "/etc/passwd", "a//b", "a/../../b", "."):
        with pytest.raises(AssertionError):
            open_storage(str(tmp_path)).read_bytes(name)


def test_an_unknown_protocol_is_a_mistake_in_the_spec():
    with pytest.raises(SpecError, match="nosuch"):
        open_storage("nosuch://bucket/out")


def test_the_url_of_a_name_opens_it(tmp_path):
    assert open_storage(str(tmp_path)).url_of("a/b") == f"{tmp_path}/a/b"
    assert open_storage("memory://x/").url_of("a/b") == "memory://x/a/b"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/data/a@b/c?d#e.tar", "/data/a@b/c?d#e.tar"),
        ("s3://bucket/a b/c?.tar", "s3://bucket/a b/c?.tar"),
        ("s3://AKIA:abc/def@bucket/key", "s3://***@bucket/key"),
        ("https://user:pw@host:8080/a.tar", "https://***@host:8080/a.tar"),
        ("http://127.0.0.1:8080/a@b.tar", "http://127.0.0.1:8080/a@b.tar"),
        ("https://h/a.tar?X-Amz-Signature=abc&versionId=7", "https://h/a.tar?X-Amz-Signature=***&versionId=7"),
        ("https://h/a.tar?sometoken", "https://h/a.tar?***"),
        ("https://h/a.tar#access_token=abc", "https://h/a.tar#***"),
        ("s3://b/a.tar?token=abc", "s3://b/a.tar?token=***"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("abfs://u:p@account/a", "abfs://***@account/a"),
        ("simplecache::https://u:p@h/a?t=1", "simplecache::https://***@h/a?t=***"),
        ("zip://a.tar::s3://k:s@b/z.zip", "zip://a.tar::s3://***@b/z.zip"),
        ("http://[::1", "http://[::1"),
    ],
)
def test_urls_are_shown_without_credentials(url, shown):
    assert printable_url(url) == shown


def test_errors_are_shown_without_credentials():
    options = {"key": "AKIAEXAMPLE", "client_kwargs": {"aws_secret_access_key": SECRET}, "anon": False}
    error = OSError(f"403 for https://u:p@h/x?sig=1 with AKIAEXAMPLE and {SECRET}\nsecond line")
    shown = printable_error(error, options)
    assert SECRET not in shown and "AKIA" not in shown and "u:p" not in shown and "sig=1" not in shown
    assert "\n" not in shown and "403" in shown


def test_full_and_unwritable_are_told_apart(tmp_path, monkeypatch):
    import errno

    storage = open_storage(str(tmp_path))
    for number, expected in ((errno.ENOSPC, OutputFull), (errno.EDQUOT, OutputFull), (errno.EROFS, OutputNotWritable),
                             (errno.EACCES, OutputNotWritable), (errno.EIO, OutputError)):  # fmt: skip

        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch, pytest.raises(OutputError) as caught:
            patch.setattr(os, "write", refuse)
            storage.publish("a.bin", b"x")
        assert type(caught.value) is expected
    assert list(Path(tmp_path).iterdir()) == []


def test_what_lies_below_a_file_is_not_there_and_cannot_be_listed_or_written(tmp_path):
    (tmp_path / "file.txt").write_bytes(b"x")
    storage = open_storage(str(tmp_path / "file.txt"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("job.json")
    assert not storage.exists("job.json")
    for refused in (storage.entries, lambda: storage.publish("a.bin", b"x"), lambda: storage.create_only("b", b"x")):
        with pytest.raises(OutputNotWritable):
            refused()
