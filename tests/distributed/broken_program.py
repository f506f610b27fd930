"""`pretrain_gpt.py` in which rank 1 does something in its fourth step: the first argument says what."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import megallm.train.loop
import pretrain_gpt
from megallm.train.engine import Engine


def spin() -> None:
    while True:
        pass


def fail() -> None:
    raise RuntimeError("a defect of ours")


BREAKS: dict[str, Callable[[], None]] = {
    "spin": spin,
    "fail": fail,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def main() -> None:
    step, break_down = megallm.train.loop.train_step, BREAKS[sys.argv[1]]

    def breaking_step(engine: Engine, *arguments: Any) -> Any:
        if engine.mesh.rank == 1 and engine.progress.iteration == 3:
            break_down()
        return step(engine, *arguments)

    megallm.train.loop.train_step = breaking_step
    pretrain_gpt.main(sys.argv[2:])


if __name__ == "__main__":
    main()
