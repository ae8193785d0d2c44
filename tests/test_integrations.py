"""The snippets of docs/integrations.md run, gate what they say they gate, and clip in the order that they say.

Those that need Lightning, transformers or accelerate run in the environment of `make architectures`.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sgsc_lib import SGSC, mlp

PAGE = Path(__file__).resolve().parents[1] / "docs" / "integrations.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
BATCH, BATCHES, FOUR = 8, 8, 4  # the snippets that accumulate do so over four batches


def gpt2() -> nn.Module:
    """What the Trainer trains: with tied embeddings, dropout, and its loss made inside."""
    import transformers

    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def names(source: str, folder: Path) -> dict[str, object]:
    """What a snippet takes as given."""
    torch.manual_seed(0)
    x, tokens = torch.randn(BATCH * BATCHES, 40), torch.randint(20, (BATCH * BATCHES, 12))
    y = x[:, :10].argmax(1)
    model = gpt2() if "transformers" in source else mlp((40, 16, 10), seed=0)
    return {
        "model": model,
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), BATCH),
        "dataset": [{"input_ids": row, "labels": row} for row in tokens],
        "loss_fn": nn.functional.cross_entropy,
        "optimizer": torch.optim.Adam(model.parameters(), lr=0.01),
        "folder": str(folder),
    }


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What was done, in order: "gate 32" for a gate from 32 samples, "update 32" for a gated update, "clip"."""
    done: list[str] = []

    def spied(owner: object, name: str, what: str) -> None:
        true = getattr(owner, name)

        def spy(*args, **kwargs):
            if what != "clip":
                done.append(f"{what} {args[0].summary()['samples'].iloc[0]}")
            elif float("inf") not in args:  # the Trainer's, which only measures the norm
                done.append(what)
            return true(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spied(SGSC, "scale_gradients_", "gate")
    spied(SGSC, "scaled_update", "update")
    spied(torch.nn.utils, "clip_grad_norm_", "clip")
    return done


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", [source for source in SNIPPETS if "init_process_group" not in source])
def test_a_snippet_of_the_docs_trains_and_gates_and_clips_in_the_order_that_the_page_gives(source, events, tmp_path):
    for library in re.findall(r"^import (lightning|transformers|accelerate)", source, re.MULTILINE):
        pytest.importorskip(library)
    given = names(source, tmp_path)
    model = given["model"]
    before = [p.detach().clone() for p in model.parameters()]
    exec(source, given)
    samples, steps = (FOUR * BATCH, BATCHES // FOUR) if re.search(r"\b4\b", source) else (BATCH, BATCHES)
    own = f"gate {samples}" if "scale_gradients_" in source else f"update {samples}"
    inside = "scale_gradients_" in source or "optimizer_step(self, epoch" in source  # Lightning clips within its step
    assert events == ([own, "clip"] if inside else ["clip", own]) * steps
    assert all((p != was).any() for p, was in zip(model.parameters(), before, strict=True))  # each was trained


def test_the_distributed_script_of_the_docs_counts_the_samples_of_all_processes(tmp_path):
    (source,) = (source for source in SNIPPETS if "init_process_group" in source)
    (tmp_path / "train.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    said = re.findall(r"rank \d: c over \d+ samples", run.stdout)  # two processes may write on one line
    assert sorted(said) == [f"rank {rank}: c over 64 samples" for rank in (0, 1)]
