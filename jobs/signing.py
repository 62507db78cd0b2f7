"""The key that signs what jobs make: named by the job, else by COUNTERFAKE_C2PA_CERT and COUNTERFAKE_C2PA_KEY.

    counterfake run generate gan-samples --set sign.certificate=chain.pem --set sign.key=key.pem

Both are PEM files: the chain of certificates with the signer's own first, and its private key. Without them files carry the
XMP mark only. A key that is missing or does not sign is refused before anything is made.
"""

from __future__ import annotations

import os

from counterfake.provenance import Signer, Signing


def signer(sign: Signing) -> Signer | None:
    """The signer of a job, tried once; None where neither the job nor the environment names a key. Raises ConfigError."""
    if not sign.key:
        sign = Signing(
            certificate=os.environ.get("COUNTERFAKE_C2PA_CERT", ""),
            key=os.environ.get("COUNTERFAKE_C2PA_KEY", ""),
        )
    return sign.load()
