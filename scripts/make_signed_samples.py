"""Make the signed samples that tests read, with OpenSSF's own library, and let it verify a signature of ours.

    pip install model-signing pyOpenSSL && python -m scripts.make_signed_samples FOLDER

Owns the samples' content. Runs in an environment of its own: the library pulls in twenty packages, among them a client
of Sigstore's servers, which nothing here may need. Invariant: private keys stay in a temporary folder.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing, verifying  # type: ignore[import-not-found]

from adapters_store.signing.keys import SigningKey, public_pem
from adapters_store.signing.sign import sign_folder

FILES = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"not weights"}
CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def main(target: Path) -> None:
    """Write a signature and a public key per curve."""
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as aside:
        folder = Path(aside) / "voice"
        folder.mkdir()
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
        for curve, kind in CURVES.items():
            private = ec.generate_private_key(kind)
            key_file, public_file = Path(aside) / f"{curve}.key", target / f"{curve}.pem"
            pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            key_file.write_bytes(private.private_bytes(*pem))
            public_file.write_bytes(public_pem(private.public_key()))
            config = signing.Config().use_elliptic_key_signer(private_key=key_file)
            config.set_hashing_config(hashing.Config()).sign(folder, target / f"{curve}.sig")
            ours = sign_folder(folder, SigningKey.read(key_file), provenance={"seed": 1})
            ours = ours.rename(Path(aside) / "ours.sig")
            verifying.Config().use_elliptic_key_verifier(public_key=public_file).verify(folder, ours)
            print(f"{curve}: signed by the library; the library verifies a signature of ours")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
