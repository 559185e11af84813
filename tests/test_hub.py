"""The loopback Hub, spoken to by the real huggingface_hub client, and by hand where the client is never so rude."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantpub.hub import LoopbackHub, git
from quantpub.hub.store import Blobs

REPO = "acme/tiny"
SHARD = bytes(range(256)) * 40  # binary, so LFS
FILES = {"model.safetensors": SHARD, "config.json": b'{"a": 1}\n', "notes/deep/a.txt": b"text\n", "empty.txt": b""}
CARD = b"---\nlicense: mit\n---\n# Tiny\n"


@pytest.fixture(autouse=True)
def plain_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub as a rehearsal starts it: no Xet, no telemetry, not offline, no proxy."""
    for name, value in {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(page_size=2) as running:
        yield running


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(hub.endpoint, hub.token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder"


def add(path: str, content: bytes = SHARD) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations: Any, parent: str | None = None) -> str:
    return api.create_commit(REPO, operations, commit_message="test", parent_commit=parent).oid


def raw_commit(hub: LoopbackHub, *lines: dict[str, Any], token: str | None = None) -> Any:
    body = "".join(json.dumps(line) + "\n" for line in ({"key": "header", "value": {"summary": "raw"}}, *lines))
    return get_session().post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        content=body.encode(),
        headers={"Authorization": f"Bearer {token or hub.token}"},
    )


def offer(hub: LoopbackHub, content: bytes, repo: str = REPO) -> str:
    """The address to which the batch call sends an object."""
    item = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [item]}
    reply = get_session().post(
        f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch",
        json=asked,
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    return str(reply.json()["objects"][0]["actions"]["upload"]["href"])


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_a_new_repository_has_one_commit_and_the_visibility_that_was_asked_for(hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo(REPO, private=True)
    api.create_repo("acme/open", private=False)
    assert list(hub.tree(REPO)) == [".gitattributes"] and len(hub.history(REPO)) == 1
    assert [api.model_info(name).private for name in (REPO, "acme/open")] == [True, False]


def test_creating_twice_is_409_and_changes_nothing(hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo(REPO, private=False)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO, private=True)
    assert status_of(error) == 409
    assert not api.model_info(REPO).private


@pytest.mark.parametrize("name", ["a--b", "a..b", "x.git", "x-", "x" * 97])
def test_bad_names_are_refused(hub: LoopbackHub, name: str) -> None:
    reply = get_session().post(
        f"{hub.endpoint}/api/repos/create",
        json={"name": name, "organization": "acme"},
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert reply.status_code == 400 and reply.headers["X-Error-Message"]


def test_a_stale_parent_is_412(hub: LoopbackHub, api: HfApi) -> None:
    first = hub.add_repo(REPO)
    second = commit(api, add("a.txt", b"a"), parent=first)
    with pytest.raises(HfHubHTTPError) as error:
        commit(api, add("b.txt", b"b"), parent=first)
    assert status_of(error) == 412 and hub.head(REPO) == second


def test_an_object_that_was_never_uploaded_cannot_be_committed(hub: LoopbackHub, api: HfApi) -> None:
    head = hub.add_repo(REPO)
    hub.add_repo("acme/other")
    line = {
        "key": "lfsFile",
        "value": {
            "path": "a.safetensors",
            "algo": "sha256",
            "size": len(SHARD),
            "oid": hashlib.sha256(SHARD).hexdigest(),
        },
    }
    assert raw_commit(hub, line).status_code == 400
    api.create_commit("acme/other", [add("a.safetensors")], commit_message="elsewhere")
    assert raw_commit(hub, line).status_code == 400  # it was uploaded, but not to this repository
    assert hub.head(REPO) == head
    api.preupload_lfs_files(REPO, [add("a.safetensors")])
    assert raw_commit(hub, {**line, "value": {**line["value"], "size": 1}}).status_code == 400
    assert raw_commit(hub, line).status_code == 200
    assert hub.read(REPO, "a.safetensors") == SHARD


def test_bytes_that_are_not_what_was_announced_leave_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    before = set(hub._hub.store.blobs.folder.iterdir())
    for wrong in (SHARD[:-1] + b"x", SHARD[:-1], SHARD + b"x"):
        reply = get_session().put(offer(hub, SHARD), content=wrong)
        assert reply.status_code == 400 and "BadDigest" in reply.headers["X-Error-Message"]
    assert set(hub._hub.store.blobs.folder.iterdir()) == before and not hub.repo(REPO).objects


def test_storage_knows_signed_addresses_and_no_tokens(hub: LoopbackHub) -> None:
    hub.add_repo(REPO)
    address = offer(hub, SHARD)
    assert get_session().put(address[:-1] + "x", content=SHARD).status_code == 403
    assert get_session().put(address.split("?")[0], content=SHARD).status_code == 403
    with_token = get_session().put(address, content=SHARD, headers={"Authorization": f"Bearer {hub.token}"})
    assert with_token.status_code == 400 and not hub.repo(REPO).objects
    assert get_session().put(address, content=SHARD).status_code == 200


def test_an_object_in_parts_is_joined(api: HfApi) -> None:
    with LoopbackHub(part_size=3000) as hub:
        hub.add_repo(REPO)
        commit(HfApi(hub.endpoint, hub.token), add("a.safetensors"))
        assert hub.read(REPO, "a.safetensors") == SHARD
        assert [entry.route for entry in hub.log].count("lfs-part") == 4


@pytest.mark.parametrize("who", ["reader", "stranger", "nobody", "bad"])
def test_without_the_right_nothing_is_written(hub: LoopbackHub, who: str) -> None:
    head = hub.add_repo(REPO, private=True)
    tokens = {"reader": hub.reader_token, "stranger": hub.stranger_token, "nobody": False, "bad": "hf_" + "x" * 34}
    expected = {"reader": 403, "stranger": 404, "nobody": 401, "bad": 401}
    api = HfApi(hub.endpoint, tokens[who])
    with pytest.raises(HfHubHTTPError) as error:
        commit(api, add("a.safetensors"))
    assert status_of(error) == expected[who] and hub.head(REPO) == head
    with pytest.raises(HfHubHTTPError):
        api.create_repo("acme/new")
    assert "acme/new" not in hub._hub.store.repos


def test_a_private_repository_does_not_exist_for_strangers(hub: LoopbackHub) -> None:
    hub.add_repo(REPO, private=True)
    for token in (hub.stranger_token, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(hub.endpoint, token).model_info(REPO)
    assert HfApi(hub.endpoint, hub.reader_token).model_info(REPO).id == REPO
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        HfApi(hub.endpoint, "hf_" + "x" * 34).model_info(REPO)
    assert not isinstance(error.value, RepositoryNotFoundError)


def test_a_gated_repository_shows_its_page_and_not_its_files(hub: LoopbackHub, folder: Path) -> None:
    hub.add_repo(REPO, folder, gated="manual")
    api = HfApi(hub.endpoint, hub.stranger_token)
    assert api.model_info(REPO).gated == "manual"
    with pytest.raises(GatedRepoError):
        api.auth_check(REPO)
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(REPO, "config.json", local_dir=folder.parent / "out")


@pytest.mark.parametrize("by", ["branch", "tag", "sha", "old sha"])
def test_a_pinned_revision_downloads_byte_for_byte(hub: LoopbackHub, folder: Path, tmp_path: Path, by: str) -> None:
    old = hub.add_repo(REPO, folder, tag="v1/rc")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    new = hub.add_repo(REPO, folder, revision="next")
    pins = {"branch": "next", "tag": "v1/rc", "sha": new, "old sha": old}
    out = Path(
        snapshot_download(REPO, revision=pins[by], endpoint=hub.endpoint, token=hub.token, cache_dir=tmp_path / "c")
    )
    weights = "other.safetensors" if pins[by] in ("next", new) else "model.safetensors"
    expected = {**FILES, weights: SHARD}
    if weights == "other.safetensors":
        del expected["model.safetensors"]
    got = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert got.pop(".gitattributes") and got == expected
    assert out.name == (new if weights == "other.safetensors" else old)


def test_what_is_not_there_says_which_kind(hub: LoopbackHub, api: HfApi, folder: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, folder)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        list(api.list_repo_tree(REPO, revision="a" * 40))
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "missing.json", local_dir=tmp_path)


@pytest.mark.parametrize(("path", "size"), [("model.safetensors", len(SHARD)), ("config.json", 9)])
@pytest.mark.parametrize(
    ("asked", "first", "last"), [("0-3", 0, 3), ("2-", 2, None), ("-4", -4, None), ("3-99999999", 3, None)]
)
def test_ranges(hub: LoopbackHub, folder: Path, path: str, size: int, asked: str, first: int, last: int | None) -> None:
    hub.add_repo(REPO, folder)
    url = f"{hub.endpoint}/{REPO}/resolve/main/{path}"
    reply = get_session().get(url, headers={"Range": f"bytes={asked}"}, follow_redirects=True)
    expected = FILES[path][first:] if last is None else FILES[path][first : last + 1]
    start = first % size if first < 0 else first
    assert (reply.status_code, reply.content) == (206, expected)
    assert reply.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{size}"
    beyond = get_session().get(url, headers={"Range": f"bytes={size}-"}, follow_redirects=True)
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")


def test_a_head_says_everything_before_the_redirect(hub: LoopbackHub, folder: Path) -> None:
    oid = hub.add_repo(REPO, folder)
    lfs = get_session().head(f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors", follow_redirects=False)
    assert (lfs.status_code, lfs.headers["X-Linked-Size"], lfs.headers["X-Repo-Commit"]) == (302, str(len(SHARD)), oid)
    assert lfs.headers["X-Linked-Etag"] == f'"{hashlib.sha256(SHARD).hexdigest()}"'
    regular = get_session().head(f"{hub.endpoint}/{REPO}/resolve/main/config.json")
    assert (regular.status_code, regular.headers["Content-Length"], regular.content) == (200, "9", b"")
    assert regular.headers["ETag"] == f'"{git.blob_oid(FILES["config.json"])}"'


def test_the_redirect_to_storage_carries_no_token(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, folder, private=True)
    snapshot_download(REPO, endpoint=hub.endpoint, token=hub.token, cache_dir=tmp_path / "c")
    storage = [entry for entry in hub.log if entry.route == "cdn"]
    assert [(entry.status, entry.authorized) for entry in storage] == [(200, False)]
    assert all(entry.authorized for entry in hub.log if entry.route == "resolve")


def test_a_tree_in_pages_is_the_whole_tree(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    entries = list(api.list_repo_tree(REPO, recursive=True))
    paths = sorted(entry.path for entry in entries)
    assert paths == sorted([".gitattributes", "notes", "notes/deep", *FILES])
    assert [entry.route for entry in hub.log].count("tree") == 4
    assert [entry.path for entry in api.list_repo_tree(REPO, "notes")] == ["notes/deep"]
    found = {info.path: info.size for info in api.get_paths_info(REPO, ["config.json", "notes", "nope"])}
    assert found == {"config.json": 9}


def test_a_commit_lands_whole_or_not_at_all(hub: LoopbackHub, api: HfApi) -> None:
    head = hub.add_repo(REPO)
    with pytest.raises(RemoteEntryNotFoundError):
        commit(api, add("a.txt", b"a"), CommitOperationDelete("missing.txt"))
    assert hub.head(REPO) == head and list(hub.tree(REPO)) == [".gitattributes"]
    commit(api, add("d/a.txt", b"a"), add("d/b.txt", b"b"), add("c.txt", b"c"))
    commit(api, CommitOperationDelete("d/", is_folder=True))
    assert set(hub.tree(REPO)) == {".gitattributes", "c.txt"}


@pytest.mark.parametrize(
    "line",
    [
        {"key": "file", "value": {"path": "../x", "content": "", "encoding": "base64"}},
        {"key": "file", "value": {"path": ".git/config", "content": "", "encoding": "base64"}},
        {"key": "file", "value": {"path": "a.txt", "content": "not base64!", "encoding": "base64"}},
        {"key": "file", "value": {"path": ".gitattributes/x", "content": "", "encoding": "base64"}},
        {"key": "file", "value": {"path": "README.md", "content": base64.b64encode(b"---\na: [\n---\n").decode()}},
        {"key": "replaceFile", "value": {"path": "a.txt"}},
    ],
)
def test_commits_that_make_no_sense_are_refused(hub: LoopbackHub, line: dict[str, Any]) -> None:
    head = hub.add_repo(REPO)
    assert raw_commit(hub, line).status_code == 400 and hub.head(REPO) == head


def test_the_card_is_judged(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO)
    for wrong in (b"---\nlicense: [\n---\n", b"---\nlicense: MIT License\n---\n", b"---\nbase_model: a/b/c\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            commit(api, add("README.md", wrong))
    commit(api, add("README.md", CARD))
    info = api.model_info(REPO)
    assert info.card_data is not None and info.card_data.license == "mit"


def test_preupload_decides_as_gitattributes_size_and_content_say(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO)
    hub.commit(REPO, {".gitignore": b"# notes\n*.log\nlogs/\n", "same.txt": b"same"})
    sent = {
        "a.safetensors": b"text",
        "b.txt": b"text",
        "c.txt": b"a\0b",
        "d.txt": b"x" * 10_000_001,
        "x.log": b"x",
        "logs/y.txt": b"y",
    }
    operations = [add(path, content) for path, content in sent.items()]
    api.preupload_lfs_files(REPO, operations)
    assert [op._upload_mode for op in operations] == ["lfs", "regular", "lfs", "lfs", "regular", "regular"]
    assert [op._should_ignore for op in operations] == [False] * 4 + [True] * 2
    before = hub.head(REPO)
    assert commit(api, add("same.txt", b"same")) == before  # the client drops what the Hub has


def test_tags_and_branches(hub: LoopbackHub, api: HfApi) -> None:
    first = hub.add_repo(REPO)
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_branch(REPO, branch="side/line", revision="v1")
    second = hub.commit(REPO, {"a.txt": b"a"})
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)} == {
        "main": second,
        "side/line": first,
        "v1": first,
    }
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(REPO, tag="v1", revision=second)
    assert status_of(error) == 409
    api.delete_tag(REPO, tag="v1")
    assert not api.list_repo_refs(REPO).tags
    assert [c.commit_id for c in api.list_repo_commits(REPO)] == [second, first]


def test_ids_are_gits_own() -> None:
    """Golden values: `git write-tree` and `git hash-object` on the same content."""
    blobs = {
        path: git.blob_oid(content)
        for path, content in {"a/c/f": b"x", "a.d/g": b"y", "a0": b"z", "b.txt": b"hello\n"}.items()
    }
    assert blobs["b.txt"] == "ce013625030ba8dba906f756967f9e9ca394464a"
    trees = git.tree_oids(blobs)
    assert trees[""] == "b4ce018d222901c3e47d371011d202d153fab7dc"  # a.d sorts before a/, and a/ before a0
    assert (trees["a"], trees["a/c"]) == (
        "2173e39361f4838242ba8374a98a2ac360bb5e0c",
        "2561a62d4223eb7660d3b6b02b707048382f4019",
    )
    pointer = git.pointer(hashlib.sha256(b"abc").hexdigest(), 12345)
    assert git.blob_oid(pointer) == "59a6fe79fbdeecdcb4903a12c74af507c692dbbb"


def test_a_seeded_folder_is_not_copied(hub: LoopbackHub, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    stored = {p.read_bytes() for p in hub._hub.store.blobs.folder.iterdir()}
    assert len(stored) == 1 and SHARD not in stored  # nothing but .gitattributes
    assert hub.read(REPO, "model.safetensors") == SHARD
    get_session().put(offer(hub, b"other" + SHARD), content=b"other" + SHARD)
    assert len(list(hub._hub.store.blobs.folder.iterdir())) == 2
    hub.add_repo("acme/second")
    get_session().put(offer(hub, SHARD, "acme/second"), content=SHARD)  # what is known by reference is not kept twice
    assert len(list(hub._hub.store.blobs.folder.iterdir())) == 2 and hub.repo("acme/second").objects


def test_content_passes_through_in_pieces(tmp_path: Path) -> None:
    piece = bytes(1 << 20)
    tracemalloc.start()
    sha256 = Blobs(tmp_path).write(piece for _ in range(48))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / sha256).stat().st_size == 48 << 20 and peak < 4 << 20


def test_an_upload_larger_than_a_piece_arrives_whole_also_when_chunked(hub: LoopbackHub) -> None:
    hub.add_repo(REPO)
    content = bytes(range(251)) * 12_000  # 3 MB, and no power of two
    pieces = (content[start : start + 70_001] for start in range(0, len(content), 70_001))
    assert get_session().put(offer(hub, content), content=pieces).status_code == 200  # no Content-Length: chunked
    assert hub.log[-1].received == len(content) and hub.repo(REPO).objects == {hashlib.sha256(content).hexdigest()}


def test_a_planned_fault_happens_as_often_as_planned(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO)
    hub.faults.fail("info", 503, times=2, headers={"Retry-After": "7"})
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as error:
            api.model_info(REPO)
        assert status_of(error) == 503 and error.value.response.headers["Retry-After"] == "7"
    assert api.model_info(REPO).sha
    assert [entry.status for entry in hub.log] == [503, 503, 200]


def test_a_lost_reply_is_a_deed_without_an_answer(hub: LoopbackHub, api: HfApi) -> None:
    head = hub.add_repo(REPO)
    hub.faults.lose_reply("commit")
    with pytest.raises(Exception, match=r"(?i)disconnected|closed") as error:
        commit(api, add("a.txt", b"a"))
    assert not isinstance(error.value, HfHubHTTPError)
    assert hub.history(REPO)[0].parent == head and hub.log[-1].status == 0


def test_silence_is_no_deed_and_no_answer(hub: LoopbackHub) -> None:
    hub.faults.silence("whoami")
    with pytest.raises(Exception, match="timed out"):
        get_session().get(f"{hub.endpoint}/api/whoami-v2", timeout=0.2)
    assert hub.log[-1].status == 0


def test_reads_can_be_damaged_and_digests_misreported(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    hub.faults.damage("model.safetensors")
    hub.faults.wrong_sha("model.safetensors")
    got = get_session().get(f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors", follow_redirects=True).content
    assert got[0] == SHARD[0] ^ 0xFF and got[1:] == SHARD[1:]
    entry = next(e for e in api.list_repo_tree(REPO) if e.path == "model.safetensors")
    assert entry.lfs is not None and entry.lfs.sha256 != hashlib.sha256(SHARD).hexdigest()


def test_simultaneous_commits_on_one_parent_let_one_through(hub: LoopbackHub) -> None:
    head = hub.add_repo(REPO)
    meet = threading.Barrier(4)
    hub.faults.meanwhile("commit", meet.wait, times=4)
    statuses: list[int] = []

    def send(number: int) -> None:
        lines = [
            {"key": "header", "value": {"summary": "race", "parentCommit": head}},
            {"key": "file", "value": {"path": f"{number}.txt", "content": ""}},
        ]
        reply = get_session().post(
            f"{hub.endpoint}/api/models/{REPO}/commit/main",
            headers={"Authorization": f"Bearer {hub.token}"},
            content="\n".join(map(json.dumps, lines)).encode(),
        )
        statuses.append(reply.status_code)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 412, 412, 412] and len(hub.history(REPO)) == 2


def test_a_fault_of_the_hub_itself_is_not_hidden() -> None:
    def broken() -> None:
        raise KeyError("within")

    with pytest.raises(RuntimeError, match="KeyError"), LoopbackHub() as hub:
        hub.faults.meanwhile("whoami", broken)
        assert get_session().get(f"{hub.endpoint}/api/whoami-v2").status_code == 500


def test_it_listens_on_loopback_only_and_ends_with_its_block(hub: LoopbackHub) -> None:
    with LoopbackHub() as short:
        folder, endpoint = short._hub.store.blobs.folder, short.endpoint
        assert get_session().get(f"{endpoint}/nothing").status_code == 404
        assert endpoint.startswith("http://127.0.0.1:")
    assert not folder.exists()
    with pytest.raises(Exception, match=r"(?i)refused|disconnected"):
        get_session().get(f"{endpoint}/nothing")


def test_tokens_are_new_each_time_and_never_logged(hub: LoopbackHub, api: HfApi) -> None:
    with LoopbackHub() as other:
        assert not {hub.token, hub.reader_token, hub.stranger_token} & {other.token, other.reader_token}
    api.whoami()
    assert hub.token not in repr(hub.log) and hub.token not in repr(hub)
