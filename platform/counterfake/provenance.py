"""Where a picture or video says it comes from: mark what we generate as synthetic, read marks and Content Credentials.

The mark is an XMP packet with the IPTC property DigitalSourceType, the vocabulary that platforms read to label
generated media (https://cv.iptc.org/newscodes/digitalsourcetype). In an MP4 it is the `uuid` box of the XMP
specification, part 3, 1.2.7.1. It is a label, not a proof: anyone can remove it, so its absence says nothing. `label` is
the mark that people see. C2PA manifests are signed: they are read, and with a key written, where the optional package
c2pa-python is installed; this file is its only home.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal
from xml.sax.saxutils import escape, unescape

import cv2
import numpy as np

import counterfake
from counterfake import media
from counterfake.errors import ConfigError, MediaError
from counterfake.media import Pixels

logger = logging.getLogger(__name__)

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
SourceType = Literal[
    "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "digitalCapture", "compositeSynthetic"
]
SYNTHETIC = frozenset(
    (
        "trainedAlgorithmicMedia",
        "compositeWithTrainedAlgorithmicMedia",
        "compositeSynthetic",
        "algorithmicMedia",
    )
)
C2paState = Literal["", "Valid", "Trusted", "Invalid", "unreadable"]
OFFLINE = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}
}  # an upload must not make us call a URL
MIME = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "mp4": "video/mp4"}
XMP_UUID = bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")  # of the MP4 box that holds a packet
PACKET_BYTES = 1 << 20  # of a packet that is read from an MP4 or a GIF
GIF = b"GIF89a"
GIF_BLOCK = b"\x21\xff\x0bXMP DataXMP"
GIF_TRAILER = bytes((1, *range(255, -1, -1), 0))
# no second, smaller picture inside
SIGNING: dict[str, Any] = {**OFFLINE, "builder": {"thumbnail": {"enabled": False}}}
CURVES = {256: "es256", 384: "es384", 521: "es512"}  # bits of an elliptic key -> its algorithm's name in C2PA
LABEL = "AI-generated"  # the words people see
LABEL_HEIGHT = 0.05  # of the label / shorter side of the picture
LABEL_LEAST = 12  # pixels of that height: less cannot be read

PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/">
   <Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
   <xmp:CreatorTool>{maker}</xmp:CreatorTool>{terms}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
TERMS = """
   <xmpRights:UsageTerms xmlns:xmpRights="http://ns.adobe.com/xap/1.0/rights/"><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></xmpRights:UsageTerms>"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a file claims about itself. Empty text and false mean: it claims nothing."""

    digital_source_type: str = ""  # last part of the IPTC term, e.g. trainedAlgorithmicMedia
    maker: str = ""  # the tool the file names
    has_c2pa: bool = False  # carries a C2PA manifest
    c2pa_state: C2paState = ""  # of its signature: Valid, Trusted, Invalid; unreadable without c2pa-python
    c2pa_generator: str = ""  # who the manifest says made the claim
    c2pa_problems: tuple[str, ...] = ()  # status codes of what failed

    @property
    def claims_synthetic(self) -> bool:
        """Whether the file itself says that an algorithm made it, wholly or in part."""
        return self.digital_source_type in SYNTHETIC

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "c2pa_problems": list(self.c2pa_problems),
            "claims_synthetic": self.claims_synthetic,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signing:
    """Where the key is that signs what is made, as files of PEM; both empty = the mark only."""

    certificate: str = ""  # path of the chain, the signer's own certificate first
    key: str = ""  # path of its private key, not encrypted

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            have, lack = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise ConfigError(
                f"sign.{have} is set but sign.{lack} is not; set both, or neither to leave files unsigned"
            )

    def load(self) -> Signer | None:
        """The signer, tried on a small picture; None if none is asked for. Raises ConfigError."""
        if not self.key:
            return None
        chain, key = _pem("sign.certificate", self.certificate), _pem("sign.key", self.key)
        signer = Signer(chain, *_algorithm(key, self.key))
        signer.check(f"sign.certificate {self.certificate} and sign.key {self.key}")
        return signer


@dataclasses.dataclass(frozen=True)
class Signer:
    """A key that signs C2PA manifests; the signature holds as long as the certificate, no time stamp is asked of anyone.

    Two signatures of one picture differ: each manifest has a name of its own and the time it was made."""

    chain: bytes = dataclasses.field(repr=False)  # PEM
    key: bytes = dataclasses.field(repr=False)  # PEM, PKCS #8
    algorithm: str  # es256, ed25519, …

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the chain: names the signer without the key."""
        return hashlib.sha256(self.chain).hexdigest()

    def sign(
        self, source: BinaryIO, out: BinaryIO, kind: str, *, maker: str, source_type: SourceType
    ) -> None:
        """Copy a JPEG, PNG, WEBP or MP4 of `kind` to `out` with a manifest that says what made it. Pixels stay."""
        c2pa = importlib.import_module("c2pa")
        info = c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, None)
        context = c2pa.Context.from_dict(SIGNING)
        with (
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(_manifest(maker, source_type, kind), context) as builder,
        ):
            builder.sign(signer, MIME[kind], source, out)

    def check(self, name: str) -> None:
        """Sign a small picture; the library verifies it. Raises ConfigError, which calls the key `name`, where that fails."""
        picture = io.BytesIO(media.encode(np.zeros((8, 8, 3), np.uint8), "png"))
        try:
            self.sign(picture, io.BytesIO(), "png", maker="", source_type="trainedAlgorithmicMedia")
        except ImportError as error:
            raise ConfigError(
                "signing needs c2pa-python, which is not installed: pip install c2pa-python"
            ) from error
        except Exception as error:  # a native library: one of a dozen kinds, each with a text
            raise ConfigError(
                f"{name} do not sign: {' '.join(str(error).split())[:200]}; C2PA wants the certificate of this very key, in "
                "force, for e-mail protection or document signing"
            ) from error


def packet(*, maker: str, source_type: SourceType = "trainedAlgorithmicMedia", terms: str = "") -> bytes:
    """The XMP packet that marks generated media; `maker` is what made it, e.g. dcgan-faces@7, `terms` what it may be
    used for."""
    usage = TERMS.format(text=_clean(terms)) if terms else ""
    return PACKET.format(source_type=VOCABULARY + source_type, maker=_clean(maker), terms=usage).encode()


def mark(
    data: bytes,
    *,
    maker: str,
    source_type: SourceType = "trainedAlgorithmicMedia",
    terms: str = "",
    signer: Signer | None = None,
) -> bytes:
    """The same JPEG, PNG, WEBP, MP4 or GIF marked as generated by `maker`, and signed where there is a signer (a GIF is
    not). Pixels are not encoded again; an older mark goes, but for that of a GIF. Raises MediaError for other files."""
    xmp, kind = packet(maker=maker, source_type=source_type, terms=terms), media.sniff(data)
    if data.startswith(GIF):
        return _gif_with_xmp(data, xmp)
    if kind == "mp4":
        file = io.BytesIO(data)
        _mark_mp4(file, xmp)
        marked = file.getvalue()
    else:
        marked = media.embed_xmp(data, xmp)
    if signer is None:
        return marked
    out = io.BytesIO()
    signer.sign(io.BytesIO(marked), out, kind, maker=maker, source_type=source_type)
    return out.getvalue()


def mark_video(
    path: Path,
    *,
    maker: str,
    source_type: SourceType = "compositeWithTrainedAlgorithmicMedia",
    terms: str = "",
    signer: Signer | None = None,
) -> None:
    """`mark` for an MP4 of any size, in place: some hundred bytes are added at its end, an older packet is struck out.
    A signer writes the file a second time, beside it. Raises MediaError for other files."""
    with path.open("r+b") as file:
        _mark_mp4(file, packet(maker=maker, source_type=source_type, terms=terms))
        file.flush()
        os.fsync(file.fileno())
    if signer is not None:
        _sign_video(signer, path, maker, source_type)


def read_video(path: Path) -> Provenance:
    """What an MP4 of any size claims in its XMP packet; `read` also looks for C2PA. Raises OSError, nothing else."""
    with path.open("rb") as file:
        return _claimed(_read_mp4(file) or b"", {})


def label(pixels: Pixels, text: str = LABEL) -> Pixels:
    """A copy of pixels (H, W, 3) with the words in its lower left corner, white on a dark ground."""
    out = np.ascontiguousarray(pixels).copy()
    left, top, right, bottom = label_box((out.shape[1], out.shape[0]), text)
    out[top:bottom, left:right] //= 3
    scale, thickness, base = _letters(bottom - top)
    cv2.putText(
        out, text, (left + base, bottom - base), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thickness, cv2.LINE_AA
    )  # fmt: skip
    return out


def label_box(image_size: tuple[int, int], text: str = LABEL) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of `label` in a picture of image_size (width, height)."""
    width, height = image_size
    tall = max(LABEL_LEAST, round(LABEL_HEIGHT * min(width, height)))
    scale, thickness, base = _letters(tall)
    (wide, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    return 0, max(0, height - tall), min(width, wide + 2 * base), height


def read(data: bytes) -> Provenance:
    """What the file claims. Never raises: hostile metadata is the same as none."""
    if data.startswith(GIF):
        xmp = _gif_xmp(data)
    else:
        xmp = _read_mp4(io.BytesIO(data)) if media.sniff(data) == "mp4" else media.read_xmp(data)
    return _claimed(xmp or b"", _read_c2pa(data))


# -- private --------------------------------------------------------------------------------------------------------


def _claimed(xmp: bytes, claims: dict[str, Any]) -> Provenance:
    text = xmp.decode("utf-8", "replace")
    source_type = _property(text, "DigitalSourceType").rstrip("/").rpartition("/")[2]
    signed_type = claims.pop("digital_source_type", "")
    if claims.get("c2pa_state") in ("Valid", "Trusted") and signed_type:
        source_type = signed_type  # a signature that holds outweighs a packet anyone can write
    return Provenance(
        digital_source_type=source_type or signed_type,
        maker=_property(text, "CreatorTool"),
        **claims,
    )


def _manifest(maker: str, source_type: SourceType, kind: str) -> str:
    """What is signed: one action, that the file was created by `maker`. C2PA specification 2, 18.15."""
    agent = {"softwareAgent": {"name": maker}} if maker else {}
    action = {"action": "c2pa.created", "digitalSourceType": VOCABULARY + source_type, **agent}
    generator = {"name": "counterfake", "version": counterfake.__version__}
    assertion = {"label": "c2pa.actions.v2", "data": {"actions": [action]}}
    return json.dumps({"claim_generator_info": [generator], "format": MIME[kind], "assertions": [assertion]})


def _sign_video(signer: Signer, path: Path, maker: str, source_type: SourceType) -> None:
    signed = path.with_name(f".{path.name}.{os.getpid()}.signing")
    try:
        with path.open("rb") as source, signed.open("w+b") as out:
            signer.sign(source, out, "mp4", maker=maker, source_type=source_type)
            out.flush()
            os.fsync(out.fileno())
        os.replace(signed, path)
    finally:
        signed.unlink(missing_ok=True)


def _pem(name: str, path: str) -> bytes:
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be read: {error.strerror}; name a PEM file") from error
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{name} {path} is no PEM file; convert it with openssl")
    return data


def _algorithm(data: bytes, path: str) -> tuple[bytes, str]:
    """(the private key as PKCS #8, the name of its algorithm in C2PA)."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise ConfigError(
            f"sign.key {path} holds no private key that can be read: {str(error)[:150]}"
        ) from error
    if isinstance(key, EllipticCurvePrivateKey) and key.curve.key_size in CURVES:
        algorithm = CURVES[key.curve.key_size]
    elif isinstance(key, Ed25519PrivateKey):
        algorithm = "ed25519"
    elif isinstance(key, RSAPrivateKey):
        algorithm = "ps256"
    else:
        raise ConfigError(
            f"sign.key {path} is a {type(key).__name__}; C2PA signs with Ed25519, P-256/384/521 or RSA keys"
        )
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), algorithm


def _clean(text: str) -> str:
    return escape("".join(c for c in text if c.isprintable()))


def _letters(height: int) -> tuple[float, int, int]:
    """(font scale, thickness, pixels below and beside the letters) of a label of this height."""
    return height / 36, max(1, round(height / 24)), round(0.3 * height)


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int, int]]:
    """(type, start, start of its content, end) of each top-level MP4 box, as far as sizes make sense. ISO 14496-12, 4.2."""
    length = file.seek(0, os.SEEK_END)
    at = 0
    for _ in range(65_536):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return
        size, start = int.from_bytes(head[:4], "big"), at + 8
        if size == 1:
            size, start = int.from_bytes(head[8:16], "big"), at + 16
        end = length if size == 0 else at + size
        if end < start or end > length:
            return
        yield head[4:8], at, start, end
        at = end


def _packets(file: BinaryIO) -> list[tuple[int, int, int]]:
    """(start, start of the packet, end) of the boxes of XMP_UUID."""
    found = []
    for kind, at, start, end in list(_boxes(file)):
        file.seek(start)
        if kind == b"uuid" and file.read(16) == XMP_UUID:
            found.append((at, start + 16, end))
    return found


def _read_mp4(file: BinaryIO) -> bytes | None:
    for _, start, end in _packets(file):
        file.seek(start)
        return file.read(min(end - start, PACKET_BYTES))
    return None


def _mark_mp4(file: BinaryIO, xmp: bytes) -> None:
    """The packet as the last box; no other byte moves, so that chunk offsets stay true."""
    length = file.seek(0, os.SEEK_END)
    boxes = list(_boxes(file))
    if not boxes or boxes[0][0] != b"ftyp" or boxes[-1][3] != length:
        raise MediaError("unsupported", "only a whole MP4 file can be marked; write the video again")
    file.seek(boxes[-1][1])
    if file.read(4) == bytes(4):  # "to the end of the file"
        raise MediaError("unsupported", "the last box of this MP4 has no size; write the video again")
    for at, _, _ in _packets(file):
        file.seek(at + 4)
        file.write(b"free")
    file.seek(length)
    file.write(struct.pack(">I", 24 + len(xmp)) + b"uuid" + XMP_UUID + xmp)


def _gif_with_xmp(data: bytes, xmp: bytes) -> bytes:
    """The packet in an application block behind the global colours. XMP specification, part 3, 1.1.2: the bytes lie there
    in the open, and a reader that takes them for lengths of blocks is led to the end of them by GIF_TRAILER."""
    at = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    if len(data) <= at:
        raise MediaError("unsupported", "only a whole GIF can be marked; write it again")
    return data[:at] + GIF_BLOCK + xmp + GIF_TRAILER + data[at:]


def _gif_xmp(data: bytes) -> bytes | None:
    _, found, rest = data.partition(GIF_BLOCK)
    return rest[:PACKET_BYTES].partition(GIF_TRAILER)[0] if found else None


def _property(text: str, name: str) -> str:
    """An XMP property as an element or an attribute, by local name. No XML parser meets untrusted bytes here."""
    element = re.search(
        rf"<[A-Za-z0-9_]{{1,32}}:{name}(?:\s+rdf:resource=\"([^\"<]{{0,500}})\"\s*/)?>([^<]{{0,500}})", text
    )
    attribute = re.search(rf":{name}=[\"']([^\"'<]{{0,500}})[\"']", text)  # starts with what is rare: linear
    found = (element[1] or element[2]) if element else attribute[1] if attribute else ""
    return unescape(found.strip())


def _read_c2pa(data: bytes) -> dict[str, Any]:
    """The manifest's facts; {} when the file carries none. Nothing is fetched over the network for it."""
    kind = media.sniff(data)
    if kind not in MIME or b"jumb" not in data or b"c2pa" not in data:
        return {}
    try:
        c2pa = importlib.import_module("c2pa")
    except ImportError:
        return {"has_c2pa": True, "c2pa_state": "unreadable"}
    try:
        context = c2pa.Context.from_dict(OFFLINE)
        with c2pa.Reader(MIME[kind], io.BytesIO(data), context=context) as reader:
            return _facts(json.loads(reader.json()))
    except Exception as error:  # a native parser over hostile bytes: whatever it says, the upload must go on
        logger.info("C2PA manifest not readable: %s", error)
        return {} if "ManifestNotFound" in str(error) else {"has_c2pa": True, "c2pa_state": "unreadable"}


def _facts(store: dict[str, Any]) -> dict[str, Any]:
    manifest = store.get("manifests", {}).get(store.get("active_manifest", ""), {})
    state = store.get("validation_state", "unreadable")
    problems = {item.get("code", "") for item in store.get("validation_status") or []}
    return {
        "has_c2pa": True,
        "c2pa_state": state if state in ("Valid", "Trusted", "Invalid") else "unreadable",
        "c2pa_generator": str(_generator(manifest))[:200],
        "c2pa_problems": tuple(sorted(problems - {""})),
        "digital_source_type": _action_source_type(manifest),
    }


def _generator(manifest: dict[str, Any]) -> str:
    infos = manifest.get("claim_generator_info") or []
    named = " ".join(str(info.get("name", "")) for info in infos if isinstance(info, dict))
    return manifest.get("claim_generator") or named


def _action_source_type(manifest: dict[str, Any]) -> str:
    """digitalSourceType of the actions of a manifest: C2PA specification 2, 18.15."""
    for assertion in manifest.get("assertions") or []:
        content = assertion.get("data") if isinstance(assertion, dict) else None
        for action in (content or {}).get("actions", []) if isinstance(content, dict) else []:
            if isinstance(action, dict) and (found := action.get("digitalSourceType")):
                return str(found).rstrip("/").rpartition("/")[2]
    return ""
