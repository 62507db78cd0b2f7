"""Storage over files and over S3 (moto's server and Swift, real HTTP), with a proxy where the network must misbehave."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from counterfake.errors import (
    ConfigError,
    CorruptError,
    NotFoundError,
    StorageError,
    StorageTimeoutError,
)
from counterfake.storage import Store, capabilities, deadlines, open_store, probe, write_atomic
from counterfake.storage import s3 as s3_store
from tests.chaos.proxy import FaultProxy

SLACK_SECONDS = 5.0  # a busy machine makes clients slowly; attempts that know no deadline take 12 s


def _is_moto(store: Store) -> bool:
    return not store.is_local and os.environ.get("AWS_ACCESS_KEY_ID") == "test"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _store(name: str, request: pytest.FixtureRequest) -> Store:
    if name == "file":
        return open_store((request.getfixturevalue("tmp_path") / "store").as_uri())
    return open_store(f"{request.getfixturevalue(name).uri}/some/prefix")


@pytest.fixture(params=["file", "s3", "swift"])
def store(request: pytest.FixtureRequest) -> Store:
    return _store(request.param, request)


@pytest.fixture(params=["file", "s3"])
def atomic(request: pytest.FixtureRequest) -> Store:
    """A store whose put-if-absent has one winner; Swift's has not."""
    return _store(request.param, request)


def test_what_is_put_is_read_listed_and_deleted(store: Store) -> None:
    store.put("a/one", b"1")
    store.put("a/two", b"22")
    store.put("b", b"333")
    assert store.read("a/two") == b"22"
    assert store.exists("b")
    assert not store.exists("a")
    assert [(entry.key, entry.size) for entry in store.list()] == [("a/one", 1), ("a/two", 2), ("b", 3)]
    assert [entry.key for entry in store.list("a/t")] == ["a/two"]
    assert abs(store.list("b")[0].modified - time.time()) < 60
    store.delete("b")
    store.delete("b")
    assert not store.exists("b")
    assert store.list("nothing/here") == []


def test_put_replaces_and_put_if_absent_does_not(store: Store) -> None:
    store.put("key", b"old")
    store.put("key", b"new")
    assert not store.put_if_absent("key", b"newer")
    assert store.read("key") == b"new"
    assert store.put_if_absent("other", b"first")
    assert store.read("other") == b"first"


def test_of_sixteen_writers_one_wins(atomic: Store) -> None:
    for round_number in range(20):
        key = f"versions/{round_number}"
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda n, key=key: atomic.put_if_absent(key, b"writer %d" % n), range(16)))
        assert sum(won) == 1
        assert atomic.read(key) == b"writer %d" % won.index(True)


def test_a_missing_object_is_named(store: Store) -> None:
    with pytest.raises(NotFoundError, match=r"no/such does not exist"):
        store.read("no/such")
    with pytest.raises(NotFoundError, match="no/such"):
        store.fetch("no/such", sha256=sha(b""), cache=Path("/nonexistent/never"))
    with pytest.raises(NotFoundError, match="nothing is stored under"):
        store.download("no", Path("/nonexistent/never"))


def test_ranges_are_exact(store: Store) -> None:
    store.put("key", bytes(range(100)))
    assert store.read_range("key", 10, 5) == bytes(range(10, 15))
    assert store.read_range("key", 98, 50) == bytes([98, 99])
    assert store.read_range("key", 0, 0) == b""


def test_a_read_with_another_digest_is_corrupt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "ATTEMPTS", 2)
    store.put("key", b"bytes")
    assert store.read("key", sha256=sha(b"bytes")) == b"bytes"
    with pytest.raises(CorruptError, match="restore"):
        store.read("key", sha256=sha(b"other"))


def test_fetch_gives_a_verified_local_file(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3000)
    store.put("shards/x", data)
    path = store.fetch("shards/x", sha256=sha(data), cache=tmp_path / "cache")
    assert path.read_bytes() == data
    assert store.fetch("shards/x", sha256=sha(data), cache=tmp_path / "cache") == path
    if store.is_local:
        assert not (tmp_path / "cache").exists()


def test_fetch_refuses_altered_bytes(store: Store, tmp_path: Path) -> None:
    store.put("shards/x", b"altered")
    with pytest.raises(CorruptError, match="shards/x"):
        store.fetch("shards/x", sha256=sha(b"original"), cache=tmp_path / "cache")


def test_a_damaged_cache_is_downloaded_again(s3, tmp_path: Path) -> None:
    store = open_store(s3.uri)
    store.put("x", b"good bytes")
    path = store.fetch("x", sha256=sha(b"good bytes"), cache=tmp_path)
    path.write_bytes(b"bad bytes!")
    assert store.fetch("x", sha256=sha(b"good bytes"), cache=tmp_path).read_bytes() == b"good bytes"


def test_publish_puts_the_marker_last_and_download_restores_the_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "a.bin").write_bytes(b"a")
    (folder / "deep" / "z.bin").write_bytes(b"z")
    keys: list[str] = []
    real = store.put_file
    monkeypatch.setattr(store, "put_file", lambda key, path: (keys.append(key), real(key, path)))
    store.publish(folder, "runs/one")
    assert keys[-1] == "runs/one/state.json"
    assert len(keys) == 3
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "stale").write_text("")
    store.download("runs/one", tmp_path / "back")
    found = {
        p.relative_to(tmp_path / "back").as_posix() for p in (tmp_path / "back").rglob("*") if p.is_file()
    }
    assert found == {"state.json", "a.bin", "deep/z.bin"}


def test_publish_refuses_a_folder_without_its_marker(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"has no state\.json"):
        store.publish(tmp_path, "runs/one")
    assert store.list() == []


def test_large_files_go_up_in_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)  # S3's smallest part
    data = os.urandom(11 << 20)
    (tmp_path / "large").write_bytes(data)
    store.put_file("large", tmp_path / "large")
    assert store.fetch("large", sha256=sha(data), cache=tmp_path / "cache").read_bytes() == data
    assert sha(store.read("large")) == sha(data)


def test_pyarrow_reads_what_was_put(store: Store) -> None:
    store.put("deep/key", b"arrow")
    filesystem, root = store.filesystem()
    with filesystem.open_input_stream(f"{root}/deep/key") as stream:
        assert stream.read() == b"arrow"


def test_unfinished_uploads_are_aborted_once_they_are_old(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(bytes(11 << 20))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if store.is_local:
            patch.setattr(os, "replace", killed)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        else:
            patch.setattr(store, "_complete", killed)
            patch.setattr(store.client, "abort_multipart_upload", lambda **_: None)
        with pytest.raises(KeyboardInterrupt):
            store.put_file("large", tmp_path / "large")
    store.put("small", b"stays")
    store.put("probe-of-a-killed-process", b"")
    if not _is_moto(store):  # which says that all uploads began in 2010
        assert store.abort_stale_uploads(3600) == 0
    time.sleep(1.1)  # S3 tells whole seconds
    assert store.abort_stale_uploads(0) == 2
    assert store.abort_stale_uploads(0) == 0
    assert [entry.key for entry in store.list()] == ["small"]


def test_probe_finds_conditional_writes(atomic: Store) -> None:
    assert probe(atomic).conditional_writes
    probe(atomic).require(atomic.uri)
    assert atomic.list() == []


def test_swift_lets_several_writers_win_and_the_probe_finds_it_every_time(
    swift, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(swift.uri)
    for _ in range(10):
        monkeypatch.setattr(capabilities, "_PROBED", {})
        found = probe(store)
        assert (found.conditional_writes, found.checksums, found.faithful) == (False, True, True)
    with pytest.raises(StorageError, match="two writers could overwrite each other's version"):
        probe(store).require(store.uri)
    assert store.list() == []


def test_a_store_that_overwrites_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_PROBED", {})
    monkeypatch.setattr(store, "put_if_absent", lambda key, data: store.put(key, data) is None)
    with pytest.raises(StorageError, match="does not keep conditional writes"):
        probe(store).require(store.uri)


@pytest.mark.parametrize("fault", ["unconditional", "look-then-write", "no-conditions"])
def test_a_server_without_atomic_conditional_writes_is_refused(faulty, fault: str) -> None:
    store, _ = faulty(lambda *_: fault)
    with pytest.raises(StorageError, match="does not keep conditional writes"):
        probe(store).require(store.uri)


def test_a_server_that_loses_what_belongs_to_an_object_is_refused(faulty) -> None:
    store, _ = faulty(lambda *_: "no-metadata")
    with pytest.raises(StorageError, match="does not give back what was written"):
        probe(store).require(store.uri)


def test_a_server_that_alters_bytes_is_refused(faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "ATTEMPTS", 2)
    store, _ = faulty(lambda _, method: "flip" if method == "GET" else "")
    with pytest.raises(StorageError, match="does not give back what was written"):
        probe(store).require(store.uri)


def test_a_server_whose_checksums_reject_good_bytes_is_told_with_the_reason(
    faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "ATTEMPTS", 2)
    store, _ = faulty(lambda _, method: "bad-digest" if method == "PUT" else "")
    with pytest.raises(StorageError, match=r"cannot write .* BadDigest"):
        probe(store)


def test_checksums_that_many_servers_reject_are_not_sent(s3) -> None:
    settings = open_store(s3.uri).client.meta.config
    assert settings.request_checksum_calculation == "when_required"
    assert settings.response_checksum_validation == "when_required"


def test_moto_does_not_look_at_checksums_and_our_own_digest_finds_it(
    s3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "ATTEMPTS", 3)
    store = open_store(s3.uri)
    assert not probe(store).checksums
    store.put("key", b"bytes")
    copied = {"Bucket": s3.uri.removeprefix("s3://"), "Key": "key", "Body": b"other"}
    store.client.put_object(**copied, Metadata={"sha256": sha(b"bytes")})
    with pytest.raises(CorruptError, match="key"):
        store.read("key")


def test_a_store_that_races_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that looks, then writes: two writers at once are both told that they won."""
    store = open_store((tmp_path / "store").as_uri())

    def look_then_write(key: str, data: bytes) -> bool:
        if store.exists(key):
            return False
        time.sleep(0.1)
        store.put(key, data)
        return True

    monkeypatch.setattr(store, "put_if_absent", look_then_write)
    assert not probe(store).conditional_writes


@pytest.mark.parametrize("uri", ["faces", "http://host/x", "file://relative", "s3://", "/tmp/x"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="is neither"):
        open_store(uri)


def test_keys_do_not_leave_the_store(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    for key in ("../outside", "/etc/passwd", "a/../../b"):
        with pytest.raises(StorageError, match="leaves"):
            store.put(key, b"")


def test_readers_of_a_file_see_old_or_new_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"a" * 100_000)
    stop, seen = threading.Event(), set()

    def watch() -> None:
        while not stop.is_set():
            data = path.read_bytes()
            seen.add((len(data), data[:1], data[-1:]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(50):
        write_atomic(path, b"b" * 200_000)
        write_atomic(path, b"a" * 100_000)
    stop.set()
    watcher.join()
    assert seen <= {(100_000, b"a", b"a"), (200_000, b"b", b"b")}
    assert os.listdir(tmp_path) == ["state"]


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_file_system_without_hard_links_still_has_one_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse)
    store = open_store(tmp_path.as_uri())
    for number in range(20):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda n: store.put_if_absent(f"{number}", b"writer %d" % n), range(16)))  # noqa: B023
        assert sum(won) == 1
        assert store.read(f"{number}") == b"writer %d" % won.index(True)
    assert sorted(os.listdir(tmp_path)) == sorted(str(number) for number in range(20))


def test_a_writer_killed_on_a_file_system_without_hard_links_leaves_no_part_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, sys\n"
        "from counterfake.storage import open_store\n"
        "def refuse(*_): raise PermissionError(1, 'Operation not permitted')\n"
        "os.link, os.replace = refuse, lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_store(sys.argv[1]).put_if_absent('key', b'killed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path.as_uri()], check=False)
    assert done.returncode == -signal.SIGKILL
    monkeypatch.setattr(os, "link", refuse)
    store = open_store(tmp_path.as_uri())
    assert store.list() == []
    assert store.put_if_absent("key", b"next")
    assert store.abort_stale_uploads(-60) == 1
    assert store.read("key") == b"next"


def test_a_file_system_with_neither_hard_links_nor_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    store = open_store(tmp_path.as_uri())
    with pytest.raises(StorageError, match=r"neither hard links nor locks .*choose a folder on another one"):
        store.put_if_absent("key", b"bytes")
    assert os.listdir(tmp_path) == []


def test_a_missing_bucket_and_missing_credentials_say_what_to_do(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="the bucket does not exist; create it"):
        open_store("s3://no-such-bucket-here/x").read("key")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        open_store(s3.uri).read("key")


def test_a_store_travels_between_processes(store: Store) -> None:
    import copy

    store.put("key", b"bytes")
    assert copy.deepcopy(store).read("key") == b"bytes"


# -- a network that misbehaves --------------------------------------------------------------------------------------


@pytest.fixture
def faulty(
    s3, faulty_s3: Callable[..., FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Store, FaultProxy]]:
    """`faulty(fault, **options of the store)` -> (the store behind a proxy, the proxy)."""
    monkeypatch.setattr(deadlines, "STALL_SECONDS", 1.0)

    def make(fault: Callable[[int, str], str], **options: float) -> tuple[Store, FaultProxy]:
        proxy = faulty_s3(lambda number, method, path: fault(number, method))
        return open_store(s3.uri, endpoint_url=proxy.url, **options), proxy

    return make


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "flip", "stall"])
def test_a_read_survives_a_fault(faulty, s3, fault: str) -> None:
    open_store(s3.uri).put("key", b"some bytes " * 1000)
    store, proxy = faulty(lambda number, _: fault if number <= 2 else "")
    assert store.read("key") == b"some bytes " * 1000
    assert proxy.count == 3


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "flip"])
def test_a_fetch_survives_a_fault(faulty, s3, tmp_path: Path, fault: str) -> None:
    data = os.urandom(100_000)
    open_store(s3.uri).put("key", data)
    store, proxy = faulty(lambda number, method: fault if method == "GET" and number <= 3 else "")
    assert store.fetch("key", sha256=sha(data), cache=tmp_path).read_bytes() == data
    assert proxy.seen[fault]


def test_a_commit_whose_answer_was_lost_is_still_ours(faulty, s3) -> None:
    store, _ = faulty(lambda number, _: "lost" if number == 1 else "")
    assert store.put_if_absent("versions/1", b"mine, with a name in it")
    assert not open_store(s3.uri).put_if_absent("versions/1", b"somebody else's")


def test_a_large_file_whose_last_answer_was_lost_is_stored(
    faulty, s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)
    posts: Counter[str] = Counter()

    def fault(_: int, method: str) -> str:
        posts[method] += 1
        return "lost" if method == "POST" and posts["POST"] == 2 else ""  # the first POST begins the upload

    data = os.urandom(11 << 20)
    (tmp_path / "large").write_bytes(data)
    store, _ = faulty(fault)
    store.put_file("large", tmp_path / "large")
    assert posts["POST"] == 3
    assert open_store(s3.uri).read("large") == data


def test_a_store_that_only_fails_is_given_up_with_advice(faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "ATTEMPTS", 3)
    store, proxy = faulty(lambda *_: "503")
    with pytest.raises(StorageError, match=r"3 attempts .* SlowDown; check that the endpoint is up"):
        store.read("key")
    assert proxy.count == 3


def test_bytes_that_are_altered_every_time_are_corrupt(faulty, s3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "ATTEMPTS", 3)
    open_store(s3.uri).put("key", b"bytes")
    store, _ = faulty(lambda *_: "flip")
    with pytest.raises(CorruptError, match="key: 3 attempts"):
        store.read("key")


def test_impatience_follows_the_pace_of_the_server() -> None:
    patience = deadlines.Patience()
    assert patience.seconds() == 2.0, "nothing is known of it yet"
    for _ in range(16):
        patience.learn(0.01)
    assert patience.seconds() == 0.25
    for _ in range(30):
        patience.learn(0.1)
    assert patience.seconds() == 1.0
    for _ in range(30):
        patience.learn(3.0)
    assert patience.seconds() == 2.0


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_the_total_deadline_holds(faulty, s3, fault: str) -> None:
    open_store(s3.uri).put("key", b"slow bytes" * 100)
    store, _ = faulty(lambda *_: fault, deadline_s=1.5)
    start = time.monotonic()
    with pytest.raises(StorageTimeoutError, match=r"deadline is 1\.5 s: check that the endpoint is up"):
        store.read("key")
    assert time.monotonic() - start < 1.5 + SLACK_SECONDS


@pytest.mark.parametrize(
    "operation", ["put", "put_if_absent", "put_file", "list", "exists", "delete", "fetch"]
)
def test_every_call_ends_by_its_deadline(faulty, tmp_path: Path, operation: str) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    store, _ = faulty(lambda *_: "black-hole", deadline_s=1.0)
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: store.put("key", b"bytes"),
        "put_if_absent": lambda: store.put_if_absent("key", b"bytes"),
        "put_file": lambda: store.put_file("key", tmp_path / "file"),
        "list": store.list,
        "exists": lambda: store.exists("key"),
        "delete": lambda: store.delete("key"),
        "fetch": lambda: store.fetch("key", sha256=sha(b""), cache=tmp_path / "cache"),
    }
    start = time.monotonic()
    with pytest.raises(StorageTimeoutError, match=r"the deadline is 1 s: check that the endpoint is up"):
        calls[operation]()
    assert time.monotonic() - start < 1.0 + SLACK_SECONDS


def test_bulk_reads_through_pyarrow_end_by_the_deadline(faulty, s3) -> None:
    """Two attempts of a second each fit in 5 s; pyarrow's own setting is three attempts of 3 s."""
    store, proxy = faulty(lambda *_: "black-hole", deadline_s=5.0)
    filesystem, root = store.filesystem()
    start = time.monotonic()
    with pytest.raises(OSError, match="Timeout was reached"):
        filesystem.get_file_info(f"{root}/key")
    assert time.monotonic() - start < 5.0 + SLACK_SECONDS
    assert proxy.count == 2


def test_bulk_calls_have_as_many_attempts_as_fit_in_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = deadlines.Retries("s3://bucket", deadlines.DEADLINE_SECONDS)
    assert usual.bulk_attempts() == 5  # 80 s of stalls, 15 s of waits
    assert deadlines.Retries("s3://bucket", 1.0).bulk_attempts() == 1
    monkeypatch.setattr(deadlines, "STALL_SECONDS", 1.0)
    assert deadlines.Retries("s3://bucket", 600.0).bulk_attempts() == deadlines.ATTEMPTS


def test_an_endpoint_where_nobody_listens_fails_soon(s3, free_port: int) -> None:
    store = open_store(s3.uri, endpoint_url=f"http://127.0.0.1:{free_port}", deadline_s=2)
    start = time.monotonic()
    with pytest.raises(StorageError, match="check that the endpoint is up"):
        store.exists("key")
    assert time.monotonic() - start < 15
