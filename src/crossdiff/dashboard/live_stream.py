"""Answers while they are written: one JSON object per line, from a thread that a reader can stop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi.responses import StreamingResponse

from crossdiff.dashboard.live import Busy, Hear, Live
from crossdiff.errors import UserError

MEDIA_TYPE = "application/x-ndjson"
BUSY = "Too many requests are waiting for the models. Try again in a moment."

Line = dict[str, Any]


def stream(live: Live, answer: Callable[[Hear], Line]) -> StreamingResponse:
    """The lines of a request: `running` with the name that stops it, `answer` with its `name` and `text` so far after each
    token, and last what `answer` returns, or `problem`. A reader who goes away stops it as well."""

    async def lines() -> AsyncIterator[str]:
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Line | None]()

        def tell(line: Line | None) -> None:
            with suppress(RuntimeError):  # the server has stopped, and with it the loop
                loop.call_soon_threadsafe(waiting.put_nowait, line)

        with live.stoppable() as (name, stop):

            def hear(number: int, name: str, text: str) -> bool:
                tell({"answer": number, "name": name, "text": text})
                return not stop.is_set()

            def work() -> None:
                last: Line = {"problem": "The server could not answer; its terminal says why."}
                try:
                    last = answer(hear)
                except UserError as error:
                    last = {"problem": f"{error}."}
                except Busy:
                    last = {"problem": BUSY}
                finally:
                    tell(last)
                    tell(None)

            threading.Thread(target=work, daemon=True, name="answer").start()
            yield _line({"running": name})
            while (line := await waiting.get()) is not None:
                yield _line(line)

    return StreamingResponse(lines(), media_type=MEDIA_TYPE)


def _line(line: Line) -> str:
    return json.dumps(line) + "\n"
