"""What does a job cost by itself? An engine that answers at once, in the place of an LLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace, TracebackType

from graphengine.request import CompletionOutput, FinishReason, Request, RequestOutput

FACTORY = "perf.stub_engine:StubLLM"


class StubLLM:
    """Gives every prompt back as its output, with a token for each character."""

    def __init__(self, model: str, **options: object) -> None:
        self._num_tokens = 0

    def __enter__(self) -> StubLLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def stream(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        for index, request in enumerate(requests):
            assert isinstance(request.prompt, str)
            token_ids = [3] * len(request.prompt)
            self._num_tokens += len(token_ids)
            completion = CompletionOutput(0, request.prompt, token_ids, FinishReason.STOP)
            assert request.request_id is not None
            yield RequestOutput(request.request_id, index, request.prompt, token_ids, [completion])

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(output_tokens=self._num_tokens, gpu_busy=None)
