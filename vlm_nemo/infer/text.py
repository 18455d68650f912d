"""Token ids to text while they come: never half a character, never a part of what ends the answer. No torch here.

The text handed out so far plus what `finish` adds is `Tokenizer.decode` of all ids, up to the stop text.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_nemo.data.tokenizer import Tokenizer

BROKEN = "\ufffd"
"""What bytes that are no character yet decode to."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8; a token holds one at least."""
_PATIENCE = 8
"""Tokens that may wait for the end of a character; more can only be bytes that never become one."""


class Detokenizer:
    """Decodes a window of the last tokens, so that a token costs the same however long the answer is.

        ids   . . . . | shown before: context | new |
                      start                   shown   end

    What a token says depends on its neighbours (a leading space, the bytes of one character), so the new text is what
    the whole window decodes to beyond what its context alone does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0
        """Tokens of the window whose text is out."""

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character lacks bytes. Special tokens say nothing."""
        if token in self._tokenizer.special_ids:
            return ""
        self._window.append(token)
        before, now = self._texts()
        if len(now) <= len(before):
            return ""
        if not now.endswith(BROKEN):
            return self._show(len(self._window), before, now)
        if len(self._window) - self._shown >= _PATIENCE:
            return self._give_up(before, now)
        return ""

    def finish(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD each."""
        before, now = self._texts()
        waiting = self._window[self._shown :]
        self._window, self._shown = [], 0
        return now[len(before) :] if now.startswith(before) else self._tokenizer.decode(waiting)

    def _texts(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._window[: self._shown]), self._tokenizer.decode(self._window)

    def _show(self, until: int, before: str, now: str) -> str:
        """Everything up to window[until] is out; what was new becomes the context of what follows."""
        self._window = self._window[self._shown :]
        self._shown = until - self._shown
        return now[len(before) :]

    def _give_up(self, before: str, now: str) -> str:
        """Show broken bytes, but not those at the end, which may still be the beginning of a character."""
        for until in range(len(self._window) - _LONGEST_CHARACTER + 1, self._shown, -1):
            part = self._tokenizer.decode(self._window[:until])
            if now.startswith(part) and part.startswith(before):
                return self._show(until, before, part)
        return self._show(len(self._window), before, now)


class TextStream:
    """Text of one answer, cut before the first stop text: the one that is complete first, of those the longest.

    A stop text is found wherever the borders of tokens lie: an end that could still become one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> tuple[str, str | None]:
        """(new text, the stop text that this token completed, if any). After a stop text nothing may follow."""
        return self._feed(self._decoder.push(token))

    def finish(self) -> tuple[str, str | None]:
        """(the rest, a stop text that it completed): the answer ends for another reason."""
        text, stop = self._feed(self._decoder.finish())
        if stop is None:
            text, self._held = text + self._held, ""
        return text, stop

    def _feed(self, text: str) -> tuple[str, str | None]:
        if not self._stop:
            return text, None
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end - len(stop)], stop
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are the beginning of `stop`: ("is it <|", "<|end|>") -> 2."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
