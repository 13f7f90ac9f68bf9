"""Formats of files of predictions: Parquet through pyarrow, and numpy's own.

A row is a sample. In Parquet a column of one number for each sample is of that number's type, other columns are Arrow's
fixed-shape tensors (to readers that do not know them: lists of a fixed length). A ``.npy`` holds a single tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from weft.errors import InputError
from weft.inference.columns import Columns, Kind, kinds_of

ROW_GROUP_BYTES = 2**26
"""Of a row group of a Parquet file, about: what a reader holds at a time."""

IDENTITY = b"weft"
"""Key, in a Parquet file's metadata, of what the predictions are of."""


class Format(Protocol):
    """How columns are kept in files. A part is a file of the same format as the whole."""

    suffix: str

    def check(self, kinds: Mapping[str, Kind]) -> None:
        """Raises InputError if such columns cannot be kept."""

    def write(self, file: BinaryIO, columns: Columns) -> None:
        """Write a part."""

    def kinds(self, part: Path) -> dict[str, Kind]:
        """What the columns of a part hold."""

    def join(self, file: BinaryIO, parts: Sequence[Path], samples: int, identity: Mapping[str, Any]) -> None:
        """Write the whole of its parts, holding about one of them at a time. The same rows give the same bytes,
        however they are spread over parts."""

    def is_of(self, whole: Path, samples: int, identity: Mapping[str, Any]) -> bool:
        """Whether a file that is there holds the predictions of so many samples, and of this, as far as it says."""


class Parquet:
    """Parquet."""

    suffix = ".parquet"

    def __init__(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401  # an extra: asked for before anything is computed
        except ImportError as error:
            raise InputError(
                "Parquet files need pyarrow, which is not installed; pip install 'weft[predict]', or give "
                "--output FILE.npy"
            ) from error

    def check(self, kinds: Mapping[str, Kind]) -> None:
        """Raises InputError if such columns cannot be kept."""
        for name, kind in kinds.items():
            if np.dtype(kind.dtype).kind not in "fiub":
                raise InputError(
                    f"predict: {name} is of {kind.dtype}, which Parquet does not have; return its parts, as with "
                    "torch.view_as_real"
                )
            if 0 in kind.shape:
                raise InputError(f"predict: {name} has no numbers, its shape is {kind.shape} per sample; leave it out")

    def write(self, file: BinaryIO, columns: Columns) -> None:
        """Write a part."""
        import pyarrow.parquet as pq

        pq.write_table(_table(columns), file, use_dictionary=False)

    def kinds(self, part: Path) -> dict[str, Kind]:
        """What the columns of a part hold."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        def kind(column: Any) -> Kind:
            if isinstance(column, pa.FixedShapeTensorType):
                return Kind(np.dtype(column.value_type.to_pandas_dtype()).name, tuple(column.shape))
            return Kind(np.dtype(column.to_pandas_dtype()).name, ())

        return {column.name: kind(column.type) for column in pq.read_schema(part)}

    def join(self, file: BinaryIO, parts: Sequence[Path], samples: int, identity: Mapping[str, Any]) -> None:
        """Write the whole: row groups of equal length, cut from the parts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pq.read_schema(parts[0]).with_metadata({IDENTITY: json.dumps(identity, sort_keys=True)})
        kinds = self.kinds(parts[0]).values()
        row = sum(np.dtype(kind.dtype).itemsize * math.prod(kind.shape) for kind in kinds)
        length = max(1, ROW_GROUP_BYTES // row)
        with pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
            rest: list[Any] = []
            for part in parts:
                rest.append(pq.ParquetFile(part).read().replace_schema_metadata(schema.metadata))
                if sum(map(len, rest)) < length:
                    continue
                table = pa.concat_tables(rest).combine_chunks()
                whole = len(table) - len(table) % length
                writer.write_table(table.slice(0, whole), row_group_size=length)
                rest = [table.slice(whole).combine_chunks()] if whole < len(table) else []
            if rest:
                writer.write_table(pa.concat_tables(rest).combine_chunks(), row_group_size=length)

    def is_of(self, whole: Path, samples: int, identity: Mapping[str, Any]) -> bool:
        """Whether a file holds the predictions of so many samples, and of this."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            found = pq.read_metadata(whole)
        except (OSError, pa.ArrowInvalid):
            return False
        noted = (found.metadata or {}).get(IDENTITY)
        return found.num_rows == samples and noted is not None and json.loads(noted) == identity


class Npy:
    """numpy's own format: one tensor, and nothing of what it is of."""

    suffix = ".npy"

    def check(self, kinds: Mapping[str, Kind]) -> None:
        """Raises InputError if such columns cannot be kept."""
        if len(kinds) > 1:
            raise InputError(
                f"predict gives {len(kinds)} tensors ({', '.join(kinds)}) and a .npy file holds one; give --output "
                "FILE.parquet, or return one tensor"
            )

    def write(self, file: BinaryIO, columns: Columns) -> None:
        """Write a part."""
        (array,) = columns.values()
        np.save(file, array)

    def kinds(self, part: Path) -> dict[str, Kind]:
        """What the columns of a part hold; numpy keeps no name."""
        return kinds_of({"": np.load(part, mmap_mode="r")})

    def join(self, file: BinaryIO, parts: Sequence[Path], samples: int, identity: Mapping[str, Any]) -> None:
        """Write the whole: its header, then every part's numbers."""
        for i, part in enumerate(parts):
            array = np.load(part)
            if i == 0:
                header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (samples, *array.shape[1:])})
            file.write(array.tobytes())

    def is_of(self, whole: Path, samples: int, identity: Mapping[str, Any]) -> bool:
        """Whether a file holds the predictions of so many samples."""
        try:
            return len(np.load(whole, mmap_mode="r")) == samples
        except (OSError, ValueError, TypeError):
            return False


def format_of(output: Path) -> Format:
    """The format a file's name asks for.

    Raises:
        InputError: none of them, or one that needs a package that is not installed.
    """
    if output.suffix == Parquet.suffix:
        return Parquet()
    if output.suffix == Npy.suffix:
        return Npy()
    raise InputError(f"--output {output}: predictions are written as .parquet or .npy; give such a name")


def _table(columns: Columns) -> Any:
    import pyarrow as pa

    def arrays() -> Iterator[Any]:
        for array in columns.values():
            numbers = pa.array(array.reshape(-1))
            if array.ndim == 1:
                yield numbers
                continue
            storage = pa.FixedSizeListArray.from_arrays(numbers, math.prod(array.shape[1:]))
            yield pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(numbers.type, array.shape[1:]), storage)

    return pa.Table.from_arrays(list(arrays()), names=list(columns))
