"""HTTP on 127.0.0.1: takes a request, lets a planned fault have its way, finds the route, writes the reply, logs both.

One `Listener` is one origin. The Hub's origin knows people by their tokens; the storage service's refuses tokens and
wants a signed address. An error within the Hub, as opposed to a refusal, is answered with 500 and kept for its user.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from quantpub.hub import routes
from quantpub.hub.access import ANONYMOUS, Person
from quantpub.hub.faults import Fault
from quantpub.hub.routes import Route
from quantpub.hub.state import Entry, Hub
from quantpub.hub.wire import Body, Refusal, Reply, Request, error_reply, request_id


class Listener(ThreadingHTTPServer):
    """One origin: a table of routes, and whether its callers bring tokens."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: Hub, table: Sequence[Route], *, tokens: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.table, self.tokens = hub, table, tokens
        # the storage service goes by another name for the same address: huggingface_hub 1.x takes a second port of
        # one host for the same origin, and would send it the token
        self.origin = f"http://{'127.0.0.1' if tokens else 'localhost'}:{self.server_address[1]}"
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def start(self) -> Listener:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening, and hang up on clients that keep their connection open."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def person(self, request: Request) -> Person:
        authorization = request.headers.get("Authorization")
        if self.tokens:
            return self.hub.access.person(authorization)
        if authorization is not None:
            raise Refusal(400, "Only one auth mechanism allowed: the signature of the address, not a token")
        self.hub.require_signature(request)
        return ANONYMOUS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        hung_up = isinstance(sys.exc_info()[1], ConnectionError)
        if not hung_up and not self.hub.closing.is_set():
            self.hub.crashes.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        route, params = routes.find(self.server.table, self.command, url.path)
        body = Body(self.rfile, self.headers)
        request = Request(self.command, url.path, parse_qs(url.query, True), self.headers, body, params)
        fault = self.server.hub.faults.take(route.name)
        try:
            reply = None if fault.silent else self._answer(route, request, fault)
            if reply is None or fault.lost:
                self._hang_up(route, request, at_once=reply is not None)
            else:
                body.drain()
                self._send(route, request, reply)
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _answer(self, route: Route, request: Request, fault: Fault) -> Reply:
        try:
            if fault.before:
                fault.before()
            return fault.reply or route.handler(self.server.hub, request, self.server.person(request))
        except Refusal as refusal:
            return error_reply(refusal)
        except ConnectionError:
            raise
        except Exception as error:
            self.server.hub.crashes.append(traceback.format_exc())
            return error_reply(Refusal(500, f"{type(error).__name__} within the Hub"))

    def _send(self, route: Route, request: Request, reply: Reply) -> None:
        bodiless = self.command == "HEAD"
        self._log(route, request, reply.status, 0 if bodiless else reply.length)
        self.send_response(reply.status)
        for name, value in {**request_id(), **reply.headers, "Content-Length": str(reply.length)}.items():
            self.send_header(name, " ".join(value.split()).encode("ascii", "replace").decode())
        self.end_headers()
        for chunk in () if bodiless else reply.chunks():
            self.wfile.write(chunk)

    def _hang_up(self, route: Route, request: Request, *, at_once: bool) -> None:
        self._log(route, request, 0, 0)
        if not at_once:
            self.server.hub.closing.wait()
        self.close_connection = True

    def _log(self, route: Route, request: Request, status: int, sent: int) -> None:
        authorized = "Authorization" in request.headers
        entry = Entry(self.command, request.path, status, route.name, authorized, request.body.received, sent)
        self.server.hub.log.append(entry)

    def log_message(self, format: str, *args: object) -> None:
        """The log is in memory; nothing is printed."""
