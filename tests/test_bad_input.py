"""Every bad input: one line that says what, where and what to do, its exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, run_cli, save_llama
from safetensors.torch import load_file, save_file

from quantpub.checkpoint import open_checkpoint
from quantpub.errors import InputError, QuantpubError, UnavailableError


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def poke(tensors: dict[str, torch.Tensor], name: str, value: float) -> None:
    tensors[name].view(-1)[7] = value


V_PROJ, NORM = "model.layers.2.self_attn.v_proj.weight", "model.norm.weight"
CASES: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "missing config": (lambda m: (m / "config.json").unlink(), 3, ["no config.json"]),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), 3, ["config.json", "not valid JSON"]),
    "truncated shard": (
        lambda m: os.truncate(m / "model.safetensors", 100_000),
        3,
        ["model.safetensors", "truncated", "100000 bytes"],
    ),
    "NaN weight": (lambda m: rewrite(m, lambda t: poke(t, V_PROJ, float("nan"))), 3, [V_PROJ, "NaN or infinite"]),
    "infinite weight": (lambda m: rewrite(m, lambda t: poke(t, V_PROJ, float("-inf"))), 3, [V_PROJ, "NaN or infinite"]),
    "NaN in a copied tensor": (
        lambda m: rewrite(m, lambda t: poke(t, NORM, float("nan"))),
        3,
        [NORM, "NaN or infinite"],
    ),
    "a shape the layout refuses": (
        lambda m: rewrite(m, lambda t: t.update({V_PROJ: torch.zeros(64, 100).bfloat16()})),
        3,
        [V_PROJ, "100", "multiple"],
    ),
    "already quantized": (
        lambda m: edit_config(m, quantization_config={"quant_method": "awq"}),
        3,
        ["quantized already (awq)", "full-precision"],
    ),
    "quantized by another tool's file": (
        lambda m: (m / "hf_quant_config.json").write_text("{}"),
        3,
        ["quantized already"],
    ),
    "unknown architecture": (
        lambda m: edit_config(m, model_type="lama"),
        3,
        ["unknown architecture 'lama'", "did you mean llama"],
    ),
    "remote code": (lambda m: edit_config(m, auto_map={"AutoModel": "m.M"}), 3, ["remote code"]),
    "pickle only": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        3,
        ["pickles (pytorch_model.bin)", "convert it to safetensors"],
    ),
    "no weights at all": (lambda m: (m / "model.safetensors").unlink(), 3, ["neither model.safetensors"]),
    "an index naming a missing file": (
        lambda m: (m / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00009.safetensors"}})
        ),
        3,
        ["index.json", "model-00009.safetensors, which does not exist"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_one_line(case: str, model: Path, tmp_path: Path) -> None:
    damage, code, words = CASES[case]
    damage(model)
    ran = run_cli("quantize", model, "-r", "w4a16", "-o", tmp_path / "out")
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.count("\n") == 1, ran.err
    for word in words:
        assert word in ran.err
    assert not (tmp_path / "out").exists()


USAGE = [
    (["quantize", DEMO_MODEL, "-r", "w4a61", "-o", "x"], 2, "did you mean w4a16"),
    (["quantize", "no/such/folder", "-r", "w4a16", "-o", "x"], 3, "no such folder"),
    (["quantize", DEMO_MODEL, "-r", "w4a16", "--engine", "vlm", "-o", "x"], 2, "did you mean vllm"),
    (["quantize", DEMO_MODEL, "-r", "w4a16", "--layout", "ct-pak", "-o", "x"], 2, "did you mean ct-pack"),
    (["quantize", DEMO_MODEL, "-r", "w4a16", "--layout", "ct-float", "-o", "x"], 3, "ct-float holds FP8"),
    (["quantize", DEMO_MODEL, "-r", "w4a16", "--device", "tpu", "-o", "x"], 2, "use cpu or cuda"),
    (["quantize", DEMO_MODEL, "-r", "w4a16", "--revision", "main", "-o", "x"], 3, "--revision goes with a Hub id"),
    (["verify", "nowhere"], 3, "no such folder"),
    (["verify", DEMO_MODEL], 3, "the checkpoint is not quantized"),
    (["list", "recipe"], 2, "did you mean recipes"),
    (["profile", DEMO_MODEL, "--m", "1"], 3, "not a quantpub artifact"),
    (["profile", DEMO_MODEL, "--m", "1,x"], 2, "write it like --m 1,16,256"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "words"), USAGE, ids=[" ".join(map(str, u[0][:1] + u[0][2:])) for u in USAGE]
)
def test_a_wrong_command_is_one_line(arguments: list[object], code: int, words: str, tmp_path: Path) -> None:
    ran = run_cli(*arguments, cwd=tmp_path)
    assert (ran.code, ran.err.count("\n")) == (code, 1), ran.err
    assert words in ran.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    ran = run_cli("quantize", DEMO_MODEL, "--recpie", "w4a16", "-o", "x", cwd=tmp_path)
    assert ran.code == 2
    assert "--recpie" in ran.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("scheme: [", "not valid YAML"),
        ("- a\n- b\n", "mapping of keys"),
        ("description: x\nscheme: W4A16\nalgorithm: {name: rtn}\nengines: {vllm: ct-pack}\nshceme: W4A16\n", "shceme"),
        ("description: x\nscheme: W4A61\nalgorithm: {name: rtn}\nengines: {vllm: ct-pack}\n", "did you mean W4A16"),
        ("description: x\nscheme: W4A16\nalgorithm: {name: rtm}\nengines: {vllm: ct-pack}\n", "did you mean rtn"),
        (
            "description: x\nscheme: W4A16\nalgorithm: {name: search, gird: 3}\nengines: {vllm: ct-pack}\n",
            "did you mean grid",
        ),
        (
            "description: x\nscheme: FP8_DYNAMIC\nalgorithm: {name: rtn}\nengines: {vllm: ct-float}\n",
            "rtn makes integer codes",
        ),
        (
            "description: x\nscheme: W4A16\nalgorithm: {name: rtn}\nengines: {tensorrt-llm: ct-pack}\n",
            "tensorrt-llm does not load ct-pack",
        ),
    ],
)
def test_a_bad_recipe_is_one_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    ran = run_cli("quantize", DEMO_MODEL, "-r", tmp_path / "mine.yaml", "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert words in ran.err and "mine" in ran.err
    assert not (tmp_path / "out").exists()


def test_an_error_is_also_one_json_object(tmp_path: Path) -> None:
    ran = run_cli("quantize", "no/such/folder", "-r", "w4a16", "-o", tmp_path / "out", "--json")
    assert ran.code == 3
    assert ran.json() == {
        "ok": False,
        "error": {
            "code": "input",
            "exit": 3,
            "what": "no such folder",
            "where": "no/such/folder",
            "next": "name a checkpoint's folder, or a Hub id like owner/name",
        },
    }


def test_the_middle_of_a_run_leaves_nothing_of_a_bad_input(tmp_path: Path) -> None:
    """The NaN lies in the last shard: two shards were written by then, and are taken back."""
    folder = save_llama(tmp_path / "m")
    last = folder / "model-00003-of-00003.safetensors"
    tensors = load_file(last)
    poke(tensors, next(iter(tensors)), float("nan"))
    save_file(tensors, last, metadata={"format": "pt"})
    ran = run_cli("quantize", folder, "-r", "w4a16", "-o", tmp_path / "out")
    assert ran.code == 3
    assert not (tmp_path / "out").exists()


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "m")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.norm\.weight lies in model-00003"):
        open_checkpoint(str(folder))
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="the index says nothing of it"):
        open_checkpoint(str(folder))


def test_an_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "-o", tmp_path / "file" / "out")
    assert (ran.code, ran.err.count("\n")) == (6, 1), ran.err
    assert "not a directory" in ran.err and "-o" in ran.err
    taken = run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "-o", tmp_path / "file")
    assert (taken.code, taken.err.count("\n")) == (5, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """A tmpfs of 1 MB: the plan's exact size is compared with the room before any work; nothing stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("this kernel does not let us mount")
    try:
        ran = run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "-o", disk / "out")
        assert (ran.code, ran.err.count("\n")) == (6, 1), ran.err
        assert "MB free" in ran.err and "run again" in ran.err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    from conftest import make_artifact

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(QuantpubError, match="MB free"):
        make_artifact(DEMO_MODEL, "w4a16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_disk_errors_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    from quantpub.files import disk_error

    assert "free some space" in str(disk_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path))
    assert "-o" in str(disk_error(OSError(errno.EROFS, "Read-only file system"), tmp_path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_stage_without_shards_or_output_folder_is_not_told_of_them(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantpub.files import atomic_write

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UnavailableError, match=r"run the same command again$") as caught:
        atomic_write(tmp_path / "profile.json", b"{}")
    assert "shards" not in str(caught.value.next) and "-o" not in str(caught.value.next)
    assert not list(tmp_path.iterdir())
