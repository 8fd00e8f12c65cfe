"""Which engines stand in for a model in a job's workers? Ones that start fast and misbehave."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from graphengine.errors import CapacityError
from graphengine.request import CompletionOutput, FinishReason, Request, RequestOutput

FACTORY = "job_engines:EchoLLM"
BROKEN_FACTORY = "job_engines:BrokenLLM"
TWICE_FACTORY = "job_engines:TwiceLLM"


class EchoLLM:
    """Answers "<prompt>" and the request's seed. A prompt tells it what else to do:

    "die" kills the process, "fall FILE" too unless FILE exists, "slow" takes 20 ms, "refuse" is an
    error, "once FILE" is an error unless FILE exists."""

    def __init__(self, model: str, **options: Any) -> None:
        self._num_tokens = 0

    def __enter__(self) -> EchoLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def stream(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        for index, request in enumerate(requests):
            yield self._answer(index, request)

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(output_tokens=self._num_tokens, prompt_tokens=0, gpu_busy=0.5)

    def _answer(self, index: int, request: Request) -> RequestOutput:
        prompt, params = request.prompt, request.sampling_params
        text = prompt if isinstance(prompt, str) else str(prompt)
        assert params is not None
        assert request.request_id is not None
        error = ""
        if "fall" in text:
            with contextlib.suppress(FileExistsError):
                Path(text.split()[1]).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        if "die" in text:
            time.sleep(0.1)  # other rows arrive, as they do while a real engine computes
            os.kill(os.getpid(), signal.SIGKILL)
        if "slow" in text:
            time.sleep(0.02)
        if "refuse" in text or ("once" in text and not Path(text.split()[1]).exists()):
            error = "the prompt is refused"
        reason = FinishReason.ERROR if error else FinishReason.STOP
        token_ids = [] if error else [7] * min(3, params.max_tokens or 3)
        self._num_tokens += len(token_ids)
        answer = "" if error else f"<{text}> {params.seed} {params.temperature:g}"
        completion = CompletionOutput(0, answer, token_ids, reason)
        return RequestOutput(request.request_id, index, None, [1, 2], [completion], error=error)


class TwiceLLM(EchoLLM):
    """Starts twice, as files in $TWICE_DIR tell, and never again."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model)
        for number in range(2):
            with contextlib.suppress(FileExistsError):
                Path(os.environ["TWICE_DIR"], f"start-{number}").touch(exist_ok=False)
                return
        raise CapacityError("the GPU is gone")


class BrokenLLM:
    def __init__(self, model: str, **options: Any) -> None:
        raise CapacityError("the model does not fit; take a smaller one")
