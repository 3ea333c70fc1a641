from collections.abc import Iterator

import pytest

from support.hosts import HostGroup, why_not


@pytest.fixture(scope="session")
def machine_for_hosts() -> None:
    """Skips, with the reason, where no hosts can be made."""
    if reason := why_not():
        pytest.skip(f"no hosts on this machine: {reason}")


@pytest.fixture(scope="session")
def two_hosts(
    machine_for_hosts: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HostGroup]:
    """Two hosts for the whole session. A test that harms one heals it."""
    group = HostGroup(tmp_path_factory.mktemp("hosts"))
    with group:
        yield group
