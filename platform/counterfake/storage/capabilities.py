"""What a store can really do, found out by trying: versions rest on a put-if-absent that has one winner."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from counterfake.errors import CorruptError, StorageError
from counterfake.storage.store import PROBE, Store, UnsupportedError

RACES = 8  # of eight writers each; Swift 2.38 was found out by 8 of 10 single races


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a store can do, as tried by `probe`."""

    # put-if-absent is refused for a key that exists, also to writers at the same moment
    conditional_writes: bool
    # an upload whose Content-MD5 does not fit is refused; without it our own SHA-256 finds it
    checksums: bool
    # bytes come back as they were written, and so does the SHA-256 kept as metadata beside them
    faithful: bool

    def require(self, uri: str) -> None:
        """Raises StorageError where versions could overwrite each other or come back altered."""
        if not self.faithful:
            raise StorageError(
                f"{uri} does not give back what was written (bytes, or the metadata that holds their SHA-256); "
                f"use another server, or look for a proxy or gateway in between that alters objects"
            )
        if not self.conditional_writes:
            raise StorageError(
                f"{uri} does not keep conditional writes (If-None-Match: *), so two writers could overwrite each other's "
                f"version; use AWS S3, another server that keeps them, or file://"
            )


_PROBED: dict[tuple[str, str | None], Capabilities] = {}  # of a bucket at an endpoint
_EVERY_BYTE = bytes(range(256))


def probe(store: Store) -> Capabilities:
    """Try what the store can do with a few small objects, which are removed again. Remembered for this process.

    Raises StorageError for a store that does not answer or refuses to write.
    """
    where = store._server()
    if where not in _PROBED:
        key = f"{PROBE}{uuid.uuid4().hex}"
        # first: a store that does not answer is found out by one call, not by eight at once
        store.put(f"{key}-bytes", _EVERY_BYTE)
        try:
            faithful = _gives_back(store, f"{key}-bytes")
            conditional = faithful and all(_one_wins(store, f"{key}-{race}") for race in range(RACES))
            checksums = faithful and store._rejects_wrong_checksums(f"{key}-md5")
        finally:
            with contextlib.suppress(StorageError):  # the first error is the one to tell
                for entry in store.list(key):
                    store.delete(entry.key)
        _PROBED[where] = Capabilities(conditional_writes=conditional, checksums=checksums, faithful=faithful)
    return _PROBED[where]


def _gives_back(store: Store, key: str) -> bool:
    try:
        found = store.read(key)
    except CorruptError:
        return False
    return found == _EVERY_BYTE and store._recorded(key) in (None, hashlib.sha256(_EVERY_BYTE).hexdigest())


def _one_wins(store: Store, key: str) -> bool:
    """Of eight writers at the same moment, and one more later. A server that looks first and then writes may refuse the
    later one and still let several of the eight win."""
    start = threading.Barrier(8, timeout=60)

    def write(writer: int) -> bool:
        start.wait()
        return store.put_if_absent(key, b"writer %d" % writer)

    try:
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        later = store.put_if_absent(key, b"later")
    except UnsupportedError:
        return False
    return sum(won) == 1 and not later and store.read(key) == b"writer %d" % won.index(True)
