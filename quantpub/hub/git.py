"""The names git gives to content: ids of blobs, trees and commits, and the pointer that stands for an LFS object.

An id is the sha1 of `<kind> <length>\\0<body>` (git's object format). A file in LFS is, to git, a three-line text that
names the sha256 and the size of the real bytes (git-lfs, specification version 1); the Hub reports the id of that text
as `oid`, and the sha256 beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath


def object_oid(kind: str, body: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(body)}\0".encode() + body, usedforsecurity=False).hexdigest()


def blob_oid(content: bytes) -> str:
    return object_oid("blob", content)


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def folder_of(path: str) -> str:
    """The folder that holds `path`; "" is the root."""
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def folders_above(path: str) -> list[str]:
    """Every folder above `path`, the root last."""
    return ["" if str(parent) == "." else str(parent) for parent in PurePosixPath(path).parents]


def tree_oids(blobs: Mapping[str, str]) -> dict[str, str]:
    """folder → id of its tree, for each folder that `blobs` (path → blob id) implies; "" is the root."""
    children: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for path, oid in blobs.items():
        children.setdefault(folder_of(path), {})[PurePosixPath(path).name] = ("100644", oid)
        for folder in folders_above(path):
            children.setdefault(folder, {})
    oids: dict[str, str] = {}
    for folder in sorted(children, key=lambda name: (name != "", name.count("/")), reverse=True):
        oids[folder] = _tree_oid(children[folder])
        if folder:
            children[folder_of(folder)][PurePosixPath(folder).name] = ("40000", oids[folder])
    return oids


def _tree_oid(entries: Mapping[str, tuple[str, str]]) -> str:
    # git sorts a folder as if its name ended in a slash
    order = sorted(entries, key=lambda name: name + "/" if entries[name][0] == "40000" else name)
    lines = (f"{entries[name][0]} {name}\0".encode() + bytes.fromhex(entries[name][1]) for name in order)
    return object_oid("tree", b"".join(lines))


def commit_oid(tree: str, parent: str | None, author: str, at: int, message: str) -> str:
    who = f"{author} <{author}@loopback.invalid> {at} +0000"
    parents = f"parent {parent}\n" if parent else ""
    return object_oid("commit", f"tree {tree}\n{parents}author {who}\ncommitter {who}\n\n{message}".encode())
