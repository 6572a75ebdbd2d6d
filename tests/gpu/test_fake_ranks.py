"""Sixty-four ranks in one process: who works with whom, whose norms meet, and what a shard holds.

Collectives of torch's fake process group do nothing, so no number that crosses ranks is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from radio.dist import Ranks
from radio.model import RadioModel
from train.distributed import DistributedStudent, find_peers, synchronise_norms
from train.groups import Partition, make_partition
from train.losses import DistillationLoss
from train.recipes import recipes
from train.setup import TeacherFacts, model_config

WORLD = 64
PAPER = recipes["paper-h14"]()


@contextmanager
def one_of(world: int, rank: int) -> Iterator[Ranks]:
    """One rank of many, the others of which do nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield Ranks(rank, world)
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def partition() -> Partition:
    """The paper's, which is half the ranks for either group."""
    return make_partition(PAPER, WORLD)


@pytest.mark.parametrize("rank", [0, 31, 32, 63])
def test_peers_and_norms_of_the_papers_ranks(partition: Partition, rank: int) -> None:
    assert [len(group.ranks) for group in partition.groups] == [32, 32]
    with one_of(WORLD, rank):
        peers = find_peers(partition, rank)
        assert peers.ranks == tuple(range(32)) if rank < 32 else tuple(range(32, 64))
        assert (peers.share, peers.leaders) == (32, (0, 32))
        assert peers.lead(rank) == (rank in (0, 32))
        assert peers.process_group is not None
        assert distributed.get_process_group_ranks(peers.process_group) == list(peers.ranks)
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        synchronise_norms(network, peers)
        assert isinstance(network[1], nn.SyncBatchNorm)
        assert network[1].process_group is peers.process_group


def test_in_turns_all_ranks_are_peers() -> None:
    turns = make_partition(replace(PAPER, teacher_placement="shared", batch_size=1024), WORLD)
    with one_of(WORLD, 40):
        peers = find_peers(turns, 40)
    assert (len(peers.ranks), peers.share, peers.process_group, peers.leaders) == (WORLD, WORLD, None, (0,))


@pytest.mark.parametrize("rank", [0, 63])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_rank_holds_its_share_of_the_student(engine: str, rank: int) -> None:
    config = replace(
        PAPER,
        student="vit-tiny12",
        parallel="fsdp" if engine == "fsdp" else "ddp",
        device="cpu",
        resolution=96,
        teachers=tuple(replace(t, student_resolution=None) for t in PAPER.teachers),
    )
    partition = make_partition(config, WORLD)
    facts = {t.name: TeacherFacts("", {96: (96, 96)}, 5, 7, 12) for t in config.teachers}
    cpu = torch.device("cpu")
    with one_of(WORLD, rank) as group:
        model = RadioModel(model_config(config, facts)).train()
        whole = {name: weight.numel() for name, weight in model.named_parameters()}
        peers = find_peers(partition, rank)
        run = DistributedStudent(
            DistillationLoss(model, config.teachers, config.loss), group, peers, cpu, config
        )
        assert run.scale == WORLD / len(peers.ranks)
        for name, weight in model.named_parameters():
            sharded = engine == "fsdp" and name.startswith("student.")
            assert isinstance(weight, DTensor) == sharded, name
            assert weight.numel() == whole[name]
            if isinstance(weight, DTensor):
                assert weight.to_local().numel() <= -(-weight.shape[0] // WORLD) * weight[0].numel()
        crops = model.sample_crops(2, torch.Generator())
        features = run.encode(torch.rand(2, 3, 96, 96), crops, None)
        assert features.tokens.shape == (2, 64, 128)
