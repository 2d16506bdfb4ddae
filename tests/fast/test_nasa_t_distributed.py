"""Two processes on a CPU (gloo), data parallel and sharded (FSDP), come to the weights of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import distributed_worker as worker

from nasa_video.errors import InputError
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import resume


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, worker.__file__, str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_come_to_the_weights_of_one(states: Path, kind: str) -> None:
    trainer = worker.new_trainer(DistributedContext(precision="fp32", cpu=True), 2, kind)
    before = {name: p.detach().clone() for name, p in trainer.states["student"].trained.items()}
    for step in range(1, worker.STEPS + 1):
        trainer.iterate(step)
    for shard in (False, True):
        found = torch.load(states / f"{shard}-{kind}.pt", weights_only=True)
        for part, expected in (
            ("trained", trainer.states["student"].trained),
            ("average", trainer.states["student"].averages),
        ):
            assert found[part].keys() == expected.keys()
            off = sum(float((found[part][n] - p.detach()).square().sum()) for n, p in expected.items()) ** 0.5
            moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in expected.items()) ** 0.5
            assert off < 0.02 * moved


@pytest.mark.slow
def test_sharded_adapters_on_a_base_in_bfloat16_are_the_data_parallel_ones(states: Path) -> None:
    """Between each other: against one process, bfloat16's rounding grows too fast for a tolerance that says much."""
    trainer = worker.new_trainer(DistributedContext(precision="bf16", cpu=True), 1, "bf16")
    assert {p.dtype for p in trainer.student.transformer.blocks[0].parameters()} == {
        torch.bfloat16,
        torch.float32,
    }
    before = trainer.states["student"].trained
    parallel, sharded = (
        torch.load(states / f"{shard}-bf16.pt", weights_only=True)["trained"] for shard in (False, True)
    )
    assert parallel.keys() == sharded.keys() == before.keys()
    off = sum(float((parallel[name] - sharded[name]).square().sum()) for name in before) ** 0.5
    moved = sum(float((parallel[name] - p.detach()).square().sum()) for name, p in before.items()) ** 0.5
    assert moved > 0
    assert off < 1e-3 * moved


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_one_process_goes_on_where_two_stopped(states: Path, shard: bool) -> None:
    context = DistributedContext(precision="fp32", cpu=True)
    trainer = worker.new_trainer(context, 2, "full")
    before = {name: p.detach().clone() for name, p in trainer.states["student"].trained.items()}
    checkpoint = states / f"{shard}-full.checkpoint"
    assert resume(trainer, checkpoint) == 1
    for step in range(2, worker.STEPS + 1):
        trainer.iterate(step)
    found = torch.load(states / f"{shard}-full.pt", weights_only=True)["trained"]
    trained = trainer.states["student"].trained
    off = sum(float((found[n] - p.detach()).square().sum()) for n, p in trained.items()) ** 0.5
    moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in trained.items()) ** 0.5
    assert off < 0.02 * moved
    half = worker.new_trainer(context, 1, "full")
    with pytest.raises(InputError, match="2 passes"):
        resume(half, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_fleet_writes_a_whole_model(states: Path, shard: bool) -> None:
    from causvid_adapter import load_generator

    model = load_generator(states / f"{shard}-full" / "transformer")
    shadow = torch.load(states / f"{shard}-full.pt", weights_only=True)["average"]
    assert all(torch.equal(p, shadow[name]) for name, p in model.named_parameters())


def test_sharding_one_process_is_refused() -> None:
    with pytest.raises(InputError, match="several processes"):
        DistributedContext(shard=True, cpu=True)
