import socket

import pytest

from deepopt.cluster.join import check_reachable
from deepopt.errors import ClusterError


@pytest.mark.parametrize(
    "address", ["auto", "10.0.0.5", "ray://10.0.0.5:10001", ":6379", "a:b"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="is not HOST:PORT"):
        check_reachable(address)


def test_a_door_that_nobody_opens_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_reachable(f"127.0.0.1:{port}")
    with pytest.raises(ClusterError, match=rf"no Ray answers at 127.0.0.1:{port}") as caught:
        check_reachable(f"127.0.0.1:{port}")
    assert caught.value.exit_code == 3
