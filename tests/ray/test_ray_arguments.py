"""What the application takes as arguments, and what the shipped manifest gives it. Starts no Ray."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from chorale.ray import Settings


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"model": "m"}, "'store' is missing"),
        ({"model": "m", "store": "s"}, "give redis_url"),
        ({"model": "m", "store": "s", "replica": "2"}, "unknown argument 'replica'"),
        ({"model": "m", "store": "s", "max_replicas": "two"}, "two"),
    ],
)
def test_arguments_that_cannot_work_say_so(args: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Settings.read(args)


def test_numbers_may_come_as_text() -> None:
    settings = Settings.read({"model": "m", "store": "s", "max_replicas": "1", "num_gpus": "0.5"})
    assert settings.max_replicas == 1 and settings.num_gpus == 0.5


def test_the_manifest_is_what_serve_and_the_application_take() -> None:
    manifest = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "rayservice.yaml"
    config = yaml.safe_load(yaml.safe_load(manifest.read_text(encoding="utf-8"))["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "chorale.ray:app"
    settings = Settings.read(application.args)
    assert (settings.min_replicas, settings.max_replicas, settings.num_gpus) == (2, 8, 1.0)
    # what Serve does not know it passes over without a word
    taken = schema.model_dump(exclude_unset=True)
    for given, known in ((config, taken), (config["applications"][0], taken["applications"][0])):
        assert set(given) == set(known)
    assert config["http_options"] == taken["http_options"]
