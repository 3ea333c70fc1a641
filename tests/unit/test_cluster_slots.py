import sys

import pytest

from deepopt.cluster.hostfile import Host
from deepopt.cluster.slots import check_slots
from deepopt.cluster.ssh import head_address, is_local, ssh_command, take_slots
from deepopt.errors import ClusterError

HOSTS = (Host(name="a", slots=2), Host(name="b", slots=4, port=2222), Host(name="c", slots=1))


@pytest.mark.parametrize(
    ("num_workers", "names"), [(1, "a"), (2, "a"), (3, "ab"), (6, "ab"), (7, "abc")]
)
def test_hosts_are_filled_in_the_order_of_the_file(num_workers: int, names: str) -> None:
    used = take_slots(HOSTS, num_workers=num_workers)
    assert "".join(host.name for host in used) == names


def test_too_few_slots_say_what_was_asked_and_found_where() -> None:
    with pytest.raises(ClusterError) as caught:
        check_slots(wanted=8, found={h.name: h.slots for h in HOSTS}, what="GPUs")
    assert caught.value.exit_code == 3
    assert "asked for 8 workers, found 7 GPUs on 3 host(s)" in caught.value.message
    assert "a: 2, b: 4, c: 1" in caught.value.message
    assert caught.value.remedy == "lower --workers to 7, or add hosts or slots"
    with pytest.raises(ClusterError):
        check_slots(wanted=1, found={"a": 0}, what="GPUs")


def test_ssh_asks_no_questions_and_quotes_the_command() -> None:
    command = ssh_command(HOSTS[1], command=["a program", "up", "$x"])
    assert command[0] == "ssh"
    assert "BatchMode=yes" in command
    assert command[-4:] == ["-p", "2222", "b", "'a program' up '$x'"]
    assert "-p" not in ssh_command(HOSTS[0], command=[sys.executable])


def test_an_address_of_this_host_is_told_from_another_s() -> None:
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.7")


def test_a_hostfile_of_this_host_alone_is_a_cluster_on_loopback() -> None:
    for own in ("127.0.0.1", "127.0.1.1", "10.0.0.5"):
        assert head_address(here=[own], others=[]) == "127.0.0.1"


def test_the_head_s_host_is_named_by_an_address_that_the_others_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deepopt.cluster.ssh.source_address", lambda target: f"to {target}")
    assert head_address(here=["10.0.0.5"], others=["10.0.0.6"]) == "10.0.0.5"
    for here in ([], ["127.0.0.1"], ["127.0.1.1"]):
        assert head_address(here=here, others=["10.0.0.6", "10.0.0.7"]) == "to 10.0.0.6"


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("GPUs", "add hosts with free GPUs, or set worker.device to cpu"),
        ("CPU slots", "add hosts with free slots"),
    ],
)
def test_where_there_is_nothing_the_remedy_is_of_its_kind(what: str, remedy: str) -> None:
    with pytest.raises(ClusterError) as caught:
        check_slots(wanted=1, found={"a": 0}, what=what)
    assert caught.value.remedy == remedy
