"""The peers, made once."""

import os
from pathlib import Path

import pytest
from support.peers import Peer, peers


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """``peer(environment, script, **values)``: the JSON that a script prints last."""
    kept = os.environ.get("ERNIESEARCH_PEERS")
    return peers(Path(kept) if kept else tmp_path_factory.mktemp("peers"))
