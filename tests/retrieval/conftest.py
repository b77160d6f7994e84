"""An embedder of random weights."""

import pytest
from builders.retrieval import save_embedder

from fgpt.retrieval.embedder import Embedder, load_embedder


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return load_embedder(save_embedder(tmp_path_factory.mktemp("embedder")))
