"""gzip in pieces: each piece of text is compressed by itself, so that what did not change is compressed only once.

A piece ends with a full flush, after which nothing refers to what came before. So pieces in any order, between a header
and an empty final block, are one gzip file (RFC 1952).
"""

from __future__ import annotations

import zlib
from io import BytesIO

# Bytes of text that are kept, compared and compressed together. Smaller pieces compress worse; of larger ones, more is
# compressed again for one number that changed.
BLOCK_BYTES = 16384
# Text shorter than this is compressed together with its neighbours.
SMALL_BYTES = 2048
# Level 9, which prometheus_client uses, takes ten times as long for two thirds of the bytes.
LEVEL = 1
GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"
LAST_BLOCK = b"\x03\0"  # of a deflate stream: empty, final


class Piece:
    """Text, and its compressed form once it was needed."""

    __slots__ = ("packed", "plain")

    def __init__(self) -> None:
        self.plain = bytearray()
        self.packed: bytes | None = None


class Body:
    """The text of a response, compressed piece by piece, and the number of its samples.

    known: short pieces that were compressed for the last scrape; None if it is not to be compressed. packed: those of
    this one.
    """

    def __init__(self, known: dict[bytes, bytes] | None) -> None:
        self._known = known
        self.packed: dict[bytes, bytes] = {}
        self.samples = 0
        self._buffer = BytesIO()
        self._short: list[bytes | bytearray] = []
        self._short_size = self._size = self._crc = 0
        if known is not None:
            # A window as large as a block, and a small hash table, as it is cleared for each piece.
            self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -14, 5)
            self._buffer.write(GZIP_HEADER)

    def write(self, text: bytes | bytearray) -> None:
        """Add a short text of whole lines, to be compressed with its neighbours."""
        self.samples += text.count(b"\n") - text.count(b"\n#") - text.startswith(b"#")
        self._write(text)

    def write_piece(self, piece: Piece, samples: int) -> None:
        """Add a piece with so many samples."""
        self.samples += samples
        if self._known is None or len(piece.plain) < SMALL_BYTES:
            self._write(piece.plain)
        else:
            self._flush(self._known)
            if piece.packed is None:
                piece.packed = self._compress(piece.plain)
            self._add(piece.plain, piece.packed)

    def close(self) -> bytes:
        """Return the whole body."""
        if self._known is not None:
            self._flush(self._known)
            self._buffer.write(LAST_BLOCK + self._crc.to_bytes(4, "little"))
            self._buffer.write((self._size & 0xFFFFFFFF).to_bytes(4, "little"))
        return self._buffer.getvalue()  # does not copy: the buffer itself becomes the bytes

    def _write(self, text: bytes | bytearray) -> None:
        if self._known is None:
            self._buffer.write(text)
            return
        self._short.append(text)
        self._short_size += len(text)
        if self._short_size >= BLOCK_BYTES:
            self._flush(self._known)

    def _flush(self, known: dict[bytes, bytes]) -> None:
        if self._short:
            plain = b"".join(self._short)
            self._short, self._short_size = [], 0
            packed = self.packed[plain] = known.get(plain) or self._compress(plain)
            self._add(plain, packed)

    def _compress(self, plain: bytes | bytearray) -> bytes:
        return self._compressor.compress(plain) + self._compressor.flush(zlib.Z_FULL_FLUSH)

    def _add(self, plain: bytes | bytearray, packed: bytes) -> None:
        self._crc = zlib.crc32(plain, self._crc)
        self._size += len(plain)
        self._buffer.write(packed)
