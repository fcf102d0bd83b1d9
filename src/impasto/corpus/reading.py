"""The documents of a corpus: files of several kinds, read as streams and in pieces that can be shared out.

| kind | files | a document is |
|---|---|---|
| JSON lines | `.jsonl`, `.ndjson`, `.json` | a text field of one line |
| plain text | `.txt`, `.text`, `.md` | what stands between blank lines; or a line, or a file |
| Parquet | `.parquet` | a row of a text column |

The first two may be packed (`.gz`, `.zst`). What is no document (broken JSON, a line without the field, more than 64
MB) is counted and passed over; a file that breaks off is read up to there.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from impasto.errors import ImpastoError, MissingExtra, UsageError

Unit = Literal["block", "line", "file"]

LONGEST = 64 << 20  # bytes of one document; memory is bounded by it
PIECE = 128 << 20  # bytes of a file that one process reads at a time, where a file can be entered in its middle
BUFFER = 1 << 20
PACKED = 1 << 14  # packed bytes that are unpacked at once
WINDOW = 1 << 31  # bytes that zstandard may refer back to: what its own tool writes at most
ROWS = 256  # of a Parquet file held at once
_NEVER = 1 << 62

_FORMS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}
_PACKINGS = (".gz", ".zst")


class Damaged(ImpastoError):
    """A file breaks off or cannot be unpacked; what came before it was read."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file: the documents that begin at its bytes `start` to `end`.

    `size` and `modified` (nanoseconds) are the file's own; they tell whether it is still the one that was counted.
    """

    path: str
    start: int
    end: int
    size: int
    modified: int

    @property
    def bytes(self) -> int:
        """Its length on disk."""
        return self.end - self.start


def files(shards: Iterable[str | Path]) -> tuple[Path, ...]:
    """The files that names, folders and globs stand for, each once and in the order of their paths.

    Raises:
        UsageError: nothing is there, or a file of a kind that is not known.
    """
    found: dict[Path, None] = {}
    for shard in map(str, shards):
        path = Path(shard)
        if path.is_dir():
            here = [file for file in sorted(path.rglob("*")) if file.is_file() and _form_if_known(file)]
        elif path.exists():
            _form(path)
            here = [path]
        else:
            here = [Path(name) for name in sorted(glob.glob(shard, recursive=True))]  # noqa: PTH207
            here = [file for file in here if file.is_file() and _form_if_known(file)]
        if not here:
            kinds = " ".join(_FORMS)
            raise UsageError(f"no shards in {shard}: neither a file nor a folder or glob of files ({kinds}; .gz, .zst)")
        found.update((file.resolve(), None) for file in here)
    return tuple(sorted(found))


def parts(path: Path, size: int = PIECE) -> list[Part]:
    """A file in pieces of about `size` bytes; in one where it can only be read from the beginning.

    Raises:
        MissingExtra: a package for its packing is not installed.
    """
    status = path.stat()
    form, packing = _form(path)
    if packing == ".zst":
        _zstandard()
    step = size if form != "parquet" and not packing else max(1, status.st_size)
    starts = range(0, max(1, status.st_size), step)
    ends = [*starts[1:], status.st_size]
    name, modified = str(path), status.st_mtime_ns
    return [Part(name, start, end, status.st_size, modified) for start, end in zip(starts, ends, strict=True)]


def documents(
    part: Part, *, field: str = "text", unit: Unit = "block", at: Callable[[int], None] = lambda done: None
) -> Iterator[bytes | None]:
    """The documents of one part in UTF-8; None for each that cannot be read.

    Args:
        part: which.
        field: the field or column of the text; dots lead into inner objects of JSON.
        unit: what a document of plain text is. A file that is one document belongs to the part that begins with it.
        at: told, before each document, how many bytes of the part on disk are done.

    Raises:
        Damaged: the file breaks off here.
        OSError: it cannot be opened or read.
    """
    path = Path(part.path)
    form, packing = _form(path)
    breaks = _breaks(packing)
    try:
        if form == "parquet":
            yield from _rows(path, part, field, at)
        else:
            with path.open("rb") as raw, _unpacked(raw, packing) as stream:
                yield from _texts(raw, stream, part, form, field, unit, at)
    except OSError as problem:
        if problem.errno is not None:
            raise
        raise Damaged(_first_line(problem)) from problem  # a broken file, not a disk that cannot be read
    except breaks as problem:
        raise Damaged(_first_line(problem)) from problem
    at(part.bytes)


def fields(path: Path) -> list[str]:
    """The fields of the first rows of a file, for an error that says which there are."""
    form, packing = _form(path)
    if form == "parquet":
        import pyarrow.parquet as parquet

        return list(parquet.read_schema(path).names)
    names: dict[str, None] = {}
    with path.open("rb") as raw, _unpacked(raw, packing) as stream:
        for line in [stream.readline(LONGEST) for _ in range(5)]:
            row = _parsed(line)
            names.update(dict.fromkeys(row if isinstance(row, dict) else ()))
    return list(names)


# Kinds of files ------------------------------------------------------------------------------------------------


def _form_if_known(path: Path) -> tuple[str, str] | None:
    """What is in a file, and how it is packed ("" for not at all); None for a kind that is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in _PACKINGS else ""
    form = _FORMS.get(suffixes[-1] if suffixes else "")
    return None if form is None or (form == "parquet" and packing) else (form, packing)


def _form(path: Path) -> tuple[str, str]:
    """The same, of a file that must be known."""
    form = _form_if_known(path)
    if form is None:
        raise UsageError(
            f"{path} is no shard of a known kind: {' '.join(_FORMS)}; all but the last also as .gz or .zst"
        )
    return form


def _unpacked(raw: IO[bytes], packing: str) -> IO[bytes]:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if packing == ".zst":
        return io.BufferedReader(_Frames(raw), BUFFER)
    return raw


class _Frames(io.RawIOBase):
    """A stream of zstandard frames, unpacked; one that ends inside a frame is an error, as it is for gzip."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._unpacker = _zstandard().ZstdDecompressor(max_window_size=WINDOW)
        self._frame: Any = None
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = rest or self._raw.read(PACKED)
            if self._frame is None or self._frame.eof:
                if not packed:
                    return 0
                self._frame = self._unpacker.decompressobj()
            if not packed:
                raise EOFError("it ends before its end-of-stream marker was reached")
            self._left = self._frame.decompress(packed)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _breaks(packing: str) -> tuple[type[Exception], ...]:
    """What is raised where a file breaks off or was never whole."""
    common = (EOFError, zlib.error, ValueError)  # the last is Parquet's
    return (*common, _zstandard().ZstdError) if packing == ".zst" else common


def _first_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0] or type(problem).__name__


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as problem:
        raise MissingExtra("zstandard", "corpus", "reading .zst files") from problem
    return zstandard


# Texts ---------------------------------------------------------------------------------------------------------


def _texts(
    raw: IO[bytes], stream: IO[bytes], part: Part, form: str, field: str, unit: Unit, at: Callable[[int], None]
) -> Iterator[bytes | None]:
    """The documents of a part of JSON lines or plain text."""
    packed = stream is not raw
    stop = _NEVER if packed else part.end

    def tell(place: int) -> None:
        at(raw.tell() if packed else min(place, part.end) - part.start)

    if form == "text" and unit == "block":
        yield from _blocks(stream, part.start, stop, tell)
    elif form == "text" and unit == "file":
        if part.start == 0:
            whole = stream.read(LONGEST + 1)
            yield whole if len(whole) <= LONGEST else None
    else:
        for place, line in _lines(stream, part.start, stop):
            tell(place)
            if line is None or line.strip():
                yield _text(line, field) if line is not None and form == "json" else line


def _lines(stream: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin at `start` or behind it and before `stop`, with their places; None if it is too long."""
    place = start
    if start > 0:
        stream.seek(start - 1)
        place += _skip(stream) - 1
    while place < stop and (line := stream.readline(LONGEST + 1)):
        rest = _skip(stream) if len(line) > LONGEST and not line.endswith(b"\n") else 0
        yield place, None if rest or len(line) > LONGEST + 1 else line
        place += len(line) + rest


def _skip(stream: IO[bytes]) -> int:
    """Read to the end of a line; says how many bytes that were."""
    count = 0
    while line := stream.readline(BUFFER):
        count += len(line)
        if line.endswith(b"\n"):
            break
    return count


def _blocks(stream: IO[bytes], start: int, stop: int, tell: Callable[[int], None]) -> Iterator[bytes | None]:
    """What stands between blank lines; a block belongs to where the last blank line before it begins."""
    mine = start == 0
    block: list[bytes] = []
    length = 0
    for place, line in _lines(stream, start, _NEVER):
        tell(place)
        if line is None or line.strip():
            length += LONGEST + 1 if line is None else len(line)
            if line is not None and mine and length <= LONGEST:
                block.append(line)
            continue
        if mine and length:
            yield b"".join(block) if length <= LONGEST else None
        block, length = [], 0
        mine = place < stop
        if not mine:
            return
    if mine and length:
        yield b"".join(block) if length <= LONGEST else None


def _text(line: bytes, field: str) -> bytes | None:
    found = _parsed(line)
    if isinstance(found, dict):
        names = [field] if field in found else field.split(".")
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str):
            return found.encode("utf-8", "replace")
    return None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, nested too deeply
        return None


def _rows(path: Path, part: Part, field: str, at: Callable[[int], None]) -> Iterator[bytes | None]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as table:
        rows = table.metadata.num_rows
        if field not in table.schema_arrow.names:
            yield from [None] * rows
            return
        done = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=[field]):
            column = batch.column(0)
            if arrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            is_text = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
            for text in column.cast(arrow.large_binary()) if is_text else [None] * len(column):
                at(part.bytes * done // max(1, rows))
                done += 1
                yield None if text is None else text.as_py()
