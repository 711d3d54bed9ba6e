"""Hostile and damaged images: TIFF and PNG, written by hand where no library would write them."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

GREY = np.random.default_rng(0).integers(0, 256, (3, 24, 32), dtype=np.uint8)
TYPES = {"H": 3, "I": 4, "i": 9, "s": 2, "d": 12}  # of TIFF, by struct's letters
Write = Callable[[Path], Path]


def tiff(
    path: Path,
    *,
    following: int = 0,
    data: bytes = bytes(24 * 32),
    without: tuple[str, ...] = (),
    **tags: Any,
) -> Path:
    """One page of 24 x 32 grey pixels; `tags` are (number, letter of struct, value or values) on top of what it needs."""
    offset = 8
    needed: dict[str, tuple[int, str, Any]] = {
        "width": (256, "I", 32),
        "height": (257, "I", 24),
        "bits": (258, "H", 8),
        "compression": (259, "H", 1),
        "photometric": (262, "H", 1),
        "offsets": (273, "I", offset),
        "samples": (277, "H", 1),
        "rows": (278, "I", 24),
        "counts": (279, "I", len(data)),
    }
    entries = sorted(tag for name, tag in {**needed, **tags}.items() if name not in without)
    start = offset + len(data) + len(data) % 2
    extra, body = b"", b""
    for number, letter, value in entries:
        if letter == "s":
            raw, count = value, len(value)
        else:
            values = value if isinstance(value, tuple) else (value,)
            raw, count = struct.pack(f"<{len(values)}{letter}", *values), len(values)
        if len(raw) > 4:
            where = start + 2 + 12 * len(entries) + 4 + len(extra)
            extra, raw = extra + raw, struct.pack("<I", where)
        body += struct.pack("<HHI", number, TYPES[letter], count) + raw.ljust(4, b"\0")
    ifd = (
        struct.pack("<H", len(entries))
        + body
        + struct.pack("<I", start if following == -1 else following)
    )
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, start) + data.ljust(start - 8, b"\0") + ifd + extra
    )
    return path


def zeros(n: int) -> bytes:
    """`n` MiB of zeros, deflated: one block that stands for itself, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return (
        b"\x78\x9c" + block * n + b"\x03\0" + struct.pack(">HH", n * 2**20 % 65521, 1)
    )  # Adler-32 of zeros


def bomb(side: int, **tags: Any) -> Write:
    """A page of side x side zeros in one deflated strip."""

    def write(folder: Path) -> Path:
        data = zeros(side * side * tags.get("bits", (0, "H", 8))[2] // 8 // 2**20)
        size = {
            "width": (256, "I", side),
            "height": (257, "I", side),
            "rows": (278, "I", side),
            "compression": (259, "H", 8),
        }
        return tiff(folder / "a.tif", data=data, **size | tags)

    return write


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


def imagej(folder: Path) -> Path:
    return tiff(
        folder / "a.tif", text=(270, "s", b"ImageJ=1.54\nimages=2000000\nslices=2000000\n\0")
    )


def described(folder: Path, xml: str) -> Path:
    return tiff(folder / "a.ome.tif", text=(270, "s", xml.encode() + b"\0"))


def ome(pixels: str, data: str = "<TiffData/>") -> str:
    return (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="32" SizeY="24" SizeC="1" SizeT="1" {pixels}>'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
    )


def ome_of_a_file_outside(folder: Path) -> Path:
    """The second plane lies in a file elsewhere: whoever opens this reads what the sender could not."""
    secret = folder.parent / "secret.tif"
    tifffile.imwrite(secret, GREY[0], photometric="minisblack")
    data = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{z}</UUID></TiffData>'
        for z, name in enumerate(("a.ome.tif", "../secret.tif"))
    )
    return described(folder, ome('SizeZ="2"', data))


def laughing_ome(folder: Path) -> Path:
    entities = '<!ENTITY a "ha">' + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    return described(
        folder, f'<?xml version="1.0"?><!DOCTYPE OME [{entities}]><OME xmlns="x">&j;</OME>'
    )


def written(name: str, content: bytes) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def page(**tags: Any) -> Write:
    return lambda folder: tiff(folder / "a.tif", **tags)


def cut_stack(folder: Path) -> Path:
    tifffile.imwrite(folder / "a.tif", GREY, photometric="minisblack", compression="zlib")
    raw = (folder / "a.tif").read_bytes()
    (folder / "a.tif").write_bytes(raw[: len(raw) // 2])
    return folder / "a.tif"


def broken_deflate(folder: Path) -> Path:
    return tiff(folder / "a.tif", data=b"\x78\x9c" + bytes(range(200)), compression=(259, "H", 8))


def not_finite(folder: Path) -> Path:
    tifffile.imwrite(
        folder / "a.tif", np.full((3, 24, 32), np.inf, np.float32), photometric="minisblack"
    )
    return folder / "a.tif"


def complex_values(folder: Path) -> Path:
    tifffile.imwrite(folder / "a.tif", np.ones((3, 24, 32), np.complex64), photometric="minisblack")
    return folder / "a.tif"


TIFFS: dict[str, Write] = {
    "tiff-empty": written("a.tif", b""),
    "tiff-noise": written("a.tif", np.random.default_rng(1).bytes(5000)),
    "tiff-header-only": written("a.tif", b"II*\0\x08\0\0\0"),
    "tiff-directory-past-the-end": written("a.tif", struct.pack("<2sHI", b"II", 42, 2**31)),
    "tiff-65535-entries": written("a.tif", struct.pack("<2sHIH", b"II", 42, 8, 65535) + bytes(100)),
    "tiff-is-a-png": written("a.tif", b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "bigtiff-offset-of-2-63": written("a.tif", struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**63)),
    "tiff-directory-follows-itself": lambda f: tiff(f / "a.tif", following=-1),
    "tiff-two-pages-in-a-circle": two_pages_that_follow_each_other,
    "tiff-truncated": cut_stack,
    "tiff-strip-past-the-end": page(offsets=(273, "I", 2**31)),
    "tiff-strip-longer-than-the-file": page(counts=(279, "I", 2**32 - 1)),
    "tiff-strip-too-short": page(counts=(279, "I", 5)),
    "tiff-no-strips": page(offsets=(273, "I", ()), counts=(279, "I", ())),
    "tiff-strips-of-another-number": lambda f: tiff(
        f / "a.tif", data=zlib.compress(bytes(32)), rows=(278, "I", 1), compression=(259, "H", 8)
    ),
    "tiff-strips-of-two-lengths": page(offsets=(273, "I", (8, 8, 8)), counts=(279, "I", (1, 2))),
    "tiff-damaged-deflate": broken_deflate,
    "tiff-unknown-compression": page(compression=(259, "H", 60000)),
    "tiff-negative-width": page(width=(256, "i", -32)),
    "tiff-negative-height": page(height=(257, "i", -24)),
    "tiff-no-width": page(width=(256, "I", 0)),
    "tiff-width-of-4-billion": page(width=(256, "I", 2**32 - 1)),
    "tiff-65000-by-65000-in-768-bytes": page(
        width=(256, "I", 65000), height=(257, "I", 65000), rows=(278, "I", 65000)
    ),
    "tiff-tiles-of-2-billion": lambda f: tiff(
        f / "a.tif",
        without=("offsets", "counts", "rows"),
        compression=(259, "H", 8),
        tw=(322, "I", 2**31 - 16),
        th=(323, "I", 2**31 - 16),
        to=(324, "I", 8),
        tc=(325, "I", 768),
    ),
    "tiff-60000-samples": page(samples=(277, "H", 60000)),
    "tiff-3-bits": page(bits=(258, "H", 77)),
    "tiff-deflate-bomb": bomb(32768),
    "tiff-deflate-bomb-of-doubles": bomb(11264, bits=(258, "H", 64), format=(339, "H", 3)),
    "tiff-two-million-slices-said-by-imagej": imagej,
    "ome-two-million-slices": lambda f: described(f, ome('SizeZ="2000000"')),
    "ome-negative-slices": lambda f: described(f, ome('SizeZ="-3"')),
    "ome-plane-in-a-file-outside": ome_of_a_file_outside,
    "ome-entities-that-multiply": laughing_ome,
    "tiff-infinite-values": not_finite,
    "tiff-complex-values": complex_values,
}


# -- PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    colour: int = 0,
    bits: int = 8,
    pixels: bytes | None = None,
    before: bytes = b"",
) -> bytes:
    packed = zlib.compress(pixels if pixels is not None else bytes(height * (width + 1)), 9)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + before
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


def png_bomb(width: int, height: int, colour: int, bits: int = 8) -> Write:
    def write(folder: Path) -> Path:
        samples = {0: 1, 2: 3, 6: 4}[colour] * bits // 8
        head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
        data = zeros(-(-height * (width * samples + 1) // 2**20))
        body = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        return folder / "a.png"

    return write


def postscript(folder: Path) -> Path:
    """Pillow hands PostScript of any name to Ghostscript, a program that runs it."""
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\n({folder.parent}/ran) (w) file closefile\nshowpage\n"
    (folder / "a.png").write_text(text)
    return folder / "a.png"


def jpeg(folder: Path) -> Path:
    from PIL import Image

    Image.fromarray(GREY[0]).save(folder / "a.png", format="JPEG")
    return folder / "a.png"


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


PNGS: dict[str, Write] = {
    "png-empty": written("a.png", b""),
    "png-truncated": written(
        "a.png", png(32, 24, pixels=np.random.default_rng(2).bytes(33 * 24))[:300]
    ),
    "png-wrong-checksum": written("a.png", flipped(png(32, 24), 20)),
    "png-damaged-pixels": written(
        "a.png", flipped(png(32, 24, pixels=np.random.default_rng(2).bytes(33 * 24)), 200)
    ),
    "png-no-width": written("a.png", png(0, 24)),
    "png-2-billion-pixels-a-side": written("a.png", png(2**31 - 1, 2**31 - 1, pixels=b"")),
    "png-fewer-pixels-than-said": written("a.png", png(1000, 1000, pixels=bytes(5000))),
    "png-bomb": png_bomb(20000, 20000, 0),
    "png-bomb-of-colours": png_bomb(13000, 13000, 6),
    "png-bomb-of-16-bit-colours": png_bomb(11000, 11000, 2, 16),
    "png-text-that-unpacks-to-200-mb": written(
        "a.png",
        png(32, 24, before=b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zeros(50)) for i in range(4))),
    ),
    "png-chunk-of-2-gb": written(
        "a.png", png(32, 24)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT"
    ),
    "png-is-a-jpeg": jpeg,
    "png-is-postscript": postscript,
}
