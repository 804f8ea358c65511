"""An answer's text as its ids come, up to a stop string."""

from collections.abc import Sequence

from ling_jax.data.tokenizer import Tokenizer


class Reply:
    """An answer's text as its ids come. Nothing is shown that may turn out to begin a stop string, nor half a
    character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()):
        self.tokenizer, self.stop, self.stop_ids = tokenizer, [s for s in stop if s], set(stop_ids)
        self.ids: list[int] = []
        self.stream = tokenizer.stream()
        self.text, self.shown, self.stopped = "", 0, False

    def push(self, ids: Sequence[int]) -> str:
        """Returns the text that these ids complete; `stopped` is set once a stop string has come, which is cut off."""
        for token in ids:
            if self.stopped or token in self.stop_ids:
                break
            self.ids.append(token)
            self.text += self.stream.push(token)
            found = [at for s in self.stop if (at := self.text.find(s, max(self.shown - len(s), 0))) >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        return self._show(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """Returns the text that is left once no more ids come; bytes that are no character become U+FFFD."""
        if not self.stopped:
            self.text += self.tokenizer.decode(self.ids)[len(self.text) :]
        return self._show(len(self.text))

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        sizes = (n for s in self.stop for n in range(min(len(s) - 1, len(self.text)), 0, -1) if s[:n] == self.text[-n:])
        return max(sizes, default=0)

    def _show(self, end: int) -> str:
        start, self.shown = self.shown, max(end, self.shown)
        return self.text[start : self.shown]
