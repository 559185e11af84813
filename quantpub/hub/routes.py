"""Every address of the Hub, by name. The name is what faults are planned for and what the log says.

Addresses are matched as they were sent, still quoted: a revision such as `refs%2Fpr%2F1` is one part. `{path}` takes
the rest. Two tables, because there are two origins: the Hub itself, and the storage service that holds large objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from quantpub.hub import committing, lfs, reading, resolving, writing
from quantpub.hub.access import Person
from quantpub.hub.state import Hub
from quantpub.hub.wire import Refusal, Reply, Request

MODEL = "/api/models/{owner}/{name}"
DATASET = "/api/{kind}/{owner}/{name}"  # datasets, which are read only


class Route(NamedTuple):
    name: str
    methods: str
    address: str
    handler: Callable[[Hub, Request, Person], Reply]


HUB = (
    Route("whoami", "GET", "/api/whoami-v2", reading.whoami),
    Route("create", "POST", "/api/repos/create", writing.create),
    Route("validate-yaml", "POST", "/api/validate-yaml", writing.validate_yaml),
    Route("info", "GET", MODEL, reading.info),
    Route("info", "GET", MODEL + "/revision/{rev}", reading.info),
    Route("info", "GET", DATASET, reading.info),
    Route("info", "GET", DATASET + "/revision/{rev}", reading.info),
    Route("auth-check", "GET", MODEL + "/auth-check", reading.auth_check),
    Route("auth-check", "GET", MODEL + "/auth-check/write", reading.auth_check_write),
    Route("settings", "PUT", MODEL + "/settings", writing.settings),
    Route("tree", "GET", MODEL + "/tree/{rev}", reading.tree),
    Route("tree", "GET", MODEL + "/tree/{rev}/{path}", reading.tree),
    Route("tree", "GET", DATASET + "/tree/{rev}", reading.tree),
    Route("tree", "GET", DATASET + "/tree/{rev}/{path}", reading.tree),
    Route("paths-info", "POST", MODEL + "/paths-info/{rev}", reading.paths_info),
    Route("refs", "GET", MODEL + "/refs", reading.refs),
    Route("refs", "GET", DATASET + "/refs", reading.refs),
    Route("commits", "GET", MODEL + "/commits/{rev}", reading.commits),
    Route("preupload", "POST", MODEL + "/preupload/{rev}", writing.preupload),
    Route("commit", "POST", MODEL + "/commit/{rev}", committing.commit),
    Route("tag", "POST", MODEL + "/tag/{rev}", writing.tag),
    Route("tag", "DELETE", MODEL + "/tag/{ref}", writing.delete_tag),
    Route("branch", "POST", MODEL + "/branch/{ref}", writing.branch),
    Route("lfs-batch", "POST", "/{owner}/{name}.git/info/lfs/objects/batch", lfs.batch),
    Route("lfs-verify", "POST", "/{owner}/{name}.git/info/lfs/verify", lfs.verify),
    Route("resolve", "GET HEAD", "/{owner}/{name}/resolve/{rev}/{path}", resolving.resolve),
    Route("resolve", "GET HEAD", "/{kind}/{owner}/{name}/resolve/{rev}/{path}", resolving.resolve),
)
STORAGE = (
    Route("lfs-put", "PUT", "/{owner}/{name}/lfs/{oid}", lfs.put),
    Route("lfs-part", "PUT", "/{owner}/{name}/lfs/{oid}/part/{number}", lfs.put_part),
    Route("lfs-join", "POST", "/{owner}/{name}/lfs/{oid}/join", lfs.join_parts),
    Route("cdn", "GET HEAD", "/objects/{oid}", lfs.get),
)


def _nowhere(hub: Hub, request: Request, person: Person) -> Reply:
    raise Refusal(404, f"Sorry, there is nothing at {request.method} {request.path}")


NOWHERE = Route("none", "", "", _nowhere)
_PARTS = {"kind": "datasets", "path": ".+", "oid": "[0-9a-f]{64}", "number": "[0-9]+"}


def _pattern(address: str) -> re.Pattern[str]:
    literal = address.replace(".", r"\.")
    return re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{_PARTS.get(m[1], '[^/]+?')})", literal))


_COMPILED = {route.address: _pattern(route.address) for route in (*HUB, *STORAGE)}


def find(table: Sequence[Route], method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route that serves `method path`, and what its address names, unquoted."""
    for route in table:
        match = _COMPILED[route.address].fullmatch(path)
        if match and method in route.methods.split():
            return route, {name: unquote(value) for name, value in match.groupdict().items()}
    return NOWHERE, {}
