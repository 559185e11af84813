"""What an error of huggingface_hub means to the user, and which of them a second try may cure.

huggingface_hub 2 speaks through httpx2, 1 through httpx; both are the base of its own error class, from which the
package in use is read here, so that neither is named. Errors of hf_xet are Python's own ConnectionError with the status
in the text. What is not recognised is a bug and passes through.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantpub.errors import AuthError, ConflictError, InputError, QuantpubError, UnavailableError, UsageError

T = TypeVar("T")
WAITS_S: tuple[float, ...] = (1, 2, 4, 8, 15)
LONGEST_WAIT_S = 330.0  # a rate limit of the Hub counts windows of five minutes
PATIENCE_S = 180.0  # some calls of the client wait and try again themselves, so tries alone are no bound
HttpError: Any = HfHubHTTPError.__mro__[1]
http: Any = importlib.import_module(HttpError.__module__.split(".")[0])

AUTH_STATUS = {
    401: "the Hub does not know this token",
    402: "the Hub asks for a paid plan for this",
    403: "the token has no right to do this",
}
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access to the repository"
RERUN = "run the same command again: what was uploaded is kept"


def patiently(call: Callable[[], T], where: str, waits: tuple[float, ...] | None = None) -> T:
    """The result of `call`, tried again while the Hub is unavailable. Errors: as `explain` words them."""
    started = time.monotonic()
    for wait in (*(WAITS_S if waits is None else waits), None):
        try:
            return call()
        except Exception as error:
            problem = explain(error, where)
            if problem is None:
                raise
            tired = wait is None or time.monotonic() - started > PATIENCE_S
            if tired or not may_pass(error, problem):
                raise problem from error
            time.sleep(max(wait or 0, asked_wait(error)))
    raise AssertionError("unreachable")


def may_pass(error: Exception, problem: QuantpubError) -> bool:
    return isinstance(problem, UnavailableError) and not isinstance(error, OfflineModeIsEnabled)


def asked_wait(error: Exception) -> float:
    """Seconds that a 429 or 503 asks for, by Retry-After or by the Hub's `RateLimit: "api";r=0;t=55`."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    match = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"r=0;\s*t=(\d+)", headers.get("RateLimit", "")
    )
    return min(float(match[1]) + 1, LONGEST_WAIT_S) if match else 0.0


def explain(error: BaseException, where: str) -> QuantpubError | None:
    """The error in quantpub's own terms; None when it is not the Hub's."""
    for cause in _causes(error):
        if isinstance(cause, QuantpubError):
            return cause
        for kinds, meaning in _MEANINGS:
            if isinstance(cause, kinds) and (problem := meaning(cause, where)):
                return problem
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    # an upload in a thread pool arrives wrapped in a RuntimeError
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _gated(error: Any, where: str) -> QuantpubError:
    return AuthError("access to this repository is gated", where=where, next="ask for access on its page at the Hub")


def _not_found(error: Any, where: str) -> QuantpubError:
    return AuthError("no such repository, or it is private and the token may not see it", where=where, next=LOGIN)


def _no_token(error: Any, where: str) -> QuantpubError:
    return AuthError(f"no token: {_first_line(error)}", where=where, next=LOGIN)


def _status(error: Any, where: str) -> QuantpubError:
    status, said = error.response.status_code, _said(error)
    if status in AUTH_STATUS:
        return AuthError(f"{AUTH_STATUS[status]}{said}", where=where, next=LOGIN)
    if status in (409, 412):
        return ConflictError(
            f"the repository has changed meanwhile{said}",
            where=where,
            next="look at what was changed there, and run the command again",
        )
    if isinstance(error, (RevisionNotFoundError, RemoteEntryNotFoundError)):
        return ConflictError(f"the repository does not hold what it held a moment ago{said}", where=where, next=RERUN)
    if status == 404:
        return UnavailableError(f"the server has no such address{said}", where=where, next="check HF_ENDPOINT")
    if status < 500 and status not in (408, 429):
        return InputError(
            f"the Hub refused what was sent, status {status}{said}",
            where=where,
            next="mend what the Hub names, and publish again",
        )
    return UnavailableError(f"the Hub answered with status {status}{said}", where=where, next=RERUN)


def _offline(error: Any, where: str) -> QuantpubError:
    return UnavailableError("offline mode is on", where=where, next="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")


def _connection(error: Any, where: str) -> QuantpubError:
    status = re.search(r"\b(401|402|403) (?:Unauthorized|Payment Required|Forbidden)", str(error))
    if status:
        return AuthError(AUTH_STATUS[int(status[1])], where=where, next=LOGIN)
    if "xet-write-token" in str(error) and "404" in str(error):
        return UnavailableError("the server has no Xet storage", where=where, next="set HF_HUB_DISABLE_XET=1")
    return UnavailableError(f"no connection: {_first_line(error)}", where=where, next=RERUN)


def _transport(error: Any, where: str) -> QuantpubError:
    return UnavailableError(f"no answer: {type(error).__name__}: {_first_line(error)}", where=where, next=RERUN)


def _system(error: Any, where: str) -> QuantpubError | None:
    if type(error).__module__.startswith("hf_xet"):
        kind = AuthError if isinstance(error, PermissionError) else UnavailableError
        return kind(f"the Hub's storage refused: {_first_line(error)}", where=where, next=RERUN)
    if error.filename is None:
        return None
    return UnavailableError(f"{error.strerror}: {error.filename}", where=where, next=RERUN)


def _repo_id(error: Any, where: str) -> QuantpubError:
    return UsageError(f"not a repository id: {_first_line(error)}", where=where, next="write it as OWNER/NAME")


def _payload(error: Any, where: str) -> QuantpubError | None:
    if str(error).startswith(("Invalid metadata in README.md", "LFS batch API")):
        return InputError(
            f"the Hub refused what was sent: {error}", where=where, next="mend what the Hub names, and publish again"
        )
    if "JSON" in type(error).__name__:
        return UnavailableError(
            "the answer was no JSON: a proxy is in the way, or the Hub is in trouble", where=where, next=RERUN
        )
    return None


_MEANINGS: tuple[tuple[Any, Callable[[Any, str], QuantpubError | None]], ...] = (
    ((LocalTokenNotFoundError, OIDCError), _no_token),
    (HFValidationError, _repo_id),
    (GatedRepoError, _gated),
    (RepositoryNotFoundError, _not_found),
    (HfHubHTTPError, _status),
    (OfflineModeIsEnabled, _offline),
    (HttpError, _transport),
    (ConnectionError, _connection),
    (OSError, _system),
    (ValueError, _payload),
)


def _said(error: Any) -> str:
    """What the server itself said, and the id under which its operators find the request."""
    said = f": {error.server_message}" if error.server_message else ""
    return f"{said} (request {error.request_id})" if error.request_id else said


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
