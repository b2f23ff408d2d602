"""Parquet and Arrow files, whose columns have types: several of them are one data set only if they are alike.

`datasets` reads them. It takes the types of the first file and casts the others to them, so that without this check
the text "007" of a second file would be the number 7 because the first one holds numbers.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lora_dist.boundary import boundary
from lora_dist.data.files.find import require_same_columns
from lora_dist.errors import require


def check_tables(kind: str, paths: list[Path]) -> None:
    """Raises UserError, which names the file, if one cannot be read, has no rows or is unlike the first one.

    kind: "parquet" or "arrow".
    """
    first = None
    for path in paths:
        with boundary(f"--dataset_name {path}: cannot be loaded"):
            schema, num_rows = _read_parquet_footer(path) if kind == "parquet" else (_read_arrow_schema(path), None)
        require(num_rows != 0, "dataset_name", path, "holds no examples")
        first = first or schema
        require_same_columns(path, schema.names, paths[0], first.names)
        for name in schema.names:
            here, there = schema.field(name).type, first.field(name).type
            why = f"its column {name} holds {here}, but in {paths[0]} it holds {there}; make the files alike"
            require(_can_be_read_as(here, there), "dataset_name", path, why)


def _read_parquet_footer(path: Path) -> tuple[pa.Schema, int]:
    """(columns, number of rows)."""
    with pq.ParquetFile(path) as file:
        return file.schema_arrow, file.metadata.num_rows


def _read_arrow_schema(path: Path) -> pa.Schema:
    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_stream(source).schema
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).schema


def _can_be_read_as(here: pa.DataType, there: pa.DataType) -> bool:
    """True if a cast leaves every value as it is. Keys that an object lacks are added as null."""
    here, there = (t.value_type if pa.types.is_dictionary(t) else t for t in (here, there))
    if pa.types.is_null(here) or here == there:
        return True
    if pa.types.is_struct(here) and pa.types.is_struct(there):
        of_there = {field.name: field.type for field in there}
        return all(f.name in of_there and _can_be_read_as(f.type, of_there[f.name]) for f in here)
    for is_kind in (_is_list, pa.types.is_integer, _is_text):
        if is_kind(here) and is_kind(there):
            return is_kind is not _is_list or _can_be_read_as(here.value_type, there.value_type)
    return False


def _is_list(type: pa.DataType) -> bool:
    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def _is_text(type: pa.DataType) -> bool:
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
