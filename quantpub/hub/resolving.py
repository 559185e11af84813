"""`/owner/name/resolve/revision/path`: a file of a commit, to read.

A regular file is answered here, with git's sha1 as ETag. A file in LFS is a redirect to the storage service; the reply
itself carries what a client wants to know before it follows: the commit, the size and the sha256 of the object.
"""

from __future__ import annotations

from urllib.parse import quote

from quantpub.hub.access import Person
from quantpub.hub.state import Hub
from quantpub.hub.store import File
from quantpub.hub.wire import Refusal, Reply, Request, file_reply


def resolve(hub: Hub, request: Request, person: Person) -> Reply:
    _, commit = hub.readable(request, person, content=True)
    path = request.params["path"]
    if path not in commit.tree:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    file, headers = commit.tree[path], {"X-Repo-Commit": commit.oid}
    if file.lfs:
        return Reply(302, b"Found. Redirecting", {**headers, **_linked(hub, path, file)})
    named = {**headers, "ETag": f'"{file.blob}"', "Content-Disposition": f"inline; filename*=UTF-8''{quote(path)}"}
    wanted = request.headers.get("Range") if request.method == "GET" else None
    return file_reply(hub.store.blobs.path(file.sha256), wanted, named, path in hub.faults.damaged)


def _linked(hub: Hub, path: str, file: File) -> dict[str, str]:
    damaged = {"damaged": "true"} if path in hub.faults.damaged else {}
    return {
        "Location": hub.signed(f"/objects/{file.sha256}", **damaged),
        "Accept-Ranges": "bytes",
        "X-Linked-Size": str(file.size),
        "X-Linked-Etag": f'"{file.sha256}"',
    }
