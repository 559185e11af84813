"""Calibration data from files: against the tokenizer itself, a plain shuffle and pyarrow; and every bad file in one line."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantpub.checkpoint import Checkpoint, open_checkpoint
from quantpub.errors import InputError, QuantpubError, UsageError
from quantpub.forward import load_tokenizer
from quantpub.samples import DEFAULT, Request, Samples, default_data, identify, read_samples
from quantpub.samples.encoder import Encoder
from quantpub.samples.picking import ROUND, permutation, pick
from quantpub.samples.reading import sha256_ids
from quantpub.samples.request import Dataset, named
from quantpub.samples.text import _passage

pytestmark = pytest.mark.slow  # together more than a few seconds

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
)
TEXTS = [f"def function_{i}(a, b):\n" + f"    return a * {i} + b  # {i}\n" * (1 + i % 40) for i in range(200)]
CHATS = [
    [{"role": "user", "content": f"What does {i} do? {text}"}, {"role": "assistant", "content": text}]
    for i, text in enumerate(TEXTS)
]


def copied(folder: Path, template: str | None = None) -> Path:
    shutil.copytree(DEMO_MODEL, folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def plain() -> Checkpoint:
    return open_checkpoint(str(DEMO_MODEL))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(copied(tmp_path_factory.mktemp("chat") / "model", TEMPLATE)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO_MODEL)


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def lists(samples: Samples) -> list[list[int]]:
    return [row.tolist() for row in samples.rows]


# which documents


def shuffled(count: int, seed: int) -> list[int]:
    """Fisher and Yates on a whole list, by the rule that the module states."""
    import hashlib

    order = list(range(count))
    for step in range(count):
        place = step + int(hashlib.sha256(f"{seed}:{step}".encode()).hexdigest(), 16) % (count - step)
        order[step], order[place] = order[place], order[step]
    return order


@given(st.integers(0, 300), st.integers(-5, 10**12))
def test_the_permutation_is_the_plain_shuffle(count: int, seed: int) -> None:
    assert list(permutation(count, seed)) == shuffled(count, seed)


def test_the_permutation_never_changes() -> None:
    assert list(permutation(10, 0)) == [2, 6, 5, 3, 9, 1, 4, 7, 0, 8]
    assert list(permutation(10, 1)) == [9, 2, 7, 0, 6, 4, 5, 1, 8, 3]


def test_every_document_is_equally_likely() -> None:
    firsts = [next(permutation(5, seed)) for seed in range(1000)]
    assert all(150 < firsts.count(place) < 250 for place in range(5))  # binomial: 200 ± 13


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 9), st.floats(0, 1))
def test_the_first_fit_documents_are_picked_and_few_are_read(count: int, wanted: int, seed: int, part: float) -> None:
    fit = {place for place in range(count) if random.Random(place).random() < part}
    read: list[int] = []

    def make(places: Any) -> dict[int, str]:
        read.extend(places)
        return {place: f"#{place}" for place in places if place in fit}

    picked = pick(count, wanted, seed, make, lambda done: None)
    order = shuffled(count, seed)
    chosen = [place for place in order if place in fit][:wanted]
    assert picked.samples == [(place, f"#{place}") for place in sorted(chosen)]
    needed = order.index(chosen[-1]) + 1 if len(chosen) == wanted else count
    assert picked.passed == [place for place in order[:needed] if place not in fit]
    assert len(read) == len(set(read)) < needed + ROUND


# texts


def test_texts_are_the_tokenizers_own_ids_cut_and_in_file_order(
    plain: Checkpoint, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "cal.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": f"t{i}"}) for i, text in enumerate(TEXTS)) + "\n")
    found = read_samples(Request(str(path), 80, 48, seed=3), plain)
    long_enough = [i for i in shuffled(200, 3) if len(tokenizer(TEXTS[i])["input_ids"]) >= 32]
    chosen = sorted(long_enough[:80])
    assert lists(found) == [tokenizer(TEXTS[i])["input_ids"][:48] for i in chosen]
    assert all(row.dtype.is_signed and row.element_size() == 8 for row in found.rows)
    record = found.record
    assert record["samples"] == [f"t{i}" for i in chosen] and record["samples_are"] == "id"
    assert (record["documents"], record["used"], record["num_samples"]) == (200, 80, 80)
    order = shuffled(200, 3)
    assert record["too_short"] == order.index(long_enough[79]) - 79 > 0
    assert record["chat_template"] == {"applied": False}
    assert record["tokens"] == sum(map(len, lists(found))) and record["token_ids_sha256"] == sha256_ids(lists(found))
    json.dumps(record, allow_nan=False)


def test_the_same_request_is_the_same_samples_another_seed_is_not(plain: Checkpoint, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "cal.jsonl", [{"text": text} for text in TEXTS])
    first, again, other = (read_samples(Request(data, 8, 40, seed), plain) for seed in (0, 0, 1))
    assert first.record == again.record and lists(first) == lists(again)
    assert lists(first) != lists(other)
    more = read_samples(Request(data, 20, 40, 0), plain)
    assert set(first.record["samples"]) < set(more.record["samples"])


def test_only_as_many_documents_are_tokenized_as_are_needed(
    plain: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = jsonl(tmp_path / "cal.jsonl", [{"text": text * 4} for text in TEXTS * 10]), list[str]()
    whole = Encoder.encode

    def counting(self: Encoder, texts: Any, special: bool) -> Any:
        read.extend(texts)
        return whole(self, texts, special)

    monkeypatch.setattr(Encoder, "encode", counting)
    assert len(read_samples(Request(data, 20, 32), plain).rows) == 20
    assert 20 <= len(read) < 20 + 2 * ROUND


def test_a_line_that_was_not_chosen_is_not_parsed(plain: Checkpoint, tmp_path: Path) -> None:
    unread = shuffled(200, 0)[-1]
    lines = [json.dumps({"text": text * 4}) if i != unread else "{not JSON" for i, text in enumerate(TEXTS)]
    (tmp_path / "cal.jsonl").write_text("\n".join(lines))
    assert len(read_samples(Request(str(tmp_path / "cal.jsonl"), 4, 32), plain).rows) == 4
    with pytest.raises(InputError, match=rf"cal.jsonl:{unread + 1}: not valid JSON"):
        read_samples(Request(str(tmp_path / "cal.jsonl"), 200, 32), plain)


def test_blank_lines_are_no_documents_and_numbers_are_those_of_the_file(plain: Checkpoint, tmp_path: Path) -> None:
    body = "\n\n".join(json.dumps({"text": text * 4}) for text in TEXTS[:5])
    (tmp_path / "cal.jsonl").write_text("\ufeff" + body + "\r\n\n  \n")
    record = read_samples(Request(str(tmp_path / "cal.jsonl"), 512, 32), plain).record
    assert (record["documents"], record["samples"]) == (5, [1, 3, 5, 7, 9])
    assert record["samples_are"] == "line of the file, from 1"


def test_a_text_of_few_tokens_is_tokenized_as_far_as_is_needed(
    plain: Checkpoint, tokenizer: Any, tmp_path: Path
) -> None:
    text = (" " * 300 + "\n") * 200 + TEXTS[39]
    ids = tokenizer(text)["input_ids"]
    assert len(text) > 20 * len(ids) > 20 * 500
    data = jsonl(tmp_path / "cal.jsonl", [{"text": text}])
    assert lists(read_samples(Request(data, 1, 500), plain)) == [ids[:500]]


def test_too_few_documents_are_all_used_and_the_record_says_so(plain: Checkpoint) -> None:
    record = read_samples(Request(str(DEMO_TEXT)), plain).record
    assert (record["used"], record["num_samples"], record["documents"]) == (12, 512, 12)


def test_the_special_tokens_of_the_tokenizer_stand_before_a_plain_text_only(tmp_path: Path) -> None:
    model = copied(tmp_path / "model", TEMPLATE)
    settings_ = json.loads((model / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    body = {"Sequence": {"id": "A", "type_id": 0}}
    settings_["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, body],
        "pair": [body, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(settings_))
    checkpoint = open_checkpoint(str(model))
    text = jsonl(tmp_path / "text.jsonl", [{"text": TEXTS[9]}])
    talk = jsonl(tmp_path / "talk.jsonl", [{"messages": CHATS[9]}])
    (tmp_path / "long.txt").write_text("\n".join(TEXTS))
    by_model = load_tokenizer(model)
    assert lists(read_samples(Request(text, 1, 64), checkpoint)) == [by_model(TEXTS[9])["input_ids"][:64]]
    assert by_model(TEXTS[9])["input_ids"][0] == 0
    rendered = by_model.apply_chat_template(CHATS[9], return_dict=False)
    assert lists(read_samples(Request(talk, 1, 64), checkpoint)) == [rendered[:64]] and rendered[0] != 0
    windows = lists(read_samples(Request(str(tmp_path / "long.txt"), 4, 64), checkpoint))
    assert all(row[0] == 0 and len(row) == 64 for row in windows)


def test_samples_are_no_longer_than_the_models_positions(tmp_path: Path) -> None:
    model = copied(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    checkpoint = open_checkpoint(str(model))
    found = read_samples(Request(str(DEMO_TEXT)), checkpoint)
    assert {len(row) for row in found.rows} == {64} and found.record["max_seq_len"] == 64
    assert identify(Request(str(DEMO_TEXT)), checkpoint)["max_seq_len"] == 64


# conversations


def test_conversations_go_through_the_chat_template(chat: Checkpoint, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "cal.jsonl", [{"messages": talk, "prompt_id": i} for i, talk in enumerate(CHATS)])
    found = read_samples(Request(data, 10, 40), chat)
    tokenizer = load_tokenizer(chat.source.path("config.json").parent)
    assert lists(found) == [
        tokenizer.apply_chat_template(CHATS[i], return_dict=False)[:40] for i in sorted(shuffled(200, 0)[:10])
    ]
    assert found.record["samples"] == sorted(shuffled(200, 0)[:10]) and found.record["samples_are"] == "prompt_id"
    applied = found.record["chat_template"]
    assert applied["applied"] and len(applied["sha256"]) == 64 and "date" not in applied


def test_what_means_the_same_conversation_is_the_same_ids(chat: Checkpoint, tmp_path: Path) -> None:
    pairs = [(talk[0]["content"], talk[1]["content"]) for talk in CHATS[:6]]
    ways: dict[str, list[dict[str, Any]]] = {
        "messages": [{"messages": talk} for talk in CHATS[:6]],
        "parts": [
            {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in t]} for t in CHATS[:6]
        ],
        "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs],
        "pairs": [{"prompt": q, "completion": a} for q, a in pairs],
        "replies": [{"prompt": q, "response": a} for q, a in pairs],
        "answers": [{"question": q, "answer": a} for q, a in pairs],
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in pairs],
    }
    found = {name: read_samples(Request(jsonl(tmp_path / f"{name}.jsonl", rows)), chat) for name, rows in ways.items()}
    for name, samples in found.items():
        assert lists(samples) == lists(found["messages"]), name
        assert samples.record["chat_template"]["applied"]


def test_without_a_template_pairs_are_plain_texts(plain: Checkpoint, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "Add them up.", "input": "1, 2", "output": TEXTS[30]}]
    found = read_samples(Request(jsonl(tmp_path / "cal.jsonl", rows), 1, 512), plain)
    assert lists(found) == [tokenizer(f"Add them up.\n1, 2\n{TEXTS[30]}")["input_ids"]]
    assert found.record["columns"] == ["instruction", "output"] and not found.record["chat_template"]["applied"]


def test_a_text_beside_conversations_serves_a_model_without_a_template(
    plain: Checkpoint, chat: Checkpoint, tmp_path: Path
) -> None:
    data = jsonl(tmp_path / "cal.jsonl", [{"messages": CHATS[i], "text": TEXTS[i] * 3} for i in range(4)])
    assert read_samples(Request(data), plain).record["columns"] == ["text"]
    assert read_samples(Request(data), chat).record["columns"] == ["messages"]


def test_plain_texts_stay_plain_for_a_chat_model(
    plain: Checkpoint, chat: Checkpoint, tokenizer: Any, tmp_path: Path
) -> None:
    data = jsonl(tmp_path / "cal.jsonl", [{"text": TEXTS[20]}])
    found = read_samples(Request(data), chat)
    assert lists(found) == [tokenizer(TEXTS[20])["input_ids"]] and found.record["chat_template"] == {"applied": False}


def test_conversations_that_the_template_refuses_are_counted_and_left_out(chat: Checkpoint, tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be brief."}, *CHATS[7]]
    data = jsonl(tmp_path / "cal.jsonl", [{"messages": talk} for talk in [system, [], *CHATS[:3]]])
    record = read_samples(Request(data, 5, 64), chat).record
    assert (record["used"], record["refused_by_template"], record["too_short"]) == (3, 2, 0)
    with pytest.raises(InputError, match="refuses the conversations: no system") as caught:
        read_samples(Request(jsonl(tmp_path / "all.jsonl", [{"messages": system}])), chat)
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_todays_date_gets_a_fixed_one(tmp_path: Path) -> None:
    dated = "Today: {{ strftime_now('%d %b %Y') }}\n{% if strftime_now is defined %}" + TEMPLATE + "{% endif %}"
    checkpoint = open_checkpoint(str(copied(tmp_path / "model", dated)))
    found = read_samples(Request(jsonl(tmp_path / "cal.jsonl", [{"messages": CHATS[3]}])), checkpoint)
    words = load_tokenizer(tmp_path / "model").decode(found.rows[0])
    assert words.startswith("Today: 26 Jul 2024\n<|user|>")
    assert found.record["chat_template"]["date"] == "2024-07-26"


# token ids


def test_token_ids_are_used_as_they_are_and_no_tokenizer_is_needed(tmp_path: Path) -> None:
    model = copied(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    rows = [{"input_ids": list(range(i, i + 50)), "text": "not this"} for i in range(5)]
    checkpoint = open_checkpoint(str(model))
    found = read_samples(Request(jsonl(tmp_path / "cal.jsonl", rows), 5, 40), checkpoint)
    assert lists(found) == [list(range(i, i + 40)) for i in range(5)]
    rows[3]["input_ids"] = [*range(40), 8192]
    with pytest.raises(InputError, match=r"again.jsonl:4: token id 8192 is none of the model's 8192"):
        read_samples(Request(jsonl(tmp_path / "again.jsonl", rows), 5, 64), checkpoint)


# parquet


def test_parquet_is_read_as_jsonl_is(chat: Checkpoint, tmp_path: Path) -> None:
    rows = [{"id": i, "messages": talk, "n": None if i % 2 else i} for i, talk in enumerate(CHATS)]
    lines = read_samples(Request(jsonl(tmp_path / "cal.jsonl", rows), 20, 64), chat)
    table = read_samples(Request(parquet(tmp_path / "cal.parquet", rows, row_group_size=7), 20, 64), chat)
    assert lists(lines) == lists(table)
    same = ("samples", "samples_are", "documents", "tokens", "token_ids_sha256", "chat_template", "columns")
    assert {key: lines.record[key] for key in same} == {key: table.record[key] for key in same}


def test_of_parquet_only_needed_columns_and_row_groups_are_read(plain: Checkpoint, tmp_path: Path) -> None:
    """The others are overwritten with noise: reading them would fail."""
    rows = [{"picture": f"{i}" * 500, "text": text * 4} for i, text in enumerate(TEXTS)]
    path = Path(parquet(tmp_path / "cal.parquet", rows, row_group_size=10, use_dictionary=False))
    before = read_samples(Request(str(path), 4, 64), plain)
    meta, raw = pq.ParquetFile(path).metadata, bytearray(path.read_bytes())
    needed = {place // 10 for place in [*shuffled(200, 0)[: max(4, ROUND)], 0]}
    unneeded = [(group, 1) for group in range(20) if group not in needed] + [(group, 0) for group in range(1, 20)]
    assert len(unneeded) > 20
    for group, column in unneeded:
        chunk = meta.row_group(group).column(column)
        raw[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = (
            b"\xa5" * chunk.total_compressed_size
        )
    path.write_bytes(raw)
    after = read_samples(Request(str(path), 4, 64), plain)
    assert lists(after) == lists(before)
    with pytest.raises(InputError, match="not a readable parquet file"):
        read_samples(Request(str(path), 200, 64), plain)


def test_a_row_of_parquet_without_the_column_is_named(plain: Checkpoint, tmp_path: Path) -> None:
    data = parquet(tmp_path / "cal.parquet", [{"text": TEXTS[39]}, {"text": TEXTS[38]}, {"text": None}])
    with pytest.raises(InputError, match=r'cal.parquet: row 2: the row has no "text"'):
        read_samples(Request(data), plain)


def test_without_pyarrow_the_error_says_what_to_install(
    plain: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = parquet(tmp_path / "cal.parquet", [{"text": TEXTS[39]}])
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        read_samples(Request(data), plain)


# one long text


def test_a_short_text_is_cut_into_all_its_windows(plain: Checkpoint, tokenizer: Any, tmp_path: Path) -> None:
    text = "".join(TEXTS[:30])
    (tmp_path / "cal.txt").write_text(text)
    found = read_samples(Request(str(tmp_path / "cal.txt"), 512, 100), plain)
    ids = tokenizer(text)["input_ids"]
    rest = len(ids) % 100
    assert [i for row in lists(found) for i in row] == (ids[:-rest] if 0 < rest < 32 else ids)
    assert {len(row) for row in found.rows[:-1]} == {100}
    assert found.record["samples"] == list(range(0, len(ids), 100))[: len(found.rows)]


def test_a_text_of_more_windows_gives_those_at_even_strides(plain: Checkpoint, tokenizer: Any, tmp_path: Path) -> None:
    text = "".join(TEXTS[:40])
    (tmp_path / "cal.txt").write_text(text)
    wanted = len(text) // (8 * 64) + 1  # the most windows for which it counts as long
    ids = tokenizer(text)["input_ids"]
    assert len(ids) // 64 > wanted
    found = read_samples(Request(str(tmp_path / "cal.txt"), wanted, 64), plain)
    starts = [i * len(ids) // wanted for i in range(wanted)]
    assert lists(found) == [ids[start : start + 64] for start in starts]
    assert found.record["samples"] == starts and starts[-1] + 64 <= len(ids)


def test_of_a_long_text_only_passages_are_read(plain: Checkpoint, tokenizer: Any, tmp_path: Path) -> None:
    text = "".join(f"{i}: äöü {'€' * (i % 5)} {line}" for i, line in enumerate(TEXTS))
    (tmp_path / "cal.txt").write_text(text)
    size = len(text.encode())
    found = read_samples(Request(str(tmp_path / "cal.txt"), 7, 64), plain)
    assert found.record["samples"] == [i * size // 7 for i in range(7)]
    assert found.record["samples_are"] == "byte of the file, from 0"
    for place, row in zip(found.record["samples"], found.rows, strict=True):
        words = tokenizer.decode(row).rstrip("\ufffd")  # a window may end within a character
        assert len(row) == 64 and words in text
        assert place <= len(text[: text.index(words)].encode()) < place + 300 or text.count(words) > 1


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=400), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_passage_is_whole_characters_wherever_it_begins(tmp_path: Path, text: str, data: st.DataObject) -> None:
    from quantpub.samples.documents import DataFile

    raw = text.encode()
    (tmp_path / "p.txt").write_bytes(raw)
    start = data.draw(st.integers(0, len(raw)))
    length = data.draw(st.integers(0, len(raw)))
    found = _passage(DataFile(tmp_path / "p.txt", "p.txt"), start, length)
    assert found in text and len(found.encode()) <= length


# who the data is


def test_the_identity_changes_with_everything_that_changes_samples_and_with_nothing_else(
    plain: Checkpoint, chat: Checkpoint, tmp_path: Path
) -> None:
    data = jsonl(tmp_path / "cal.jsonl", [{"text": text} for text in TEXTS])
    renamed = shutil.copy(data, tmp_path / "other.jsonl")
    changed = jsonl(tmp_path / "changed.jsonl", [{"text": text} for text in TEXTS[:-1]])
    base = identify(Request(data), plain)
    assert base == identify(Request(str(renamed)), plain)
    others = [
        identify(Request(changed), plain),
        identify(Request(data), chat),
        identify(Request(data, num_samples=511), plain),
        identify(Request(data, max_seq_len=512), plain),
        identify(Request(data, seed=1), plain),
    ]
    digests = [json.dumps(one, sort_keys=True) for one in [base, *others]]
    assert len(set(digests)) == 6


@pytest.mark.slow
def test_the_identity_needs_no_transformers_and_no_pyarrow() -> None:
    code = (
        "import sys; from quantpub.checkpoint import open_checkpoint; from quantpub.samples import Request, identify\n"
        f"identify(Request({str(DEMO_TEXT)!r}), open_checkpoint({str(DEMO_MODEL)!r}))\n"
        "print([name for name in ('transformers', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_chat_models_have_default_data_others_must_name_some(
    plain: Checkpoint, chat: Checkpoint, tmp_path: Path
) -> None:
    assert default_data(chat) == DEFAULT
    with pytest.raises(UsageError, match="name a calibration text with --calibration"):
        default_data(plain)
    inside = copied(tmp_path / "model")
    config = json.loads((inside / "tokenizer_config.json").read_text())
    (inside / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    assert default_data(open_checkpoint(str(inside))) == DEFAULT


# names


def test_a_name_is_a_file_that_exists_or_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "8049631c405ae6576f93f445c6b8166f76f5505a"
    assert named(DEFAULT) == Dataset("HuggingFaceH4/ultrachat_200k", commit, "train_sft")
    assert named(DEFAULT).pinned and str(named(DEFAULT)) == "HuggingFaceH4/ultrachat_200k@8049631:train_sft"
    assert named("a/b") == Dataset("a/b") and named("a/b:t") == Dataset("a/b", None, "t")
    assert named("a/b@refs/convert/parquet:c/t") == Dataset("a/b", "refs/convert/parquet", "c/t")
    assert named("teknium/OpenHermes-2.5") == Dataset("teknium/OpenHermes-2.5")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.jsonl").write_text("")
    assert named("a/b.jsonl") == Path("a/b.jsonl")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/c.jsonl", "no such file"),
        ("./a/c", "no such file"),
        ("/nowhere/c", "no such file"),
        ("~/nowhere-at-all", "no such file"),
        ("wikitext", "neither a file nor a dataset id"),
        ("a/b/c", "neither a file nor a dataset id"),
        ("", "a folder is no calibration data"),
        ("a/b.jsonl:train", "neither a file nor a dataset id"),
        (".", "a folder is no calibration data"),
    ],
)
def test_a_name_that_is_neither_is_one_line(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        named(name)
    assert "takes a jsonl, txt or parquet file" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"num_samples": 0}, {"max_seq_len": 1}])
def test_numbers_that_make_no_samples_are_usage_errors(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Request("a.jsonl", **bad)


# bad files

LONG = json.dumps({"text": TEXTS[39]}).encode() + b"\n"
BAD: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", "the file is empty"),
    ("blank.jsonl", b"\n \n", "the file is empty"),
    ("noise.jsonl", bytes(range(256)) * 9, "not text: it holds NUL bytes"),
    ("latin.jsonl", '{"text": "é"}'.encode("latin-1"), "latin.jsonl:1: not UTF-8"),
    ("utf16.jsonl", '{"text": "é"}'.encode("utf-16"), "not text|not UTF-8"),
    ("words.jsonl", b"hello\n", "words.jsonl:1: not valid JSON"),
    ("second.jsonl", LONG + b"{'text': 1}\n", "second.jsonl:2: not valid JSON"),
    ("array.json", b'[{"text": "a"}]', "a JSON array, not JSON lines"),
    ("string.jsonl", b'"text"\n', "string.jsonl:1: the line is not a JSON object"),
    ("deep.jsonl", b"[1]\n", "a JSON array"),
    ("nested.jsonl", b'{"a":' * 100_000, "not valid JSON"),
    ("columns.jsonl", b'{"body": "a", "n": 1}\n', "the row holds no text; it has 'body', 'n'"),
    ("null.jsonl", b'{"text": null}\n', "the row holds no text; it has nothing"),
    ("missing.jsonl", LONG + b'{"texts": "a"}\n', 'missing.jsonl:2: the row has no "text"'),
    ("number.jsonl", LONG + b'{"text": 5}\n', 'number.jsonl:2: "text" is not a text'),
    ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    ("ids.jsonl", b'{"input_ids": [1, true]}\n', '"input_ids" is not a list of whole numbers'),
    ("big.jsonl", b'{"input_ids": [1, 9999]}\n', "none of its 1 documents has 32 tokens"),
    ("negative.jsonl", json.dumps({"input_ids": [-1] * 50}).encode(), "token id -1 is none of the model's 8192"),
    ("talk.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', "tokenizer has no chat template"),
    ("short.jsonl", b'{"text": "a"}\n{"text": ""}\n', "none of its 2 documents has 32 tokens"),
    ("empty.txt", b"", "the file is empty"),
    ("blank.txt", b" \n\n\t", "the file is empty"),
    ("short.txt", b"too short", "the text has less than 32 tokens"),
    ("noise.txt", bytes(range(256)), "not text: it holds NUL bytes"),
    ("latin.txt", b"abc \xe9 def", r"not UTF-8 \(byte 4\)"),
    ("empty.parquet", b"", "not a readable parquet file"),
    ("noise.parquet", b"PAR1" + bytes(100) + b"PAR1", "not a readable parquet file"),
    ("words.csv", b"a,b\n", ".csv is no kind of calibration data"),
    ("packed.jsonl.gz", b"\x1f\x8b", ".gz is no kind of calibration data"),
    ("none", b"a", "no ending is no kind of calibration data"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD, ids=[name for name, _, _ in BAD])
def test_a_bad_file_is_one_clear_line(plain: Checkpoint, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_samples(Request(str(tmp_path / name)), plain)
    assert name in str(caught.value) and caught.value.next and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hi"}, '"messages" is not a list'),
        ({"messages": ["hi"]}, '"messages" is not a list'),
        ({"messages": [{"content": "hi"}]}, '"messages" is not a list'),
        ({"messages": [{"role": "user"}]}, 'a message of "messages" has no content'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "something else than text"),
        ({"messages": [{"role": "user", "content": 5}]}, "something else than text"),
        ({"conversations": [{"from": "human", "text": "hi"}]}, 'a message of "conversations" has no content'),
        ({"prompt": ["hi"], "completion": "a"}, '"prompt" is not a text'),
    ],
)
def test_a_bad_conversation_is_one_clear_line(
    chat: Checkpoint, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_samples(Request(jsonl(tmp_path / "cal.jsonl", [row])), chat)
    assert "cal.jsonl:1" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_parquet_table_is_one_line(plain: Checkpoint, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "cal.parquet")
    with pytest.raises(InputError, match="the file is empty"):
        read_samples(Request(str(tmp_path / "cal.parquet")), plain)


def test_a_long_text_that_turns_binary_is_one_line(plain: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "cal.txt").write_bytes("".join(TEXTS).encode() + b"\xff\xfe" * 100_000)
    with pytest.raises(InputError, match=r"not UTF-8 \(byte \d+\)"):
        read_samples(Request(str(tmp_path / "cal.txt"), 9, 32), plain)


def test_a_file_that_may_not_be_read_is_one_line(plain: Checkpoint, tmp_path: Path, monkeypatch: Any) -> None:
    data = jsonl(tmp_path / "cal.jsonl", [{"text": "a"}])
    monkeypatch.setattr(Path, "open", _refuse(Path.open, "cal.jsonl"))
    with pytest.raises(InputError, match="cannot be read: permission denied"):
        read_samples(Request(data), plain)
    with pytest.raises(InputError, match="cannot be read: permission denied"):
        identify(Request(data), plain)


def _refuse(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    def opened(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    return opened


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    model = copied(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(InputError) as caught:
        read_samples(Request(str(DEMO_TEXT)), open_checkpoint(str(model)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.jsonl", "a.txt", "a.parquet"]), st.binary(max_size=300) | st.text(max_size=200), st.data())
def test_whatever_a_file_holds_it_is_samples_or_one_line(
    plain: Checkpoint, tmp_path: Path, name: str, content: bytes | str, data: st.DataObject
) -> None:
    raw = content if isinstance(content, bytes) else json.dumps({"text": content}).encode()
    (tmp_path / name).write_bytes(raw)
    try:
        found = read_samples(Request(str(tmp_path / name), 3, 4), plain)
    except QuantpubError as error:
        assert isinstance(error, InputError) and "\n" not in str(error)
    else:
        assert found.rows and all(2 <= len(row) <= 4 for row in found.rows)
