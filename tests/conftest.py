"""Shared fixtures: the bundled 2M model, artifacts made from it once a session, and the command line as a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from quantpub.hub import LoopbackHub

ROOT = Path(__file__).parent.parent
DEMO_MODEL = ROOT / "demo" / "pycode-tiny-2m"
DEMO_TEXT = ROOT / "demo" / "eval.jsonl"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}


@dataclass
class Ran:
    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


def run_cli(*args: object, cwd: Path | None = None) -> Ran:
    """The command line, entered as its console script enters it, in this process: no import is paid for again."""
    from quantpub import cli

    text, talk, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(talk),
        contextlib.chdir(cwd or ROOT),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["quantpub", *map(str, args)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Ran(code, text.getvalue(), talk.getvalue())


def spawn_cli(*args: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Ran:
    """The command line in a process of its own, without a network."""
    command = [sys.executable, "-m", "quantpub.cli", *map(str, args)]
    done = subprocess.run(
        command,
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **OFFLINE, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Calibrations of these tests are kept apart from the user's, and serve the whole session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTPUB_CACHE", str(folder))
        yield folder


SMALL = {"num_samples": 8, "max_seq_len": 64}  # a calibration of the demo model that takes a moment


def make_artifact(
    model: Path | str, recipe: str, out: Path, layout: str | None = None, calibration: Path | None = None
) -> Path:
    """An artifact; calibrated with DEMO_TEXT where its recipe needs data, with `calibration` where that is given."""
    from quantpub.calibrating import Asked, calibrate
    from quantpub.checkpoint import open_checkpoint
    from quantpub.plan import make_plan
    from quantpub.quantize import quantize
    from quantpub.recipe import load_recipe

    chosen = load_recipe(recipe)
    names = [layout] if layout else chosen.layouts([], [])
    plans = [make_plan(open_checkpoint(str(model)), chosen, name) for name in names]
    asked = Asked(str(calibration or DEMO_TEXT), **SMALL) if calibration or plans[0].calibrates else Asked()
    found = calibrate(plans, asked)
    quantize(found.plans, out, statistics=found.statistics, solved=found.solved)
    return out


@pytest.fixture(scope="session", params=["w4a16", "w4a16-rtn", "fp8-dynamic"])
def any_artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the demo model by each recipe. Read only."""
    return make_artifact(DEMO_MODEL, request.param, tmp_path_factory.mktemp("artifact") / request.param)


def needed(algorithm: Any, scheme: Any, w_NK: Any, stats: Any = None) -> Any:
    """`stats` with what the algorithm or the scheme cannot do without: a Hessian, the largest input."""
    import dataclasses

    import torch

    from quantpub.stats import Stats

    if "hessian" in algorithm.needs:
        stats = dataclasses.replace(stats or Stats(), hessian_KK=torch.eye(w_NK.shape[1]))
    if scheme.act is not None and (scheme.act.global_scale or not scheme.act.dynamic):
        stats = dataclasses.replace(stats or Stats(), input_amax=4.0)
    return stats


@pytest.fixture
def artifact(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A w4a16 artifact of the demo model that the test may damage."""
    cache = tmp_path_factory.getbasetemp() / "w4a16-master"
    if not cache.exists():
        make_artifact(DEMO_MODEL, "w4a16", cache)
    return Path(shutil.copytree(cache, tmp_path / "artifact"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model that the test may damage."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save_llama(folder: Path, shards: int = 3, seed: int = 0) -> Path:
    """A random Llama-shaped checkpoint of several shards, written with the safetensors package."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    shapes = {"model.embed_tokens.weight": (512, 128), "model.norm.weight": (128,)}
    for i in range(shards):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (128,), at + "post_attention_layernorm.weight": (128,)}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (64 if p in "kv" else 128, 128) for p in "qkvo"}
        shapes |= {at + "mlp.gate_proj.weight": (384, 128), at + "mlp.up_proj.weight": (384, 128)}
        shapes |= {at + "mlp.down_proj.weight": (128, 384)}
    files: dict[str, dict[str, Any]] = {}
    for place, (name, shape) in enumerate(sorted(shapes.items())):
        shard = f"model-{place * shards // len(shapes) + 1:05d}-of-{shards:05d}.safetensors"
        files.setdefault(shard, {})[name] = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    folder.mkdir(parents=True)
    for shard, tensors in files.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": shards, "vocab_size": 512}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "LICENSE").write_text("a licence\n")
    return folder


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which bytes are written is looked at here, not whether a disk has them."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A w4a16 artifact of three shards. Read only."""
    folder = tmp_path_factory.mktemp("sharded")
    return make_artifact(save_llama(folder / "model"), "w4a16-rtn", folder / "artifact")


def use_hub(hub: LoopbackHub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the client of this process, which reads its environment once, speak to that Hub."""
    constants = "huggingface_hub.constants."
    patch.setattr(constants + "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants + "HF_HUB_CACHE", str(cache))
    for name, value in {"DISABLE_XET": True, "DISABLE_TELEMETRY": True, "OFFLINE": False}.items():
        patch.setattr(constants + "HF_HUB_" + name, value)
    patch.setenv("HF_TOKEN", hub.token)
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
