"""Text that has been tokenized to shards, as a data source that any number of hosts read.

`ling_jax.data.prepare` writes such a folder. It holds a plan, the tokenizer, an entry of `ling_jax.data.store` for each
shard, and one of what is known of all documents, which is written last and makes the folder whole. What is held out and
which documents are equal is decided where a run opens it, as with any other source; text is decoded from the tokens.

Legend: D documents.
"""

import bisect
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

from ling_jax.data.reading import Document
from ling_jax.data.remote import Column, DamagedCorpus, find
from ling_jax.data.store import BLOCK, CHECKED_BLOCKS, column_file, open_column, read_entry
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import paths

TEXT, CODE, DERIVED = range(3)  # kinds of documents; docstrings are derived from the code just before them
KINDS = ("text", "code", "docs")
SUFFIX = ".prepared"  # of a folder's name, which without it is the source's
PLAN, TOKENIZER, DOCUMENTS = "plan.json", "tokenizer", "documents"
TABLE = {"share": np.uint64, "high": np.uint64, "low": np.uint64, "bytes": np.int64, "kind": np.uint8}
# Where documents begin, and where the further pieces of long ones do, which were tokenized by themselves; where pieces
# begin whose tokens are not decoded to their text, where each of these texts ends in the bytes of all, and those bytes.
PLACES = {"starts": np.int64, "pieces": np.int64, "lossy": np.int64, "lossy_ends": np.int64, "lossy_text": np.uint8}
AHEAD = 64  # documents whose tokens are on their way while one is decoded


def shard_key(number: int) -> str:
    """The name that the files of a shard begin with."""
    return f"shard-{number:06}"


class Tokens:
    """The tokens of all shards, one shard after the other.

    Args:
      shards: uint16 or uint32, one dimension each.
    """

    def __init__(self, shards: list[np.ndarray | Column]):
        self._shards, self._ends = shards, np.cumsum([len(shard) for shard in shards]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def start(self, begin: int, end: int) -> Callable[[], np.ndarray]:
        """Begins to read tokens begin .. end - 1 of one shard; the call gives them."""
        i = bisect.bisect_right(self._ends, begin)
        shard, before = self._shards[i], self._ends[i - 1] if i else 0
        assert end <= self._ends[i]
        if isinstance(shard, Column):
            return shard.start(begin - before, end - before)
        return lambda: shard[begin - before : end - before]


class Prepared:
    """A prepared source.

    Attributes:
      table: as `survey` makes it of a source of text.
      facts: of the index: `documents`, `bytes`, `tokens`, `lengths`, `tokenizer` (its fingerprint), `shards`, ...
      tokens: of all documents, each with its prefix and end, in the order of the files.
      checksum: follows from all tokens and the table.
    """

    def __init__(self, folder: epath.Path):
        """Opens the index and the shards, and compares checksums: of all shards up to 1 GiB, of some of more.

        Raises:
          ValueError: naming the file that is damaged or missing.
        """
        self.folder = folder
        try:
            index = read_entry(folder, DOCUMENTS)
            self.tokens = _open_shards(folder, index.facts["shards"])
        except DamagedCorpus as error:
            raise ValueError(
                f"{error}. Copy it again, or run the `prepare` command that made {folder} again: it makes anew what is "
                "damaged"
            ) from error
        self.facts, self.checksum = index.facts, index.checksum
        self.table = replace(index, columns={name: index.columns[name] for name in TABLE})
        self._places = replace(index, columns={name: index.columns[name] for name in PLACES}).in_memory()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards; ValueError if the folder's is not the one they were made with."""
        tokenizer = Tokenizer.load(str(self.folder / TOKENIZER))
        self.check(tokenizer)
        return tokenizer

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for another tokenizer than that of the shards."""
        theirs = self.facts["tokenizer"]
        if tokenizer.fingerprint != theirs:
            raise ValueError(
                f"{self.folder} was prepared with another tokenizer (fingerprint {theirs}) than {tokenizer.name} "
                f"({tokenizer.fingerprint}): set data.tokenizer to {self.folder / TOKENIZER}, or prepare the text anew"
            )

    def spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin and end in the tokens: int64, as many as `numbers`."""
        starts_D = self._places["starts"]
        following = np.minimum(numbers + 1, len(starts_D) - 1)
        return starts_D[numbers], np.where(numbers + 1 < len(starts_D), starts_D[following], len(self.tokens))

    def read(self, numbers: Iterable[int] | None = None) -> Iterator[Document]:
        """Blocks of the documents of these numbers, all by default."""
        begun: deque[Callable[[], list[Document]]] = deque()
        for number in range(self.facts["documents"]) if numbers is None else numbers:
            begun.append(self._start(number))
            if len(begun) > AHEAD:
                yield from begun.popleft()()
        while begun:
            yield from begun.popleft()()

    def _start(self, number: int) -> Callable[[], list[Document]]:
        [begin], [end] = (place.tolist() for place in self.spans(np.array([number])))
        pieces = self._places["pieces"]
        first, last = np.searchsorted(pieces, (begin, end))
        begins = [begin, *pieces[first:last].tolist()]
        reading = self.tokens.start(begin, end)
        kind = KINDS[int(self.table.columns["kind"][number : number + 1][0])]

        def finish() -> list[Document]:
            ids = reading().tolist()
            cuts = [len(self.tokenizer.prefix_ids), *(at - begin for at in begins[1:]), len(ids) - 1]
            texts = [self._text(at, ids[a:b]) for at, a, b in zip(begins, cuts, cuts[1:], strict=False)]
            name = self.folder.name.removesuffix(SUFFIX)
            more = [True] * (len(texts) - 1) + [False]
            return [Document(t, name, "", kind, f"{name}:{number}", m) for t, m in zip(texts, more, strict=True)]

        return finish

    def _text(self, at: int, ids: list[int]) -> str:
        """The text of a piece whose tokens begin at `at`."""
        lossy, ends = self._places["lossy"], self._places["lossy_ends"]
        i = int(np.searchsorted(lossy, at))
        if i < len(lossy) and lossy[i] == at:
            return self._places["lossy_text"][int(ends[i - 1]) if i else 0 : int(ends[i])].tobytes().decode()
        return self.tokenizer.decode(ids)


def _open_shards(folder: epath.Path, shards: list[dict[str, Any]]) -> Tokens:
    """The shards' tokens; of many, evenly spread ones are compared with their checksums.

    Args:
      shards: `number`, and of the column of tokens what the shard's index tells.
    """
    step = -(-sum(told["bytes"] for told in shards) // (CHECKED_BLOCKS * BLOCK))
    return Tokens(
        [
            open_column(column_file(folder, shard_key(told["number"]), "tokens"), told, check=i % step == 0)
            for i, told in enumerate(shards)
        ]
    )


def open_prepared(path: str) -> Prepared | None:
    """The prepared source at `path`; None where there is none.

    Raises:
      ValueError: naming the file, for one that is damaged or not yet whole, and for a folder of several.
    """
    folder = paths.at(path)
    if not paths.is_bucket(folder) and (several := sorted(folder.glob(f"*{SUFFIX}/{PLAN}"))):
        names = ", ".join(str(plan.parent) for plan in several)
        raise ValueError(f"data source {path!r} holds prepared sources: give each of them, {names}")
    if _is_there(folder / PLAN):
        if not _is_there(folder / f"{DOCUMENTS}.json"):
            raise ValueError(
                f"data source {path!r} is a preparation that has not ended: run its `prepare` command again, which "
                "goes on where it stopped"
            )
        return Prepared(folder)
    return None


def _is_there(file: epath.Path) -> bool:
    return find(file) is not None if paths.is_bucket(file) else file.exists()
