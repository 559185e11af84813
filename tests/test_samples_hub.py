"""Calibration data from the Hub: the real client against the loopback Hub, and the layouts of dataset repositories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DEMO_MODEL, DEMO_TEXT, use_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from quantpub.checkpoint import Checkpoint, open_checkpoint
from quantpub.errors import AuthError, InputError, UnavailableError
from quantpub.files import sha256_file
from quantpub.hub import LoopbackHub
from quantpub.samples import DEFAULT, Request, identify, read_samples
from quantpub.samples import dataset as module
from quantpub.samples.request import OWN_FILE
from quantpub.samples.splits import files_of

pytestmark = pytest.mark.slow  # together more than a few seconds

REPO = "acme/chat"
ROWS = [{"prompt_id": f"{i:04}", "text": f"# document {i}\n" + f"value_{i} = {i} + 1\n" * 20} for i in range(60)]
NAMES = [f"data/train_sft-{i:05}-of-00003-a3ecf92756993583.parquet" for i in range(3)]


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return open_checkpoint(str(DEMO_MODEL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Laid out as HuggingFaceH4/ultrachat_200k is."""
    root = tmp_path / "dataset"
    (root / "data").mkdir(parents=True)
    for place, name in enumerate(NAMES):
        pq.write_table(pa.Table.from_pylist(ROWS[20 * place : 20 * place + 20]), root / name, row_group_size=8)
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), root / "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet")
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Chats\n")
    return root


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        use_hub(running, tmp_path / "cache", monkeypatch)
        running.add_repo(f"datasets/{REPO}", folder, tag="v1")
        yield running


def ids(data: str, model: Checkpoint, **more: Any) -> list[list[int]]:
    return [row.tolist() for row in read_samples(Request(data, **more), model).rows]


def fetched(hub: LoopbackHub) -> set[str]:
    """The files that were asked for; content in LFS comes from elsewhere afterwards."""
    return {entry.path.partition("/resolve/")[2] for entry in hub.log if entry.route == "resolve"}


# the loopback Hub's datasets


def test_the_loopback_hub_keeps_datasets_and_models_apart(hub: LoopbackHub) -> None:
    api = HfApi()
    info = api.dataset_info(REPO, files_metadata=True)
    assert (info.id, info.author, info.sha) == (REPO, "acme", hub.head(f"datasets/{REPO}"))
    assert NAMES[0] in api.list_repo_files(REPO, repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)
    hub.add_repo(REPO)
    assert api.model_info(REPO).sha != info.sha


# a split at a commit


def test_a_split_is_read_at_its_commit_and_only_its_files(hub: LoopbackHub, model: Checkpoint, folder: Path) -> None:
    commit = hub.head(f"datasets/{REPO}")
    hub.commit(f"datasets/{REPO}", {NAMES[0]: b"broken"}, title="Somebody breaks main")
    found = read_samples(Request(f"{REPO}@{commit}:train_sft", 10, 64), model)
    one = folder.parent / "all.jsonl"
    one.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    local = read_samples(Request(str(one), 10, 64), model)
    assert [row.tolist() for row in found.rows] == [row.tolist() for row in local.rows]
    assert found.record["samples"] == local.record["samples"] and found.record["documents"] == 60
    assert {key: found.record[key] for key in ("kind", "repo", "commit", "split", "pinned", "files_in_split")} == {
        "kind": "hub",
        "repo": REPO,
        "commit": commit,
        "split": "train_sft",
        "pinned": f"{REPO}@{commit}:train_sft",
        "files_in_split": 3,
    }
    assert found.record["files"] == {name: sha256_file(folder / name) for name in NAMES}
    assert fetched(hub) == {f"{commit}/{name}" for name in ("README.md", *NAMES)}


def test_a_name_without_a_commit_is_resolved_and_its_pinned_form_repeats_it(
    hub: LoopbackHub, model: Checkpoint
) -> None:
    first = read_samples(Request(f"{REPO}:train_sft", 6, 64), model)
    tagged = identify(Request(f"{REPO}@v1:train_sft"), model)
    assert first.record["commit"] == tagged["commit"] == hub.head(f"datasets/{REPO}")
    hub.commit(f"datasets/{REPO}", {NAMES[0]: b"broken"}, title="Somebody breaks main")
    again = read_samples(Request(first.record["pinned"], 6, 64), model)
    assert again.record == first.record
    assert identify(Request(f"{REPO}:train_sft"), model)["commit"] != tagged["commit"]


def test_a_pinned_name_is_identified_without_the_hub(hub: LoopbackHub, model: Checkpoint) -> None:
    before = len(hub.log)
    found = identify(Request(DEFAULT), model)
    assert (found["repo"], found["split"]) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert len(hub.log) == before


def test_a_kept_split_serves_offline(
    hub: LoopbackHub, model: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pinned = f"{REPO}@{hub.head(f'datasets/{REPO}')}:train_sft"
    online = read_samples(Request(pinned, 6, 64), model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_samples(Request(pinned, 6, 64), model).record == online.record
    next((tmp_path / "cache").rglob(Path(NAMES[1]).name)).unlink()
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE is set"):
        read_samples(Request(pinned, 6, 64), model)


def test_of_a_huge_split_only_some_files_are_downloaded(
    hub: LoopbackHub, model: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT", (folder / NAMES[0]).stat().st_size * 3 // 2)
    record = read_samples(Request(f"{REPO}:train_sft", 6, 64), model).record
    assert (len(record["files"]), record["files_in_split"], record["documents"]) == (2, 3, 40)
    assert len({path for path in fetched(hub) if path.endswith(".parquet")}) == 2


def test_one_text_of_the_hub_is_cut_as_a_local_one(hub: LoopbackHub, model: Checkpoint, tmp_path: Path) -> None:
    text = json.loads(DEMO_TEXT.read_text().splitlines()[0])["text"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/wiki.txt").write_text(text)
    hub.add_repo("datasets/acme/wiki", tmp_path / "t")
    assert ids("acme/wiki", model, max_seq_len=64) == ids(str(tmp_path / "t/wiki.txt"), model, max_seq_len=64)


# what goes wrong


def line(data: str, model: Checkpoint, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        read_samples(Request(data, 4, 64), model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_names_are_one_line_each(hub: LoopbackHub, model: Checkpoint) -> None:
    assert "no split 'train'; there are test_sft, train_sft" in line(f"{REPO}:train", model, InputError)
    assert "several splits, and none was named" in line(REPO, model, InputError)
    assert "no revision 'v9' | check the revision after the @" in line(f"{REPO}@v9:train_sft", model, InputError)
    assert "no such dataset on the Hub, or no right to read it" in line("acme/nothing", model, AuthError)
    assert OWN_FILE in line("acme/nothing", model, AuthError)


def test_a_gated_dataset_is_an_auth_error(
    hub: LoopbackHub, model: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("datasets/acme/gated", folder, gated="manual")
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    assert "access to this dataset must be granted first" in line("acme/gated:train_sft", model, AuthError)


def test_a_dataset_in_another_format_names_its_conversion(hub: LoopbackHub, model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/train.csv").write_text("a,b\n")
    hub.add_repo("datasets/acme/csv", tmp_path / "csv")
    assert "acme/csv@refs/convert/parquet" in line("acme/csv:train", model, InputError)
    (tmp_path / "converted/default/train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "converted/default/train/0000.parquet")
    hub.add_repo("datasets/acme/csv", tmp_path / "converted", revision="refs/convert/parquet")
    assert len(ids("acme/csv@refs/convert/parquet:train", model, num_samples=5)) == 5


def test_a_damaged_download_is_noticed(hub: LoopbackHub, model: Checkpoint) -> None:
    hub.faults.damaged.add(NAMES[2])
    assert "its sha256 is not the one that the Hub states" in line(f"{REPO}:train_sft", model, UnavailableError)


def test_a_bad_row_is_named_with_its_file(hub: LoopbackHub, model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.jsonl").write_text('{"body": "a"}\n')
    commit = hub.add_repo("datasets/acme/bad", tmp_path / "bad")
    assert f"acme/bad@{commit[:7]}/train.jsonl:1: the row holds no text" in line("acme/bad", model, InputError)


def test_the_default_offline_is_one_clear_sentence(
    hub: LoopbackHub, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert line(DEFAULT, model, UnavailableError) == (
        "HuggingFaceH4/ultrachat_200k@8049631:train_sft: the default calibration data cannot be had: HF_HUB_OFFLINE is set"
        " | unset it; or give your own text: `--calibration FILE` takes a jsonl, txt or parquet file"
    )


def test_without_a_network_it_is_unavailable(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path))
    for data in (DEFAULT, "acme/chat:train"):
        found = line(data, model, UnavailableError)
        assert "the Hub did not answer" in found and OWN_FILE in found
    with pytest.raises(UnavailableError):
        identify(Request("acme/chat:train"), model)


def test_a_network_that_goes_away_between_two_files_is_unavailable(
    hub: LoopbackHub, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    def gone(*_: object, **__: object) -> str:
        raise errors.LocalEntryNotFoundError("no connection, and not in the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gone)
    assert "the Hub did not answer" in line(f"{REPO}:train_sft", model, UnavailableError)


# layouts

ULTRACHAT = [
    *NAMES,
    "data/test_gen-00000-of-00001-3d4cd8309148a71f.parquet",
    "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet",
    "README.md",
    ".gitattributes",
]
WIKITEXT = [
    "wikitext-103-raw-v1/train-00000-of-00002.parquet",
    "wikitext-103-raw-v1/train-00001-of-00002.parquet",
    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "wikitext-2-raw-v1/train-00000-of-00001.parquet",
]
CARD = {
    "configs": [
        {
            "config_name": "one",
            "data_files": [{"split": "train", "path": "a/tr*.parquet"}, {"split": "x", "path": "b/**"}],
        },
        {
            "config_name": "two",
            "default": True,
            "data_dir": "c",
            "data_files": {"train": ["[0-9].jsonl", "./z?.jsonl"]},
        },
        {"config_name": "three", "data_files": "d.jsonl"},
    ]
}
CARDED = ["a/train.parquet", "a/other.parquet", "b/deep/f.parquet", "c/1.jsonl", "c/zz.jsonl", "c/no.jsonl", "d.jsonl"]


@pytest.mark.parametrize(
    ("asked", "names", "card", "split", "files"),
    [
        ("train_sft", ULTRACHAT, {}, "train_sft", NAMES),
        ("test_gen", ULTRACHAT, {}, "test_gen", ULTRACHAT[3:4]),
        ("wikitext-2-raw-v1/train", WIKITEXT, {}, "wikitext-2-raw-v1/train", WIKITEXT[3:]),
        ("wikitext-103-raw-v1/train", WIKITEXT, {}, "wikitext-103-raw-v1/train", WIKITEXT[:2]),
        ("test", WIKITEXT, {}, "wikitext-2-raw-v1/test", WIKITEXT[2:3]),
        (None, ["train.jsonl", "valid.jsonl", "LICENSE.txt"], {}, "train", ["train.jsonl"]),
        ("valid", ["train.jsonl", "valid.jsonl"], {}, "valid", ["valid.jsonl"]),
        (None, ["alpaca_data_cleaned.json", "README.md"], {}, "alpaca_data_cleaned", ["alpaca_data_cleaned.json"]),
        ("train", ["alpaca_data_cleaned.json"], {}, "alpaca_data_cleaned", ["alpaca_data_cleaned.json"]),
        (
            "train",
            ["default/test/0000.parquet", "default/train/0000.parquet"],
            {},
            "train",
            ["default/train/0000.parquet"],
        ),
        (None, ["data/train.parquet", "data/train.jsonl", "dataset_infos.json"], {}, "train", ["data/train.parquet"]),
        ("train", CARDED, CARD, "two/train", ["c/1.jsonl", "c/zz.jsonl"]),
        ("one/train", CARDED, CARD, "one/train", ["a/train.parquet"]),
        ("x", CARDED, CARD, "one/x", ["b/deep/f.parquet"]),
        ("three/train", CARDED, CARD, "three/train", ["d.jsonl"]),
        (
            "train",
            ["train.jsonl"],
            {"configs": [{"config_name": "c", "data_files": "*.csv"}]},
            "train",
            ["train.jsonl"],
        ),
        ("train", ["train.jsonl"], {"configs": ["nonsense", {"data_files": 5}]}, "train", ["train.jsonl"]),
    ],
)
def test_the_files_of_a_split(
    asked: str | None, names: list[str], card: dict[str, Any], split: str, files: list[str]
) -> None:
    assert files_of(asked, names, card, "acme/x") == (split, files)


@pytest.mark.parametrize(
    ("asked", "names", "words"),
    [
        ("train", WIKITEXT, "no split 'train'; there are wikitext-103-raw-v1/train, wikitext-2-raw-v1/test, wiki"),
        ("train", ["validation.jsonl"], "no split 'train'; there are validation"),
        ("a/train", ["train.jsonl"], "no split 'a/train'; there are train"),
        ("s", [f"s{i}x.jsonl" for i in range(30)], "and 18 more"),
        (None, ["a.csv", "README.md", ".hidden/train.parquet"], "no parquet, jsonl or txt files"),
    ],
)
def test_a_split_that_is_not_there_lists_those_that_are(asked: str | None, names: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        files_of(asked, names, {}, "acme/x")
    assert words in str(caught.value)


def test_a_card_with_configurations_is_followed(
    hub: LoopbackHub, model: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "carded"))
    configs = "configs:\n- config_name: default\n  data_files:\n  - split: mixed\n    path: data/*_sft-*\n"
    (root / "README.md").write_text(f"---\n{configs}---\n# Chats\n")
    hub.add_repo("datasets/acme/carded", root)
    record = read_samples(Request("acme/carded:mixed", 5, 64), model).record
    assert (record["split"], record["files_in_split"], record["documents"]) == ("mixed", 4, 62)
