"""Publishing, by the real huggingface_hub client to the loopback Hub: nothing is mocked, everything can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import HfApi, errors, metadata_load, snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from quantpub.artifact import SUMS, Artifact
from quantpub.errors import AuthError, ConflictError, GateError, InputError, QuantpubError, UnavailableError, UsageError
from quantpub.hub import LoopbackHub
from quantpub.publish import PublishResult, failures, publish, rehearse, remote
from quantpub.publish.headers import header_problem, read_header
from quantpub.publish.plan import LocalFile, RemoteFile, compare, differences, foreign, parse_sums, read_plan
from quantpub.publish.refuse import bad_name, secrets_in

REPO = "acme/tiny-W4A16"
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\nbase_model: acme/tiny\n---\n# Tiny\n"
READING = {"GET", "HEAD"}
SECRET = "hf_" + "aB3" * 12
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(autouse=True)
def plain_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub as a rehearsal starts it, and waits that are short."""
    for name, value in {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(failures, "WAITS_S", (0.01, 0.01, 0.01))


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path / "artifact")


def make_artifact(folder: Path, seed: int = 0) -> Artifact:
    (folder / ".quantpub").mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number, rows in ((1, 64), (2, 16)):
        tensor = random.standard_normal((rows, 32)).astype(np.float32)
        save_file({f"w{number}": tensor}, folder / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "README.md").write_text(CARD)
    (folder / ".quantpub" / "run.json").write_text('{"stages": {"quantize": {}}}\n')
    artifact = Artifact(folder)
    artifact.seal()
    return artifact


def edit(artifact: Artifact, name: str, content: str | bytes | None) -> Artifact:
    path = artifact.path / name
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return reseal(artifact)


def reseal(artifact: Artifact) -> Artifact:
    """As if a stage had written what is there: a seal that exists is kept for what it states."""
    (artifact.path / SUMS).unlink()
    artifact.seal()
    return artifact


def push(hub: LoopbackHub, artifact: Artifact, **options: Any) -> PublishResult:
    return publish(artifact, REPO, **{"endpoint": hub.endpoint, "token": hub.token, **options})


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def held(hub: LoopbackHub, revision: str = "main") -> dict[str, str]:
    """What the Hub holds, without its own file."""
    return {path: file.sha256 for path, file in hub.tree(REPO, revision).items() if path != ".gitattributes"}


def writes(hub: LoopbackHub, since: int = 0) -> list[str]:
    return [entry.route for entry in hub.log[since:] if entry.method not in READING and entry.route != "validate-yaml"]


def count(hub: LoopbackHub, route: str) -> int:
    return [entry.route for entry in hub.log].count(route)


def actions(result: PublishResult) -> dict[str, str]:
    return {change.path: change.action for change in result.files}


# The straight line


def test_everything_lands_in_one_commit_and_nothing_else(hub: LoopbackHub, artifact: Artifact) -> None:
    before = digests(artifact.path)
    result = push(hub, artifact)
    assert held(hub) == before == digests(artifact.path)  # SHA256SUMS included; publishing wrote nothing here
    assert len(hub.history(REPO)) == 2 and count(hub, "commit") == 1
    assert (result.changed, result.commit, result.private) == (True, hub.head(REPO), True)
    assert set(actions(result).values()) == {"add"} and result.bytes_sent == sum(
        p.stat().st_size for p in artifact.path.rglob("*") if p.is_file()
    )
    assert result.verified is not None and result.verified.as_json() == {"files": 6, "headers": 2}
    assert HfApi(hub.endpoint, hub.token).model_info(REPO).private


def test_what_was_published_downloads_and_loads(hub: LoopbackHub, artifact: Artifact, tmp_path: Path) -> None:
    result = push(hub, artifact)
    out = Path(
        snapshot_download(
            REPO, revision=result.commit, endpoint=hub.endpoint, token=hub.token, local_dir=tmp_path / "out"
        )
    )
    name = "model-00001-of-00002.safetensors"
    assert np.array_equal(load_file(out / name)["w1"], load_file(artifact.path / name)["w1"])
    assert metadata_load(out / "README.md") == metadata_load(artifact.path / "README.md")


def test_the_same_artifact_again_changes_nothing(hub: LoopbackHub, artifact: Artifact) -> None:
    first, seen = push(hub, artifact), len(hub.log)
    second = push(hub, artifact)
    assert (second.changed, second.commit, second.bytes_sent) == (False, first.commit, 0)
    assert set(actions(second).values()) == {"unchanged"} and writes(hub, seen) == []
    assert second.verified == first.verified


def test_a_new_version_adds_updates_and_deletes_in_one_commit(hub: LoopbackHub, artifact: Artifact) -> None:
    edit(artifact, "old/notes.txt", "stale\n")
    push(hub, artifact)
    edit(artifact, "old/notes.txt", None)
    edit(artifact, "config.json", '{"model_type": "qwen3"}\n')
    edit(artifact, "generation_config.json", "{}\n")
    result = push(hub, artifact)
    assert actions(result) == {
        "old/notes.txt": "delete",
        "config.json": "update",
        "generation_config.json": "add",
        SUMS: "update",
        ".quantpub/run.json": "unchanged",
        "README.md": "unchanged",
        "model-00001-of-00002.safetensors": "unchanged",
        "model-00002-of-00002.safetensors": "unchanged",
    }
    assert held(hub) == digests(artifact.path) and len(hub.history(REPO)) == 3
    assert count(hub, "lfs-put") == 2  # the weights went up once


def test_a_tree_in_pages_and_shards_in_parts(artifact: Artifact) -> None:
    with LoopbackHub(page_size=2, part_size=1000) as hub:
        push(hub, artifact)
        assert not push(hub, artifact).changed
        assert held(hub) == digests(artifact.path) and count(hub, "lfs-part") > 2


# Locked, and honest about lost replies


def test_a_moved_head_is_a_conflict_and_stays_as_it_is(hub: LoopbackHub, artifact: Artifact) -> None:
    push(hub, artifact)
    edit(artifact, "config.json", '{"model_type": "qwen3"}\n')
    hub.faults.meanwhile("commit", lambda: hub.commit(REPO, {"theirs.txt": b"theirs"}))
    with pytest.raises(ConflictError, match="somebody else committed"):
        push(hub, artifact)
    assert 412 in [entry.status for entry in hub.log if entry.route == "commit"]
    assert hub.read(REPO, "theirs.txt") == b"theirs" and b"qwen3" not in hub.read(REPO, "config.json")
    assert len(hub.history(REPO)) == 3


def test_a_lost_commit_reply_is_found_and_not_repeated(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.lose_reply("commit")
    result = push(hub, artifact)
    assert result.changed and result.commit == hub.head(REPO)
    assert len(hub.history(REPO)) == 2 and count(hub, "commit") == 1
    assert held(hub) == digests(artifact.path)


def test_a_lost_reply_is_found_under_a_later_commit(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.add_repo(REPO, private=True)
    hub.faults.lose_reply("commit")
    landed: list[str] = []

    def later() -> None:
        if len(hub.history(REPO)) == 2:
            landed.append(hub.head(REPO))
            hub.commit(REPO, {"later.txt": b"later"})

    hub.faults.meanwhile("info", later, times=9)
    result = push(hub, artifact)
    assert result.commit == landed[0] != hub.head(REPO)
    assert held(hub, str(result.commit)) == digests(artifact.path)


def test_a_server_error_before_the_commit_is_tried_again(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.fail("commit", 503, times=2)
    assert push(hub, artifact).commit == hub.head(REPO)
    assert [entry.status for entry in hub.log if entry.route == "commit"] == [503, 503, 200]
    assert len(hub.history(REPO)) == 2


@pytest.mark.slow
def test_an_error_that_lies_is_not_believed(hub: LoopbackHub, artifact: Artifact) -> None:
    """500, but the commit did happen."""
    hub.faults.lose_reply("commit")
    hub.faults.fail("info", 500, times=1)
    hub.faults.fail("commits", 500, times=1)
    assert push(hub, artifact).commit == hub.head(REPO) and count(hub, "commit") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "route", ["info", "tree", "create", "auth-check", "whoami", "validate-yaml", "tag", "refs", "resolve"]
)
def test_server_errors_pass(hub: LoopbackHub, artifact: Artifact, route: str) -> None:
    if route in ("auth-check", "refs"):
        hub.add_repo(REPO, private=True)
    hub.faults.fail(route, 502)
    result = push(hub, artifact, tag="v1")
    assert next(entry.status for entry in hub.log if entry.route == route) == 502
    assert result.commit == hub.head(REPO) == hub.head(REPO, "v1")


def test_a_hub_that_stays_down_is_unavailable_and_a_rerun_finishes(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.fail("commit", 504, times=99)
    with pytest.raises(UnavailableError, match="504") as error:
        push(hub, artifact)
    assert error.value.exit_code == 6 and error.value.next and "injected fault" in error.value.what
    assert len(hub.history(REPO)) == 1  # private, and empty
    hub.faults.clear()
    result = push(hub, artifact)
    assert held(hub) == digests(artifact.path) and len(hub.history(REPO)) == 2 and result.changed
    assert count(hub, "lfs-put") == 2  # uploaded by the first run, kept for the second


@pytest.mark.slow
@pytest.mark.parametrize("route", ["info", "create", "commit", "resolve", "tag"])
def test_a_silent_hub_is_not_waited_for(
    hub: LoopbackHub, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr(remote, "ANSWER_S", 0.3)
    remote.Remote(REPO, hub.endpoint, hub.token)
    huggingface_hub.close_session()  # the next client is made with the short patience
    try:
        hub.faults.silence(route)
        assert push(hub, artifact, tag="v1", private=False).commit == hub.head(REPO, "v1")
        answers = [entry.status for entry in hub.log if entry.route == route]
        assert answers[0] == 0 and answers[1] in (200, 302, 404)  # 404: there is no repository yet
    finally:
        huggingface_hub.close_session()


def test_of_two_publishers_exactly_one_wins(hub: LoopbackHub, artifact: Artifact, tmp_path: Path) -> None:
    other = edit(make_artifact(tmp_path / "other", seed=1), "README.md", CARD + "other\n")
    hub.add_repo(REPO, private=True)
    hub.faults.meanwhile("commit", threading.Barrier(2).wait, times=2)
    outcomes: dict[str, PublishResult | Exception] = {}

    def run(name: str, mine: Artifact) -> None:
        try:
            outcomes[name] = push(hub, mine)
        except Exception as error:
            outcomes[name] = error

    pair = {"artifact": artifact, "other": other}
    threads = [threading.Thread(target=run, args=item) for item in pair.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [name for name, outcome in outcomes.items() if isinstance(outcome, PublishResult)]
    assert len(won) == 1 and [type(o) for n, o in outcomes.items() if n not in won] == [ConflictError]
    assert held(hub) == digests(pair[won[0]].path) and len(hub.history(REPO)) == 2


def test_a_lost_reply_to_create_goes_on(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.lose_reply("create")
    push(hub, artifact)
    assert [entry.status for entry in hub.log if entry.route == "create"] == [0, 409] and len(hub.history(REPO)) == 2


# Whose files


def test_foreign_files_stop_everything(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.add_repo(REPO, private=True)
    hub.commit(REPO, {"theirs.safetensors": b"theirs", "README.md": b"my notes"})
    head = hub.head(REPO)
    with pytest.raises(ConflictError, match=r"README\.md, theirs\.safetensors") as error:
        push(hub, artifact)
    assert error.value.exit_code == 5 and hub.head(REPO) == head and writes(hub) == []


def test_a_foreign_file_beside_ours_stops_the_second_publication(hub: LoopbackHub, artifact: Artifact) -> None:
    push(hub, artifact)
    head, seen = hub.commit(REPO, {"examples/theirs.txt": b"theirs"}), len(hub.log)
    with pytest.raises(ConflictError, match=r"examples/theirs\.txt"):
        push(hub, artifact)
    assert hub.head(REPO) == head and writes(hub, seen) == []


@pytest.mark.parametrize("path", ["README.md", SHARD])
def test_a_file_of_ours_that_was_edited_there_stays(hub: LoopbackHub, artifact: Artifact, path: str) -> None:
    push(hub, artifact)
    hub.commit(REPO, {path: b"edited on the web\0"})
    with pytest.raises(ConflictError, match=rf"{path} \(changed since\)"):
        push(hub, artifact)
    assert hub.read(REPO, path) == b"edited on the web\0"


def test_a_repository_that_already_holds_the_same_files_is_taken_over(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.add_repo(REPO, private=True)
    hub.commit(REPO, {"README.md": CARD.encode()})
    assert actions(push(hub, artifact))["README.md"] == "unchanged"
    assert held(hub) == digests(artifact.path)


def test_a_gitignore_at_the_hub_leaves_nothing_out_in_silence(hub: LoopbackHub, artifact: Artifact) -> None:
    head = hub.add_repo(REPO, private=True)
    hub.faults.ignore("config.json")
    with pytest.raises(InputError, match=r"gitignore leaves out config\.json"):
        push(hub, artifact)
    assert hub.head(REPO) == head


# What may be published


Damage = Callable[[Artifact], object]
REFUSED: dict[str, tuple[Damage, str]] = {
    "a token in the card": (lambda a: edit(a, "README.md", f"{CARD}token {SECRET}\n"), "README.md:7: a Hugging Face"),
    "a key in the config": (lambda a: edit(a, "config.json", '{"k": "AKIA' + "A1" * 8 + '"}'), "config.json:1: an AWS"),
    "a private key": (lambda a: edit(a, ".quantpub/log.txt", "-----BEGIN EC PRIVATE KEY-----"), "a private key"),
    "a path in the record": (
        lambda a: edit(a, ".quantpub/run.json", '{"stages": {"quantize": {"from": "/home/a/m"}}}'),
        "run.json:1: a local path",
    ),
    "a windows path": (lambda a: edit(a, "config.json", json.dumps({"_name_or_path": "C:\\Users\\a"})), "a local path"),
    "a pickle": (lambda a: edit(a, "pytorch_model.bin", b"x"), "can run code"),
    "code": (lambda a: edit(a, "sub/modeling.PY", b"x"), "can run code"),
    "a gitignore": (lambda a: edit(a, ".gitignore", b"*"), "reserved"),
    "a card that is no text": (lambda a: edit(a, "README.md", b"\xff\xfe"), "README.md: not UTF-8"),
    "no card": (lambda a: edit(a, "README.md", None), "README.md is missing"),
    "half a shard": (lambda a: edit(a, SHARD, (a.path / SHARD).read_bytes()[:-4]), "bytes of tensors"),
    "no shard": (lambda a: edit(a, SHARD, b"abc"), "not a safetensors file"),
    "a link": (lambda a: ((a.path / "l.json").symlink_to("config.json"), reseal(a)), "l.json: a symbolic link"),
    "a link to a folder": (lambda a: (a.path / "up").symlink_to(a.path.parent), "up: a symbolic link"),
    "changed since": (lambda a: (a.path / "config.json").write_text("{}"), r"differs from .*SHA256SUMS: config\.json"),
    "unlisted": (lambda a: (a.path / "more.json").write_text("{}"), r"differs from .*SHA256SUMS: more\.json"),
    "gone": (lambda a: (a.path / "config.json").unlink(), r"differs from .*SHA256SUMS: config\.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_leave_is_refused_before_any_request(hub: LoopbackHub, artifact: Artifact, case: str) -> None:
    damage, message = REFUSED[case]
    damage(artifact)
    with pytest.raises(InputError, match=message) as error:
        push(hub, artifact)
    assert hub.log == [] and SECRET not in str(error.value) and error.value.exit_code == 3


def test_vocabularies_may_hold_any_string(hub: LoopbackHub, artifact: Artifact) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        edit(artifact, name, f'{{"/home/user/": 1, "{SECRET}": 2}}')
    assert push(hub, artifact).changed


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /home/alice/m", True),
        ("file:///tmp/x", True),
        ('"/ro' + 'ot/x"', True),
        (r"C:\\Users\\a", True),
        ("/Users/a/b", True),
        ("https://example.com/home/x", False),
        ("a/tmp/b", False),
        ("./tmp/x", False),
        ("/homes/", False),
        ("hf_short", False),
        (SECRET, True),
        ("x" + SECRET, False),
        ("AKIA" + "B" * 16, True),
        ("-----BEGIN PRIVATE KEY-----", True),
        ("-----BEGIN PUBLIC KEY-----", False),
    ],
)
def test_secrets_and_paths(text: str, found: bool) -> None:
    assert bool(secrets_in(text)) == found


@pytest.mark.parametrize(
    "path", ["a.safetensors", "README.md", "tokenizer.model", "chat_template.jinja", ".quantpub/plots/a.png", "LICENSE"]
)
def test_good_names(path: str) -> None:
    assert bad_name(path) is None


def test_a_card_that_the_hub_refuses_stops_before_the_upload(hub: LoopbackHub, artifact: Artifact) -> None:
    edit(artifact, "README.md", "---\nlicense: Apache License\n---\n")
    with pytest.raises(InputError, match='"license" must be'):
        push(hub, artifact)
    assert writes(hub) == []


@pytest.mark.filterwarnings("ignore:Warnings while validating")
def test_a_card_without_metadata_is_a_warning(hub: LoopbackHub, artifact: Artifact) -> None:
    edit(artifact, "README.md", "# Tiny\n")
    assert push(hub, artifact).warnings == ("empty or missing yaml metadata in repo card",)


def test_an_error_page_instead_of_json_is_unavailable(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.html("validate-yaml", status=200, times=99)
    with pytest.raises(UnavailableError, match="no JSON"):
        push(hub, artifact)
    hub.faults.clear()
    hub.faults.html("validate-yaml", status=502)
    assert push(hub, artifact).changed


# Who may


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("who", ["reader", "stranger", "bad", "none"])
def test_without_the_right_it_is_an_auth_error(
    hub: LoopbackHub, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str, exists: bool
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    if exists:
        hub.add_repo(REPO, private=True)
    tokens = {"reader": hub.reader_token, "stranger": hub.stranger_token, "bad": "hf_" + "x" * 34, "none": None}
    with pytest.raises(AuthError) as error:
        push(hub, artifact, token=tokens[who])
    assert error.value.exit_code == 4 and error.value.next
    assert writes(hub) == (["create"] if who == "stranger" else [])  # where a stranger learns that it may not
    assert exists or REPO not in hub._hub.store.repos


def test_the_token_is_in_no_result_and_goes_to_no_other_origin(hub: LoopbackHub, artifact: Artifact) -> None:
    result = push(hub, artifact)
    assert hub.token not in json.dumps(result.as_json()) + repr(result) + repr(hub.log)
    assert {entry.route for entry in hub.log if not entry.authorized} == {"lfs-put", "cdn"}


@pytest.mark.parametrize("repo_id", ["a/b/c", "acme/x--y", "acme/.x", ""])
def test_a_bad_repository_id_is_a_usage_error(hub: LoopbackHub, artifact: Artifact, repo_id: str) -> None:
    with pytest.raises(UsageError):
        publish(artifact, repo_id, endpoint=hub.endpoint, token=hub.token)


# Visibility, tags, dry runs


def test_a_public_repository_is_refused_when_private_was_asked_for(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.add_repo(REPO, private=False)
    with pytest.raises(ConflictError, match="is public"):
        push(hub, artifact)
    assert writes(hub) == []


def test_public_comes_last(hub: LoopbackHub, artifact: Artifact) -> None:
    result = push(hub, artifact, private=False)
    routes = [entry.route for entry in hub.log]
    assert routes.index("settings") > len(routes) - 1 - routes[::-1].index("cdn") > routes.index("commit")
    assert not hub.repo(REPO).private and not result.private
    assert HfApi(hub.endpoint, False).model_info(REPO).sha == result.commit


def test_a_repository_that_does_not_become_public_is_reported(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.fail("settings", 403)
    with pytest.raises(AuthError):
        push(hub, artifact, private=False)
    assert hub.repo(REPO).private and held(hub) == digests(artifact.path)
    assert not push(hub, artifact, private=False).changed and not hub.repo(REPO).private


def test_a_tag_names_the_commit_and_is_not_moved(hub: LoopbackHub, artifact: Artifact) -> None:
    first = push(hub, artifact, tag="v1")
    assert hub.head(REPO, "v1") == first.commit == push(hub, artifact, tag="v1").commit
    edit(artifact, "config.json", "{}\n")
    seen = len(hub.log)
    with pytest.raises(ConflictError, match="v1 names another commit"):
        push(hub, artifact, tag="v1")
    assert writes(hub, seen) == [] and hub.head(REPO) == first.commit
    assert push(hub, artifact, tag="v2").commit == hub.head(REPO, "v2")
    assert hub.head(REPO, "v1") == first.commit


def test_a_lost_reply_to_a_tag_is_found(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.lose_reply("tag")
    assert push(hub, artifact, tag="v1").commit == hub.head(REPO, "v1")


def test_a_tag_that_somebody_else_set_meanwhile_is_a_conflict(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.meanwhile("tag", lambda: hub.add_repo(REPO, revision="main", tag="v2"))
    assert push(hub, artifact, tag="v2").commit == hub.head(REPO, "v2")  # 409, but it names the same commit
    hub.faults.meanwhile("tag", lambda: hub.repo(REPO).tags.update(v3=hub.history(REPO)[-1].oid))
    with pytest.raises(ConflictError, match="Tag reference exists"):
        push(hub, artifact, tag="v3")
    assert [entry.status for entry in hub.log if entry.route == "tag"] == [409, 409]


def test_a_dry_run_writes_nothing(hub: LoopbackHub, artifact: Artifact) -> None:
    planned = push(hub, artifact, dry_run=True, tag="v1")
    assert writes(hub) == [] and REPO not in hub._hub.store.repos
    assert (planned.commit, planned.changed, planned.verified, planned.dry_run) == (None, False, None, True)
    done = push(hub, artifact)
    assert (planned.files, planned.bytes_sent) == (done.files, done.bytes_sent)
    edit(artifact, "config.json", "{}\n")
    seen = len(hub.log)
    planned = push(hub, artifact, dry_run=True)
    assert writes(hub, seen) == [] and planned.commit == done.commit
    assert {path for path, action in actions(planned).items() if action == "update"} == {"config.json", SUMS}


def test_a_dry_run_refuses_what_the_run_would_refuse(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.add_repo(REPO, private=True)
    hub.commit(REPO, {"theirs.txt": b"theirs"})
    with pytest.raises(ConflictError):
        push(hub, artifact, dry_run=True)
    with pytest.raises(AuthError):
        push(hub, artifact, dry_run=True, token=hub.reader_token)


def test_progress_is_told(hub: LoopbackHub, artifact: Artifact) -> None:
    told: list[tuple[str, int, int]] = []
    result = push(hub, artifact, progress=lambda *step: told.append(step))
    assert told[0][1] == 0 and told[-1][1] == told[-1][2] == result.bytes_sent


# Reading back


def test_a_digest_that_the_hub_reports_wrongly_is_seen(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.wrong_sha(SHARD)
    with pytest.raises(ConflictError, match=r"does not hold what was sent.*00002\.safetensors: differs"):
        push(hub, artifact, tag="v1", private=False)
    assert "v1" not in hub.repo(REPO).tags and hub.repo(REPO).private  # neither tagged nor shown


def test_a_shard_that_reads_differently_is_seen(hub: LoopbackHub, artifact: Artifact) -> None:
    hub.faults.damage(SHARD)
    with pytest.raises(ConflictError, match=r"00002\.safetensors: its header reads differently"):
        push(hub, artifact)


def test_only_headers_are_read_back(hub: LoopbackHub, artifact: Artifact) -> None:
    push(hub, artifact)
    headers = sum(len(read_header(path)) for path in artifact.path.glob("*.safetensors"))
    assert sum(entry.sent for entry in hub.log if entry.route == "cdn") == headers


def test_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros((2, 3), np.float32)}, path)
    size, header = path.stat().st_size, read_header(path)
    assert size == len(header) + 24 and header_problem(header, size) is None
    assert "describes 24 bytes of tensors, the file holds 23" in str(header_problem(header, size - 1))
    assert header_problem(header[:-1], size) and header_problem(b"", 0)
    assert "cannot be read" in str(header_problem(b"\x02" + bytes(7) + b"[]", 10))


# The pure part


NAMES = st.sampled_from(["a", "b/c", "README.md", SUMS, ".gitattributes"])
CONTENT = st.sampled_from([b"1", b"2", b"33"])


def local(path: str, content: bytes, folder: Path) -> LocalFile:
    source = folder / hashlib.sha256(content).hexdigest()
    source.write_bytes(content)
    return LocalFile(path, len(content), source.name, source)


def there(path: str, content: bytes, lfs: bool) -> RemoteFile:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return RemoteFile(path, len(content), blob, hashlib.sha256(content).hexdigest() if lfs else None)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(NAMES, CONTENT), st.dictionaries(NAMES, st.tuples(CONTENT, st.booleans())), st.sets(NAMES))
def test_carrying_out_the_changes_gives_the_plan_and_leaves_the_rest(
    tmp_path_factory: pytest.TempPathFactory,
    wanted: dict[str, bytes],
    present: dict[str, tuple[bytes, bool]],
    known: set[str],
) -> None:
    wanted.pop(".gitattributes", None)
    folder = tmp_path_factory.getbasetemp()
    plan = {path: local(path, content, folder) for path, content in wanted.items()}
    tree = {path: there(path, *file) for path, file in present.items()}
    ours = dict.fromkeys(known - {".gitattributes"}, "")
    after = dict(tree)
    for change in compare(plan, tree, ours):
        assert change.action != "unchanged" or after[change.path] == tree[change.path]
        if change.action == "delete":
            assert change.path in ours
            del after[change.path]
        elif change.action in ("add", "update"):
            assert (change.action == "add") == (change.path not in tree)
            after[change.path] = there(change.path, wanted[change.path], lfs=True)
    left = {line.split(":")[0] for line in differences(plan, after)}
    assert left == {path for path in tree if path not in plan and path not in ours and path != ".gitattributes"}
    assert left <= set(foreign(plan, tree, ours))


def test_sums_that_are_none() -> None:
    digest = "a" * 64
    assert parse_sums(f"{digest}  a b\n{digest}  c\n") == {"a b": digest, "c": digest}
    assert parse_sums("not a list\n") == {} == parse_sums(f"{digest}  a\n<html>\n")


def test_a_plan_has_every_file_and_gits_ids(artifact: Artifact) -> None:
    plan = read_plan(artifact)
    assert {path: file.sha256 for path, file in plan.items()} == digests(artifact.path)
    edit(artifact, "hello.txt", b"hello\n")
    assert read_plan(artifact)["hello.txt"].blob == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


# Errors


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (errors.LocalTokenNotFoundError("none"), AuthError, "no token"),
        (errors.OIDCError("no id token"), AuthError, "no token"),
        (
            ConnectionError("status 403 Forbidden (https://h/api/models/a/b/xet-write-token/main)"),
            AuthError,
            "no right",
        ),
        (ConnectionError("404 Not Found https://h/api/models/a/b/xet-write-token/main"), UnavailableError, "Xet"),
        (ConnectionError("refused by port 40312"), UnavailableError, "no connection"),
        (errors.OfflineModeIsEnabled("offline"), UnavailableError, "offline mode"),
        (failures.http.ReadTimeout("timed out"), UnavailableError, "no answer"),
        (FileNotFoundError(2, "No such file or directory", "a.safetensors"), UnavailableError, "a.safetensors"),
        (ValueError("Invalid metadata in README.md.\n- x"), InputError, "Invalid metadata"),
        (errors.HFValidationError("bad id"), UsageError, "bad id"),
    ],
)
def test_errors_of_the_client_are_explained(error: Exception, expected: type[QuantpubError], said: str) -> None:
    problem = failures.explain(error, "where")
    assert type(problem) is expected and said in str(problem) and problem.where == "where" and problem.next
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = error
    assert type(failures.explain(wrapped, "where")) is expected


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("another"), RuntimeError("third")])
def test_bugs_stay_bugs(error: Exception) -> None:
    assert failures.explain(error, "where") is None
    with pytest.raises(type(error)):
        failures.patiently(lambda: (_ for _ in ()).throw(error), "where")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, InputError),
        (413, InputError),
        (401, AuthError),
        (402, AuthError),
        (403, AuthError),
        (409, ConflictError),
        (412, ConflictError),
        (404, UnavailableError),
        (408, UnavailableError),
        (429, UnavailableError),
        (500, UnavailableError),
    ],
)
def test_every_status_has_its_meaning(
    hub: LoopbackHub, artifact: Artifact, status: int, expected: type[QuantpubError]
) -> None:
    hub.add_repo(REPO, private=True)
    hub.faults.fail("refs", status, times=9)
    with pytest.raises(QuantpubError) as error:
        push(hub, artifact, tag="v1")
    assert type(error.value) is expected and error.value.where == f"{hub.endpoint}/{REPO}" and error.value.next


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 8),
        ({"RateLimit": '"api";r=0;t=55'}, 56),
        ({"RateLimit": '"api";r=9;t=55'}, 0),
        ({}, 0),
        ({"Retry-After": "99999"}, failures.LONGEST_WAIT_S),
    ],
)
def test_the_hub_says_how_long_to_wait(hub: LoopbackHub, headers: dict[str, str], wait: float) -> None:
    hub.faults.fail("whoami", 429, headers=headers)
    with pytest.raises(errors.HfHubHTTPError) as error:
        HfApi(hub.endpoint, hub.token).whoami()
    assert failures.asked_wait(error.value) == wait


def test_offline_mode_fails_at_once(hub: LoopbackHub, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match="offline mode is on") as error:
        push(hub, artifact)
    assert "HF_HUB_OFFLINE" in str(error.value.next) and hub.log == []


def tries(error: Exception) -> int:
    """How often `patiently` makes a call that always fails with `error`."""
    made: list[int] = []

    def call() -> None:
        made.append(1)
        raise error

    with pytest.raises(QuantpubError):
        failures.patiently(call, "where")
    return len(made)


def test_patience_is_for_what_may_pass_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    down = failures.http.ConnectError("refused")
    assert [tries(e) for e in (down, errors.OfflineModeIsEnabled("off"), errors.OIDCError("no"))] == [4, 1, 1]
    monkeypatch.setattr(failures, "PATIENCE_S", -1.0)
    assert tries(down) == 1


# Rehearsal


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that would lead the client astray, or to the network."""
    monkeypatch.delenv("NO_PROXY")
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_" + "y" * 34, "HF_OIDC_RESOURCE": "acme/x"}.items():
        monkeypatch.setenv(name, value)


def test_a_rehearsal_publishes_downloads_compares_and_changes_nothing_twice(artifact: Artifact, hostile: None) -> None:
    before = digests(artifact.path)
    result = rehearse(artifact, REPO)
    shown = result.as_json()
    assert shown["rehearsal"] == {
        "downloaded": 6,
        "identical": 6,
        "commits": 1,
        "second": {"changed": False},
        "requests": shown["rehearsal"]["requests"],
    }
    assert shown["changed"] and shown["private"] and shown["verified"] == {"files": 6, "headers": 2}
    assert {file["action"] for file in shown["files"]} == {"add"}
    assert digests(artifact.path) == before and json.loads(json.dumps(shown)) == shown


def test_a_rehearsal_fails_as_the_publication_would(artifact: Artifact) -> None:
    edit(artifact, "README.md", "---\nlicense: Apache License\n---\n")
    with pytest.raises(InputError, match="the Hub refuses the card") as error:
        rehearse(artifact, REPO)
    assert error.value.where == "README.md" and error.value.next


def test_a_rehearsal_needs_room(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UnavailableError, match="bytes of disk"):
        rehearse(artifact, REPO)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["create", "preupload", "lfs-batch", "lfs-put", "commit", "commits", "resolve"])
def test_killed_at_any_request_a_rerun_ends_at_the_plan_with_one_commit(
    hub: LoopbackHub, artifact: Artifact, tmp_path: Path, route: str
) -> None:
    child: list[subprocess.Popen[bytes]] = []
    hub.faults.meanwhile(route, lambda: (child[0].kill(), child[0].wait()))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "quantpub.publish.client", str(artifact.path), REPO, str(tmp_path / "out")]
    if route == "commits":
        hub.faults.lose_reply("commit")
    child.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert child[0].wait(60) == -signal.SIGKILL
    push(hub, artifact)
    assert held(hub) == digests(artifact.path) and len(hub.history(REPO)) == 2


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("eval.json", {"gate": "failed", "reason": "KL 0.2 is over 0.05"}),
        ("profile.json", {"gate": "failed", "reason": "7.9 times slower"}),
        ("verify.json", "failed"),
    ],
)
def test_a_failed_gate_is_not_published(hub: LoopbackHub, artifact: Artifact, name: str, verdict: object) -> None:
    edit(artifact, f".quantpub/{name}", json.dumps({"verdict": verdict}))
    with pytest.raises(GateError, match=name):
        publish(artifact, REPO, endpoint=hub.endpoint, token=hub.token)
    assert not [entry for entry in hub.log if entry.method != "GET"]


def test_what_was_not_proven_is_published(hub: LoopbackHub, artifact: Artifact) -> None:
    edit(artifact, ".quantpub/profile.json", json.dumps({"verdict": {"gate": "not proven", "reason": "no GPU"}}))
    assert publish(artifact, REPO, endpoint=hub.endpoint, token=hub.token).changed
