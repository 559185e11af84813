"""Things that go wrong at a Hub, on order. All of them were seen on huggingface.co or in front of it.

A fault is planned for a route by its name (`create`, `commit`, `lfs-put` …, see routes.py) and is used up by as many
requests as `times` says; the next request is served normally.

    hub.faults.fail("commit", 503, times=2)      answer with a status, do nothing
    hub.faults.lose_reply("commit")              do it, then close the connection without a word
    hub.faults.silence("commit")                 do nothing, and do not answer
    hub.faults.html("validate-yaml")             a proxy's error page where JSON is expected
    hub.faults.meanwhile("commit", action)       something else happens just before the request is served
    hub.faults.ignore("a.safetensors")           preupload says that .gitignore names it
    hub.faults.wrong_sha("a.safetensors")        the tree reports another digest
    hub.faults.damage("a.safetensors")           reads give other bytes
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantpub.hub.wire import Refusal, Reply, error_reply, html_reply


@dataclass
class Fault:
    """`reply` stands in for serving the request; `before` runs first; `silent` and `lost` leave out the answer."""

    route: str
    times: int = 1
    reply: Reply | None = None
    before: Callable[[], object] | None = None
    silent: bool = False
    lost: bool = False


class Faults:
    def __init__(self) -> None:
        self._planned: list[Fault] = []
        self._lock = threading.Lock()
        self.ignored: set[str] = set()
        self.misreported: set[str] = set()
        self.damaged: set[str] = set()

    def fail(
        self,
        route: str,
        status: int,
        *,
        times: int = 1,
        message: str = "injected fault",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._plan(Fault(route, times, reply=error_reply(Refusal(status, message, code), headers)))

    def html(self, route: str, *, status: int = 502, times: int = 1) -> None:
        self._plan(Fault(route, times, reply=html_reply(status)))

    def lose_reply(self, route: str, *, times: int = 1) -> None:
        self._plan(Fault(route, times, lost=True))

    def silence(self, route: str, *, times: int = 1) -> None:
        self._plan(Fault(route, times, silent=True))

    def meanwhile(self, route: str, action: Callable[[], object], *, times: int = 1) -> None:
        self._plan(Fault(route, times, before=action))

    def ignore(self, path: str) -> None:
        self.ignored.add(path)

    def wrong_sha(self, path: str) -> None:
        self.misreported.add(path)

    def damage(self, path: str) -> None:
        self.damaged.add(path)

    def clear(self) -> None:
        """Forget what was planned and not used."""
        with self._lock:
            self._planned.clear()
        for paths in (self.ignored, self.misreported, self.damaged):
            paths.clear()

    def take(self, route: str) -> Fault:
        """The next fault planned for this route, used up by one; a fault that does nothing when there is none."""
        with self._lock:
            for fault in self._planned:
                if fault.route == route and fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault(route)

    def _plan(self, fault: Fault) -> None:
        with self._lock:
            self._planned.append(fault)
