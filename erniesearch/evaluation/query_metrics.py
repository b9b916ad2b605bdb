"""``runs/per_query.parquet``: each system's metrics of every query, from which systems are compared
without their runs being read again.

Columns: query_id, system (the table's row), and a metric each; any Parquet reader opens it.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniesearch.errors import UserError
from erniesearch.files import written_aside

Values = dict[str, dict[str, np.ndarray]]
"""By system and metric, ``[num_queries]`` in the order of the queries."""


def write_query_metrics(path: Path, qids: list[str], values: Values) -> None:
    """Write the metrics of every system, all with the same queries in the same order."""
    tables = []
    for system, metrics in values.items():
        assert all(len(column) == len(qids) for column in metrics.values())
        columns = {name: np.asarray(column, dtype=np.float64) for name, column in metrics.items()}
        tables.append(pa.table({"query_id": qids, "system": [system] * len(qids), **columns}))
    with written_aside(path) as aside:
        pq.write_table(pa.concat_tables(tables), aside, compression="zstd")


def read_query_metrics(path: Path) -> tuple[list[str], Values]:
    """The queries, and the metrics of every system.

    Raises:
        UserError: if the file is damaged, or systems differ in their queries.
    """
    try:
        table = pq.read_table(path)
        columns = table.column_names
        systems = table["system"].unique().to_pylist()
        parts = {name: table.filter(pc.equal(table["system"], name)) for name in systems}
        qids = [part["query_id"].to_pylist() for part in parts.values()]
    except (pa.ArrowException, KeyError, OSError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged ({problem}); `erniesearch run` writes it again") from None
    if not qids or any(other != qids[0] for other in qids[1:]):
        raise UserError(f"{path}: its systems differ in their queries; delete it")
    metrics = [name for name in columns if name not in ("query_id", "system")]
    values = {name: {m: part[m].to_numpy() for m in metrics}
              for name, part in parts.items()}  # fmt: skip
    return qids[0], values
