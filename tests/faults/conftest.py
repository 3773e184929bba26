from collections.abc import Iterator

import pytest
from campaign import Bench
from victims import Nursery


@pytest.fixture(scope="session")
def bench(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Where the campaigns of faults run the training scripts."""
    with Nursery() as nursery:
        yield Bench(nursery, commands, tmp_path_factory.mktemp("faults"))
