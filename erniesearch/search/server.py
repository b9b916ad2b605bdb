"""Start and stop of the service: port, models, requests, signals."""

import errno
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from erniesearch.errors import UserError
from erniesearch.search.app import create_app
from erniesearch.search.system import SearchSystem

GRACE_S = 30
"""Requests that have begun may take this long after SIGTERM or Ctrl-C."""


def serve(
    load: Callable[[], SearchSystem],
    host: str,
    port: int,
    late_interaction_depth: int | None = None,
    cross_encoder_depth: int | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    The port is taken first and opened when the models are loaded, so that a mistake shows at once
    and no request comes too early.

    Args:
        load: loads the system.
        port: 0 takes any free one.

    Raises:
        UserError: if the port cannot be taken; also whatever ``load`` and :func:`create_app` raise.
    """
    with _bound_socket(host, port) as listener:
        system = load()
        app = create_app(system, late_interaction_depth, cross_encoder_depth)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S)
        try:
            listener.listen(config.backlog)
        except OSError as error:
            raise _cannot_listen(host, port, error) from None
        sys.stdout.write(f"{len(system.index.pids)} passages on {_url(host, listener)}\n")
        sys.stdout.flush()
        # Uvicorn finishes what has begun and then raises the signal again: that must not kill.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)


def _bound_socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} of {host} is in use: give another --port")
    return UserError(f"cannot listen on --host {host} --port {port}: {error.strerror}")


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
