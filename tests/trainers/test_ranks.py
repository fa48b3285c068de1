"""Which processes of a trainer have a monitor."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradmon_integrations.callbacks._ranks import for_ranks


@pytest.fixture
def alone(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_without_other_processes_the_options_stay(alone):
    assert for_ranks({"seed": 3}, nn.Linear(2, 2), None, "DDP") == {"seed": 3}


@pytest.mark.parametrize("rank", [0, 1])
def test_with_others(alone, rank, monkeypatch, caplog):
    model = nn.Linear(2, 2)
    wrapped = DistributedDataParallel(model)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    assert for_ranks({"seed": 3}, model, wrapped, "DDP") == {"seed": 3, "group": wrapped.process_group}
    assert for_ranks({"group": None}, model, wrapped, "DDP") == {"group": None}
    assert for_ranks({}, model, None, "single device") == ({} if rank == 0 else None)
    assert not caplog.records
    assert for_ranks({}, model, None, "DeepSpeed") is None
    assert "a model distributed by DeepSpeed cannot be measured" in caplog.text
