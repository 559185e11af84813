"""What a hostile but realistic user does: a source that changes, a folder that was touched, signals, odd streams."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, ROOT, make_artifact, run_cli, save_llama, spawn_cli, tree
from safetensors.torch import load_file, save_file

from quantpub.artifact import Artifact
from quantpub.errors import ConflictError, InputError, UnavailableError
from quantpub.publish.refuse import refusals
from quantpub.quantize import Destination
from quantpub.stages import background, concurrently
from quantpub.verify.run import verify

SHARD = "model.safetensors"


def poke_between_samples(path: Path) -> None:
    """Change bytes that no sampled block covers, as a light edit of one layer would."""
    raw = bytearray(path.read_bytes())
    place = len(raw) // 2 + 70_000  # between the 16 sampled blocks of a file of several MB
    raw[place] ^= 0x01
    path.write_bytes(raw)


def big_model(folder: Path) -> Path:
    """One shard large enough that samples do not cover it."""
    shutil.copytree(DEMO_MODEL, folder)
    tensors = load_file(folder / SHARD)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].repeat(8, 1)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    return folder


def test_a_light_edit_of_the_source_is_noticed_by_a_finished_artifact(tmp_path: Path) -> None:
    model = big_model(tmp_path / "m")
    out = make_artifact(model, "w4a16", tmp_path / "out")
    poke_between_samples(model / SHARD)
    with pytest.raises(ConflictError, match="source it was made from is not the same"):
        make_artifact(model, "w4a16", out)


def test_a_light_edit_of_the_source_is_never_mixed_in(tmp_path: Path) -> None:
    """Interrupted, edited, resumed: the shard of the old weights is made again."""
    model = big_model(tmp_path / "m")
    part = make_artifact(model, "w4a16", tmp_path / "out")
    (part / ".quantpub/SHA256SUMS").unlink()
    poke_between_samples(model / SHARD)
    make_artifact(model, "w4a16", part)
    assert tree(part) == tree(make_artifact(model, "w4a16", tmp_path / "fresh"))


def test_a_source_replaced_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_llama(tmp_path / "m")
    real, calls = Destination.commit, 0

    def commit_then_replace(self: Destination, shard: str, source_sha256: str) -> None:
        nonlocal calls
        calls += 1
        real(self, shard, source_sha256)
        if calls == 1:
            shutil.rmtree(model)
            save_llama(model, seed=7)

    monkeypatch.setattr(Destination, "commit", commit_then_replace)
    with pytest.raises(UnavailableError, match="changed"):
        make_artifact(model, "w4a16", tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    "touch",
    [
        lambda a: (a / "config.json").unlink(),
        lambda a: (a / "tokenizer.json").unlink(),
        lambda a: (a / "config.json").write_text("{}"),
        lambda a: (a / SHARD).unlink(),
    ],
)
def test_a_finished_artifact_that_was_touched_is_not_called_finished(
    artifact: Path, touch: Callable[[Path], object]
) -> None:
    touch(artifact)
    with pytest.raises(ConflictError, match="missing or no longer"):
        make_artifact(DEMO_MODEL, "w4a16", artifact)


def test_the_demo_deletes_nobodys_artifact(artifact: Path) -> None:
    before = tree(artifact)
    assert run_cli("demo", "-o", artifact, "--recipe", "nonsuch").code == 2
    assert run_cli("demo", "-o", artifact).code == 5
    assert tree(artifact) == before


def test_bad_input_into_an_existing_folder_is_taken_back(tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").mkdir()
    good = (model / SHARD).read_bytes()
    tensors = load_file(model / SHARD)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        make_artifact(model, "w4a16", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(InputError, match="NaN"):
        make_artifact(model, "w4a16", tmp_path / "a/b/c")
    assert not (tmp_path / "a").exists()
    (model / SHARD).write_bytes(good)
    make_artifact(model, "w4a16", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[]"),
        ("run.json", "{}"),
        ("run.json", "{"),
        ("run.json", '{"stages": {"quantize": {}}}'),
        ("journal.jsonl", "x\n"),
        ("journal.jsonl", "{}\n"),
        ("plan.jsonl", '{"as": "x"}\n'),
        ("plan.jsonl", "x\n"),
    ],
)
def test_a_damaged_state_is_one_line(artifact: Path, name: str, content: str) -> None:
    (artifact / ".quantpub" / name).write_text(content)
    for command in (
        ["verify", artifact, "--source", DEMO_MODEL],
        ["quantize", DEMO_MODEL, "-r", "w4a16", "-o", artifact],
    ):
        ran = run_cli(*command)
        assert ran.code in (3, 5) and ran.err.count("\n") == 1, (command[0], ran)


def test_overlapping_tensors_are_refused(model: Path) -> None:
    raw = (model / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    a, b = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    header[a]["data_offsets"] = header[b]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    (model / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    ran = run_cli("plan", model, "-r", "w4a16")
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "overlaps" in ran.err or "promises" in ran.err


def test_empty_tensors_are_copied_or_refused(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / SHARD)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(0, dtype=torch.bfloat16)
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    make_artifact(model, "w4a16", tmp_path / "out")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(0, 128, dtype=torch.bfloat16)
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    with pytest.raises(InputError, match="is empty"):
        make_artifact(model, "w4a16", tmp_path / "other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_reports_a_scale_that_is_not_finite(artifact: Path, value: float) -> None:
    tensors = load_file(artifact / SHARD)
    tensors["model.layers.1.mlp.down_proj.weight_scale"][0, 0] = value
    save_file(tensors, artifact / SHARD, metadata={"format": "pt"})
    evidence = verify(Artifact.open(artifact), str(DEMO_MODEL))
    assert {check["id"] for check in evidence["checks"] if check["status"] == "failed"} == {"files", "scales"}


def test_one_huge_weight_does_not_hide_a_lost_tensor(tmp_path: Path, model: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(model / SHARD)
    tensors[f"{name}.weight"][0, 0] = 1000.0
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    out = make_artifact(model, "w4a16", tmp_path / "out")
    assert verify(Artifact.open(out), str(model))["verdict"] == "passed"
    packed = load_file(out / SHARD)
    packed[f"{name}.weight_packed"][1:] = -0x77777778  # every other row is zero now
    save_file(packed, out / SHARD, metadata={"format": "pt"})
    failed = [check["id"] for check in verify(Artifact.open(out), str(model))["checks"] if check["status"] == "failed"]
    assert "values" in failed


@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_verify_measures_weights_of_any_size(tmp_path: Path, model: Path, scale: float) -> None:
    tensors = {
        name: (t.float() * scale).bfloat16() if "proj" in name else t for name, t in load_file(model / SHARD).items()
    }
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    evidence = verify(Artifact.open(make_artifact(model, "w4a16", tmp_path / "out")), str(model))
    assert evidence["verdict"] == "passed"
    assert 15 < evidence["tensors"]["sqnr_db"]["min"] < 30


def test_verify_refuses_a_source_of_other_shapes_or_kind(artifact: Path, model: Path) -> None:
    tensors = {name: torch.zeros(2, 2) if "up_proj" in name else t for name, t in load_file(model / SHARD).items()}
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    with pytest.raises(InputError, match="another shape"):
        verify(Artifact.open(artifact), str(model))
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="another model"):
        verify(Artifact.open(artifact), str(model))


def test_verify_compares_the_rest_of_the_config_and_wants_an_index(artifact: Path, tmp_path: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    found = {check["id"]: check for check in verify(Artifact.open(artifact), str(DEMO_MODEL))["checks"]}
    assert "num_hidden_layers is not the source's" in found["config"]["detail"]
    model = save_llama(tmp_path / "m")
    out = make_artifact(model, "w4a16", tmp_path / "out")
    (out / "model.safetensors.index.json").unlink()
    assert {c["id"]: c["status"] for c in verify(Artifact.open(out))["checks"]}["index"] == "failed"


GOOD = "description: x\nscheme: W4A16\nalgorithm: {name: search}\nengines: {vllm: ct-pack}\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ignore: ['re:(lm_head']\n", "not a valid pattern"),
        ("group_size: 0\n", "group_size"),
        ("algorithm: {name: search, grid: x}\n", "grid"),
        ("algorithm: {name: search, grid: 0}\n", "grid is at least 1"),
        ("engines: {}\n", "engines"),
    ],
)
def test_a_recipe_out_of_range_is_one_line(tmp_path: Path, change: str, words: str) -> None:
    lines = {line.partition(":")[0]: line for line in (GOOD + change).splitlines()}
    (tmp_path / "r.yaml").write_text("\n".join(lines.values()) + "\n")
    ran = run_cli("plan", DEMO_MODEL, "-r", tmp_path / "r.yaml")
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert words in ran.err


def test_a_broken_recipe_does_not_break_the_list_and_latin1_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/broken.yaml").write_text("- a")
    (tmp_path / "recipes/latin.yaml").write_bytes("description: é".encode("latin-1"))
    listed = run_cli("list", "recipes", cwd=tmp_path)
    assert listed.code == 0 and "not valid" in listed.out and "w4a16" in listed.out
    assert run_cli("plan", DEMO_MODEL, "-r", "latin", cwd=tmp_path).code == 3


def test_an_ignore_entry_that_matches_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD + "ignore: [lm_head, 're:.*dwn_proj']\n")
    assert "re:.*dwn_proj matches nothing" in run_cli("plan", DEMO_MODEL, "-r", tmp_path / "r.yaml").out


def test_a_failed_gate_is_not_ok_in_json(model: Path) -> None:
    tensors = load_file(model / SHARD)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(128, 200, dtype=torch.bfloat16)
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    ran = run_cli("plan", model, "-r", "w4a16", "--json")
    assert ran.code == 3 and ran.json()["ok"] is False


def test_usage_errors_are_one_line_and_one_object() -> None:
    ran = run_cli("quantize", DEMO_MODEL, "--json")
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert "--recipe" in ran.err and "Usage" not in ran.err
    assert run_cli("nonsuch").code == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c_is_130_one_line_and_resumable(tmp_path: Path, flags: list[str]) -> None:
    model, out = save_llama(tmp_path / "m", shards=12), tmp_path / "out"
    command = [sys.executable, "-m", "quantpub.cli", "quantize", str(model), "-r", "w4a16", "-o", str(out), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    while not list(out.glob("*.safetensors")) and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    talk = child.communicate(timeout=30)
    assert child.returncode == 130, talk
    assert talk[1].count("\n") == 1 and "resumes" in talk[1]
    assert not flags or json.loads(talk[0])["error"]["exit"] == 130
    assert not list(out.rglob(".tmp-*"))
    make_artifact(model, "w4a16", out)
    assert tree(out) == tree(make_artifact(model, "w4a16", tmp_path / "fresh"))


@pytest.mark.slow
def test_odd_streams_and_locales() -> None:
    latin = spawn_cli(
        "plan", DEMO_MODEL, "-r", "w4a16", env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    )
    assert latin.code == 0, latin.err
    script = f"{sys.executable} -m quantpub.cli list recipes"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for redirect, code, lines in ((">&-", 0, 0), (">/dev/full", 6, 1)):
        done = subprocess.run(f"{script} {redirect}", shell=True, capture_output=True, text=True, env=env, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (code, lines), (redirect, done)


def test_stages_end_in_order_and_pass_errors_on() -> None:
    ended: list[str] = []

    def source() -> object:
        try:
            for i in range(1000):
                yield i
                time.sleep(0.001)
        finally:
            ended.append("source")

    def middle(items: object) -> object:
        try:
            yield from concurrently(items, lambda i: i * 2, 2)  # type: ignore[arg-type]
        finally:
            ended.append("middle")

    chain = background(middle(background(source(), lambda _: 1, 4)), lambda _: 1, 4)  # type: ignore[arg-type]
    assert [next(chain) for _ in range(5)] == [0, 2, 4, 6, 8]
    chain.close()
    assert ended == ["middle", "source"] or ended == ["source", "middle"]

    def failing() -> object:
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(background(failing(), lambda _: 1, 4))  # type: ignore[arg-type]


@pytest.mark.slow
def test_evidence_of_other_weights_is_on_no_card_and_is_not_published(tmp_path: Path) -> None:
    """A profile copied over from another artifact says whose weights it timed."""
    one, two = (make_artifact(DEMO_MODEL, recipe, tmp_path / recipe) for recipe in ("fp8-dynamic", "w4a16-rtn"))
    assert run_cli("profile", one, "--m", "1", "--budget-seconds", "0.2").code == 0
    found = json.loads((one / ".quantpub" / "profile.json").read_text())
    Artifact.open(two).write_evidence("profile.json", found)
    done = run_cli("card", two)
    assert done.code == 3 and "profile.json was measured on other weights" in done.err
    assert "profile.json was measured on other weights" in " ".join(refusals(Artifact.open(two)))
    assert run_cli("card", one).code == 0


@pytest.mark.parametrize(
    ("gate", "word"),
    [
        ("{min_speedup: 1.2}", "needs a workload"),
        ("{workload: serbing, min_speedup: 1.2}", "unknown workload 'serbing'"),
        ("{workload: serving, min_speedup: .nan}", "min_speedup"),
        ("{workload: serving, min_speedup: -1}", "min_speedup"),
        ("{max_kl: 0}", "max_kl"),
    ],
)
def test_a_gate_that_cannot_be_answered_is_said_when_the_recipe_is_read(tmp_path: Path, gate: str, word: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"{{description: d, scheme: W4A16, algorithm: {{name: rtn}}, engines: {{vllm: ct-pack}}, gate: {gate}}}"
    )
    done = run_cli("plan", DEMO_MODEL, "-r", recipe)
    assert done.code == 3 and word in done.err and done.err.strip().count("\n") == 0
