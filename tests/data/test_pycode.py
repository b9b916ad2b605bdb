"""The code-search corpus from hand-written packages: queries, code, what is left out, splits."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from support.processes import ROOT

from erniesearch.data.collection import load_beir
from erniesearch.data.importers import pycode
from erniesearch.errors import UserError


def write_module(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")


def pairs_of(root: Path) -> tuple[dict[str, pycode.Pair], Counter[str]]:
    left_out: Counter[str] = Counter()
    return {pair.name: pair for pair in pycode.extract(root, root.name, left_out)}, left_out


# --- the query ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("Return the sum of both numbers.", "Return the sum of both numbers"),
        ("\n    Read a file\n    line by line.\n\n    At length.", "Read a file line by line"),
        ("Wait for the lock. Then take it.", "Wait for the lock"),
        ("Join the words, e.g. Those of a list, into one.",
         "Join the words, e.g. Those of a list, into one"),
        ("Find the path of J. Smith in 2.5 seconds.", "Find the path of J. Smith in 2.5 seconds"),
        ("Turn a :class:`~pack.core.Box` into ``bytes``.", "Turn a Box into bytes"),
        ("Call :py:meth:`Box.open` on *every* **open** box.", "Call Box.open on every open box"),
        ("Draw the `first figure <https://x.org>`_ of it [1]_.", "Draw the first figure of it"),
        ("Load a [`~pack.Model`] as [the guide](https://x.org) says.",
         "Load a Model as the guide says"),
        ("Pass *args and **kwargs on to all callbacks.",
         "Pass *args and **kwargs on to all callbacks"),
        ("Send one message to the server.\n:param text: what to send", "Send one message to the"
         " server"),
        ("Sort the rows by date\nArgs:\n    rows: a list", "Sort the rows by date"),
        ("Split the text into words\n=========================", "Split the text into words"),
        ("One two three four " * 6 + "five", "One two three four " * 6 + "five"),  # 25 words
    ],
)  # fmt: skip
def test_first_sentence_without_markup(docstring: str, query: str) -> None:
    assert pycode.first_sentence(docstring) == query


@pytest.mark.parametrize(
    "docstring",
    [
        "", "Three words only.", "One two three four " * 6 + "five six",
        "a 1 2 3 4 5 6", "Résumé of the whole matter.", "读取文件 的 每 一 行",
        ":param x: the only thing that is said", "Args:\n    x: a number that is given",
        ">>> print(1) # and so on and on", "- a list of some things",
        "See the method of the base class.", "Same as the other function above.",
        "Deprecated since the second version.", "Use the other one as this is deprecated.",
        "open(file, mode) opens a file for you", "concat(a, b) -> joined list of them",
        "Return one of the following values:", "Fill in {name} for the template.",
        "name = one or more letters then", "Look at https://x.org for more of it.",
        "(This docstring will be overwritten)", "Compute the :math:`\\alpha` of a distribution.",
    ],
)  # fmt: skip
def test_what_says_too_little_is_no_query(docstring: str) -> None:
    assert pycode.first_sentence(docstring) is None


# --- the code -----------------------------------------------------------------------------------


def bare(source: str) -> str:
    """The code of the first function of a source text."""
    function = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, pycode.Function))
    return pycode.bare_code(function, source.split("\n"))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('def f(x):\n    """Doc."""\n    return x + 1\n', "def f(x):\n    return x + 1"),
        ('@cache\n@other("""text""")\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n# after',
         "def f(x):\n    return x + 1"),
        ('class A:\n    async def f(\n        self,  # the box\n    ):\n        """Doc\n        on'
         ' two lines.\n        """\n\n        # alone\n        await self.g()\n',
         "async def f(\n    self,\n):\n    await self.g()"),
        ('def f(): "Doc."; return g(1)\n', "def f(): return g(1)"),
        ('def f():\n    "Doc." ; x = g(1)\n    return x\n',
         "def f():\n    x = g(1)\n    return x"),
        ('def f():\n    ("Doc "\n     "goes on.")\n    return g(1)\n', "def f():\n    return g(1)"),
        ('class A:\n\tdef f(self):\n\t\t"""Doc."""\n\t\tif self:\n\t\t\treturn g(1)\n',
         "def f(self):\n\tif self:\n\t\treturn g(1)"),
        ('class A:\n\f\n\f    def f(self):\n        """Doc."""\n\f\n        return g(1)\n',
         "def f(self):\n    return g(1)"),
        ('def f():\n    """Dööçé."""; x = "ä # no comment"  # ü\n    return x * 2\n',
         'def f():\n    x = "ä # no comment"\n    return x * 2'),
        ('class A:\n    def f(self):\n        """Doc."""\n        return """one\n\n  # kept\n'
         '        end"""  # gone\n',
         'def f(self):\n    return """one\n\n  # kept\n    end"""'),
        ('def f():\n    """Doc."""\n    def g(x):\n        """Inner doc."""\n        return x * 2\n'
         '    class B:\n        """Inner doc too."""\n        y = 1\n    return g\n',
         "def f():\n    def g(x):\n        return x * 2\n    class B:\n        y = 1\n"
         "    return g"),
        ('def f():\n    """Doc."""\n    return lambda x: (x,\n  2)  # two\n',
         "def f():\n    return lambda x: (x,\n  2)"),
    ],
)  # fmt: skip
def test_code_without_docstrings_comments_and_decorators(source: str, code: str) -> None:
    assert bare(source) == code
    ast.parse(code)


@pytest.mark.parametrize(
    ("body", "trivial"),
    [
        ("pass", True), ("...", True), ("raise NotImplementedError", True), ("return", True),
        ("raise NotImplementedError('not here')", True), ("return None", True),
        ("return self._x", True), ("return self._x.y", True), ("self._x = x", True),
        ("import os\n    return os.sep", True), ("return -1 if x else 1", False),
        ("return self._x[0]", False), ("return self.g()", False), ("self._x = x + 1", False),
        ("del self.x", False), ("for y in x: pass", False), ("yield x", False),
    ],
)  # fmt: skip
def test_trivial_bodies(body: str, trivial: bool) -> None:
    node = ast.parse(f'def f(self, x):\n    """Doc."""\n    {body}\n').body[0]
    assert isinstance(node, pycode.Function)
    assert pycode.is_trivial(node) == trivial


# --- a package ----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with one of everything."""
    root = tmp_path / "pack"
    write_module(
        root / "core.py",
        '''
        """A module of small tools with a docstring."""

        class Box:
            """A class is no function of ours."""

            def __len__(self):
                """Return how many things there are."""
                return len(self.things)

            @classmethod
            def of(cls, *things):
                """Make a box of some things."""
                return cls(list(things))

            @property
            def weight(self):
                """The weight of all things together."""
                return sum(self.things)

            @weight.setter
            def weight(self, value):
                """Change the weight of all things."""
                self.things = [value / len(self.things)]

            @property
            def colour(self):
                """The colour that the box has."""
                return self._colour

        @overload
        def double(x: int) -> int:
            """Double a number that is whole."""
            ...

        def double(x):
            """Double anything that can be added."""
            def inner(y):
                """Add a thing to itself once."""
                return y + y
            return inner(x)

        async def fetch(url):
            """Fetch a page from the network."""
            return await get(url)

        def no_docstring():
            return g(1)

        shorter = lambda x: x * 2

        def test_double():
            """Check that double does double things."""
            assert double(1) == 2

        def refuse(x):
            """Refuse numbers that are negative."""
            if x < 0:
                raise ValueError("refuse numbers that\\nare negative!")
            raise ValueError("Refuse numbers that are negative")
        ''',
    )
    write_module(root / "long.py", 'def f(x):\n    """Say something very many times."""\n'
                 + "    print(x)\n" * 100)  # fmt: skip
    function = 'def {}(x):\n    """Describe the thing named {}."""\n    return g(x, "{}")\n'
    for name, before in {
        "broken": "def (", "print2": "print 'old Python'\n", "made": "# Generated by a tool\n",
        "test_x": "", "conftest": "", "x_test": "", "sub/tests/x": "", "_vendor/x": "", "kept": "",
    }.items():  # fmt: skip
        word = name.replace("/", "_")
        write_module(root / f"{name}.py", before + function.format(word, word, word))
    (root / "latin.py").write_bytes(function.format("é", "é", "é").encode("latin-1"))
    return root


def test_a_package(package: Path) -> None:
    pairs, left_out = pairs_of(package)
    assert {name: pair.query for name, pair in pairs.items()} == {
        "pack.core.Box.of": "Make a box of some things",
        "pack.core.Box.weight": "Change the weight of all things",  # the last of the two here
        "pack.core.double": "Double anything that can be added",
        "pack.core.fetch": "Fetch a page from the network",
        "pack.kept.kept": "Describe the thing named kept",
    }
    assert pairs["pack.core.double"].code == (
        "def double(x):\n    def inner(y):\n        return y + y\n    return inner(x)"
    )
    assert pairs["pack.core.fetch"].code == "async def fetch(url):\n    return await get(url)"
    assert {pair.module for pair in pairs.values()} == {"pack.core", "pack.kept"}
    assert left_out == {
        "special methods and tests": 2, "trivial body": 2, "the sentence is in the code": 1,
        "code of more than 1000 characters": 1,
    }  # fmt: skip


# --- the set ------------------------------------------------------------------------------------


FUNCTION = 'def f{0}(x):\n    # a comment\n    """Compute the quantity number {0}."""\n    {1}\n'


@pytest.fixture
def many_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hundred modules of two functions, copies of some, and sentences that repeat."""
    root = tmp_path / "many"
    for i in range(400):
        path = root / f"m{i // 2:03}.py"
        old = path.read_text() if path.exists() else ""
        write_module(path, old + FUNCTION.format(i, f"return x + {i}"))
        if i < 20:  # a vendored copy: other name, other layout, other docstring
            write_module(
                root / "zcopies" / f"c{i}.py",
                f'def g{i}(\n  x\n):\n    "This is copy number {i}."\n    return x+{i}\n',
            )
    for i, sentence in enumerate(["Open the file again"] * 3 + ["Return the usual value"] * 4):
        write_module(root / f"z{i}.py", f'def f(x):\n    """{sentence}!"""\n    return x * {i}\n')
    monkeypatch.setattr(pycode, "roots", lambda: iter([("many", root)]))
    return root


def test_every_split_loads_and_none_shares_a_query_a_module_or_code(
    many_modules: Path, tmp_path: Path
) -> None:
    facts = pycode.build(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pycode.json").read_text()) == facts
    assert facts["pairs"] == 401  # with the first of those that open the file again
    assert facts["documented_functions_left_out"] == {
        "copy of other code": 20,
        "sentence of another function": 2,
        "sentence of more than 3 functions": 4,
    }
    splits = {name: load_beir(tmp_path / "out", name) for name in ("train", "dev", "test")}
    assert {name: len(data.qrels) for name, data in splits.items()} == facts["splits"]
    assert len(splits["train"].pids) == sum(facts["splits"].values()) == 401
    assert facts["splits"]["train"] > facts["splits"]["test"] > facts["splits"]["dev"] > 0
    modules, seen = {}, set()
    for name, data in splits.items():
        for qid, grades in data.qrels.items():
            (pid,) = grades
            assert qid == f"q:{pid}"
            assert modules.setdefault(pid.rpartition(".")[0], name) == name
            number = pid.rpartition(".f")[2]
            if number:
                code = f"def f{number}(x):\n    return x + {number}"
                assert data.passages[data.index_of[pid]] == code
                assert data.queries[qid] == f"Compute the quantity number {number}"
            seen.add(data.queries[qid])
    assert len(seen) == 401


SCRIPT = """
import sys
from pathlib import Path
from erniesearch.data.importers import pycode
pycode.roots = lambda: iter([("many", Path(sys.argv[1]))])
pycode.build(Path(sys.argv[2]), 150)
"""


def test_two_processes_write_the_same_bytes(many_modules: Path, tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(many_modules), str(out)], check=True, cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        files = (path for path in out.rglob("*") if path.is_file())
        written.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert written[0] == written[1]
    assert sorted(written[0]) == [
        "corpus.jsonl", "pycode.json", "qrels/dev.tsv", "qrels/test.tsv", "qrels/train.tsv",
        "queries.jsonl",
    ]  # fmt: skip


def test_max_pairs_keeps_a_stable_choice(many_modules: Path, tmp_path: Path) -> None:
    for number in (100, 120):
        assert pycode.build(tmp_path / str(number), number)["pairs"] == number
    fewer, more = ({json.loads(line)["_id"] for line in (tmp_path / name / "corpus.jsonl").open()}
                   for name in ("100", "120"))  # fmt: skip
    assert fewer < more


def test_too_few_pairs_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max_pairs is 99"):
        pycode.build(tmp_path / "out", max_pairs=99)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        pycode.build(tmp_path / "file")


def test_installed_code_is_read_and_not_imported(tmp_path: Path) -> None:
    """The standard library's json, and a package whose import would fail."""
    (tmp_path / "bomb").mkdir()
    write_module(tmp_path / "bomb" / "__init__.py", 'raise SystemExit\ndef f(x):\n    """Go off'
                 ' with a bang."""\n    return x * 2\n')  # fmt: skip
    assert list(pairs_of(tmp_path / "bomb")[0]) == ["bomb.f"]
    pairs, _ = pairs_of(Path(json.__file__).parent)
    assert pairs["json.dumps"].query == "Serialize obj to a JSON formatted str"
    assert pairs["json.dumps"].code.startswith("def dumps(obj, *, skipkeys=False")
    assert "#" not in pairs["json.dumps"].code
