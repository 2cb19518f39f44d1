"""Files of ours taken apart, changed by hand and put together again."""

from __future__ import annotations

import json
import struct
import zlib


def write(path, header, data=b"", length=None):
    """Write a safetensors file by hand, from a header as JSON data or text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def parts(path):
    """Take a file apart: header as data, and the rest."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def place_of(header, name):
    return slice(*header[name]["data_offsets"])


def rewrite(path, change, checksums=True):
    """Change a file of ours: its header, its record and its bytes, with right checksums."""
    header, data = parts(path)
    record = json.loads(header["__metadata__"]["torch_dimap"])
    data = change(header, record, data) or data
    if checksums:
        record["crc32"] = {
            name: f"{zlib.crc32(data[place_of(header, name)]):08x}"
            for name in header if name != "__metadata__"
        }  # fmt: skip
    header["__metadata__"]["torch_dimap"] = json.dumps(record)
    return write(path, header, bytes(data))
