"""The embedded corpus from a hand-written package: what is read, what is skipped, how it splits."""

import json
import textwrap
from pathlib import Path

import pytest

from erniesearch.data.collection import load_beir
from erniesearch.data.importers import pydocs
from erniesearch.errors import UserError

BODY = "The rest of the docstring says at length what happens and which arguments there are"


def write_module(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with one of everything."""
    root = tmp_path / "pack"
    write_module(root / "__init__.py", f'"""A package of small tools.\n\n{BODY} 1.\n"""\n')
    write_module(
        root / "core.py",
        f'''
        """Core of the whole package.

        {BODY} 2.
        """

        class Box:
            """A box that holds `things`.

            {BODY} 3.

            Second paragraph of the body.
            """

            async def open(self):
                """Open the **box** without
                breaking it.

                {BODY} 4.
                """

        def outer():
            """Too short.

            {BODY} 5.
            """

            def inner():
                """A function inside another function.

                {BODY} 6.
                """

        def only_summary():
            """There is a summary line, yet no body."""

        def thin_body():
            """Summary with quite enough words.

            Little here.
            """

        def no_docstring():
            return 1
        ''',
    )
    write_module(root / "broken.py", f'"""A module that will not parse.\n\n{BODY} 7.\n"""\ndef (')
    (root / "latin.py").write_bytes(f'"""A module in another encoding.\n\n{BODY} 8 \xe9.\n"""'
                                    .encode("latin-1"))  # fmt: skip
    for folder in ("tests", "sub/testing", "_vendor"):
        write_module(root / folder / "thing.py", f'"""A file nobody should read.\n\n{BODY} 9.\n"""')
    write_module(root / "sub" / "leaf.py", f'"""The leaf of the tree.\n\n{BODY} 10.\n"""')
    return root


def test_summary_is_split_from_the_rest(package: Path) -> None:
    pairs = {pair.name: pair for pair in pydocs.extract(package, "pack")}
    assert list(pairs) == [
        "pack", "pack.core", "pack.core.Box", "pack.core.Box.open", "pack.core.outer.inner",
        "pack.sub.leaf",
    ]  # fmt: skip
    box = pairs["pack.core.Box"]
    assert box.summary == "A box that holds things"  # no mark-up, no full stop
    assert box.body == f"{BODY} 3. Second paragraph of the body."
    assert pairs["pack.core.Box.open"].summary == "Open the box without breaking it"
    assert {pair.module for pair in pairs.values()} == {"pack", "pack.core", "pack.sub.leaf"}


def test_stdlib_names_leave_out_the_folder_and_single_files_work(package: Path) -> None:
    names = [pair.name for pair in pydocs.extract(package, "stdlib")]
    assert names[1:3] == ["core", "core.Box"]
    single = list(pydocs.extract(package / "sub" / "leaf.py", "leaf"))
    assert [pair.name for pair in single] == ["leaf"]


@pytest.mark.parametrize(
    ("docstring", "kept"),
    [
        ("Three words only\n\n" + BODY, False),
        ("Now there are four\n\n" + BODY, True),
        (" ".join(["word"] * 24) + "\n\n" + BODY, True),
        (" ".join(["word"] * 25) + "\n\n" + BODY, False),
        ("Now there are four\n\n" + " ".join(["word"] * 9), False),
        ("Now there are four\n\n" + " ".join(["word"] * 10), True),
        ("1 + 2 == 3\n\n" + BODY, False),
        ("Now there are four\n" + BODY, False),
    ],
)
def test_docstrings_that_say_too_little_are_left_out(
    docstring: str, kept: bool, tmp_path: Path
) -> None:
    file = tmp_path / "pack" / "module.py"
    write_module(file, "")
    file.write_text(f'"""{docstring}"""\n')
    assert len(list(pydocs.extract(file, "pack"))) == kept


def test_long_bodies_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "pack" / "module.py"
    write_module(file, '"""A body without any end.\n\n' + "word " * 3000 + '"""\n')
    (pair,) = pydocs.extract(file, "pack")
    assert len(pair.body) == 2000


@pytest.fixture
def many_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hundred modules; some docstrings repeat."""
    root = tmp_path / "many"
    for i in range(200):
        write_module(root / f"m{i:03}.py", f'"""Module about topic number {i}.\n\n{BODY} {i}.\n"""')
    twice, boilerplate = "Open the file again", "Return the usual default value"
    for i, summary in enumerate([twice, twice.upper(), *[boilerplate] * 4]):
        write_module(root / f"z{i}.py", f'"""{summary}.\n\n{BODY} z{i}.\n"""')
    write_module(root / "zz.py", f'"""Copy of the first module.\n\n{BODY} 0.\n"""')
    monkeypatch.setattr(pydocs, "roots", lambda: iter([("many", root)]))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_built_twice_is_the_same_to_the_byte(many_modules: Path, tmp_path: Path) -> None:
    facts = [pydocs.build(tmp_path / name) for name in ("first", "second")]
    assert facts[0] == facts[1]
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert sorted(contents(tmp_path / "first")) == [
        "corpus.jsonl", "qrels/dev.tsv", "qrels/test.tsv", "qrels/train.tsv", "queries.jsonl",
    ]  # fmt: skip


def test_every_split_loads_and_none_shares_a_query(many_modules: Path, tmp_path: Path) -> None:
    facts = pydocs.build(tmp_path / "out")
    splits = {name: load_beir(tmp_path / "out", name) for name in ("train", "dev", "test")}
    sizes = {name: sum(map(len, data.qrels.values())) for name, data in splits.items()}
    assert sizes == facts["splits"]
    assert sum(sizes.values()) == facts["passages"] == 202
    queries = [set(data.qrels) for data in splits.values()]
    assert sum(map(len, queries)) == len(set.union(*queries)) == facts["queries"] == 201
    assert sizes["train"] > sizes["test"] > sizes["dev"] > 0
    train = splits["train"]
    for qid, grades in train.qrels.items():
        assert all(train.queries[qid] not in train.passages[train.index_of[pid]] for pid in grades)


def test_repeated_docstrings(many_modules: Path, tmp_path: Path) -> None:
    """One summary for up to three passages is one query; shared by more it is boilerplate; a body
    counts once."""
    pydocs.build(tmp_path / "out")
    lines = (tmp_path / "out" / "queries.jsonl").read_text().splitlines()
    queries = {record["_id"]: record["text"] for record in map(json.loads, lines)}
    assert queries["q:many.z0"] == "Open the file again"
    assert not {"q:many.z1", "q:many.zz"} & set(queries)
    assert "Return the usual default value" not in queries.values()
    qrels = "".join(p.read_text() for p in (tmp_path / "out" / "qrels").iterdir())
    assert "q:many.z0\tmany.z0\t1\nq:many.z0\tmany.z1\t1\n" in qrels


def test_max_pairs_keeps_a_stable_choice(many_modules: Path, tmp_path: Path) -> None:
    assert pydocs.build(tmp_path / "some", max_pairs=120)["queries"] == 120
    assert pydocs.build(tmp_path / "fewer", max_pairs=100)["queries"] == 100
    some, fewer = ((tmp_path / name / "queries.jsonl").read_text().splitlines()
                   for name in ("some", "fewer"))  # fmt: skip
    assert set(fewer) < set(some)


def test_too_few_pairs_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max_pairs is 99"):
        pydocs.build(tmp_path / "out", max_pairs=99)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        pydocs.build(tmp_path / "file")


def test_the_standard_library_is_there_and_is_skipped_where_it_should_be() -> None:
    roots = dict(pydocs.roots())
    assert (roots["stdlib"] / "json" / "__init__.py").is_file()
    assert {"numpy", "torch"} <= set(roots)
    names = {pair.name for pair in pydocs.extract(roots["stdlib"] / "json", "json")}
    assert "json.dumps" in names
