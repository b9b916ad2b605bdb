"""The documentation's pictures of the page can be taken again."""

import struct
from pathlib import Path

from support.browser import needs_browser
from support.finished_run import write_run
from support.page_pictures import PICTURES, take_all
from support.tiny import ALL_TERMS

from erniesearch.search.system import SearchSystem

pytestmark = needs_browser


def test_every_picture_is_taken(tmp_path: Path, tiny_data: Path, tiny_model: Path) -> None:
    write_run(tmp_path / "run", tiny_data, tiny_model, ALL_TERMS)
    system = SearchSystem.from_run(tmp_path / "run")
    paths = take_all(system, "baran desel", tmp_path / "pictures")
    assert [path.stem for path in paths] == list(PICTURES)
    contents = [path.read_bytes() for path in paths]
    sizes = [struct.unpack(">II", content[16:24]) for content in contents]
    assert sizes == [(picture.width, picture.height) for picture in PICTURES.values()]
    assert len(set(contents)) == len(contents)
