"""Git LFS: the batch call that hands out addresses, and the storage service that takes and gives the bytes.

Objects are streamed to disk and hashed as they arrive; bytes that are not what was announced are refused (BadDigest)
and leave nothing behind. `basic` is one PUT; above `hub.part_size`, `multipart` is a PUT a part, each answered with an
ETag, and a POST that joins them. The storage calls carry no token: their addresses are signed (git-lfs batch API; the
multipart transfer is huggingface_hub's).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantpub.hub.access import Person, require_write
from quantpub.hub.state import Hub
from quantpub.hub.store import DigestMismatch, Repo
from quantpub.hub.wire import CHUNK, Refusal, Reply, Request, file_reply, json_reply

_SHA256 = re.compile(r"[0-9a-f]{64}")


def batch(hub: Hub, request: Request, person: Person) -> Reply:
    repo, asked = require_write(person, hub.repo(request.params)), request.json()
    if asked.get("operation") != "upload":
        raise Refusal(422, "Only uploads are negotiated here")
    objects = [_offer(hub, repo, item, asked.get("transfers", ["basic"])) for item in asked["objects"]]
    parts = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in objects)
    return json_reply(
        {"transfer": "multipart" if parts else "basic", "objects": objects},
        headers={"Content-Type": "application/vnd.git-lfs+json"},
    )


def _offer(hub: Hub, repo: Repo, item: dict[str, Any], transfers: list[str]) -> dict[str, Any]:
    oid, size = str(item["oid"]), int(item["size"])
    named: dict[str, Any] = {"oid": oid, "size": size}
    if not _SHA256.fullmatch(oid):
        return {**named, "error": {"code": 422, "message": "the oid is not a sha256"}}
    if oid in repo.objects:
        return named
    if hub.part_size and size > hub.part_size and "multipart" in transfers:
        upload = _parts(hub, repo, oid, size, hub.part_size)
    else:
        upload = {"href": hub.signed(f"/{repo.id}/lfs/{oid}", size=size)}
    return {**named, "actions": {"upload": upload, "verify": {"href": f"{hub.endpoint}/{repo.id}.git/info/lfs/verify"}}}


def _parts(hub: Hub, repo: Repo, oid: str, size: int, part_size: int) -> dict[str, Any]:
    at, numbers = f"/{repo.id}/lfs/{oid}", range(1, -(-size // part_size) + 1)
    parts = {f"{number:05}": hub.signed(f"{at}/part/{number}") for number in numbers}
    return {"href": hub.signed(f"{at}/join", size=size), "header": {"chunk_size": str(part_size), **parts}}


def verify(hub: Hub, request: Request, person: Person) -> Reply:
    repo, asked = require_write(person, hub.repo(request.params)), request.json()
    oid = str(asked.get("oid"))
    if oid not in repo.objects or hub.store.blobs.path(oid).stat().st_size != asked.get("size"):
        raise Refusal(404, "The object was not uploaded", "EntryNotFound")
    return json_reply({})


def put(hub: Hub, request: Request, person: Person) -> Reply:
    """A whole object."""
    _keep(hub, request, request.body.chunks())
    return Reply(200, headers={"ETag": f'"{request.params["oid"]}"'})


def put_part(hub: Hub, request: Request, person: Person) -> Reply:
    digest = hashlib.md5(usedforsecurity=False)
    with _part(hub, request, request.params["number"]).open("wb") as f:
        for chunk in request.body.chunks():
            digest.update(chunk)
            f.write(chunk)
    return Reply(200, headers={"ETag": f'"{digest.hexdigest()}"'})


def join_parts(hub: Hub, request: Request, person: Person) -> Reply:
    paths = [_part(hub, request, str(part["partNumber"])) for part in request.json()["parts"]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise Refusal(400, f"InvalidPart: {missing[0]}")
    _keep(hub, request, _joined(paths))
    for path in paths:
        path.unlink()
    return json_reply({})


def _part(hub: Hub, request: Request, number: str) -> Path:
    return hub.store.blobs.folder / f".part-{request.params['oid']}-{int(number)}"


def _joined(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                yield chunk


def _keep(hub: Hub, request: Request, chunks: Iterable[bytes]) -> None:
    repo, oid = hub.repo(request.params), request.params["oid"]
    if repo is None:
        raise Refusal(404, "NoSuchBucket")
    try:
        repo.objects.add(hub.store.blobs.write(chunks, oid, int(request.query["size"][-1])))
    except DigestMismatch as error:
        raise Refusal(400, f"BadDigest: {error}") from None


def get(hub: Hub, request: Request, person: Person) -> Reply:
    """An object, or a range of it."""
    oid = request.params["oid"]
    if oid not in hub.store.blobs:
        raise Refusal(404, "NoSuchKey")
    damaged = request.flag("damaged")
    return file_reply(hub.store.blobs.path(oid), request.headers.get("Range"), {"ETag": f'"{oid}"'}, damaged)
