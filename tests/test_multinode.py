"""One fit over two machines (network namespaces with a cable between them)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engines import REPO, machines

RANK = """
import os, sys
from pathlib import Path
import torch
from framework.run import CONFIG, load_document, train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
trainer = train(folder, load_document(folder / CONFIG), bar=False)
state = {"rank": trainer.global_rank, "step": trainer.global_step, "open": torch.distributed.is_initialized()}
torch.save({**state, "weights": trainer.lightning_module.state_dict()}, folder / f"rank{os.environ['NODE_RANK']}.pt")
"""


@pytest.mark.engine
def test_two_machines_train_the_same_weights(tmp_path, tiny):
    import torch

    from framework.ablation.state import read_status
    from framework.config import dump
    from framework.run import LAST

    trainer = {"limit_train_batches": 3, "accelerator": "cpu", "strategy": "ddp", "num_nodes": 2, "devices": 1}
    (tmp_path / "config.yaml").write_text(dump(tiny(trainer=trainer)))
    with machines() as pair:
        ranks = []
        for number, machine in enumerate(pair):
            env = {
                **os.environ,
                "PYTHONPATH": str(REPO),
                "MASTER_ADDR": pair[0].address,
                "MASTER_PORT": "29500",
                "NODE_RANK": str(number),
                "GLOO_SOCKET_IFNAME": machine.interface,
            }
            command = [*machine.prefix, sys.executable, "-c", RANK, str(tmp_path)]
            ranks.append(
                subprocess.Popen(
                    command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        outs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outs)
    one, two = (torch.load(tmp_path / f"rank{number}.pt", weights_only=True) for number in (0, 1))
    assert (one["rank"], two["rank"]) == (0, 1)
    assert 3 == one["step"] == two["step"] == torch.load(tmp_path / LAST, weights_only=True)["global_step"]
    assert (one["open"], two["open"]) == (False, False)
    assert all(torch.equal(value, two["weights"][key]) for key, value in one["weights"].items())
    assert read_status(tmp_path).state == "finished"
