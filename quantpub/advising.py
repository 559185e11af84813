"""Which recipe to take for a model on a GPU, before anything is quantized: from stored profiles, and the roofline where none is.

Every recipe in sight is a candidate, and so is bf16. Within NEAR of the fastest the better quality comes first: of times that
were predicted, no more can be told apart. Times that are less sure than another's have to beat it by more than their error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantpub.candidates import Case, Choice, gb
from quantpub.derived import ESTIMATED, OTHER, held_out, held_out_kernels
from quantpub.errors import InputError, UsageError, closest
from quantpub.expected_runs import Refusal
from quantpub.gpus import BF16, GB, GIB, Gpu, find
from quantpub.predict import LINEAR
from quantpub.recipe import load_recipe
from quantpub.recipe_files import recipe_files
from quantpub.served import served
from quantpub.stored import QUALITY, stored
from quantpub.targets import TARGETS
from quantpub.workloads import parse

NEAR = 0.03  # predictions closer than this say nothing about which is faster
DIFFERENT = 0.001  # speeds that are less apart are shown as the same
SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(GB|GIB|G)?", re.IGNORECASE)
UNKNOWN_ERROR = 1.0  # of times that nothing measured could be held against: half as fast is as likely
UNITS = {"": GB, "G": GB, "GB": GB, "GIB": GIB}


def advise(
    config: Mapping[str, Any], name: str, gpu: str, workload: str, memory: str | None, engine: str
) -> dict[str, Any]:
    """config: of the model, called `name`. Returns `choices`, best first, `refused`, `bf16`, and a `reason` for the best.

    Where nothing pays the first choice is `bf16`; it is among them wherever it fits. Speedups are None where it does not.
    Errors: UsageError (gpu, workload, memory, engine), InputError (an architecture that is not known).
    """
    if engine not in TARGETS:
        raise UsageError(f"unknown engine {engine!r}", next=closest(engine, TARGETS))
    chosen = find(gpu)
    case = Case(
        served(config, f"{name.rstrip('/')}/config.json"), chosen, budget(memory, chosen), parse(workload), engine
    )
    found, refused = candidates(case)
    base = next((choice for choice in found if choice.recipe == BF16), None)
    choices, no_base = ranked(found), next((each["reason"] for each in refused if each["recipe"] == BF16), "")
    return {
        "model": name,
        "gpu": chosen.name,
        "memory_gb": case.memory / GB,
        "workload": case.workload.name,
        "engine": engine,
        "choices": [choice.as_json(base) for choice in choices],
        "refused": refused,
        "bf16": base.as_bf16()
        if base
        else {"tokens_per_s": None, "weights_gb": gb(case.served.bytes()), "kv_tokens": 0, "fits": False},
        "reason": reason(choices, base, no_base),
        "notes": [*unlike(choices), *notes(case)],
    }


def candidates(case: Case) -> tuple[list[Choice], list[dict[str, str]]]:
    """bf16 and every recipe: those that can be served, and why the others cannot."""
    found, refused = [], []
    for name in (BF16, *recipe_files()):
        try:
            found.append(case.bf16() if name == BF16 else case.choice(load_recipe(name)))
        except Refusal as refusal:
            refused.append({"recipe": name, "reason": str(refusal)})
        except (InputError, UsageError) as error:
            refused.append({"recipe": name, "reason": error.what})
    return found, refused


def budget(memory: str | None, gpu: Gpu) -> int:
    """Bytes. Errors: UsageError."""
    if memory is None:
        return gpu.memory
    match = SIZE.fullmatch(memory.strip())
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if not size:
        raise UsageError(f"--memory takes a size, not {memory!r:.40}", next="write it like 80GB or 40GiB")
    if size > gpu.memory:
        has = f"--memory {memory} is more than the {gpu.memory / GB:.0f} GB of one {gpu.name}"
        raise UsageError(has, next="ask for less, or another --gpu")
    return size


def ranked(choices: Sequence[Choice]) -> list[Choice]:
    """The fastest first, but of those within NEAR of it the surest, and of these the least lossy; so on with the others."""
    surest = min((choice.doubt for choice in choices), default=0)
    speeds = {choice: _sure_speed(choice, surest) for choice in choices}
    left, found = sorted(choices, key=lambda choice: -speeds[choice]), list[Choice]()
    while left:
        near = [choice for choice in left if speeds[choice] >= (1 - NEAR) * speeds[left[0]]]
        found += sorted(near, key=lambda choice: (choice.doubt, _loss(choice), choice.weight_bytes, -choice.speed))
        left = left[len(near) :]
    return found


def _sure_speed(choice: Choice, surest: int) -> float:
    """Its speed, less the error of its times when there are surer ones."""
    if choice.doubt == surest:
        return choice.speed
    return choice.speed / (1 + (UNKNOWN_ERROR if choice.error is None else choice.error))


def _loss(choice: Choice) -> float:
    return float("inf") if choice.kl is None else choice.kl


def reason(choices: Sequence[Choice], base: Choice | None, no_base: str) -> str:
    """One sentence for the first. no_base: why bf16 is no choice."""
    if not choices:
        return f"nothing fits; bf16: {no_base}"
    best = choices[0]
    if best is base:
        return _nothing_pays(best, choices)
    what = f"{best.recipe} as {best.layout} on {best.kernel}"
    if base is None:
        said = f"{what}, {best.speed:,.0f} tokens/s; bf16 is no choice: {no_base}"
    else:
        said = f"{what}, {best.speed / base.speed:.2f}x bf16"
        said += "" if base.fits else f", whose KV cache holds {base.at_once} of {base.wanted} requests"
    said += f"; its quality with {best.unlike} was not measured" if best.unlike else ""
    return f"{said}; {best.confidence}{_tie(best, choices)}{_perhaps(best, choices)}"


def _tie(best: Choice, choices: Sequence[Choice]) -> str:
    """Who is a little faster, no less sure, and loses more."""
    fastest = max((choice for choice in choices if choice.doubt <= best.doubt), key=lambda choice: choice.speed)
    faster = fastest.speed / best.speed - 1
    if faster < DIFFERENT or _loss(fastest) <= _loss(best):
        return ""
    lost = "unknown" if fastest.kl is None else f"{fastest.kl:.4f}"
    return (
        f"; {fastest.recipe} is {100 * faster:.1f} % faster, less than a prediction can tell, "
        f"and loses more: KL {lost} against {_loss(best):.4f}"
    )


def _perhaps(best: Choice, choices: Sequence[Choice]) -> str:
    """Who is faster if times that are less sure are true."""
    less_sure = [choice for choice in choices if choice.doubt > best.doubt]
    fastest = max(less_sure, key=lambda choice: choice.speed, default=best)
    if fastest.speed / best.speed - 1 < DIFFERENT:
        return ""
    off = "by how much is unknown" if fastest.error is None else f"off by {100 * fastest.error:.0f} % in the middle"
    return f"; {fastest.recipe} might be faster, but that is an estimate, {off}"


def _nothing_pays(base: Choice, choices: Sequence[Choice]) -> str:
    others = [choice for choice in choices if choice is not base]
    if not others:
        return "bf16 is best: no recipe can be served here"
    perhaps = _perhaps(base, choices)
    known = [choice for choice in others if choice.doubt <= base.doubt or not perhaps]
    if not known:
        return f"bf16 is best of what was measured{perhaps}"
    best = max(known, key=lambda choice: choice.speed)
    faster = base.prediction.parts[LINEAR] / best.prediction.parts[LINEAR]
    return (
        f"bf16 is best: the fastest recipe, {best.recipe} on {best.kernel}, reaches {best.speed / base.speed:.2f}x of it; "
        f"linears take {100 * base.prediction.share(LINEAR):.0f} % of its time, and are {faster:.2f}x as fast there{perhaps}"
    )


def unlike(choices: Sequence[Choice]) -> list[str]:
    """Whose quality is not that of the table."""
    return [
        f"no KL for {choice.recipe}: {choice.unlike} quantizes activations too, which its quality was not measured with"
        for choice in choices
        if choice.unlike
    ]


def notes(case: Case) -> list[str]:
    """What holds for every choice."""
    said = [f"KL: {QUALITY}"]
    if case.engine != "vllm":
        said.append(f"steps and memory are those of vLLM: {TARGETS[case.engine].summary} schedules by its own rules")
    if case.stored is None:
        known = ", ".join(stored())
        return [*said, f"nothing was measured on this GPU: kernels are carried over from {known} by the roofline"]
    for confidence, error in ((OTHER, held_out(case.stored)), (ESTIMATED, held_out_kernels(case.stored))):
        if error:
            said.append(f"{confidence}: times derived so for what was measured are off by {error.words}")
    return [*said, f"measured: {', '.join(case.stored.evidence)}"]
