"""Where a storage proxy listens and how it is reached; what it stores is held to `tests/contracts`."""

import socket

import pytest
from optuna.storages import InMemoryStorage

from search.databases import open_storage
from search.errors import StoreError
from search.proxy import serve
from tests.toys.servers import free_port


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="loopback has no IPv6 address here")


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        pytest.param("127.0.0.1", "127.0.0.1", id="IPv4"),
        pytest.param("::1", "[::1]", id="IPv6", marks=needs_ipv6),
        pytest.param("[::1]", "[::1]", id="IPv6 in brackets", marks=needs_ipv6),
    ],
)
def test_a_proxy_is_reached_directly_whatever_http_proxy_says(host, shown, monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    server = serve(InMemoryStorage(), host, port)
    try:
        storage = open_storage(tmp_path, url=f"grpc://{shown}:{port}")
        studies = storage.get_all_studies()
    finally:
        server.stop(None).wait()

    assert studies == []


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(StoreError, match=f"needs a free port, but 127.0.0.1:{port} is not"):
            serve(InMemoryStorage(), "127.0.0.1", port)
