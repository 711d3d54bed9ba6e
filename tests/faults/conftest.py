"""What the fault tests share."""

from pathlib import Path

import pytest
from studies import make_states


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `before-VERB` and `after-VERB` of a tiny study."""
    return make_states(tmp_path_factory.mktemp("states"))
