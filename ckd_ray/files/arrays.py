"""Arrays in files of numpy's form (.npy), local or in object storage."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.files.atomic import write_atomic
from ckd_ray.files.paths import filesystem_of, is_local

# Rows that are written at a time.
_BLOCK = 1 << 16


def write_array(uri: str, array: npt.NDArray[Any]) -> None:
    """Write an array atomically, a block at a time, so that a map need not fit the memory."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    rows = array.reshape(-1) if array.ndim == 0 else array

    def write(stream: pa.NativeFile) -> None:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(rows), _BLOCK):
            stream.write(np.ascontiguousarray(rows[start : start + _BLOCK]).tobytes())

    write_atomic(uri, write)


def read_array(uri: str) -> npt.NDArray[Any]:
    """The array of a file: a map of a local one, and a remote one in memory.

    Raises:
        ValueError: it is no array, or one of pickled objects.
    """
    fs, path = filesystem_of(uri)
    if is_local(uri):
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found
    with fs.open_input_stream(path) as stream:
        found = np.load(io.BytesIO(stream.read()), allow_pickle=False)
    return found
