"""Hostile and damaged images: TIFF and PNG, written by hand where no library would write them."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from files import GREY, Write, flipped, noise, written, zeros
from PIL import Image

TYPES = {"H": 3, "I": 4, "i": 9, "s": 2, "d": 12}  # of TIFF, by struct's letters


def tiff(
    path: Path,
    *,
    following: int = 0,
    data: bytes = bytes(24 * 32),
    without: tuple[str, ...] = (),
    **tags: Any,
) -> Path:
    """One page of 24 x 32 grey pixels; `tags` are (number, letter of struct, value or values)."""
    needed: dict[str, tuple[int, str, Any]] = {
        "width": (256, "I", 32),
        "height": (257, "I", 24),
        "bits": (258, "H", 8),
        "compression": (259, "H", 1),
        "photometric": (262, "H", 1),
        "offsets": (273, "I", 8),
        "samples": (277, "H", 1),
        "rows": (278, "I", 24),
        "counts": (279, "I", len(data)),
    }
    entries = sorted(tag for name, tag in {**needed, **tags}.items() if name not in without)
    start = 8 + len(data) + len(data) % 2
    extra, body = b"", b""
    for number, letter, value in entries:
        values = value if isinstance(value, tuple) else (value,)
        raw = value if letter == "s" else struct.pack(f"<{len(values)}{letter}", *values)
        count = len(value if letter == "s" else values)
        if len(raw) > 4:
            where = start + 2 + 12 * len(entries) + 4 + len(extra)
            extra, raw = extra + raw, struct.pack("<I", where)
        body += struct.pack("<HHI", number, TYPES[letter], count) + raw.ljust(4, b"\0")
    last = struct.pack("<I", start if following == -1 else following)
    head = struct.pack("<2sHI", b"II", 42, start) + data.ljust(start - 8, b"\0")
    path.write_bytes(head + struct.pack("<H", len(entries)) + body + last + extra)
    return path


def page(**how: Any) -> Write:
    return lambda folder: tiff(folder / "a.tif", **how)


def stack(volume: np.ndarray = GREY, keep: float = 1.0, **how: Any) -> Write:
    """By tifffile; only a part of the file."""

    def write(folder: Path) -> Path:
        path = folder / "a.tif"
        tifffile.imwrite(path, volume, photometric="minisblack", **how)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        return path

    return write


def bomb(side: int, **tags: Any) -> Write:
    """A page of side x side zeros in one deflated strip."""
    size = {
        "width": (256, "I", side),
        "height": (257, "I", side),
        "rows": (278, "I", side),
        "compression": (259, "H", 8),
    }
    megabytes = side * side * tags.get("bits", (0, "H", 8))[2] // 8 // 2**20
    return lambda folder: tiff(folder / "a.tif", data=zeros(megabytes), **size | tags)


def two_pages_that_follow_each_other(folder: Path) -> Path:
    path = folder / "a.tif"
    tifffile.imwrite(path, GREY[:2], photometric="minisblack", metadata=None)
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        first, last = (page.offset for page in tif.pages)
    n = struct.unpack_from("<H", raw, last)[0]
    struct.pack_into("<I", raw, last + 2 + 12 * n, first)
    path.write_bytes(raw)
    return path


def described(text: str, name: str = "a.ome.tif") -> Write:
    return lambda folder: tiff(folder / name, text=(270, "s", text.encode() + b"\0"))


def ome(slices: int, data: str = "<TiffData/>") -> Write:
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    return described(
        f'<?xml version="1.0"?><OME xmlns="{schema}"><Image ID="Image:0"><Pixels ID="Pixels:0"'
        f' DimensionOrder="XYZCT" Type="uint8" SizeX="32" SizeY="24" SizeC="1" SizeT="1"'
        f' SizeZ="{slices}"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image>'
        "</OME>"
    )


def ome_of_a_file_outside(folder: Path) -> Path | str:
    """The second plane is in a file elsewhere: who opens this reads what the sender could not."""
    tifffile.imwrite(folder.parent / "secret.tif", GREY[0], photometric="minisblack")
    data = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{z}</UUID>'
        "</TiffData>"
        for z, name in enumerate(("a.ome.tif", "../secret.tif"))
    )
    return ome(2, data)(folder)


LAUGHS = '<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
HUGE = 2**31 - 16
TIFFS: dict[str, Write] = {
    "tiff-empty": written("a.tif", b""),
    "tiff-noise": written("a.tif", noise(5000)),
    "tiff-header-only": written("a.tif", b"II*\0\x08\0\0\0"),
    "tiff-65535-entries": written("a.tif", struct.pack("<2sHIH", b"II", 42, 8, 65535) + bytes(99)),
    "tiff-is-a-png": written("a.tif", b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "bigtiff-offset-of-2-63": written("a.tif", struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**63)),
    "tiff-directory-follows-itself": page(following=-1),
    "tiff-two-pages-in-a-circle": two_pages_that_follow_each_other,
    "tiff-next-page-past-the-end": page(following=2**31),
    "tiff-truncated": stack(keep=0.5, compression="zlib"),
    "tiff-strip-past-the-end": page(offsets=(273, "I", 2**31)),
    "tiff-strip-longer-than-the-file": page(counts=(279, "I", 2**32 - 1)),
    "tiff-strip-too-short": page(counts=(279, "I", 5)),
    "tiff-no-strips": page(offsets=(273, "I", ()), counts=(279, "I", ())),
    "tiff-strips-of-another-number": page(
        data=zlib.compress(bytes(32)), rows=(278, "I", 1), compression=(259, "H", 8)
    ),
    "tiff-strips-of-two-lengths": page(offsets=(273, "I", (8, 8, 8)), counts=(279, "I", (1, 2))),
    "tiff-damaged-deflate": page(data=b"\x78\x9c" + bytes(range(200)), compression=(259, "H", 8)),
    "tiff-unknown-compression": page(compression=(259, "H", 60000)),
    "tiff-negative-width": page(width=(256, "i", -32)),
    "tiff-no-width": page(width=(256, "I", 0)),
    "tiff-width-of-4-billion": page(width=(256, "I", 2**32 - 1)),
    "tiff-65000-by-65000-in-768-bytes": page(
        width=(256, "I", 65000), height=(257, "I", 65000), rows=(278, "I", 65000)
    ),
    "tiff-tiles-of-2-billion": page(
        without=("offsets", "counts", "rows"),
        compression=(259, "H", 8),
        tw=(322, "I", HUGE),
        th=(323, "I", HUGE),
        to=(324, "I", 8),
        tc=(325, "I", 768),
    ),
    "tiff-60000-samples": page(samples=(277, "H", 60000)),
    "tiff-77-bits": page(bits=(258, "H", 77)),
    "tiff-deflate-bomb": bomb(32768),
    "tiff-deflate-bomb-of-doubles": bomb(11264, bits=(258, "H", 64), format=(339, "H", 3)),
    "tiff-two-million-slices-said-by-imagej": described("ImageJ=1.54\nimages=2000000\n", "a.tif"),
    "ome-two-million-slices": ome(2000000),
    "ome-negative-slices": ome(-3),
    "ome-plane-in-a-file-outside": ome_of_a_file_outside,
    "ome-entities-that-multiply": described(
        f'<?xml version="1.0"?><!DOCTYPE OME [{LAUGHS}]><OME xmlns="x">&j;</OME>'
    ),
    "tiff-infinite-values": stack(np.full((3, 24, 32), np.inf, np.float32)),
    "tiff-complex-values": stack(np.ones((3, 24, 32), np.complex64)),
}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    colour: int = 0,
    bits: int = 8,
    packed: bytes = b"",
    before: bytes = b"",
) -> bytes:
    """With these deflated pixels, or noise."""
    packed = packed or zlib.compress(noise(height * (width + 1)), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def png_bomb(side: int, colour: int, bits: int = 8) -> Write:
    samples = {0: 1, 2: 3, 6: 4}[colour] * bits // 8
    packed = zeros(-(-side * (side * samples + 1) // 2**20))
    return written("a.png", png(side, side, colour, bits, packed))


def postscript(folder: Path) -> Path:
    """Pillow hands PostScript of any name to Ghostscript, a program that runs it."""
    text = (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\n({folder.parent}/ran)"
    )
    (folder / "a.png").write_text(text + " (w) file closefile\nshowpage\n")
    return folder / "a.png"


def jpeg(folder: Path) -> Path:
    Image.fromarray(GREY[0]).save(folder / "a.png", format="JPEG")
    return folder / "a.png"


TEXTS = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zeros(50)) for i in range(4))
PNGS: dict[str, Write] = {
    "png-empty": written("a.png", b""),
    "png-truncated": written("a.png", png(32, 24)[:300]),
    "png-wrong-checksum": written("a.png", flipped(png(32, 24), 20)),
    "png-damaged-pixels": written("a.png", flipped(png(32, 24), 200)),
    "png-no-width": written("a.png", png(0, 24)),
    "png-2-billion-pixels-a-side": written("a.png", png(2**31 - 1, 2**31 - 1, packed=b"x")),
    "png-fewer-pixels-than-said": written("a.png", png(1000, 1000, packed=zlib.compress(b"x"))),
    "png-bomb": png_bomb(20000, 0),
    "png-bomb-of-colours": png_bomb(13000, 6),
    "png-bomb-of-16-bit-colours": png_bomb(11000, 2, 16),
    "png-text-that-unpacks-to-200-mb": written("a.png", png(32, 24, before=TEXTS)),
    "png-chunk-of-2-gb": written("a.png", png(32, 24)[:33] + struct.pack(">I", HUGE) + b"IDAT"),
    "png-is-a-jpeg": jpeg,
    "png-is-postscript": postscript,
}
