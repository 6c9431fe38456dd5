"""The flags that name an object store, for every command that has a store.

Owns spelling and help only.
"""

from typing import Annotated

import typer

BlobsUrl = Annotated[
    str | None,
    typer.Option(
        "--blobs",
        envvar="CHORALE_BLOBS",
        help="S3-compatible store that replicas share instead of a folder: s3://BUCKET/PREFIX. --store is then this "
        "replica's own folder, for copies. Credentials and endpoint come from the environment (AWS_...).",
    ),
]
BlobsCacheBytes = Annotated[
    int,
    typer.Option(envvar="CHORALE_BLOBS_CACHE_BYTES", min=0, help="Bytes of copies kept in --store; with --blobs only."),
]
