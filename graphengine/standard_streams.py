"""What if a standard stream is closed? It is opened again, so that only its use is an error."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """For the start of a program. The next files to be opened would else get the numbers of those
    that are closed, and be taken for them. Input and output are opened for the other direction:
    reading and writing still fail there as on a closed one. Lines for a terminal go nowhere."""
    for descriptor, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free: this one
            os.set_inheritable(descriptor, True)
    # Python has None for them.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
