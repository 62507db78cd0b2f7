"""file:// and s3:// as one: read, list, put-if-absent, publish atomically, digests, deadlines, retries.

store.py says what a store can do; local.py and s3.py do it. files.py writes and verifies local files, deadlines.py ends
every call in time, aws.py is the only home of boto3, capabilities.py tries what a server keeps of its promises.
Keeps away from what the bytes mean: schema, versions and shards are records.py and versions.py.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path

from counterfake.errors import ConfigError
from counterfake.storage.capabilities import Capabilities, probe
from counterfake.storage.deadlines import DEADLINE_SECONDS
from counterfake.storage.files import file_sha256, write_atomic
from counterfake.storage.local import FileStore
from counterfake.storage.s3 import PART_BYTES, S3Store
from counterfake.storage.store import Entry, Store

__all__ = [
    "PART_BYTES", "Capabilities", "Entry", "Store", "file_sha256", "open_store", "probe", "write_atomic",
]  # fmt: skip


def open_store(uri: str, *, endpoint_url: str | None = None, deadline_s: float = DEADLINE_SECONDS) -> Store:
    """The store under `uri`: file:///absolute/folder or s3://bucket/prefix.

    The endpoint of S3 comes from the argument, else from boto3's own settings (AWS_ENDPOINT_URL, ~/.aws/config).
    Opens nothing yet: the first call does. Raises ConfigError for any other kind of URI.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FileStore(uri.rstrip("/"), Path(urllib.parse.unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(uri.rstrip("/"), parts.netloc, parts.path.strip("/"), endpoint_url, deadline_s)
    raise ConfigError(f"storage {uri!r} is neither file:///absolute/folder nor s3://bucket/prefix")
