"""Schemathesis reads our OpenAPI document and tries to break what it promises, over the real socket."""

import subprocess
import sys
from pathlib import Path

from tests.api.api_server import ApiServer

ROUTES = "^/(v1/(chat|completions|embeddings|models)|tokenize|detokenize|version)"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_the_document_and_the_routes_agree(api: ApiServer, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{api.url}/openapi.json"]
    command += ["--phases", "coverage,fuzzing", "-n", "5", "--seed", "7", "--checks", CHECKS]
    command += ["--include-path-regex", ROUTES, "--generation-database", "none"]
    # a busy machine is no finding
    command += ["--suppress-health-check", "too_slow", "--request-timeout", "120"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "9 passed" in done.stdout
