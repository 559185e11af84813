"""Observing, against the whole model in memory: transformers' own forward with plain hooks, and its own key-value cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT, run_cli, spawn_cli, tree
from test_families import save_tiny

import quantpub.observe as stage
from quantpub.checkpoint import open_checkpoint
from quantpub.errors import InputError, QuantpubError
from quantpub.families import FAMILIES
from quantpub.layer_store import LayerStore
from quantpub.observe import observe, passing
from quantpub.observe.skeleton import Skeleton
from quantpub.observe.watch import Gathered, largest, spread
from quantpub.samples import Request
from quantpub.statistics import Statistics, folder_of, require_experts

IDS = torch.arange(48).view(2, 24) % 60


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTPUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    return written(tmp_path / "ids.jsonl")


def written(path: Path) -> Path:
    """Samples of three lengths, as token ids: no tokenizer has a say."""
    rows = [
        torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 40, 33, 64, 40)
    ]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]


def reference(folder: Path, rows: list[list[int]]) -> tuple[Any, dict[str, list[torch.Tensor]], list[Any]]:
    """The model, the inputs of every nn.Linear, and the key-value caches, row by row."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager").eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            )
    with torch.inference_mode():
        caches = [net(torch.tensor([row]), use_cache=True).past_key_values for row in rows]
    return net, seen, caches


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_layer_by_layer_is_what_the_whole_model_computes(model_type: str, tmp_path: Path) -> None:
    """Bit for bit: same weights in the same places, same masks and positions, for every architecture that is known."""
    from transformers import AutoModelForCausalLM

    save_tiny(model_type, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation="eager").eval()
    base = model.get_decoder()
    base.norm = torch.nn.Identity()
    skeleton = Skeleton(open_checkpoint(str(tmp_path)), tmp_path)
    with torch.inference_mode():
        (hidden,) = skeleton.embed([IDS])
        for layer in range(skeleton.layers):
            skeleton.load(layer)
            hidden = skeleton.run(layer, hidden)
            skeleton.unload(layer)
            assert all(p.device.type == "meta" for p in skeleton.module(layer).parameters())
        assert torch.equal(hidden, base(input_ids=IDS, use_cache=False).last_hidden_state)


@pytest.mark.slow
def test_statistics_are_those_of_the_whole_model(cache: Path, ids: Path) -> None:
    rows = rows_of(ids)
    statistics = observe(open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64))
    _, seen, caches = reference(DEMO_MODEL, rows)
    linears = {name: torch.cat(parts) for name, parts in seen.items() if name != "lm_head"}
    assert sorted(statistics.modules()) == sorted(linears)
    for name, x_MK in linears.items():
        found = statistics.input(name)
        assert found.tokens == statistics.tokens(name) == sum(map(len, rows))
        # rows of one length go through a kernel together, which may round the last bit of bf16 otherwise
        assert torch.allclose(found.amax_K, x_MK.float().abs().amax(0), rtol=0.02, atol=1e-3)
        assert torch.allclose(found.second_moment_K, x_MK.float().square().mean(0), rtol=0.02, atol=1e-5)
        assert found.sample_RK.dtype == torch.bfloat16 and 100 <= len(found.sample_RK) <= 128
    for layer in range(len(caches[0].layers)):
        k, v = statistics.kv(f"model.layers.{layer}.self_attn")
        assert k == pytest.approx(max(float(c.layers[layer].keys.abs().max()) for c in caches), rel=0.01)
        assert v == pytest.approx(max(float(c.layers[layer].values.abs().max()) for c in caches), rel=0.01)


def test_sampled_rows_are_rows_of_the_input(cache: Path, ids: Path) -> None:
    statistics = observe(open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64))
    first = statistics.input("model.layers.0.self_attn.q_proj").sample_RK.float()
    _, seen, _ = reference(DEMO_MODEL, rows_of(ids))
    x_MK = torch.cat(seen["model.layers.0.self_attn.q_proj"]).float()
    nearest = torch.cdist(first, x_MK).amin(1)
    assert float(nearest.max()) < 0.02 * float(x_MK.norm(dim=1).mean())


def test_what_reads_the_same_input_shares_one_entry(cache: Path, ids: Path) -> None:
    statistics = observe(open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64))
    tensors, metadata = LayerStore(folder_of("observed", statistics.key)).read(0)
    at = "model.layers.0."
    assert metadata["inputs"] == {
        **dict.fromkeys((f"{at}self_attn.{p}_proj" for p in "qkv"), f"{at}self_attn.q_proj"),
        **{f"{at}self_attn.o_proj": f"{at}self_attn.o_proj", f"{at}mlp.down_proj": f"{at}mlp.down_proj"},
        **dict.fromkeys((f"{at}mlp.{p}_proj" for p in ("gate", "up")), f"{at}mlp.gate_proj"),
    }
    assert len(tensors) == 4 * 3


def test_a_second_time_costs_nothing(cache: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, request = open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64)
    first = observe(checkpoint, request)
    monkeypatch.setattr(stage, "read_samples", lambda *_: pytest.fail("the data was read again"))
    assert observe(checkpoint, request).record == first.record
    with pytest.raises(pytest.fail.Exception):
        observe(checkpoint, Request(str(ids), 3, 64))


def layers_of(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(cache).items() if name.endswith(".safetensors")}


def test_spilled_to_disk_it_finds_the_same(cache: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe(open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64))
    kept = layers_of(cache)
    monkeypatch.setenv("QUANTPUB_CACHE", str(cache / "spilled"))
    monkeypatch.setattr(passing, "SHARE", 1 << 40)
    observe(open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64))
    assert layers_of(cache / "spilled") == kept
    assert not [name for name in tree(cache) if "hidden" in name]


@pytest.mark.slow
@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "record"])
def test_what_was_damaged_is_recognised_and_made_again(
    damage: str, spilled: bool, cache: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spilled:
        monkeypatch.setattr(passing, "SHARE", 1 << 40)
    checkpoint, request = open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64)
    found = observe(checkpoint, request)
    whole, folder = tree(cache), folder_of("observed", found.key)
    path = folder / ("record.json" if damage == "record" else "layer-00001.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {"flipped": lambda: path.write_bytes(data), "record": lambda: path.write_bytes(data[:50])}.get(
        damage, lambda: path.unlink() if damage == "gone" else path.write_bytes(data[:-7])
    )()
    assert Statistics.open(found.key) is None
    observe(checkpoint, request)
    assert tree(cache) == whole


ASK = ("quantize", DEMO_MODEL, "-r", "w4a16", "--engine", "vllm", "--calibration")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(artifact, cache) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTPUB_CACHE", str(folder / "cache"))
        assert run_cli(*ASK, written(folder / "ids.jsonl"), "-o", folder / "out").code == 0
    return folder / "out", folder / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("passage", [1, 2, 3])
def test_a_killed_calibration_goes_on(
    passage: int, whole: tuple[Path, Path], cache: Path, ids: Path, tmp_path: Path
) -> None:
    """kill -9 after a layer's file and before its line in the journal; the same command then ends with the same bytes."""
    killed = spawn_cli(*ASK, ids, "-o", tmp_path / "two", env={"QUANTPUB_CRASH_AT": f"layer:{passage}"})
    assert killed.code == -9
    assert [p.name for p in cache.rglob("layer-*")] and not list(cache.rglob("record.json"))
    done = run_cli(*ASK, ids, "-o", tmp_path / "two")
    assert done.code == 0, done.err
    assert layers_of(cache) == layers_of(whole[1])
    assert tree(whole[0]) == tree(tmp_path / "two")


def test_going_on_begins_where_it_was_left(cache: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption in the second layer: the first is not run again."""
    checkpoint, request = open_checkpoint(str(DEMO_MODEL)), Request(str(ids), 8, 64)
    ran: list[int] = []
    load = Skeleton.load

    def interrupted(self: Skeleton, layer: int) -> None:
        ran.append(layer)
        if len(ran) == 2:
            raise KeyboardInterrupt
        load(self, layer)

    monkeypatch.setattr(Skeleton, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        observe(checkpoint, request)
    observe(checkpoint, request)
    layers = json.loads((DEMO_MODEL / "config.json").read_text())["num_hidden_layers"]
    assert ran == [0, 1, *range(1, layers)]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(whole: tuple[Path, Path], cache: Path, ids: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*TORCHRUN, "-m", "quantpub", *map(str, ASK), str(ids), "-o", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert layers_of(whole[1]) == layers_of(cache)
    one, two = tree(whole[0]), tree(tmp_path / "two")
    assert {name for name in {*one, *two} if one.get(name) != two.get(name)} == set()


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    folder = tmp_path / "moe"
    save_tiny("qwen3_moe", folder)
    return folder


def test_experts_are_counted_as_the_router_sends(cache: Path, ids: Path, moe: Path) -> None:
    statistics = observe(open_checkpoint(str(moe)), Request(str(ids), 8, 64))
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(moe, dtype="auto").eval()
    counts = torch.zeros(4, 4, dtype=torch.long)
    for row in rows_of(ids):
        with torch.inference_mode():
            logits = net(torch.tensor([row]), output_router_logits=True).router_logits
        for layer, each in enumerate(logits):
            counts[layer] += torch.bincount(each.float().topk(2).indices.flatten(), minlength=4)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.experts"
        assert sum(statistics.record["experts"][name]) == int(counts[layer].sum()) == 2 * sum(map(len, rows_of(ids)))
        # a tie or a last bit of bf16 may send a token elsewhere
        assert (torch.tensor(statistics.record["experts"][name]) - counts[layer]).abs().max() <= 4
        assert statistics.tokens(f"{name}.1.down_proj") == statistics.record["experts"][name][1]


def test_an_expert_that_the_router_avoids_has_sound_statistics(cache: Path, ids: Path, moe: Path) -> None:
    """Known failure: experts never reached by calibration, and zeros or NaN as their scales."""
    from safetensors.torch import load_file, save_file

    path = moe / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name][3] = -tensors[name][:3].sum(0) * 50  # hardly any token's choice
        tensors[name][3] -= 10
    save_file(tensors, path, {"format": "pt"})
    statistics = observe(open_checkpoint(str(moe)), Request(str(ids), 8, 64))
    counts = statistics.record["experts"]
    poor = min((each[3], name) for name, each in counts.items())
    assert poor[0] < 128
    for leaf in ("gate_proj", "down_proj"):
        found = statistics.input(f"{poor[1]}.3.{leaf}")
        assert found.tokens >= 128 and float(found.amax_K.min()) > 0 and bool(found.second_moment_K.isfinite().all())
    require_experts(statistics.record, 0)
    with pytest.raises(InputError, match="of the calibration's tokens, fewer than 1000"):
        require_experts(statistics.record, 1000)


def test_too_little_for_experts_is_one_line(cache: Path, tmp_path: Path, moe: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}) + "\n")
    with pytest.raises(QuantpubError, match=r"saw 8 tokens|too short|long enough"):
        observe(open_checkpoint(str(moe)), Request(str(few), 8, 8))


def test_activations_that_overflow_are_one_line(cache: Path, ids: Path, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e30
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="activations of layer 0 are not finite"):
        observe(open_checkpoint(str(model)), Request(str(ids), 8, 64))


BAD = {
    "empty.txt": b"",
    "short.txt": b"one two",
    "binary.txt": bytes(range(256)) * 40,
    "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
    "no.parquet": b"PAR1 this is none",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line_and_leaves_nothing(name: str, cache: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / name, tmp_path / "artifact"
    path.write_bytes(BAD[name])
    ran = run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "--engine", "vllm", "-o", folder, "--calibration", path)
    assert ran.code == 3 and ran.out == ""
    assert len(ran.err.strip().splitlines()) <= 2 and name in ran.err
    assert not folder.exists() and not list(cache.rglob("layer-*"))


def test_data_that_a_recipe_has_no_use_for_is_refused(cache: Path, tmp_path: Path) -> None:
    ask = ("quantize", DEMO_MODEL, "--engine", "vllm", "-o", tmp_path / "artifact")
    ran = run_cli(*ask, "-r", "fp8-dynamic", "--calibration", DEMO_TEXT)
    assert ran.code == 2 and "no use for calibration data" in ran.err
    ran = run_cli(*ask, "-r", "w4a16", "--num-samples", "8")
    assert ran.code == 2 and "--calibration" in ran.err


def gathered(x_MK: torch.Tensor, step: int) -> Iterator[Gathered]:
    found = Gathered(x_MK.shape[1], -(-len(x_MK) // step), torch.device("cpu"), hessian=True)
    for i, part in enumerate(x_MK.split(step)):
        found.add(part, i)
    yield found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_by_hand(dtype: torch.dtype) -> None:
    x_MK = torch.randn(700, 24, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    (found,) = gathered(x_MK, 300)
    wide = x_MK.double()
    assert torch.equal(found.amax_K, x_MK.float().abs().amax(0)) and found.tokens == 700
    assert torch.allclose(found.sum_K, wide.square().sum(0), rtol=1e-6)
    assert found.sum_KK is not None
    assert torch.allclose(found.sum_KK.double(), wide.T @ wide, rtol=1e-4, atol=1e-2)
    assert torch.equal(largest(x_MK), x_MK.float().abs().amax(0))
    sample = found.sample()
    assert len(sample) == 128 and all(bool((row == x_MK).all(1).any()) for row in sample)


def test_places_are_even_and_no_row_is_taken_twice() -> None:
    for rows, count, batch in ((512, 4, 0), (512, 4, 7), (100, 99, 3), (10, 128, 1), (3, 1, 5)):
        at = spread(rows, count, batch)
        assert len(set(at.tolist())) == len(at) == min(rows, count)
        assert int(at.min()) >= 0 and int(at.max()) < rows
    assert {int(spread(512, 1, batch)[0]) // 128 for batch in range(8)} == {0, 1, 2, 3}
