"""As kill.py, of a repack: usage: kill_repack.py CHECKPOINT LAYOUT WORK points | random COUNT."""

from __future__ import annotations

import os
from pathlib import Path

import kill

from quantpub.opened import open_quantized
from quantpub.repack import repack
from quantpub.repacking import make_repack


def run(out: Path) -> None:
    repack(make_repack(open_quantized(kill.MODEL), kill.RECIPE), out, accept_loss=True)


if __name__ == "__main__":
    kill.run = run
    os.fsync = lambda fd: None  # what a killed process wrote is in the page cache, and stays
    run(kill.WORK / "first")  # here: what it imports is then there for every victim
    kill.main()
