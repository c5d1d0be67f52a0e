"""The checks of a machine, on this one, and that they see what is wrong."""

import shutil

import pytest
import torch

import train.packing
from config import RunError
from tools import check_gpu

flex = pytest.mark.skipif(not shutil.which("g++"), reason="flex attention on the CPU compiles with g++")


@flex
@pytest.mark.long
def test_all_is_right_on_the_cpu(capsys):
    code = check_gpu.main(["--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines[:6]] == ["ok"] * 6, lines
    assert lines[6].startswith("6 of 6 checks are right")


@flex
@pytest.mark.long
def test_a_mask_that_lets_responses_see_each_other_is_noticed(monkeypatch):
    monkeypatch.setattr(train.packing, "mask_mod", lambda *_: lambda b, h, q, k: q >= k)
    with pytest.raises(RunError, match=r"flex attention and SDPA differ by more than 0.001: float32 \de-0[12] nats"):
        check_gpu.attention("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert check_gpu.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().out
