"""Image parts of a request: a data URI to the bytes of a file that may be decoded.

Nothing is fetched: a URL of the client's choice would let it reach what only this machine can. Size and format are
read from the file's header, so that a bomb of pixels is refused before any is allocated.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass

from vlm_nemo.data.header import read_header
from vlm_nemo.data.sample import SampleError
from vlm_nemo.serve.errors import bad_request

PARAM = "image_url"


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may be."""

    bytes: int
    pixels: int


def read_data_uri(url: str, limits: ImageLimits) -> bytes:
    """`data:image/png;base64,…` -> the file's bytes, header checked. Raises APIError (400).

    What the URI says the file is does not count; its first bytes do.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or scheme.strip().lower() != "data":
        shown = scheme.strip().lower() if colon and len(scheme) < 12 else "this kind of"
        raise bad_request(
            f"Cannot load an image from {shown} URL: this server takes data URIs only (data:image/png;base64,…).", PARAM
        )
    head, comma, payload = rest.partition(",")
    if not comma:
        raise bad_request("Invalid data URL: missing ',' separator.", PARAM)
    if not head.lower().endswith(";base64"):
        raise bad_request("Only base64 data URLs are supported for now.", PARAM)
    if len(payload) // 4 * 3 > limits.bytes + 2:
        raise bad_request(f"An image is longer than the {limits.bytes} bytes that this server takes.", PARAM)
    try:
        data = binascii.a2b_base64(payload.encode("ascii"), strict_mode=True)
    except ValueError:  # binascii.Error and UnicodeEncodeError are both
        raise bad_request("Failed to load image: the data URL is not valid base64.", PARAM) from None
    if len(data) > limits.bytes:
        raise bad_request(f"An image is longer than the {limits.bytes} bytes that this server takes.", PARAM)
    check_header(data, limits)
    return data


def check_header(data: bytes, limits: ImageLimits) -> None:
    """Raises APIError (400) if the file is no image, or one that must not be decoded."""
    try:
        header = read_header(data)
    except SampleError as error:
        raise bad_request(f"Failed to load image: {error.detail}", PARAM) from None
    if header.width * header.height > limits.pixels:
        raise bad_request(
            f"Image dimensions {header.width}x{header.height} exceed the maximum of {limits.pixels} pixels.", PARAM
        )
