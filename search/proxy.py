"""Optuna's gRPC proxy: many workers share one process's connections to the database. The only importer of grpc.

A proxy keeps the number of database connections constant, and workers need no database password. It speaks no TLS and
asks for no password itself: it belongs on loopback or inside a private network. It has no patience of its own: that its
database is away it tells its clients, which are patient and know how to repeat a write.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.storages._grpc.auto_generated.api_pb2_grpc import (
    StorageServiceStub,
    add_StorageServiceServicer_to_server,
)
from optuna.storages._grpc.client import GrpcClientCache
from optuna.storages._grpc.servicer import OptunaStorageProxyService

from search.errors import StoreError
from search.patience import database_errors, first_line, is_away

NUM_THREADS = 32

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 5000),
    ("grpc.enable_http_proxy", 0),  # HTTP_PROXY leads out of the private network that the proxy belongs in
)


def address(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 address, which may have them already."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


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
        self._channel = grpc.intercept_channel(self._open_channel(), _Deadline(self._timeout_s))
        self._stub = StorageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cache = GrpcClientCache(self._stub)

    def wait_server_ready(self, timeout: float | None = None) -> None:
        """Wait until the proxy answers; Optuna's own opens a channel without our options.

        Raises:
            ConnectionError: If it does not within so many seconds.
        """
        try:
            with self._open_channel() as channel:
                grpc.channel_ready_future(channel).result(timeout=timeout)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError("the proxy does not answer") from error

    def _open_channel(self) -> grpc.Channel:
        return grpc.insecure_channel(address(self._host, self._port), options=_CHANNEL_OPTIONS)


class _Deadline(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def intercept_unary_unary(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        return continuation(details._replace(timeout=self._timeout_s), request)


class _Away(grpc.ServerInterceptor):  # type: ignore[misc]
    """Tells clients what a database says: UNAVAILABLE may be tried again, INTERNAL may not."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                return handler.unary_unary(request, context)
            except database_errors() as error:
                code = grpc.StatusCode.UNAVAILABLE if is_away(error) else grpc.StatusCode.INTERNAL
                context.abort(code, first_line(error))

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)


def serve(database: BaseStorage, host: str, port: int) -> grpc.Server:
    """Start a proxy and return its server; it runs in threads until it is stopped.

    Args:
        database: What is shared, from `open_database`: one that is patient would do a client's repeated writes twice.
        host: Address to listen at.
        port: Port to listen at.

    Raises:
        StoreError: If the port is taken or the host is not one of this machine's.
    """
    server = grpc.server(ThreadPoolExecutor(NUM_THREADS, "proxy"), interceptors=[_Away()])
    add_StorageServiceServicer_to_server(OptunaStorageProxyService(database), server)  # type: ignore[no-untyped-call]
    place = address(host, port)
    try:
        server.add_insecure_port(place)
    except RuntimeError as error:
        raise StoreError(f"a storage proxy needs a free port, but {place} is not; give another --port") from error
    server.start()
    return server
