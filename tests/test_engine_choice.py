"""Asking an engine's selector: the plumbing, with real subprocesses, and what is said where nobody can be asked.

The package `vllm` in here mimics the names and signatures of vLLM 0.25.1 that one route calls, as they were read. It shows
that the question gets there and the answer back; what vLLM itself answers, it cannot show.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantpub.engines import ask as asking
from quantpub.engines.choice import Ask, Choice, by_table
from quantpub.engines.hearing import Hearing
from quantpub.engines.symbols import confirm, device_kernels, names, short
from quantpub.engines.vllm_choice import TILE
from quantpub.engines.vllm_experts import ROUTES as EXPERTS
from quantpub.engines.vllm_linears import ROUTES as LINEARS
from quantpub.engines.vllm_rows import LINEARS as CLASSES
from quantpub.engines.vllm_rows import row
from quantpub.kernel_tables import SEEN
from quantpub.kernels.base import Kernel
from quantpub.scheme import preset
from quantpub.targets import TARGETS

QKV = Ask("self_attn.qkv_proj", 6144, 4096, preset("W4A16"), "ct-pack")
STUB = {
    "__init__.py": "print('INFO a line on stdout, as engines log')",
    "version.py": "__version__ = '0.25.1+cu130'",
    "platforms.py": """
        class Platform:
            device_name = "cuda"
            def get_device_capability(self): return (9, 0)
            def get_device_name(self): return "NVIDIA H200"
            def is_rocm(self): return False
            def is_cpu(self): return False
        current_platform = Platform()
    """,
    "config.py": """
        from contextlib import contextmanager
        now = None
        class VllmConfig: pass
        @contextmanager
        def set_current_vllm_config(config):
            global now
            now = config
            yield
    """,
    "scalar_type.py": """
        class scalar_types: uint4b8, uint4, uint8b128, uint8 = "uint4b8", "uint4", "uint8b128", "uint8"
    """,
    "model_executor/__init__.py": "",
    "model_executor/layers/__init__.py": "",
    "model_executor/layers/quantization/__init__.py": "",
    "model_executor/layers/quantization/compressed_tensors/__init__.py": "",
    "model_executor/layers/quantization/compressed_tensors/schemes.py": """
        class CompressedTensorsWNA16:
            @classmethod
            def get_min_capability(cls): return 75
        class CompressedTensorsW4A4Mxfp4:
            @classmethod
            def get_min_capability(cls): return 100
    """,
    "model_executor/kernels/__init__.py": "",
    "model_executor/kernels/linear.py": """
        from dataclasses import dataclass
        import vllm.config
        @dataclass
        class MPLinearLayerConfig:
            full_weight_shape: tuple
            partition_weight_shape: tuple
            weight_type: str
            act_type: object
            group_size: int
            zero_points: bool
            has_g_idx: bool
        class Base:
            least = 75
            @classmethod
            def get_min_capability(cls): return cls.least
            @classmethod
            def can_implement(cls, c): return True, None
        class BlackwellLinearKernel(Base):
            least = 100
        class MacheteLinearKernel(Base):
            @classmethod
            def can_implement(cls, c):
                assert vllm.config.now.model_config.hf_text_config.model_type == "qwen3"
                if c.partition_weight_shape[1] % 128:
                    return False, "Output features size must be\\n divisible by 128"
                return super().can_implement(c)
        class MarlinLinearKernel(Base):
            @classmethod
            def can_implement(cls, c): return c.group_size in (32, 64, 128), f"no group of {c.group_size}"
        _POSSIBLE_KERNELS = {"cuda": [BlackwellLinearKernel, MacheteLinearKernel, MarlinLinearKernel]}
        def choose_mp_linear_kernel(config):
            for kernel in _POSSIBLE_KERNELS["cuda"]:
                if kernel.get_min_capability() <= 90 and kernel.can_implement(config)[0]:
                    return kernel
            raise ValueError("Failed to find a kernel")
    """,
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("engine")
    for name, text in STUB.items():
        path = home / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return home


def interpreter(folder: Path, body: str) -> str:
    """An executable that stands where an engine's Python should."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_the_question_reaches_a_package_of_vllms_shape_and_the_answer_comes_back(
    stub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = Ask("odd", 4160, 4096, preset("W4A16"), "ct-pack")
    whole = Ask("whole", 4160, 4096, preset("W8A16"), "ct-pack")
    mx = Ask("mx", 4096, 4096, preset("MXFP4A16"), "ct-mxfp4")
    int8 = Ask("int8", 4096, 4096, preset("W8A8"), "ct-int")
    asks = [QKV, odd, whole, mx, int8]
    monkeypatch.setenv("PYTHONPATH", str(stub))
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "MacheteLinearKernelOfOld")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (tmp_path / "vllm").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of the engine's name in the working directory is not the engine
    reply = asking.ask(sys.executable, asking.make_request({"model_type": "qwen3"}, asks))
    assert {k: reply[k] for k in ("engine", "version", "device", "generation")} == {
        "engine": "vllm", "version": "0.25.1", "device": "NVIDIA H200", "generation": "sm90",
    }  # fmt: skip
    assert reply["environment"] == {"VLLM_DISABLED_KERNELS": "MacheteLinearKernelOfOld"}
    found = asking.choices(reply, asks, "sm90")
    asked, disabled = "asked vllm 0.25.1", {"MacheteLinearKernelOfOld": "disabled by VLLM_DISABLED_KERNELS"}
    too_new = {"BlackwellLinearKernel": "it asks for compute capability 10.0, this GPU has 9.0"}
    no_tile = {"Machete": "Output features size must be divisible by 128"}
    assert found[0] == Choice(QKV.gemm, "Machete", "MacheteLinearKernel", asked, disabled | too_new)
    assert found[1] == Choice("odd", "Marlin", "MarlinLinearKernel", asked, disabled | too_new | no_tile)
    assert (found[2].kernel, found[2].asked) == (None, True)
    assert found[2].rejected == too_new | no_tile | {"Marlin": "no group of -1"}
    assert found[2].error == "vLLM refuses the layer: ValueError: Failed to find a kernel"
    assert found[3].error and "asks for compute capability 10.0, this GPU has 9.0" in found[3].error
    assert (found[4].kernel, found[4].source) == ("CUTLASS INT8", "table, seen: " + SEEN[5].evidence)
    assert found[4].error and found[4].error.startswith("vLLM 0.25.1 could not be asked: AttributeError")


def test_an_interpreter_without_vllm_says_so_and_the_tables_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    reply = asking.ask(sys.executable, asking.make_request({}, [QKV]))
    assert reply == {"error": "ModuleNotFoundError: No module named 'vllm'"}
    (choice,) = asking.choices(reply, [QKV], "sm90")
    assert (choice.kernel, choice.class_name, choice.asked) == ("Machete", None, False)
    assert (choice.source, choice.error) == ("table of 0.25.1 and 0.33.0", reply["error"])


def test_none_means_this_interpreter_and_it_has_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    assert asking.ask(None, {}) == {"error": "vLLM is not installed in this interpreter, and no other was named"}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import sys; print('no json'); print('[1]'); print('{}'); sys.exit(3)", "ended with 3 and no answer"),
        ("import sys; sys.stderr.write('log\\nboom\\n\\n'); sys.exit(1)", "ended with 1 and no answer: boom"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)))", "ended with 0 and no answer"),
    ],
)
def test_garbage_for_an_answer_is_an_error_of_one_line(tmp_path: Path, body: str, error: str) -> None:
    python = interpreter(tmp_path, body)
    assert asking.ask(python, {}) == {"error": f"{python} {error}"}


def test_the_answer_is_the_last_line_that_is_one(tmp_path: Path) -> None:
    body = (
        "import json; print(json.dumps({'choices': []})); print(json.dumps({'choices': [], 'n': 2})); print('INFO bye')"
    )
    assert asking.ask(interpreter(tmp_path, body), {}) == {"choices": [], "n": 2}


def test_a_broken_path_is_an_error_of_one_line(tmp_path: Path) -> None:
    missing, plain = str(tmp_path / "none"), tmp_path / "plain"
    plain.write_text("no program")
    assert asking.ask(missing, {}) == {"error": f"{missing} does not start: No such file or directory"}
    assert asking.ask(str(plain), {}) == {"error": f"{plain} does not start: Permission denied"}


def test_an_engine_that_hangs_is_stopped(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "import time; time.sleep(60)")
    began = time.monotonic()
    under_way = asking.start(python, {}, timeout=0.3)
    assert under_way.wait() == {"error": f"{python} gave no answer within 0.3 s"}
    assert time.monotonic() - began < 20
    assert isinstance(under_way, asking.Asking) and under_way._process and under_way._process.returncode == -9


def test_an_engine_works_on_while_nobody_waits_and_logs_more_than_a_pipe_holds(tmp_path: Path) -> None:
    done = tmp_path / "done"
    body = f"import sys; sys.stderr.write('x' * 300_000); open({str(done)!r}, 'w'); print('{{\"choices\": []}}')"
    under_way = asking.start(interpreter(tmp_path, body), {}, timeout=30)
    until = time.monotonic() + 20
    while not done.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert done.exists(), "it waits for its reader"
    assert under_way.wait() == {"choices": []}


def test_a_request_survives_json() -> None:
    moe = Ask("mlp.experts.down_proj", 2048, 768, preset("W4A16_ASYM", 64), "ct-pack", 128, 8, 2, 1)
    request = json.loads(json.dumps(asking.make_request({"model_type": "qwen3"}, [QKV, moe])))
    assert [Ask.from_json(value) for value in request["asks"]] == [QKV, moe]
    assert Ask.from_json({"gemm": "o", "n": 8, "k": 16, "scheme": "W4A16", "layout": "gptq", "group": 32}) == Ask(
        "o", 8, 16, preset("W4A16", 32), "gptq"
    )


@pytest.mark.parametrize(
    ("gemm", "n", "k", "sides"),
    [
        ("mlp.experts.gate_up_proj", 1536, 2048, (2048, 768)),
        ("mlp.experts.down_proj 2048×768", 2048, 768, (2048, 768)),
        ("block_sparse_moe.experts.w13", 28672, 4096, (4096, 14336)),
        ("block_sparse_moe.experts.w2", 4096, 14336, (4096, 14336)),
    ],
)
def test_the_sides_of_an_expert(gemm: str, n: int, k: int, sides: tuple[int, int]) -> None:
    assert Ask(gemm, n, k, preset("W4A16"), "ct-pack", 8).expert_sides == sides


def test_the_tables_know_what_follows_a_kernel_that_does_not_fit() -> None:
    odd = Ask("odd", 4160, 4096, preset("W4A16"), "ct-pack")
    choice = by_table(odd, "nobody there", "0.25.1", "sm90")
    assert choice.kernel == "Marlin"
    assert choice.rejected == {"Machete": "Machete wants N % 128 = 0 and K % 64 = 0, this is 4160×4096"}
    assert by_table(odd, "nobody there", "0.33.0", "sm90").kernel == "Humming"
    assert by_table(odd, "nobody there", "0.29.0", "sm90").kernel is None
    pads = Ask("pads", 4128, 4128, preset("W4A16", 32), "ct-pack")
    assert (by_table(pads, "", "0.25.1", "sm80").kernel, by_table(pads, "", "0.25.1", "sm80").rejected) == (
        "Marlin",
        {},
    )
    coarse = by_table(Ask("coarse", 4096, 4096, preset("W4A16", 256), "ct-pack"), "why", "0.25.1", "sm80")
    assert (coarse.kernel, coarse.error) == (None, "Triton or Exllama runs it; why")
    assert coarse.rejected == {"Marlin": "Marlin has no code for groups of 256"}


def test_a_version_that_nobody_read_has_what_all_that_were_read_agree_on() -> None:
    assert by_table(QKV, "why", "0.29.0", "sm90").kernel == "Machete"
    nvfp4 = Ask("o", 4096, 4096, preset("NVFP4"), "ct-nvfp4")
    assert by_table(nvfp4, "why", "0.25.1", "sm90").kernel == "Marlin NVFP4 W4A16"
    assert by_table(nvfp4, "why", "0.33.0", "sm90").kernel == "Humming NVFP4 W4A16"
    unknown = by_table(nvfp4, "why", "0.29.0", "sm90")
    assert (unknown.kernel, unknown.source) == (None, "table, not established")
    assert by_table(QKV, "why", "0.25.1", "").kernel is None


def test_what_vllm_does_not_load_is_refused_with_the_reason() -> None:
    choice = by_table(Ask("e", 8, 8, preset("LLM_INT8"), "bnb-int8", 8), "why", "0.25.1", "sm90")
    assert (choice.kernel, choice.error) == (
        None, "vLLM's bitsandbytes loader refuses what is 8-bit on disk where the model has experts, quantized or not; why",
    )  # fmt: skip


SAID = re.compile(r"(?:Using|Selected) (\w+Kernel)\b")


@pytest.mark.parametrize("run", [run for run in SEEN if run.said and SAID.match(run.said)], ids=lambda r: r.checkpoint)
def test_classes_in_engines_logs_have_the_rows_that_the_tables_gave_them(run: SimpleNamespace) -> None:
    found = SAID.match(run.said)
    assert found and row(found[1]) == run.kernel


def test_experts_rows_are_those_of_the_tables() -> None:
    classes = {"": "MarlinExperts", "NVFP4": "MarlinExperts", "INT8": "TritonExperts", "FP8": "TritonOrCutlassExperts"}
    rows = {row(name, num) for num, name in classes.items()}
    assert rows == {run.kernel for run in SEEN if run.engine == "vllm" and run.experts}
    assert row("NewKernel") == row("NewKernel", "FP8") == "NewKernel"


def test_every_layout_that_vllm_loads_has_a_route_or_a_reason_for_none() -> None:
    loads = set(TARGETS["vllm"].loads)
    assert set(LINEARS) == loads - {TILE, "torchao-nvfp4", "bnb-int8"}
    assert set(EXPERTS) == {name for name in loads if TARGETS["vllm"].loads[name].experts is None}
    assert len(set(CLASSES.values())) == len(CLASSES)


class First:
    @classmethod
    def is_supported(cls, capability: int | None = None) -> tuple[bool, str | None]:
        return Second.is_supported(capability)[0] is None, "no\n  such GPU"

    @staticmethod
    def is_supported_config(cls: type, config: object) -> tuple[bool, str | None]:
        return cls._supports_quant_scheme(config), None

    @classmethod
    def _supports_quant_scheme(cls, config: object) -> bool:
        return config == cls.__name__


class Second(First):
    @classmethod
    def is_supported(cls, capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        return config is not None, "no config"


def test_a_hearing_notes_what_the_selector_asked_and_not_what_was_asked_inside() -> None:
    before = dict(vars(First)), dict(vars(Second))
    with Hearing(90) as hearing:
        hearing.listen([First, Second])
        hearing.listen([Second])
        assert First.is_supported(90) == (False, "no\n  such GPU")
        assert (hearing.accepted, hearing.rejected) == (None, {"First": "no such GPU"})
        Second.is_supported()
        assert hearing.accepted == "Second"
        Second.can_implement(None)
    assert (hearing.accepted, hearing.rejected) == (None, {"First": "no such GPU", "Second": "no config"})
    assert (dict(vars(First)), dict(vars(Second))) == before


def test_a_hearing_follows_static_questions_to_the_class_they_are_about() -> None:
    with Hearing() as hearing:
        hearing.listen([First, Second])
        assert Second.is_supported_config(Second, "First") == (False, None)
        assert Second.is_supported_config(Second, "Second") == (True, None)
    assert (hearing.accepted, hearing.rejected) == ("Second", {"Second": "it gives no reason"})


def test_a_hearing_restores_what_it_wrapped_when_the_selector_fails() -> None:
    before = dict(vars(First))
    with pytest.raises(ZeroDivisionError), Hearing() as hearing:
        hearing.listen([First])
        raise ZeroDivisionError
    assert dict(vars(First)) == before


MACHETE = (
    "void cutlass::device_kernel<machete::Gemm<cute::tuple<cute::C<128>, cute::C<64>>, (int)4, true>>(machete::Params)"
)


def kernel(symbol: str) -> Kernel:
    return Kernel(
        "vllm-machete", "machete", ("cuda",), lambda: None, lambda *a: None, lambda w: (), lambda x, o: x, symbol=symbol
    )


def test_a_kernel_is_confirmed_by_its_symbol() -> None:
    assert confirm(kernel("MACHETE::gemm"), ["other", MACHETE]) is None
    assert confirm(kernel(""), []) is None
    assert confirm(kernel("marlin"), [MACHETE, "gemv"]) == (
        "vllm-machete should run a kernel like marlin; what ran: cutlass::device_kernel machete::Gemm machete::Params; gemv"
    )
    assert confirm(kernel("marlin"), []) == "vllm-machete should run a kernel like marlin; what ran: nothing"


def test_long_names_are_cut() -> None:
    assert short(" ".join(f"name{i}" for i in range(99))).endswith("…")
    assert len(short(" ".join(f"name{i}" for i in range(99)))) == 160


def test_of_a_profile_only_kernels_count_each_once() -> None:
    cuda, cpu = SimpleNamespace(name="CUDA"), SimpleNamespace(name="CPU")
    events = [
        SimpleNamespace(name="aten::mm", device_type=cpu),
        SimpleNamespace(name="Memcpy DtoD (Device -> Device)", device_type=cuda),
        SimpleNamespace(name="gemm", device_type=cuda, is_user_annotation=False),
        SimpleNamespace(name="ProfilerStep", device_type=cuda, is_user_annotation=True),
        SimpleNamespace(name="gemm", device_type=cuda),
        SimpleNamespace(name="quant", device_type=cuda),
    ]
    assert names(events) == ["gemm", "quant"]


def test_without_cuda_nothing_is_called_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    called: list[int] = []
    assert device_kernels(lambda: called.append(1)) == ([], "there is no CUDA device")
    assert called == []
