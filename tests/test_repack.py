"""Repacking bit for bit: from every layout to every other that holds the scheme, and back."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, ROOT, make_artifact, run_cli, tree
from repacks import again, made, moe, same_weights, sharded, weight_files, wide

from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS
from quantpub.pairs import CONVERSIONS, HOLDS, clause, conversions_table, converted, lossless, table
from quantpub.registry import load
from quantpub.scheme import PRESETS, SUMMARIES

pytestmark = pytest.mark.usefixtures("unsynced")

BIG = 1024 * 128  # columns that every group size divides
CALIBRATED = ("FP8", "NVFP4")
GROUPS = {"W4A16": (-1, 32, 64, 128), "W4A16_ASYM": (-1, 32, 64, 128), "W8A16": (-1, 32, 128)}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("wide") / "model")


def holders(scheme: str, group_size: int | None = None) -> list[str]:
    """The layouts that hold a scheme in groups of that size."""
    from quantpub.scheme import preset

    names = [name for name, schemes in HOLDS.items() if scheme in schemes]
    asked = preset(scheme, group_size)
    return [name for name in names if not load(LAYOUTS, "layout", name).reject(asked, 1024, BIG, "BF16")]


def test_holds_is_what_the_layouts_themselves_say() -> None:
    found = {
        name: {
            s for s, scheme in PRESETS.items() if not load(LAYOUTS, "layout", name).reject(scheme, 1024, BIG, "BF16")
        }
        for name in LAYOUTS
    }
    assert {name: set(schemes) for name, schemes in HOLDS.items()} == found
    assert list(HOLDS) == [name for name in LAYOUTS if name in HOLDS]


def test_conversions_begin_and_end_at_schemes_that_a_layout_holds() -> None:
    held = {scheme for schemes in HOLDS.values() for scheme in schemes}
    assert {c.source for c in CONVERSIONS} | {c.target for c in CONVERSIONS} <= held
    assert all(c.exact for c in CONVERSIONS if c.partial)
    assert not any(c.exact for c in CONVERSIONS if c.dtype)


def test_pairs_go_both_ways() -> None:
    for layout in HOLDS:
        for other, schemes in lossless(layout).items():
            assert set(lossless(other)[layout]) == set(schemes)
            assert all(each.source not in schemes for each in converted(layout).get(other, ()))


def test_the_list_of_layouts_says_where_each_can_go() -> None:
    found = run_cli("list", "layouts", "--json").json()
    listed = found.get("layouts", found)
    assert all(listed[name].endswith(clause(name)) for name in LAYOUTS)
    assert all("repacked" not in listed[name] for name in KERNEL_LAYOUTS)
    assert listed["torchao-nvfp4"].endswith("; repacked bit for bit as ct-nvfp4 (NVFP4A16), modelopt-nvfp4 (NVFP4A16)")
    assert listed["bnb-int8"].endswith("with a loss as ct-pack (LLM_INT8), gptq (LLM_INT8), gptq-v2 (LLM_INT8)")
    assert listed["gptq-v2"].endswith(
        "with a loss as torchao-tile (W4A16_ASYM); bit for bit or not at all as gptq (W4A16_ASYM)"
    )
    assert listed["ct-int"].endswith("repacked as nothing else")


def test_the_documented_pairs_are_those_of_the_data() -> None:
    text = (ROOT / "docs/repack.md").read_text()
    assert table() in text and conversions_table() in text


def test_the_list_of_layouts_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from quantpub.listing import LISTS; LISTS['layouts'](); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def as_when_quantized(folder: Path, layout: str, out: Path, whole: dict[str, Path]) -> Path:
    """Repacked; the very files that quantizing into that layout wrote, so that the next can begin from either."""
    proof = again(folder, layout, out)
    assert proof["equal"] == proof["modules"] > 0 and not proof["rounded"] and not proof["conversions"]
    assert weight_files(out) == weight_files(whole[layout]), out.name
    return out


def around(
    model: Path, scheme: str, names: list[str], work: Path, group_size: int | None = None, all_pairs: bool = True
) -> None:
    """Artifacts of every layout hold the same weights, and each becomes the other: there, and back from what was repacked.

    all_pairs: else each becomes the next one's, once around.
    """
    whole = {name: made(model, scheme, name, work / name, group_size) for name in names}
    assert all(same_weights(whole[name], whole[names[0]]) for name in names[1:])
    if not all_pairs:
        folder = whole[names[0]]
        for name in [*names[1:], names[0]]:
            folder = as_when_quantized(folder, name, work / f"to-{name}", whole)
        return
    for a, b in combinations(names, 2):
        there = as_when_quantized(whole[a], b, work / f"{a}-{b}", whole)
        as_when_quantized(there, a, work / f"{a}-{b}-{a}", whole)


DATA_FREE = [
    (scheme, group_size)
    for scheme in SUMMARIES
    if scheme not in CALIBRATED
    for group_size in GROUPS.get(scheme, (None,))
    if len(holders(scheme, group_size)) > 1
]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "group_size"), DATA_FREE)
def test_there_and_back_is_byte_for_byte(wide_model: Path, tmp_path: Path, scheme: str, group_size: int | None) -> None:
    names = holders(scheme, group_size)
    around(wide_model, scheme, names, tmp_path / "work", group_size, all_pairs=group_size in (None, 128))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", CALIBRATED)
def test_there_and_back_with_calibrated_scales(tmp_path: Path, scheme: str) -> None:
    around(DEMO_MODEL, scheme, holders(scheme), tmp_path / "work")


def test_every_scheme_of_several_layouts_is_tried() -> None:
    several = {scheme for scheme in SUMMARIES if len(holders(scheme)) > 1}
    assert several == {scheme for scheme, _ in DATA_FREE} | set(CALIBRATED)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "NVFP4A16"])
def test_there_and_back_with_experts(tmp_path: Path, scheme: str) -> None:
    names = [name for name in holders(scheme) if not name.startswith("torchao")][:3]
    around(moe(tmp_path / "model"), scheme, names, tmp_path / "work", all_pairs=False)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W4A16"])
def test_there_and_back_with_several_shards(tmp_path: Path, scheme: str) -> None:
    around(sharded(tmp_path / "model"), scheme, holders(scheme), tmp_path / "work", all_pairs=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layout", "other"),
    [
        ("fp8-static-kv", "ct-float", "modelopt-fp8"),
        ("fp8-dynamic-kv", "ct-float", "modelopt-fp8-channel"),
        ("nvfp4-kv", "ct-nvfp4", "modelopt-nvfp4"),
    ],
)
def test_scales_of_the_kv_cache_take_the_names_of_the_other_layout(
    tmp_path: Path, recipe: str, layout: str, other: str
) -> None:
    from safetensors.torch import load_file

    one = make_artifact(DEMO_MODEL, recipe, tmp_path / "one", layout)
    again(one, other, tmp_path / "two")
    again(tmp_path / "two", layout, tmp_path / "back")
    assert weight_files(tmp_path / "back") == weight_files(one)
    ct, modelopt = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    for i in range(4):
        for letter in "kv":
            name = f"model.layers.{i}.self_attn"
            scale = modelopt[f"{name}.{letter}_proj.{letter}_scale"]
            assert scale.shape == () and scale == ct[f"{name}.{letter}_scale"][0]


def test_two_runs_give_the_same_bytes_without_path_or_time(tmp_path: Path, artifact: Path) -> None:
    again(artifact, "gptq", tmp_path / "x" / "one")
    again(artifact, "gptq", tmp_path / "y" / "two")
    one, two = tree(tmp_path / "x" / "one"), tree(tmp_path / "y" / "two")
    assert one == two
    run = json.loads(one[".quantpub/run.json"])
    assert str(tmp_path) not in json.dumps(run)
    assert run["source"]["name"] == DEMO_MODEL.name
    assert run["stages"]["repack"]["from"]["name"] == artifact.name
    assert len(one[".quantpub/repack.jsonl"].splitlines()) == 1


def test_the_shards_of_the_base_are_remembered(tmp_path: Path, artifact: Path) -> None:
    from quantpub.files import sha256_file

    again(artifact, "gptq", tmp_path / "one")
    again(tmp_path / "one", "awq", tmp_path / "two")
    due = {"model.safetensors": sha256_file(DEMO_MODEL / "model.safetensors")}
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / ".quantpub/run.json").read_text())["source"]["weights"] == due
