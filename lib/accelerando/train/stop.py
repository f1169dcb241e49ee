"""Stop signals, on which all processes agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerando.base.processes import signal_when_parent_dies

if TYPE_CHECKING:
    from accelerando.train.state import Run

import signal
import threading
from typing import TYPE_CHECKING, Any

from accelerando.base.processes import launcher_command

if TYPE_CHECKING:
    pass


def stop_requested(run: Run) -> bool:
    """True on every process when one of them was asked to stop; a collective."""
    if run.accelerator.num_processes == 1:
        return run.stop.received is not None
    import torch

    flag = torch.tensor([float(run.stop.received is not None)], device=run.accelerator.device)
    return run.accelerator.reduce(flag, reduction="sum").item() > 0


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR1 so that the loop can save and leave; a second SIGINT leaves at once.

    ``received`` is this process's own; the processes agree on it together with the loss of each step. Where the
    launcher dies without telling its child (Accelerate's does, on one process), Linux sends the SIGTERM.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._note)
            if launcher_command():
                signal_when_parent_dies(signal.SIGTERM)

    def _note(self, number: int, _frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_code(self) -> int:
        """The shell's code for an end by this signal."""
        return 128 + (self.received or signal.SIGTERM)
