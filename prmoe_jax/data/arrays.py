"""Arrays in .npy files, written a few rows at a time and memory-mapped for reading."""

import errno
import math
import os
import pathlib

import numpy as np
import numpy.typing as npt

from prmoe_jax import files
from prmoe_jax.errors import first_line


class ArrayWriter:
    """Writes a .npy file of a known shape, a few rows at a time.

    It uses plain writes: on a full disk they raise an OSError, while a write to a memory map would
    kill the process by a signal. A disk that is too small for all rows fails at once, unless the
    file system can't reserve space.

    `rows` is the number of rows written so far.
    """

    def __init__(self, path: pathlib.Path, dtype: npt.DTypeLike, shape: tuple[int, ...]):
        self._file, self._dtype, self.rows = open(path, "wb"), np.dtype(dtype), 0
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        size = self._file.tell() + math.prod(shape) * self._dtype.itemsize
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._file.close()
                raise

    def append(self, rows: npt.ArrayLike) -> bytes:
        """Writes rows; returns their bytes."""
        values = np.asarray(rows, self._dtype)
        content = values.tobytes()
        self._file.write(content)
        self.rows += len(values)
        return content

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        with self._file:
            if error_type is None:
                # Cuts off reserved space without rows, so that `read_header` refuses a file that
                # lacks rows.
                self._file.truncate()


def open_array(path: pathlib.Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """Maps a .npy file into memory, read-only; only its header is read now.

    Raises ValueError if the array has another dtype or shape, and as `read_header`.
    """
    found, length, offset = read_header(path)
    if (found, length) != (np.dtype(dtype), shape):
        raise ValueError(f"{path.name} holds {found} {length}, not {np.dtype(dtype)} {shape}")
    # A plain view: slicing an np.memmap takes longer than reading the data.
    return np.asarray(np.memmap(path, found, "r", offset, shape))


def read_header(path: pathlib.Path) -> tuple[np.dtype, tuple[int, ...], int]:
    """The dtype and shape of the array in a .npy file, and the byte at which its data begins.

    Raises:
      UserError: the path is a pipe or a device.
      OSError: the file cannot be read.
      ValueError: the file is damaged, holds Python objects, or its size does not fit its header.
    """
    files.refuse_pipe(path)
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"it has the version {version} of NumPy's format, not (1, 0)")
        try:
            shape, by_column, dtype = readers[version](file)
        except Exception as error:  # NumPy parses it as Python: any exception
            raise ValueError(f"its header can't be read: {first_line(error)}") from None
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject or any(length < 0 for length in shape) or (by_column and len(shape) > 1):
        raise ValueError(f"it holds {dtype} {shape}, which can't be mapped into memory")
    end = offset + math.prod(shape) * dtype.itemsize
    if end != size:
        raise ValueError(f"it has {size} bytes, and an array {dtype} {shape} ends at byte {end}")
    return dtype, tuple(map(int, shape)), offset
