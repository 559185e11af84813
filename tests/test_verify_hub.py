"""Verify and repack by Hub id: the real client against the loopback Hub. What is read, how often, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, Ran, make_artifact, run_cli, save_llama, tree, use_hub
from huggingface_hub import HfApi, snapshot_download
from inside import Answers, inside
from safetensors.torch import load_file, save_file

from quantpub import ranges
from quantpub.artifact import SUMS, Artifact
from quantpub.held import open_held
from quantpub.hub import LoopbackHub
from quantpub.hub.faults import Fault
from quantpub.hub.wire import Reply, Slice, file_reply
from quantpub.publish import publish
from quantpub.sources import LocalSource

OURS, PEER, WIDE = "acme/tiny-w4a16", "peer/quantized", "acme/wide-fp8"
PEERS = Path(__file__).parent / "golden" / "checkpoints"
FOREIGN = (  # one of each tool's config, and each way to lie on disk
    "autoawq-w4-dense",
    "autoround-nvfp4-dense",
    "gptqmodel-gptq-desc-act-dense",
    "llmcompressor-w4a16-moe",
    "modelopt-fp8-dense",
    "torchao-int8-moe",
)
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\nbase_model: acme/tiny\n---\n# Tiny\n"
SHARD = "model.safetensors"
UNREAD = {"coverage", "copies", "values"}  # without a source and without weights
MB = 1_000_000

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a card. Read only."""
    made = Artifact.open(make_artifact(DEMO_MODEL, "w4a16", tmp_path_factory.mktemp("ours") / "tiny"))
    made.write("README.md", CARD.encode())
    made.seal()
    return made.path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose embedding alone takes 67 MB, and an artifact of it. Read only."""
    folder = tmp_path_factory.mktemp("wide")
    model = save_llama(folder / "model", shards=2)
    shard = next(path for path in model.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].repeat(512, 1)
    save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 512 * 512}))
    return model, make_artifact(model, "nvfp4a16", folder / "nvfp4", "ct-nvfp4")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Of tensors this small two take longer, several times so on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(tmp_path: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        use_hub(running, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(ranges, "WAITS_S", (0.01, 0.01))
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits up to half a minute
        running.add_repo(OURS, ours, tag="v1")
        yield running


@pytest.fixture
def answers() -> Iterator[Answers]:
    with inside() as ran:
        yield ran


def statuses(ran: Ran) -> dict[str, str]:
    return {check["id"]: check["status"] for check in ran.json()["checks"]}


def having(status: str, ran: Ran) -> set[str]:
    return {name for name, found in statuses(ran).items() if found == status}


def served(hub: LoopbackHub, repo: str) -> dict[str, list[int]]:
    """File in LFS → bytes of each reply that held some of it."""
    names = {file.sha256: name for name, file in hub.tree(repo).items() if file.lfs}
    found: dict[str, list[int]] = {}
    for entry in hub.log:
        if entry.route == "cdn" and (name := names.get(entry.path.rpartition("/")[2])):
            found.setdefault(name, []).append(entry.sent)
    return found


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))


# Ours


def test_published_and_verified_by_id(hub: LoopbackHub, ours: Path) -> None:
    publish(Artifact.open(ours), "acme/published", endpoint=hub.endpoint, token=hub.token)
    ran = run_cli("verify", "acme/published", "--json")
    assert (ran.code, ran.json()["verdict"], having("skipped", ran)) == (0, "incomplete", UNREAD), ran.err
    assert ran.json()["checkpoint"]["commit"] == hub.head("acme/published")


@pytest.mark.parametrize("revision", ["main", "v1", "commit"])
def test_a_revision_is_what_is_verified(hub: LoopbackHub, ours: Path, revision: str) -> None:
    sound = hub.head(OURS)
    hub.commit(OURS, {"config.json": (ours / "config.json").read_bytes() + b" "}, title="Somebody edits it")
    ran = run_cli("verify", OURS, "--revision", sound if revision == "commit" else revision, "--json")
    assert having("failed", ran) == ({"files"} if revision == "main" else set())
    assert ran.json()["checkpoint"]["commit"] == (hub.head(OURS) if revision == "main" else sound)


def test_the_weights_are_left_where_they_are(hub: LoopbackHub, tmp_path: Path) -> None:
    ran = run_cli("verify", OURS, "--json")
    assert (ran.code, having("skipped", ran), having("failed", ran)) == (0, UNREAD, set()), ran.err
    (sent,) = served(hub, OURS)[SHARD]
    assert sent == ranges.FIRST < hub.tree(OURS)[SHARD].size
    assert cached(tmp_path) == []
    gets = Counter(entry.path for entry in hub.log if entry.method == "GET" and entry.route == "resolve")
    assert set(gets.values()) == {1}


def test_a_second_look_fetches_nothing_again_but_the_header(hub: LoopbackHub) -> None:
    run_cli("verify", OURS)
    hub.log.clear()
    assert run_cli("verify", OURS).code == 0
    assert [entry.route for entry in hub.log] == ["info", "resolve", "cdn"]


def test_with_the_weights_it_passes_and_they_stay_in_the_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    ran = run_cli("verify", OURS, "--download", "--source", DEMO_MODEL, "--json")
    assert (ran.code, ran.json()["verdict"]) == (0, "passed"), ran.err
    assert served(hub, OURS)[SHARD] == [ranges.FIRST, hub.tree(OURS)[SHARD].size]
    assert cached(tmp_path) == [SHARD]
    hub.log.clear()
    assert run_cli("verify", OURS, "--source", DEMO_MODEL, "--download", "--json").json()["verdict"] == "passed"
    assert served(hub, OURS) == {}


def test_of_many_megabytes_some_hundred_kilobytes_are_read(hub: LoopbackHub, wide: tuple[Path, Path]) -> None:
    hub.add_repo(WIDE, wide[1])
    sizes = {name: file.size for name, file in hub.tree(WIDE).items() if name.endswith(".safetensors")}
    assert sum(sizes.values()) > 60 * MB
    ran = run_cli("verify", WIDE, "--source", wide[0], "--json")
    assert (ran.code, having("skipped", ran)) == (0, {"copies", "values"}), ran.err
    found = served(hub, WIDE)
    assert found.keys() == sizes.keys()
    assert sum(sum(sent) for sent in found.values()) < 0.3 * MB


def test_each_shard_is_fetched_once_with_download(hub: LoopbackHub, wide: tuple[Path, Path]) -> None:
    hub.add_repo(WIDE, wide[1])
    ran = run_cli("verify", WIDE, "--download", "--source", wide[0], "--json")
    assert ran.json()["verdict"] == "passed", ran.err
    for name, sent in served(hub, WIDE).items():
        assert sent == [min(ranges.FIRST, hub.tree(WIDE)[name].size), hub.tree(WIDE)[name].size]


def test_a_source_on_the_hub_is_fetched_once_too(hub: LoopbackHub, ours: Path, tmp_path: Path) -> None:
    hub.add_repo("acme/base", DEMO_MODEL)
    folder = Path(shutil.copytree(ours, tmp_path / "copy"))
    ran = run_cli("verify", folder, "--source", "acme/base", "--json")
    assert ran.json()["verdict"] == "passed", ran.err
    size = hub.tree("acme/base")[SHARD].size
    assert served(hub, "acme/base")[SHARD] == [ranges.FIRST, size]


# The rule of files


def flipped(folder: Path) -> bytes:
    data = (folder / SHARD).read_bytes()
    return data[:-1] + bytes([data[-1] ^ 1])


CHANGED: dict[str, Callable[[LoopbackHub, Path], object]] = {
    "a shard replaced": lambda hub, ours: hub.commit(OURS, {SHARD: flipped(ours)}),
    "a card edited": lambda hub, ours: hub.commit(OURS, {"README.md": CARD.encode() + b"Best.\n"}),
    "an extra file": lambda hub, ours: hub.commit(OURS, {"notes.txt": b"mine"}),
    "no SHA256SUMS": lambda hub, ours: HfApi().delete_file(SUMS, OURS),
    "a file missing": lambda hub, ours: HfApi().delete_file("generation_config.json", OURS),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_was_changed_at_the_hub_is_caught_by_its_sha256(case: str, hub: LoopbackHub, ours: Path) -> None:
    CHANGED[case](hub, ours)
    ran = run_cli("verify", OURS, "--json")
    assert (ran.code, having("failed", ran)) == (3, {"files"})
    assert set(served(hub, OURS)) == {SHARD}


def test_the_hubs_own_file_is_no_damage(hub: LoopbackHub, ours: Path, tmp_path: Path) -> None:
    """As `hf download --local-dir` leaves it: .gitattributes, and notes of the client's own."""
    folder = Path(snapshot_download(OURS, local_dir=tmp_path / "local"))
    assert (folder / ".gitattributes").is_file() and list((folder / ".cache").rglob("*.metadata"))
    ran = run_cli("verify", folder, "--source", DEMO_MODEL, "--json")
    assert ran.json()["verdict"] == "passed", ran.err
    (folder / ".cache/other").write_text("")
    assert Artifact(folder).damage() == [".cache/other"]


# Anybody's


@pytest.mark.parametrize("name", FOREIGN)
def test_the_same_is_said_of_a_checkpoint_here_and_at_the_hub(name: str, hub: LoopbackHub) -> None:
    hub.add_repo(PEER, PEERS / name)
    here, there = run_cli("verify", PEERS / name, "--json"), run_cli("verify", PEER, "--json")
    assert here.code == there.code
    differing = {rule for rule, status in statuses(here).items() if statuses(there)[rule] != status}
    assert differing <= {"values"}
    assert statuses(there)["values"] == "skipped"


@pytest.mark.parametrize("name", ["modelopt-nvfp4-moe", "llmcompressor-w4a16-dense"])
def test_a_peers_weights_are_fetched_when_asked_for(name: str, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_repo(PEER, PEERS / name)
    base = PEERS / f"base-{name.rpartition('-')[2]}"
    here = run_cli("verify", PEERS / name, "--source", base, "--json").json()
    there = run_cli("verify", PEER, "--source", base, "--download", "--json").json()
    assert (there["checks"], there["verdict"]) == (here["checks"], here["verdict"])
    assert [len(sent) for sent in served(hub, PEER).values()] == [2]


# Requests for single numbers


def many_numbers(kind: str) -> dict[str, torch.Tensor]:
    """200 modules. float32 scalars lie together; bfloat16 ones among other bfloat16 tensors; bytes among the weights."""
    tensors = {}
    for i in range(200):
        tensors[f"layers.{i}.weight"] = torch.full((32, 4096), i, dtype=torch.uint8)
        tensors[f"layers.{i}.scale"] = torch.full((1,), i, dtype=getattr(torch, kind))
        if kind == "bfloat16":
            tensors[f"layers.{i}.weight_scale"] = torch.full((2048, 1), 1.0, dtype=torch.bfloat16)
    return tensors


@pytest.mark.parametrize(
    ("kind", "requests", "kilobytes"), [("float32", 1, 132), ("bfloat16", 2, 1000), ("uint8", 201, 140)]
)
def test_single_numbers_share_requests(
    kind: str, requests: int, kilobytes: int, hub: LoopbackHub, tmp_path: Path
) -> None:
    tensors = many_numbers(kind)
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / SHARD)
    (tmp_path / "m/config.json").write_text("{}")
    hub.add_repo(PEER, tmp_path / "m")
    held = open_held(PEER, None, whole=False)
    for i in reversed(range(200)):
        assert torch.equal(held.tensor(f"layers.{i}.scale"), tensors[f"layers.{i}.scale"])
    sent = served(hub, PEER)[SHARD]
    assert len(sent) <= requests and sum(sent) < kilobytes * 1000
    assert torch.equal(held.tensor("layers.7.weight"), tensors["layers.7.weight"])
    assert cached(tmp_path) == []


def test_a_long_header_takes_two_requests(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({f"layers.{i}.{'x' * 100}": torch.ones(1) for i in range(1500)}, tmp_path / "m" / SHARD)
    (tmp_path / "m/config.json").write_text("{}")
    hub.add_repo(PEER, tmp_path / "m")
    held = open_held(PEER, None, whole=False)
    assert len(held.place) == 1500 and held.source.header(SHARD) == held.headers[SHARD]
    length = int.from_bytes(hub.read(PEER, SHARD)[:8], "little")
    assert served(hub, PEER)[SHARD] == [ranges.FIRST, 8 + length - ranges.FIRST]


def test_parts_that_lie_near_each_other_are_one() -> None:
    assert ranges.runs([(90, 92), (0, 2), (10, 12), (1, 5)], gap=5) == [(0, 12), (90, 92)]
    assert ranges.runs([(0, 8), (2, 4), (14, 15)], gap=5) == [(0, 8), (14, 15)]
    assert ranges.runs([]) == []


# What goes wrong


@dataclass(frozen=True)
class Cut(Reply):
    """A reply whose connection breaks half way."""

    def chunks(self) -> Iterator[bytes]:
        assert isinstance(self.content, Slice)
        data = b"".join(self.content.chunks())
        yield data[: len(data) // 2]
        raise ConnectionResetError


@dataclass(frozen=True)
class Counted(Reply):
    """A reply that knows how much of it was taken."""

    taken: list[int] = field(default_factory=list)

    def chunks(self) -> Iterator[bytes]:
        for chunk in super().chunks():
            yield chunk
            self.taken.append(len(chunk))


def plan(hub: LoopbackHub, reply: Reply, times: int = 99) -> None:
    hub.faults._plan(Fault("cdn", times, reply=reply))


def one_line(ran: Ran, code: int, words: str) -> None:
    lines = [line for line in ran.err.splitlines() if line.startswith("error:")]
    assert (ran.code, len(lines), ran.out) == (code, 1, ""), ran.err
    assert words in lines[0]


def test_a_connection_that_breaks_once_is_made_good(hub: LoopbackHub) -> None:
    size = hub.tree(OURS)[SHARD].size
    path = hub._hub.store.blobs.path(hub.tree(OURS)[SHARD].sha256)
    plan(hub, Cut(206, Slice(path, 0, ranges.FIRST), {"Content-Range": f"bytes 0-{ranges.FIRST - 1}/{size}"}), times=1)
    ran = run_cli("verify", OURS, "--json")
    assert (ran.code, having("failed", ran)) == (0, set()), ran.err
    assert len(served(hub, OURS)[SHARD]) == 2


def test_a_connection_that_breaks_each_time_is_one_line(hub: LoopbackHub, tmp_path: Path) -> None:
    path = hub._hub.store.blobs.path(hub.tree(OURS)[SHARD].sha256)
    plan(hub, Cut(206, Slice(path, 0, ranges.FIRST)))
    one_line(run_cli("verify", OURS), 6, "the Hub did not answer")
    assert len(served(hub, OURS)[SHARD]) == 1 + len(ranges.WAITS_S)
    assert cached(tmp_path) == []


def test_a_hub_that_answers_with_the_whole_file_is_stopped(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": torch.zeros(64 * MB, dtype=torch.uint8)}, folder / SHARD)
    (folder / "config.json").write_text("{}")
    hub.add_repo(PEER, folder)
    whole = file_reply(folder / SHARD, None, {})
    reply = Counted(whole.status, whole.content, whole.headers)
    plan(hub, reply)
    one_line(run_cli("verify", PEER), 6, "with the whole file of")
    assert sum(reply.taken) < 32 * MB  # what the sockets hold


BROKEN = {
    "shorter than its header says": (lambda data: data[:-100], "truncated"),
    "longer than its header says": (lambda data: data + b"\0", "too long"),
    "cut within its header": (lambda data: data[:600], "not a whole safetensors file"),
    "a header of a terabyte": (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "not a whole safetensors file"),
    "empty": (lambda data: b"", "not a whole safetensors file"),
    "no header": (lambda data: data[:8] + b"?" * (len(data) - 8), "its safetensors header is damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_shard_that_is_none_is_found_at_the_hub(case: str, hub: LoopbackHub) -> None:
    change, words = BROKEN[case]
    folder = PEERS / "llmcompressor-w4a16-dense"
    hub.add_repo(PEER, folder)
    hub.commit(PEER, {SHARD: change((folder / SHARD).read_bytes())})
    ran = run_cli("verify", PEER, "--json")
    assert ran.code == 3 and "index" in having("failed", ran)
    assert words in next(check["detail"] for check in ran.json()["checks"] if check["id"] == "index")
    assert sum(map(sum, served(hub, PEER).values())) <= 2 * ranges.FIRST


def test_who_may_not_see_it_is_told_so(hub: LoopbackHub, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("acme/private", ours, private=True)
    hub.add_repo("acme/gated", ours, gated="manual")
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    one_line(run_cli("verify", "acme/private"), 4, "no such model on the Hub, or no right to read it")
    one_line(run_cli("verify", "acme/gated"), 4, "access to this model must be granted first")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    one_line(run_cli("verify", OURS), 4, "the Hub refused the token")
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    assert run_cli("verify", "acme/private").code == run_cli("verify", "acme/gated").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("acme/absent",), 4, "no such model on the Hub"),
        ((OURS, "--revision", "v9"), 3, "no revision 'v9'"),
        (("acme/a--b",), 3, "not a Hub id"),
        ((OURS, "--engine", "transformers"), 2, "add --download, for 0.00 GB"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], code: int, words: str, hub: LoopbackHub) -> None:
    one_line(run_cli("verify", *arguments), code, words)


FAULTS: dict[str, tuple[Callable[[LoopbackHub], object], str]] = {
    "busy": (lambda hub: hub.faults.fail("info", 503), "the Hub answered 503"),
    "silent": (lambda hub: hub.faults.lose_reply("info"), "the Hub did not answer"),
    "no Hub at all": (lambda hub: hub.faults.html("info", status=200), "what answered is not a Hub"),
    "small files are refused": (lambda hub: hub.faults.fail("resolve", 503, times=99), "the Hub did not answer"),
    "a small file never comes": (lambda hub: hub.faults.lose_reply("resolve", times=99), "the Hub did not answer"),
    "a range never comes": (lambda hub: hub.faults.fail("cdn", 503, times=99), "the Hub answered 503"),
}


@pytest.mark.parametrize(
    ("command", "case"),
    [*(("verify", case) for case in FAULTS), ("repack", "a range never comes")],
)
def test_a_hub_in_trouble_is_one_line_and_safe_to_ask_again(
    command: str, case: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    more = ("--layout", "gptq", "-o", tmp_path / "out") if command == "repack" else ()
    FAULTS[case][0](hub)
    one_line(run_cli(command, OURS, *more), 6, FAULTS[case][1])
    assert cached(tmp_path) == [] and not (tmp_path / "out").exists()
    hub.faults.clear()
    assert run_cli(command, OURS, *more).code == 0


def test_a_full_disk_is_not_the_hubs_fault(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    one_line(run_cli("verify", OURS), 6, "cannot write")


def test_offline_is_one_line(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_line(run_cli("verify", OURS), 6, "HF_HUB_OFFLINE is set")
    assert hub.log == []


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "huggingface.co"])
def test_a_wrong_endpoint_is_one_line(endpoint: str, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    one_line(run_cli("verify", OURS), 6, "the Hub did not answer")
    assert hub.log == []


# Engines, repacking


def test_the_engine_runs_what_was_fetched(hub: LoopbackHub, answers: Answers) -> None:
    command = ("verify", OURS, "--download", "--source", DEMO_MODEL, "--engine", "transformers", "--json")
    ran = run_cli(*command)
    assert (ran.code, ran.json()["verdict"]) == (0, "passed"), ran.err
    assert ran.json()["engine"]["verdict"] == "passed" and ran.json()["engine"]["kl"]["tokens"] == 4 * 256
    assert [folder.name for folder in answers] == [DEMO_MODEL.name, hub.head(OURS)]


def test_a_repack_from_the_hub_is_that_of_the_folder(hub: LoopbackHub, ours: Path, tmp_path: Path) -> None:
    here = run_cli("repack", ours, "--layout", "gptq", "-o", tmp_path / "here")
    there = run_cli("repack", OURS, "--layout", "gptq", "-o", tmp_path / "there")
    assert here.code == there.code == 0, there.err
    assert weights(tmp_path / "here") == weights(tmp_path / "there")
    assert served(hub, OURS)[SHARD] == [ranges.FIRST, hub.tree(OURS)[SHARD].size]


@pytest.mark.parametrize("name", ["autoround-gptq-dense", "modelopt-nvfp4-dense"])
def test_a_peers_repack_from_the_hub_is_that_of_the_folder(name: str, hub: LoopbackHub, tmp_path: Path) -> None:
    layout = {"autoround-gptq-dense": "ct-pack", "modelopt-nvfp4-dense": "ct-nvfp4"}[name]
    hub.add_repo(PEER, PEERS / name)
    for model, out in ((PEERS / name, "here"), (PEER, "there")):
        ran = run_cli("repack", model, "--layout", layout, "-o", tmp_path / out)
        assert ran.code == 0, ran.err
    assert weights(tmp_path / "here") == weights(tmp_path / "there")
    assert [len(sent) for sent in served(hub, PEER).values()] == [2]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if "/" not in name}


# A snapshot in the Hub's cache


def test_a_snapshot_of_ours_is_sound_and_stays_as_it_is(hub: LoopbackHub) -> None:
    folder = Path(snapshot_download(OURS))
    assert (folder / "config.json").is_symlink()
    before = {name: (folder / name).readlink() for name in tree(folder)}
    ran = run_cli("verify", folder, "--source", DEMO_MODEL, "--json")
    assert ran.json()["verdict"] == "passed", ran.err
    assert {name: (folder / name).readlink() for name in tree(folder)} == before
    assert Artifact(folder).damage() == []


def test_other_links_are_alarmed_wherever_they_are(hub: LoopbackHub, ours: Path, tmp_path: Path) -> None:
    folder = Path(snapshot_download(OURS))
    (tmp_path / "elsewhere.json").write_bytes((folder / "generation_config.json").read_bytes())
    for place in (folder, Path(shutil.copytree(ours, tmp_path / "copy"))):
        (place / "generation_config.json").unlink()
        (place / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
        assert LocalSource(place).is_link("generation_config.json")
        assert having("failed", run_cli("verify", place, "--json")) == {"safe-files"}


@pytest.mark.parametrize("name", ["autoround-gptq-dense", "llmcompressor-nvfp4-dense"])
def test_a_snapshot_of_anybodys_is_what_the_folder_is(name: str, hub: LoopbackHub) -> None:
    hub.add_repo(PEER, PEERS / name)
    here, there = (run_cli("verify", path, "--json") for path in (PEERS / name, snapshot_download(PEER)))
    assert (there.code, statuses(there)) == (here.code, statuses(here))
