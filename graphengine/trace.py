"""What ran when? A trace of host phases and device work for Chrome's tracing page or Perfetto."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from graphengine.errors import ConfigError
from graphengine.metrics import Lap

if TYPE_CHECKING:
    from captures import DeviceSpan

# Threads of the trace, in the order they are shown.
_HOST = "host"
_ROWS = (_HOST, "copy_in", "compute")
_log = logging.getLogger(__name__)


class TraceFile:
    """Written as spans come, so that memory does not grow with the run. The format is the "JSON
    object format" of Chrome's Trace Event Format; times are microseconds since the file was made.

    Raises ConfigError if `path` cannot be opened. If it takes no more later on, a warning says so
    and the trace ends there: no answer is lost for it."""

    def __init__(self, path: Path, *, start_s: float) -> None:
        self._name = str(path)
        self._start_s = start_s
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"trace {str(path)!r} cannot be written ({error.strerror}); give another file"
            ) from error
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}}
            for tid, name in enumerate(_ROWS)
        ]
        self._write('{"displayTimeUnit": "ms", "traceEvents": [')
        self._write(",\n".join(map(json.dumps, names)))

    def add_lap(self, lap: Lap) -> None:
        self._add(lap.phase, _HOST, lap.start_s, lap.end_s)

    def add_span(self, span: DeviceSpan) -> None:
        self._add(span.label, span.stream, span.start_s, span.end_s)

    def close(self) -> None:
        """Completes the file. Safe to call twice."""
        self._write("]}\n", is_last=True)

    def _add(self, name: str, row: str, start_s: float, end_s: float) -> None:
        # Formatted by hand: names are ours, and json.dumps would cost three times as much.
        self._write(
            f',\n{{"ph":"X","name":"{name}","pid":0,"tid":{_ROWS.index(row)},'
            f'"ts":{1e6 * (start_s - self._start_s):.3f},"dur":{1e6 * (end_s - start_s):.3f}}}'
        )

    def _write(self, text: str, *, is_last: bool = False) -> None:
        """Nothing once the file is closed, as it is after a failure."""
        if self._file.closed:
            return
        try:
            self._file.write(text)
            if is_last:
                self._file.close()
        except OSError as error:
            reason = error.strerror
            _log.warning("trace %r ends here: %s; the run goes on without it", self._name, reason)
            with contextlib.suppress(OSError):  # it tries what is left to be written once more
                self._file.close()
