"""Arrays in .npy files: written row by row, mapped into memory when they are read."""

import errno
import math
import os
import pathlib

import numpy as np
import numpy.typing as npt


class ArrayWriter:
    """Writes a .npy file whose number of rows is known only at the end.

    By plain writes: on a full disk they raise an OSError, where writing through a memory map ends
    the process by a signal.

    Attributes:
      rows: number of rows written so far.
    """

    def __init__(self, path: pathlib.Path, dtype: npt.DTypeLike, row_shape: tuple[int, ...] = ()):
        self._file = open(path, "wb")
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self.rows = 0
        self._write_header()

    def reserve(self, rows: int) -> None:
        """Takes the space of so many rows, so that a disk too small for them is told of at once.

        Raises:
          OSError: there is no room. Where a file system can't reserve any, `append` finds out.
        """
        if not hasattr(os, "posix_fallocate"):  # macOS
            return
        size = rows * math.prod(self._row_shape) * self._dtype.itemsize
        try:
            os.posix_fallocate(self._file.fileno(), 0, self._file.tell() + size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise

    def append(self, rows: npt.ArrayLike) -> bytes:
        """Writes rows; returns what is now in the file for them."""
        values = np.asarray(rows, self._dtype)
        content = values.tobytes()
        self._file.write(content)
        self.rows += len(values)
        return content

    def _write_header(self) -> None:
        # NumPy pads the header so that a longer first axis still fits in its place.
        description = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self.rows, *self._row_shape)
        header = {"descr": description, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        with self._file:
            if error_type is None:
                self._file.truncate()  # what was reserved and not needed
                self._file.seek(0)
                self._write_header()


def open_array(path: pathlib.Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """Maps a .npy file into memory, read-only; nothing but its header is read.

    Raises:
      Exception: of any type, if the file is missing or damaged; see `cache.reading`.
      ValueError: it holds an array of another dtype or shape.
    """
    array = np.load(path, mmap_mode="r")
    if (array.dtype, array.shape) != (np.dtype(dtype), shape):
        raise ValueError(
            f"{path.name} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}"
        )
    # A plain view of the map: slicing a np.memmap costs more than the read.
    return np.asarray(array)
