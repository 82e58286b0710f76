"""Checks of what the machine may reach: the storage, the temporary folder, the clock, the token."""

from __future__ import annotations

import email.utils
import os
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from ckd_ray.doctor.check import GIB, Check, State
from ckd_ray.errors import JobError, UserError, first_line
from ckd_ray.files import filesystem_of, is_local, join
from ckd_ray.files.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, ShardCache
from ckd_ray.ray_util.token import token_file

_SPACE_FAIL, _SPACE_WARN = 1 * GIB, 10 * GIB
# S3 refuses requests whose time is a quarter of an hour off.
_CLOCK_FAIL_S, _CLOCK_WARN_S = 600.0, 30.0
_EARLIEST = 1_735_689_600  # 2025-01-01: a clock that shows less was never set


def storage(uri: str) -> Iterator[Check]:
    """run.storage: write, read and delete a file there; the free space of a local disk."""
    try:
        local = is_local(uri)
    except UserError as error:
        yield Check("storage", "fail", f"{uri}: {error.found}", "set run.storage to a folder or an s3:// or gs:// URI")
        return
    if local:
        yield from _local_storage(filesystem_of(uri)[1])
    else:
        yield _remote_storage(uri)


def _local_storage(path: str) -> Iterator[Check]:
    folder = Path(path)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(prefix=".ckd-ray-doctor-", dir=folder) as file:
            file.write(b"ckd-ray")
            file.flush()
            os.fsync(file.fileno())
            assert Path(file.name).read_bytes() == b"ckd-ray"
    except OSError as error:
        fix = "set run.storage to a folder that you may write (and that is not full)"
        yield Check("storage", "fail", f"{path}: {folder} cannot be written: {error.strerror}", fix)
        return
    yield Check("storage", "ok", f"{path}: written, read and deleted")
    yield space(
        "disk of the storage", str(folder), "a run holds the corpus and two stores (ckd-ray plan says how large)"
    )


def space(name: str, folder: str, why: str) -> Check:
    """Free space of the disk of a folder; `why` says what the space is for."""
    free = os.statvfs(folder)
    size = free.f_bavail * free.f_frsize
    found = f"{size / GIB:.1f} GiB free at {folder}"
    state: State = "fail" if size < _SPACE_FAIL else "warn" if size < _SPACE_WARN else "ok"
    return Check(name, state, found, f"make room: {why}")


def _remote_storage(uri: str) -> Check:
    """Write, read and delete a file, without the many attempts of a stage: a diagnosis does not wait for the end of an
    outage."""
    probe = join(uri, f".ckd-ray-doctor-{uuid.uuid4().hex[:8]}")
    try:
        fs, path = pafs.FileSystem.from_uri(probe)
        with fs.open_output_stream(path) as out:
            out.write(b"ckd-ray")
        with fs.open_input_stream(path) as stream:
            read = stream.read()
        fs.delete_file(path)
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        return Check("storage", "fail", f"{uri}: {message[:300]}", _advice(message.lower()))
    if read != b"ckd-ray":
        fix = "look for a proxy or cache in front of the bucket"
        return Check("storage", "fail", f"{uri}: a file that was read back had changed", fix)
    return Check("storage", "ok", f"{uri}: put, read and deleted")


_ADVICE = (
    (
        ("no such bucket", "nosuchbucket", "bucket does not exist"),
        "make the bucket, or correct its name in run.storage",
    ),
    (
        ("accessdenied", "access denied", "access_denied", "forbidden", "403", "signature"),
        "these keys may not read and write there: check AWS_ACCESS_KEY_ID or the machine's profile, and the policy",
    ),
    (
        ("network", "connect", "resolve"),
        "nothing answers there: check the endpoint (AWS_ENDPOINT_URL), the region and the network",
    ),
    (("",), "check the URI, the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the endpoint (AWS_ENDPOINT_URL)"),
)


def _advice(message: str) -> str:
    return next(advice for words, advice in _ADVICE if any(word in message for word in words))


def scratch(uri: str) -> Iterator[Check]:
    """The temporary folder (uploads, Ray's logs and spilled objects), and the cache of remote shards."""
    yield space("temporary folder", tempfile.gettempdir(), "Ray's files and uploads lie there; TMPDIR names another")
    if is_local(uri):
        return
    try:
        cache = ShardCache.of_this_machine()
    except (UserError, JobError) as error:
        fix = f"set {FOLDER_VARIABLE} to a folder that can be written"
        yield Check("cache", "fail", first_line(error), fix)
        return
    size = cache.limit / GIB
    fix = f"{FOLDER_VARIABLE} names a folder on a larger disk, {LIMIT_VARIABLE} how much of it may be used"
    yield Check("cache", "warn" if size < 1 else "ok", f"{size:.1f} GiB at {cache.folder}", fix)


def clock(uri: str) -> Iterator[Check]:
    """The clock, compared with that of the storage, which refuses requests whose time is far off."""
    if time.time() < _EARLIEST:
        yield Check("clock", "fail", time.strftime("it shows %Y-%m-%d"), "set the clock (timedatectl set-ntp true)")
        return
    endpoint = None if "://" not in uri or is_local(uri) else endpoint_of(uri)
    if endpoint is None:
        found = time.strftime("%Y-%m-%d %H:%M:%S %z; the storage is local, so there is nothing to compare it with")
        yield Check("clock", "ok", found)
        return
    theirs = _date_of(endpoint)
    if theirs is None:
        fix = "check it by hand (timedatectl), and that this machine reaches the storage"
        yield Check("clock", "warn", f"{endpoint} did not tell the time", fix)
        return
    off = time.time() - theirs
    state: State = "fail" if abs(off) > _CLOCK_FAIL_S else "warn" if abs(off) > _CLOCK_WARN_S else "ok"
    found = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} {endpoint}"
    yield Check("clock", state, found, "set the clock (timedatectl set-ntp true)")


def endpoint_of(uri: str) -> str | None:
    """The address of the server of an object store, without keys; None for storage without one."""
    parts = urllib.parse.urlsplit(uri)
    options = dict(urllib.parse.parse_qsl(parts.query))
    if parts.scheme in ("gs", "gcs"):
        return "https://storage.googleapis.com"
    if parts.scheme != "s3":
        return None
    env = os.environ.get
    given = options.get("endpoint_override") or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    if given:
        return given if "://" in given else f"{options.get('scheme', 'https')}://{given}"
    region = options.get("region") or env("AWS_REGION") or env("AWS_DEFAULT_REGION") or "us-east-1"
    return f"https://s3.{region}.amazonaws.com"


def _date_of(endpoint: str) -> float | None:
    """Seconds since 1970 by the Date header of the server; answers that are errors have one, too."""
    if not endpoint.startswith(("http://", "https://")):
        return None
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310  (http or https, see above)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
    except (OSError, ValueError):
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except (TypeError, ValueError):
        return None


def token() -> Iterator[Check]:
    """Ray's token exists, and only its owner can read it."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        fix = "unset RAY_AUTH_MODE: everybody who reaches a Ray without a token can run code as you"
        yield Check("token", "fail", "RAY_AUTH_MODE=disabled", fix)
    path = token_file()
    try:
        info = path.stat()
        empty = not path.read_text().strip()
    except FileNotFoundError:
        if os.environ.get("RAY_AUTH_TOKEN"):
            yield Check("token", "ok", "RAY_AUTH_TOKEN")
            return
        fix = "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token (ckd-ray makes one where it needs one)"
        yield Check("token", "warn", f"none: no {path}, no RAY_AUTH_TOKEN", fix)
        return
    except OSError as error:
        yield Check("token", "fail", f"{path}: {error.strerror}", f"sudo chown $USER {path} && chmod 600 {path}")
        return
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o077:
        yield Check("token", "fail", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}")
    elif empty:
        fix = f"rm {path} && ray get-auth-token --generate && chmod 600 {path}"
        yield Check("token", "fail", f"{path} is empty", fix)
    else:
        yield Check("token", "ok", f"{path}, mode {mode:04o}")
