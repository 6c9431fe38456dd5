"""The reference forward against transformers, for every family that is served: it must be right on its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.float_bits import Float32
from serve.model.spec import read_spec
from serve.probe.decoder import Lane, ReferenceDecoder
from serve.probe.weights import ProbeWeights
from tests.model.tiny_models import TINY_MODELS, VOCAB, TinyModel, build_gemma3_multimodal, reference_logits, save

# measured 1e-6 to 2e-5, transformers' own fp32 sums
TOLERANCE = 5e-5
IDS = [int(token) for token in np.random.default_rng(5).integers(3, VOCAB, 40)]


def exact(values: Floats) -> Float32:
    return values.astype(np.float32)


def error(model: torch.nn.Module, folder: Path, max_model_len: int) -> float:
    with torch.random.fork_rng():
        wanted = torch.log_softmax(reference_logits(model, IDS), dim=-1).numpy()
    save(model, folder)
    spec = read_spec(folder)
    lanes = [Lane(SourceModel(), tuple(IDS), exact), Lane(SourceModel(), tuple(IDS[:7]), exact)]
    with ProbeWeights(folder, spec.dims) as weights:
        whole, part = ReferenceDecoder(spec, weights, lanes, max_model_len=max_model_len).logprobs()
    assert np.array_equal(whole[:7], part) or np.abs(whole[:7] - part).max() < TOLERANCE
    assert wanted.std() > 0.3
    return float(np.abs(whole - wanted).max())


@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda model: model.name)
def test_logprobs_are_those_of_transformers(tiny: TinyModel, tmp_path: Path) -> None:
    # longrope: the short factors belong to a server that never goes beyond the original length
    max_model_len = 128 if tiny.name.endswith("longrope-short") else 256
    with torch.random.fork_rng():
        model = tiny.build()
    assert error(model, tmp_path, max_model_len) < TOLERANCE


def test_logprobs_of_a_multimodal_checkpoint_are_those_of_its_text_part(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = build_gemma3_multimodal()
    assert error(model, tmp_path, 256) < TOLERANCE


def test_logprobs_of_exact_gelu_are_those_of_transformers(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = TINY_MODELS[0].build(hidden_act="gelu")
    assert error(model, tmp_path, 256) < TOLERANCE
