"""Lines of text files, in blocks, with their numbers; gzip, a byte-order mark and Windows line ends are understood."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from ckd_ray.data.problems import Problems, shorten
from ckd_ray.errors import UserError, first_line
from ckd_ray.files import filesystem_of

_BLOCK = 8 << 20
_LONGEST_LINE = 64 << 20


def read_lines(uri: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Blocks of (number of the first line, its lines without their ends); memory is bounded by the block.

    A line that is not UTF-8 is noted with the byte in question, and returned with replacement characters, so that
    reading can find the next problem. Empty lines are returned: only the reader knows what they mean.
    """
    fs, path = filesystem_of(uri)
    number, rest, first = 1, b"", True
    try:
        stream = fs.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None)
    except FileNotFoundError:
        raise UserError("this file does not exist", where=uri) from None
    except OSError as error:  # a folder, or no permission
        raise unreadable(uri, error) from None
    with stream:
        while True:
            try:
                block = stream.read(_BLOCK)
            except (OSError, pa.ArrowInvalid) as error:
                raise unreadable(uri, error) from None
            if first:
                block, first = block.removeprefix(b"\xef\xbb\xbf"), False
            data = rest + block
            cut = len(data) if not block else data.rfind(b"\n") + 1
            rest = data[cut:]
            if len(rest) > _LONGEST_LINE:
                found = f"{len(rest)} bytes"
                raise UserError(
                    "a line has no end", where=f"{uri}:{number}", expected="lines below 64 MiB", found=found
                )
            if cut:
                lines = _decode(uri, number, data[:cut], problems)
                yield number, lines
                number += len(lines)
            if not block:
                return


def unreadable(uri: str, error: Exception) -> UserError:
    """An error of the file system or the decompressor as a UserError."""
    return UserError("the file cannot be read", where=uri, found=first_line(error))


def _decode(uri: str, number: int, data: bytes, problems: Problems) -> list[str]:
    data = data.removesuffix(b"\n")
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = []
        for i, line in enumerate(data.split(b"\n")):
            try:
                lines.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                problems.add(
                    f"{uri}:{number + i}",
                    f"byte {error.start + 1} of the line is not UTF-8",
                    expected="UTF-8",
                    found=shorten(line[max(0, error.start - 10) : error.start + 10].decode("latin-1")),
                    fix="convert the file with iconv",
                )
                lines.append(line.decode("utf-8", errors="replace"))
    return [line.removesuffix("\r") for line in lines]
