"""Dockerfile, compose file and the manifests outside the chart: what they must hold, and what they must not."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.deploy.chart import read
from tests.deploy.kubernetes_schemas import problems
from tests.live_server import REPO_ROOT

DEPLOY = REPO_ROOT / "deploy"
COMPOSE = read(DEPLOY / "compose.yaml")
SERVICES: dict[str, dict[str, object]] = COMPOSE["services"]  # type: ignore[assignment]
# the top-level and service keys of the Compose Specification that are used here or nearby; others are spelling mistakes
COMPOSE_KEYS = {"name", "services", "volumes", "networks", "secrets", "configs"}
SERVICE_KEYS = {
    *("build", "cap_add", "cap_drop", "command", "depends_on", "entrypoint", "environment", "gpus", "healthcheck"),
    *("image", "logging", "mem_limit", "networks", "ports", "read_only", "restart", "security_opt"),
    *("stop_grace_period", "tmpfs", "ulimits", "user", "volumes"),
}


def dockerfile() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, lines joined, comments dropped."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


STEPS = dockerfile()


def arguments_of(instruction: str) -> list[str]:
    """Return the arguments of every instruction of one kind."""
    return [argument for name, argument in STEPS if name == instruction]


def test_the_image_runs_as_a_user_of_its_own_and_says_how_it_is() -> None:
    assert arguments_of("USER") == ["10001:10001"]
    names = [name for name, _ in STEPS]
    last_stage = names[len(names) - names[::-1].index("FROM") :]
    assert last_stage.index("USER") > max(i for i, name in enumerate(last_stage) if name in {"RUN", "COPY"})
    assert json.loads(arguments_of("ENTRYPOINT")[0]) == ["chorale"] and json.loads(arguments_of("CMD")[0]) == ["serve"]
    assert "/livez" in arguments_of("HEALTHCHECK")[0]
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", " ".join(arguments_of("LABEL"))))
    assert labels >= {"title", "description", "licenses", "version", "revision"}


def test_the_image_is_built_in_two_stages_from_a_base_that_can_be_pinned() -> None:
    assert len(arguments_of("FROM")) == 2
    assert all("${BASE_DIGEST:+@${BASE_DIGEST}}" in base for base in arguments_of("FROM"))
    assert not any("latest" in argument for argument in arguments_of("ARG") + arguments_of("FROM"))
    assert [argument for argument in arguments_of("COPY") if "--from=build" in argument] == [
        "--from=build /opt/chorale /opt/chorale"
    ]


def test_the_image_takes_nothing_it_should_not() -> None:
    everything = " ".join(argument for _, argument in STEPS)
    for word in ("ADD", "curl", "wget", "sudo", "chmod 777", "--trusted-host", "SECRET", "PASSWORD", "TOKEN"):
        assert word not in everything, word
    # a compiler where the CPU's kernels are built, which is left behind, and in the image only where triton needs one
    building, last_run = (argument for argument in arguments_of("RUN") if "apt-get" in argument)
    for run, device in ((building, "cpu"), (last_run, "cuda")):
        condition = rf'if \[ "\$\{{DEVICE\}}" = {device} \]; then\s*apt-get update .*gcc.*rm -rf /var/lib/apt/lists'
        assert re.search(condition, run), run
        assert "--no-install-recommends" in run
    stages = [argument for instruction, argument in STEPS if instruction in ("FROM", "RUN")]
    second = [i for i, argument in enumerate(stages) if "BASE_IMAGE" in argument][1]
    assert stages.index(building) < second < stages.index(last_run)


def test_what_is_copied_exists_and_passes_the_ignore_file() -> None:
    kept = {
        line.removeprefix("!")
        for line in (REPO_ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    for argument in arguments_of("COPY"):
        sources = [word for word in shlex.split(argument)[:-1] if not word.startswith("--from")]
        for source in [] if "--from=build" in argument else sources:
            assert (REPO_ROOT / source).exists() and source in kept, source
    # whatever the wheel is made of must be there
    packages = re.search(r"packages = \[(.*)\]", (REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert packages is not None
    for package in re.findall(r'"(\w+)', packages.group(1)):
        assert package in kept


def test_cuda_wheels_come_into_the_gpu_build_alone() -> None:
    script = (DEPLOY / "image_steps.sh").read_text(encoding="utf-8")
    cpu, cuda = script.split("  cpu)")[1].split("  cuda)")
    assert "torch.version.cuda is not None" in cpu and "-c constraints.txt" in cpu
    assert "cuda" in cuda and "set -eu" in script


def test_compose_knows_every_key_that_is_used() -> None:
    assert {key for key in COMPOSE if not key.startswith("x-")} <= COMPOSE_KEYS
    for name, service in SERVICES.items():
        assert set(service) - {"<<"} <= SERVICE_KEYS, name
        used = [str(volume).split(":")[0] for volume in service.get("volumes", [])]  # type: ignore[attr-defined]
        named = {volume for volume in used if re.fullmatch(r"[a-z]+", volume)}
        assert named <= set(COMPOSE["volumes"]), name  # type: ignore[call-overload]
        for path in (volume for volume in used if volume.startswith("./")):
            assert (DEPLOY / path).exists(), path
        assert set(service.get("depends_on", {})) <= set(SERVICES), name  # type: ignore[call-overload]


@pytest.mark.parametrize("name", SERVICES)
def test_compose_services_are_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service and "restart" in service
    tag = str(service["image"]).rpartition(":")[2]
    assert tag and tag != "latest"
    # what is published is published on this machine alone
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))  # type: ignore[attr-defined]


def test_compose_has_what_the_design_names_and_waits_for_the_drain() -> None:
    assert set(SERVICES) == {"server", "trainer", "redis", "prometheus", "grafana"}
    environment = SERVICES["server"]["environment"]
    assert isinstance(environment, dict)
    grace = str(SERVICES["server"]["stop_grace_period"]).removesuffix("s")
    assert int(grace) > int(environment["CHORALE_DRAIN_TIMEOUT_S"])
    known = set(re.findall(r'envvar="(CHORALE_[A-Z_]+)"', (REPO_ROOT / "serve/cli/options.py").read_text("utf-8")))
    assert set(environment) <= known


@pytest.mark.parametrize(
    "path", sorted(DEPLOY.glob("ray/*.yaml")) + sorted(DEPLOY.glob("lws/*.yaml")), ids=lambda p: p.name
)
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_clusters_accept_the_manifests_outside_the_chart(path: Path, version: str) -> None:
    item = read(path)
    assert problems(item, version) == []
    spec = item["spec"]
    assert isinstance(spec, dict)
    assert problems({**item, "spec": {**spec, "surprise": 1}}, version) != []


def test_the_ray_service_gives_the_application_arguments_that_it_takes() -> None:
    text = (REPO_ROOT / "chorale" / "ray.py").read_text(encoding="utf-8")
    known = set(
        re.findall(r"^    (\w+): (?:str|int|float)\b", text.split("class Settings")[1].split("def ")[0], re.MULTILINE)
    )
    service = (DEPLOY / "ray" / "rayservice.yaml").read_text(encoding="utf-8")
    given = re.search(r"        args:\n((?:          .*\n)+)", service)
    assert given is not None
    assert set(re.findall(r"^ +(\w+):", given.group(1), re.MULTILINE)) <= known
    assert "import_path: chorale.ray:app" in service
