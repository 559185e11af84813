"""Hygiene: secrets by their issuers' forms, local paths, file names, remote code; no false alarm on what is ordinary."""

from __future__ import annotations

import hashlib
import json
import random
import string
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL
from hypothesis import given
from hypothesis import strategies as st

from quantpub.artifact import META
from quantpub.hygiene import SECRETS, bad_name, is_searched, remote_code, secrets_in
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.registry import load
from quantpub.scheme import PRESETS

WORD = string.ascii_letters + string.digits


def made(length: int, alphabet: str = WORD) -> str:
    """Random, so that no file of this repository holds a key in its issuer's form."""
    return "".join(random.Random(length).choices(alphabet, k=length))


ROOT = "/"  # put before a path here, so that no file of this project holds one of a machine
HEX = hashlib.sha1(b"key").hexdigest()
PLANTED = {
    "a Hugging Face token": ["hf_" + made(34), "HF_TOKEN=hf_" + made(37)],
    "an AWS access key": ["AKIA" + made(16, string.ascii_uppercase + string.digits)],
    "an AWS secret key": ["aws_secret_access_key = " + made(40), 'AWS_SECRET_ACCESS_KEY": "' + made(40) + '"'],
    "an OpenAI key": [f"sk-{made(20)}T3BlbkFJ{made(20)}", f"sk-proj-{made(74)}T3BlbkFJ{made(74)}"],
    "an Anthropic key": [f"sk-ant-api03-{made(93)}AA"],
    "a GitHub token": ["ghp_" + made(36), f"https://x:gho_{made(36)}@host", f"github_pat_{made(22)}_{made(59)}"],
    "a GitLab token": ["glpat-" + made(20)],
    "a Slack token": [f"xoxb-{made(12, string.digits)}-{made(24)}"],
    "a Google key": ["AIza" + made(35), f"?key=AIza{made(35)}&x"],
    "an NVIDIA key": ["nvapi-" + made(64)],
    "a Weights & Biases key": [f"WANDB_API_KEY={HEX}", f'"wandb_api_key": "{HEX}"', f"wandb-key: {HEX}"],
    "a private key": ["-----BEGIN PRIVATE KEY-----", "-----BEGIN OPENSSH PRIVATE KEY-----"],
    "a local path": [
        *(f"{ROOT}home/me/model", f'"{ROOT}tmp/x"', f"file at {ROOT}root/.cache/x", f"{ROOT}Users/me/x"),
        f"C:{chr(92)}Users{chr(92)}me",
    ],
}


@pytest.mark.parametrize("kind", sorted(SECRETS))
def test_every_kind_is_found_once_on_its_line(kind: str) -> None:
    for text in PLANTED[kind]:
        assert secrets_in(text) == [(1, kind)]
        assert secrets_in(f'{{\n  "a": 1,\n  "note": {json.dumps(text)}\n}}\n')[0] == (3, kind)
        assert text not in str(secrets_in(text)), "the finding is not repeated"


ORDINARY = [
    f'"_commit_hash": "{HEX}", "sha256": "{hashlib.sha256(b"x").hexdigest()}"',
    f"wandb run {HEX}",  # forty hexadecimal digits that nothing calls a key
    "hf_hub_download, hf_transfer, hf_quant_config.json, hf_xxx",
    "sk-learn, sk-100, task-specific-model-name-with-many-words, risk-adjusted-return-on-capital",
    "github_pat_ and ghp_ are prefixes; AKIA and AIza and xoxb- are others; nvapi- and glpat- too",
    "https://huggingface.co/org/model/tree/main/home/x and https://host/tmp/x",
    f"~/.cache/home/x, .{ROOT}tmp/x, model{ROOT}root/x, a{ROOT}Users/b",
    "-----BEGIN PUBLIC KEY----- -----BEGIN CERTIFICATE-----",
    "AIzawl, xoxo-123, ASIAN MARKETS AKIA1234",
    "aws_secret_access_key is not stored; wandb_api_key is read from the environment",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_hold_no_secret(text: str) -> None:
    assert secrets_in(text) == []


def test_configs_of_ours_and_of_other_tools_hold_none() -> None:
    peers = (Path(__file__).parent / "golden" / "peer_configs.json").read_text()
    assert secrets_in(peers) == []
    for name in LAYOUTS:
        layout: Layout = load(LAYOUTS, "layout", name)
        for scheme in PRESETS.values():
            if not layout.reject(scheme, 1024, 1024, "BF16"):
                assert secrets_in(json.dumps(layout.config(scheme, ["lm_head"]), indent=1)) == []


def test_a_vocabulary_is_not_searched_and_this_one_holds_none() -> None:
    text = (DEMO_MODEL / "tokenizer.json").read_text()
    assert not is_searched("tokenizer.json") and not is_searched("vocab.json")
    assert [found for found in secrets_in(text) if found[1] != "a local path"] == []


@given(st.text(alphabet=WORD + "_-. /\"':=", max_size=400))
def test_random_text_holds_none_but_paths(text: str) -> None:
    assert all(kind == "a local path" for _, kind in secrets_in(text))


def test_a_long_line_of_prefixes_takes_no_time() -> None:
    start = time.perf_counter()
    for prefix in (
        "sk-",
        "hf_",
        "xoxb-1",
        "AIza",
        "sk-ant-a",
        "github_pat_",
        "aws_secret_access_key ",
        "/",
        "wandb_key =",
    ):
        secrets_in(prefix * (200_000 // len(prefix)))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "name", ["model.bin", "x/y.PKL", "modeling_x.py", "a.so", ".git/config", ".gitattributes", "a.npz"]
)
def test_names_that_are_not_published(name: str) -> None:
    assert bad_name(name)


def test_texts_that_are_searched() -> None:
    assert all(
        map(is_searched, ("README.md", "config.json", "hf_quant_config.json", f"{META}/run.json", f"{META}/log"))
    )
    assert not any(map(is_searched, ("model.safetensors", f"{META}/a.safetensors", "sub/config.json", "merges.txt")))


CODE: list[tuple[dict[str, Any], list[str]]] = [
    ({"auto_map": {"AutoModel": "modeling_x.Model"}}, ["auto_map: modeling_x.Model is code that comes with the model"]),
    ({"auto_map": {"AutoModel": "org/repo--x.Model"}}, ["auto_map: org/repo--x.Model is code of org/repo"]),
    ({"auto_map": {"AutoTokenizer": ["tok.T", None]}}, ["auto_map: tok.T is code that comes with the model"]),
    ({"trust_remote_code": True}, ["trust_remote_code: it asks for code that comes with the model"]),
    ({"custom_pipelines": {"p": {"impl": "p.Pipe"}}}, ["custom_pipelines: p.Pipe is code that comes with the model"]),
    ({"vision": {"auto_map": {"AutoConfig": "c.C"}}}, ["vision.auto_map: c.C is code that comes with the model"]),
    ({"auto_map": {}, "trust_remote_code": False, "custom_pipelines": None, "custom_code": "false"}, []),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "default"}, "architectures": ["LlamaForCausalLM"]}, []),
]


@pytest.mark.parametrize(("config", "found"), CODE)
def test_remote_code_is_named(config: dict[str, Any], found: list[str]) -> None:
    assert remote_code(config) == found


def test_the_demo_model_runs_no_code() -> None:
    for name in ("config.json", "tokenizer_config.json"):
        assert remote_code(json.loads((DEMO_MODEL / name).read_text())) == []
