from pathlib import Path

import pytest

from deepopt.cluster.hostfile import Host, parse_hostfile, read_hostfile
from deepopt.errors import InputError


def test_hosts_come_in_the_order_of_the_file_without_comments() -> None:
    text = "# our hosts\n\n  10.0.0.5 slots=8  # the fast one\nme@gpu-1\tslots=4 port=2222\n"
    assert parse_hostfile(text, source="hosts") == (
        Host(name="10.0.0.5", slots=8),
        Host(name="me@gpu-1", slots=4, port=2222),
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a", "host a has no slots"),
        ("a slots=0", "slots=0 is not a positive number"),
        ("a slots=-1", "slots=-1 is not a positive number"),
        ("a slots=two", "slots=two is not a positive number"),
        ("a slots=\u00b2", "is not a positive number"),
        ("a slots=2 slots=3", "slots is there twice"),
        ("a slots=2 gpus=3", "'gpus=3' is neither"),
        ("a slots=2 3", "'3' is neither"),
        ("a slots=2 port=70000", "above 65535"),
        ("slots=2", "'slots=2' is not a host name"),
        ("-oProxyCommand=evil slots=2", "is not a host name"),
        ("good slots=3", "host good is there already, in line 1"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(line: str, complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_hostfile(f"good slots=2\n{line}\n", source="my/hosts")
    assert caught.value.message.startswith("my/hosts:2: ")
    assert complaint in caught.value.message


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n"])
def test_a_file_without_hosts_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no host"):
        parse_hostfile(text, source="hosts")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read hostfile .*nowhere"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_hostfile(tmp_path / "binary")
