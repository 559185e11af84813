"""After the commit: does the Hub hold what was sent? Asked of its content, never of its replies.

Every path, size and digest of the commit's tree is compared with the plan; nothing may be missing, other, or too much.
Each safetensors file is then opened where it lies, as an engine would: the length, the JSON header and the offsets are
read by a range request and compared with the local file's. Last, the card's metadata as the Hub understood it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load

from quantpub.errors import ConflictError, InputError
from quantpub.publish.headers import SUFFIX, header_problem, read_header
from quantpub.publish.plan import LocalFile, Plan, differences
from quantpub.publish.refuse import CARD
from quantpub.publish.remote import Remote

CARD_KEYS = ("license", "base_model", "library_name", "pipeline_tag")


@dataclass(frozen=True)
class Verified:
    files: int  # whose size and digest the Hub reports as sent
    headers: int  # of safetensors files that were read back

    def as_json(self) -> dict[str, int]:
        return {"files": self.files, "headers": self.headers}


def read_back(remote: Remote, plan: Plan, oid: str) -> Verified:
    """Errors: ConflictError when the commit is not the plan, InputError when the Hub did not understand the card."""
    wrong = differences(plan, remote.tree(oid))
    shards = [file for path, file in plan.items() if path.endswith(SUFFIX)]
    wrong += [f"{file.path}: {reason}" for file in shards if (reason := _header_differs(remote, file, oid))]
    if wrong:
        raise ConflictError(
            f"the Hub does not hold what was sent: {'; '.join(wrong[:10])}",
            where=remote.url,
            next="do not use this commit; run the command again, and report it if it happens again",
        )
    _require_card(remote, plan[CARD].source, oid)
    return Verified(len(plan), len(shards))


def _header_differs(remote: Remote, file: LocalFile, oid: str) -> str | None:
    expected = read_header(file.source)
    found = remote.read(file.path, oid, length=len(expected))
    return "its header reads differently" if found != expected else header_problem(found, file.size)


def _require_card(remote: Remote, card: Path, oid: str) -> None:
    written, understood = metadata_load(card) or {}, remote.card_data(oid)
    lost = [key for key in CARD_KEYS if key in written and understood.get(key) != written[key]]
    if lost:
        raise InputError(
            f"the Hub read the card's {', '.join(lost)} differently",
            where=CARD,
            next="run `quantpub card`, and publish again",
        )
