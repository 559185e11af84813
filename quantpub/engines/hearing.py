"""Overhears what an engine's candidate kernels answer while its own selector asks them: nothing of the choice is redone.

A selector walks its candidate classes in order of preference and asks each whether it supports the GPU and the layer. For
that while, the methods it asks are wrapped; what a method asks of another class inside is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

# The questions of vLLM 0.25.1 and 0.33.0: dense kernels', then experts'
QUESTIONS = ("get_min_capability", "is_supported", "can_implement", "_supports_quant_scheme", "is_supported_config")
SILENT = "it gives no reason"


class Hearing:
    """rejected: class → the first reason for which it said no. accepted: the last class that said yes, or None."""

    def __init__(self, capability: int | None = None) -> None:
        """capability: the GPU's, as 90 for 9.0; None where there is none."""
        self.rejected: dict[str, str] = {}
        self.accepted: str | None = None
        self._capability = capability
        self._depth = 0
        self._kept: list[tuple[type, str, Any]] = []

    def __enter__(self) -> Hearing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._kept:
            setattr(*self._kept.pop())

    def listen(self, classes: Iterable[type]) -> None:
        """Wraps the questions of these classes, on the class that defines each, until the hearing ends."""
        for owner in dict.fromkeys(base for cls in classes for base in cls.__mro__):
            for question in QUESTIONS:
                raw = vars(owner).get(question)
                if isinstance(raw, classmethod | staticmethod) and not hasattr(raw, "overheard"):
                    self._kept.append((owner, question, raw))
                    setattr(owner, question, self._overheard(raw, question))

    def _overheard(self, raw: Any, question: str) -> Any:
        def asked(cls: type, *args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                answer = raw.__get__(None, cls)(*args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth == 0:
                self._note(cls.__name__, question, answer)
            return answer

        wrapped: Any = classmethod(asked)
        wrapped.overheard = True
        return wrapped

    def _note(self, name: str, question: str, answer: Any) -> None:
        if question == "get_min_capability":
            if self._capability is not None and answer > self._capability:
                self.reject(name, f"it asks for compute capability {answer / 10}, this GPU has {self._capability / 10}")
            return
        yes, reason = answer if isinstance(answer, tuple) else (answer, None)
        if yes:
            self.accepted = name
        else:
            self.reject(name, str(reason or SILENT))

    def reject(self, name: str, reason: str) -> None:
        self.rejected.setdefault(name, " ".join(reason.split()))
        if self.accepted == name:
            self.accepted = None

    def after(self, module: Any, function: str, then: Callable[..., None]) -> None:
        """Calls `then(its result, *args)` whenever the module's function has been called. No-op where there is none."""
        original = getattr(module, function, None)
        if original is None:
            return

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            then(result, *args)
            return result

        self._kept.append((module, function, original))
        setattr(module, function, wrapped)
