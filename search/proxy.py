"""Optuna's gRPC proxy: many workers share one process's connections to the database. The only importer of grpc.

A proxy keeps the number of database connections constant, and workers need no database password. It speaks no TLS and
asks for no password itself: it belongs on loopback or inside a private network.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.storages._grpc.auto_generated.api_pb2_grpc import StorageServiceStub
from optuna.storages._grpc.client import GrpcClientCache
from optuna.storages._grpc.server import make_server

from search.errors import StoreError

NUM_THREADS = 32


class ProxyStorage(GrpcStorageProxy):
    """A client of the proxy each of whose calls ends after a time, because a cut network answers nothing at all.

    Args:
        host: Of the proxy.
        port: Of the proxy.
        timeout_s: Longest time of one call.
    """

    def __init__(self, host: str, port: int, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        super().__init__(host=host, port=port)

    def _setup(self) -> None:
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_reconnect_backoff_ms", 5000)]
        channel = grpc.insecure_channel(f"{self._host}:{self._port}", options=unlimited)
        self._channel = grpc.intercept_channel(channel, _Deadline(self._timeout_s))
        self._stub = StorageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cache = GrpcClientCache(self._stub)


class _Deadline(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def intercept_unary_unary(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        return continuation(details._replace(timeout=self._timeout_s), request)


def serve(storage: BaseStorage, host: str, port: int) -> grpc.Server:
    """Start a proxy and return its server; it runs in threads until it is stopped.

    Raises:
        StoreError: If the port is taken or the host is not one of this machine's.
    """
    try:
        server = make_server(storage, host, port, ThreadPoolExecutor(NUM_THREADS, "proxy"))
    except RuntimeError as error:
        raise StoreError(f"a storage proxy needs a free port, but {host}:{port} is not; give another --port") from error
    server.start()
    return server
