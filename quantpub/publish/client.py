"""The client's side of a rehearsal: `python -m quantpub.publish.client ARTIFACT REPO_ID SCRATCH`, one JSON object out.

It runs in an environment that names the loopback Hub as HF_ENDPOINT; everything else it does is what a user's
publication and a user's download do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from quantpub.artifact import Artifact
from quantpub.errors import QuantpubError
from quantpub.files import sha256_file
from quantpub.publish import publish
from quantpub.publish.plan import read_plan


def run(artifact: Artifact, repo_id: str, scratch: Path) -> dict[str, Any]:
    first = publish(artifact, repo_id)
    downloaded = Path(snapshot_download(repo_id, revision=first.commit, local_dir=scratch / "download"))
    plan = read_plan(artifact)
    different = [path for path, file in plan.items() if not _same(downloaded / path, file.sha256)]
    second = publish(artifact, repo_id)
    return {"first": first.as_json(), "downloaded": len(plan), "different": different, "second": second.as_json()}


def _same(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def main(arguments: list[str]) -> int:
    artifact, repo_id, scratch = arguments
    try:
        said = run(Artifact.open(artifact), repo_id, Path(scratch))
    except QuantpubError as error:
        said = {"error": error.as_json()}
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
