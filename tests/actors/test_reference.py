"""Frozen models: what they promise about themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.placement import environment
from actors.reference import FrozenModel, ReferenceWorker
from actors.start import Workers
from learners.experience import Experience
from learners.settings import ModelSettings


def frozen(folder: Path) -> FrozenModel:
    from tests.actors.tiny_models import save_model

    return FrozenModel(save_model(folder, seed=0, tied=True), 100, "cpu")


def test_the_digest_changes_with_a_single_bit_of_a_weight_or_a_buffer(tmp_path: Path) -> None:
    one = frozen(tmp_path)
    one.model.register_buffer("counted", torch.zeros(1))
    before = one.fingerprint()
    assert one.fingerprint() == before
    for tensor in (next(one.model.parameters()), one.model.counted):
        value = tensor.data.flatten()[0].item()
        tensor.data.view(-1)[0] = value + 1e-7
        assert one.fingerprint() != before
        tensor.data.view(-1)[0] = value
        assert one.fingerprint() == before


class Disturbed(ReferenceWorker):
    """A Reference that somebody can write to."""

    def disturb(self) -> None:
        next(self.model.parameters()).data[0, 0] += 1e-3


@pytest.mark.engines
@pytest.mark.timeout(120)
def test_a_frozen_model_that_changed_is_noticed(tmp_path: Path, cluster: None) -> None:
    from tests.actors.tiny_models import save_model

    save_model(tmp_path, seed=0, tied=True)
    options = {"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}
    group = WorkerGroup("reference", f"{__name__}:Disturbed", [options])
    model = ModelSettings(path=str(tmp_path))
    arguments = {"model": model, "temperature": 1.0, "micro_batch_tokens": 9, "device": "cpu"}
    group.gather(group.start(arguments, 60), "start", 60)
    workers: Any = object.__new__(Workers)
    workers.deadline_s = 60
    workers.frozen = {"reference": (group, "fingerprint")}
    workers.loaded = workers.fingerprints()
    workers.check_frozen()
    group.call("disturb", phase="test", deadline_s=60)
    with pytest.raises(WorkerError, match=r"a frozen model \(reference\) changed during the run"):
        workers.check_frozen()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_reference_reads_at_the_sampling_temperature(
    tmp_path: Path, temperature: float
) -> None:
    from tests.actors.tiny_models import logprobs, save_model

    model = save_model(tmp_path, seed=0, tied=False)
    worker = ReferenceWorker(ModelSettings(path=str(tmp_path)), temperature, 100, "cpu")
    ids = [1, 5, 9, 7, 2]
    ours = worker.logprobs(Experience.from_ids([ids[:2]], [ids[2:]]))[0]
    torch.testing.assert_close(ours, logprobs(model, ids, temperature)[1:], atol=1e-5, rtol=0)
