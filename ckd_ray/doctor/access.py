"""What the machine may reach: the storage, the clock of that storage, the token."""

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
from ckd_ray.errors import JobError, UserError
from ckd_ray.files import filesystem_of, is_local, join
from ckd_ray.files.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, ShardCache
from ckd_ray.ray_util.token import token_file

_TIGHT, _LITTLE = 1 * GIB, 10 * GIB
# S3 refuses requests that are signed a quarter of an hour off.
_CLOCK_FAIL_S, _CLOCK_WARN_S = 600.0, 30.0
_BUILT_AFTER = 1_735_689_600  # 2025-01-01: an earlier clock was never set


def storage(uri: str) -> Iterator[Check]:
    """run.storage: an object is put there, read and deleted; the space of a local disk."""
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
    """Free space of a disk."""
    free = os.statvfs(folder)
    size = free.f_bavail * free.f_frsize
    found = f"{size / GIB:.1f} GiB free at {folder}"
    state: State = "fail" if size < _TIGHT else "warn" if size < _LITTLE else "ok"
    return Check(name, state, found, None if state == "ok" else f"make room: {why}")


def _remote_storage(uri: str) -> Check:
    """With the few attempts that a plain URI has: a diagnosis need not outlast an outage."""
    probe = join(uri, f".ckd-ray-doctor-{uuid.uuid4().hex[:8]}")
    try:
        fs, path = pafs.FileSystem.from_uri(probe)
        with fs.open_output_stream(path) as out:
            out.write(b"ckd-ray")
        with fs.open_input_stream(path) as stream:
            came = stream.read()
        fs.delete_file(path)
    except (pa.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        return Check("storage", "fail", f"{uri}: {said[:300]}", _advice(said))
    if came != b"ckd-ray":
        return Check("storage", "fail", f"{uri}: other bytes came back", "look for a proxy or cache before the bucket")
    return Check("storage", "ok", f"{uri}: put, read and deleted")


def _advice(said: str) -> str:
    text = said.lower()
    if "no such bucket" in text or "nosuchbucket" in text or "bucket does not exist" in text:
        return "make the bucket, or correct its name in run.storage"
    if any(
        word in text for word in ("accessdenied", "access denied", "access_denied", "forbidden", "403", "signature")
    ):
        return (
            "these keys may not read and write there: check AWS_ACCESS_KEY_ID or the machine's profile, and the policy"
        )
    if "network" in text or "connect" in text or "resolve" in text:
        return "nothing answers there: check the endpoint (AWS_ENDPOINT_URL), the region and the network"
    return "check the URI, the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the endpoint (AWS_ENDPOINT_URL)"


def scratch(uri: str) -> Iterator[Check]:
    """The temporary folder (uploads, Ray's logs and spilled objects), and the cache of remote shards."""
    yield space("temporary folder", tempfile.gettempdir(), "Ray's files and uploads lie there; TMPDIR names another")
    if is_local(uri):
        return
    try:
        cache = ShardCache.of_this_machine()
    except (UserError, JobError) as error:
        yield Check(
            "cache", "fail", str(error).splitlines()[0], f"set {FOLDER_VARIABLE} to a folder that can be written"
        )
        return
    size = cache.limit / GIB
    found = f"{size:.1f} GiB at {cache.folder}"
    if size < 1:
        fix = f"{FOLDER_VARIABLE} names a larger disk, {LIMIT_VARIABLE} how much of it may be taken"
        yield Check("cache", "warn", found, fix)
    else:
        yield Check("cache", "ok", found)


def clock(uri: str) -> Iterator[Check]:
    """Against the storage's own clock, whose servers refuse requests that are signed far off."""
    if time.time() < _BUILT_AFTER:
        yield Check("clock", "fail", time.strftime("it shows %Y-%m-%d"), "set the clock (timedatectl set-ntp true)")
        return
    endpoint = None if "://" not in uri or is_local(uri) else endpoint_of(uri)
    if endpoint is None:
        yield Check("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %z; compared with nothing, the storage is local"))
        return
    told = _date_of(endpoint)
    if told is None:
        fix = "check it by hand (timedatectl), and that this machine reaches the storage"
        yield Check("clock", "warn", f"{endpoint} did not tell the time", fix)
        return
    off = time.time() - told
    state: State = "fail" if abs(off) > _CLOCK_FAIL_S else "warn" if abs(off) > _CLOCK_WARN_S else "ok"
    found = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} {endpoint}"
    yield Check("clock", state, found, None if state == "ok" else "set the clock (timedatectl set-ntp true)")


def endpoint_of(uri: str) -> str | None:
    """The address of an object store's server, without keys; None where there is none to ask."""
    parts = urllib.parse.urlsplit(uri)
    options = dict(urllib.parse.parse_qsl(parts.query))
    if parts.scheme in ("gs", "gcs"):
        return "https://storage.googleapis.com"
    if parts.scheme != "s3":
        return None
    given = (
        options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    if given:
        return given if "://" in given else f"{options.get('scheme', 'https')}://{given}"
    region = (
        options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    )
    return f"https://s3.{region}.amazonaws.com"


def _date_of(endpoint: str) -> float | None:
    """Seconds since 1970 by the server's Date header; whatever the answer is, it has one."""
    if not endpoint.startswith(("http://", "https://")):
        return None
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310  (http or https, as was just seen)
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
    """Ray's token: there, and readable by its owner alone."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        fix = "unset RAY_AUTH_MODE: whoever reaches a Ray without a token runs code as you"
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
        yield Check(
            "token", "fail", f"{path} is empty", f"rm {path} && ray get-auth-token --generate && chmod 600 {path}"
        )
    else:
        yield Check("token", "ok", f"{path}, mode {mode:04o}")
