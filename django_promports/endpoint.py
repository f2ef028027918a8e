"""The endpoint: the HTTP server of one process on its ports, with its limits on connections.

Each connection is a conversation of one loop in one thread, so that a slow, idle or hostile peer costs a file
descriptor and delays no other. Each connection carries one request. What a port answers is decided by its Routes.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from django_promports.http import Request, receive_head
from django_promports.logs import LimitedLog
from django_promports.loop import READ, Conversation, Loop, Steps, attempt, receive, send_all
from django_promports.own import own_metrics
from django_promports.routes import Routes
from django_promports.thread import PAUSE_SECONDS, LoopThread
from django_promports.unix import has_unsent

logger = logging.getLogger("django_promports")

# Seconds for TLS handshake and request header together. Prometheus sends both at once; its scrape timeout is 10 s.
HEADER_SECONDS = 5.0
# Seconds for the peer to receive the response. Megabytes over a slow link take that long, and delay no other peer.
ANSWER_SECONDS = 60.0
# If a connection is closed while input of the peer is unread, the kernel resets it, and the peer may miss the end of
# the response. So the endpoint keeps reading after a response, for so many seconds and bytes at most.
LINGER_SECONDS = 1.0
MAX_LINGER_BYTES = 4 * 1024 * 1024
# A Prometheus server holds one connection for a moment. This leaves ample room for two servers and a few browsers.
MAX_CONNECTIONS = 64
# Seconds to wait when the process has no file descriptor left for a connection.
EXHAUSTED_SECONDS = 0.1


class Stage(IntEnum):
    """What a connection is doing. At the limit, the oldest connection of the lowest stage is dropped."""

    ENDING = 0
    ASKING = 1
    ANSWERED = 2


@dataclass(eq=False)
class Service:
    """A port that is served: its listening socket, and what it answers."""

    listener: socket.socket
    routes: Routes
    accepting: Conversation | None = field(default=None, init=False)


class Endpoint:
    """Serves ports from a thread, until stop(): the one that its process has claimed, and any others that are added.

    tls: serve HTTPS with this context.
    """

    def __init__(self, listener: socket.socket, routes: Routes, *, tls: ssl.SSLContext | None = None) -> None:
        self._services = [Service(listener, routes)]
        self._own = own_metrics()
        self._tls = tls
        self._log = LimitedLog()
        self._connections: dict[Conversation, Stage] = {}  # oldest first
        self._tasks: list[Callable[[Loop], Steps[Any]]] = []
        self._held: list[socket.socket] = []
        self._stopping = False
        self._thread = LoopThread("promports-endpoint", self._begin, self._log)

    @property
    def _loop(self) -> Loop:
        return self._thread.loop

    def _begin(self, loop: Loop) -> Conversation:
        self._connections.clear()
        for task in self._tasks:
            loop.spawn(task(loop))
        first, *_ = [self._serve_port(loop, service) for service in self._services]
        return first

    def _serve_port(self, loop: Loop, service: Service) -> Conversation:
        service.routes.begin(loop)
        service.accepting = loop.spawn(self._accept(service))
        return service.accepting

    def run(self, task: Callable[[Loop], Steps[Any]], sock: socket.socket | None = None) -> None:
        """Run a conversation too, and close its socket with the endpoint. Call it before start()."""
        self._tasks.append(task)
        if sock is not None:
            self._held.append(sock)
        self._loop.spawn(task(self._loop))

    def add(self, listener: socket.socket, routes: Routes) -> Service:
        """Serve one more port. Call it in a conversation of the endpoint."""
        service = Service(listener, routes)
        self._services.append(service)
        self._serve_port(self._loop, service)
        return service

    def remove(self, service: Service) -> socket.socket:
        """Accept nothing more at a port that was added, and return its listening socket, which stays open.

        Call it in a conversation of the endpoint. Connections that were accepted are answered.
        """
        self._services.remove(service)
        if service.accepting is not None:
            self._loop.drop(service.accepting)
        return service.listener

    def start(self) -> None:
        """Start the thread, or start it again after pause()."""
        self._thread.start()

    def pause(self, seconds: float = PAUSE_SECONDS) -> None:
        """Stop the thread between two steps until start(), and wait up to `seconds` for it. The ports stay claimed."""
        self._thread.pause(seconds)

    def stop(self) -> None:
        """Stop the thread and free the ports."""
        self._stopping = True
        self.pause()
        self.abandon()

    def abandon(self) -> None:
        """Close all descriptors: in stop(), or in a forked child whose parent keeps serving."""
        self._stopping = True
        self._thread.close()  # first: gevent delays closing a socket that a selector watches
        for sock in [*self._held, *(service.listener for service in self._services)]:
            sock.close()

    def _accept(self, service: Service) -> Steps[None]:
        while True:
            try:
                yield service.listener, READ
                for _ in range(MAX_CONNECTIONS):  # then the open connections have a turn
                    try:
                        sock, address = service.listener.accept()
                    except BlockingIOError:
                        break
                    except ConnectionError:  # the peer closed it while it was queued
                        continue
                    if len(self._connections) >= MAX_CONNECTIONS:
                        self._drop_one()
                    connection = self._loop.spawn(self._serve(service, sock, address[0]), HEADER_SECONDS, sock)
                    self._connections[connection] = Stage.ASKING
            except OSError:  # no file descriptor left, or the selector cannot take the listener
                if not self._drop_one():
                    yield from self._loop.sleep(EXHAUSTED_SECONDS)

    def _drop_one(self) -> bool:
        if not self._connections:
            return False
        connection = min(self._connections, key=self._connections.__getitem__)
        self._loop.drop(connection)
        self._connections.pop(connection, None)
        return True

    def _serve(self, service: Service, sock: socket.socket, peer: str) -> Steps[None]:
        connection = self._loop.current()
        try:
            sock.setblocking(False)
            if self._tls:
                sock = tls = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                yield from attempt(tls, tls.do_handshake, READ)
            head = yield from receive_head(sock)
            if head:
                self._connections[connection] = Stage.ANSWERED
                connection.set_deadline(ANSWER_SECONDS)
                request = Request(head)
                response = request.error or (yield from service.routes.answer(self._loop, request, sock))
                if response.status in (400, 401, 405, 408, 431, 505):
                    self._own.refused.inc()
                yield from send_all(sock, response.encode(with_body=request.command != "HEAD"))
                # Closing at once would reset the connection if the peer sent more than was read.
                self._connections[connection] = Stage.ENDING
                sock.shutdown(socket.SHUT_WR)
                # What the kernel still has to send takes as long as the link needs.
                connection.set_deadline(ANSWER_SECONDS if has_unsent(sock) else LINGER_SECONDS)
                rest = MAX_LINGER_BYTES
                while rest > 0 and (chunk := (yield from receive(sock))):
                    rest -= len(chunk)
                if rest > 0 and response.delivered is not None and not has_unsent(sock):  # closed, and not reset
                    response.delivered(peer.removeprefix("::ffff:"))
        except OSError:  # the peer is gone or does not speak TLS; no reply is possible
            logger.debug("A connection to the metrics endpoint broke.", exc_info=True)
        except GeneratorExit:
            if self._connections.get(connection) == Stage.ASKING and not self._stopping:
                self._own.refused.inc()
            raise
        finally:
            self._connections.pop(connection, None)
            sock.close()
