"""An import holds ids, not texts."""

import json
from pathlib import Path

from support.processes import run_python

IMPORT = """
import resource, sys
from pathlib import Path
from erniesearch.data.importers.import_data import convert
from erniesearch.config.options import ImportOptions
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
facts = convert(sys.argv[1], [Path(sys.argv[2])], Path(sys.argv[3]), ImportOptions())
print(facts["passages"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def measure(name: str, source: Path, out: Path) -> tuple[int, float]:
    """Passages written, and MiB that the import added."""
    status, output = run_python("-c", IMPORT, name, str(source), str(out))
    assert status == 0, output
    passages, added = output.split()[-2:]
    return int(passages), float(added)


def test_a_large_collection_takes_the_memory_of_its_ids(tmp_path: Path) -> None:
    """200,000 passages, 180 MB of text, in 64 MiB."""
    root = tmp_path / "in"
    root.mkdir()
    with (root / "collection.tsv").open("w") as file:
        for i in range(200_000):
            file.write(f"{i}\t{'lorem ipsum ' * 75}\n")
    (root / "queries.train.tsv").write_text("q\twho?\n")
    (root / "qrels.train.tsv").write_text("q\t0\t7\t1\n")
    passages, added = measure("msmarco", root, tmp_path / "out")
    assert passages == 200_000
    assert added < 64


def test_a_long_json_list_is_read_item_by_item(tmp_path: Path) -> None:
    """4,000 questions on one line, 100 MB, in 32 MiB."""
    source = tmp_path / "train.json"
    with source.open("w") as file:
        for i in range(4000):
            contexts = [{"title": f"t{i}", "text": "lorem ipsum " * 2000, "passage_id": str(i)}]
            file.write("[" if not i else ",")
            file.write(json.dumps({"question": f"q{i}", "positive_ctxs": contexts}))
        file.write("]")
    passages, added = measure("dpr", source, tmp_path / "out")
    assert passages == 4000
    assert added < 32
