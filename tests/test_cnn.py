"""The convolutional network: trained by the class `SGSC` and torch's optimizers as the study trains its perceptrons."""

import pytest
import torch
import torch.nn.functional as F
from study_inputs import SMALL

from sgsc_lib import per_sample_gradients, sign_consistency
from sgsc_study import Run, mnist1d_cnn, train_cnn

ROWS = SMALL.x_train, SMALL.y_train
RUNS = [
    Run(0, 0.01),
    Run(0, 0.01, 0.3),
    Run(0, 0.05, 0.5, "after", weight_decay=0.3, schedule="cosine"),
    Run(0, 0.05, 0.5, "after", optimizer="sgd", weight_decay=0.1, schedule="cosine"),
]


def by_definition(run: Run, epochs: int, batch_size: int) -> torch.nn.Module:
    """The trained network, gated by hand from per-sample gradients, the decay by hand too."""
    model, order = mnist1d_cnn(run.seed), torch.Generator().manual_seed(run.seed)
    parameters = dict(model.named_parameters())
    optimizer = (torch.optim.Adam(parameters.values(), run.lr) if run.optimizer == "adam"
                 else torch.optim.SGD(parameters.values(), run.lr, momentum=0.9, nesterov=True))  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(ROWS[0]) // batch_size))
    for _ in range(epochs):
        for batch in torch.randperm(len(ROWS[0]), generator=order).split(batch_size):
            x, y = (part[batch] for part in ROWS)
            gates = {name: c**run.gamma for name, c in sign_consistency(per_sample_gradients(model, x, y)).items()}
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            old = {name: p.detach().clone() for name, p in parameters.items()}
            for name, p in parameters.items():
                p.grad *= gates[name] if run.placement == "before" else 1
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            for name, p in parameters.items():
                gate = gates[name] if run.placement == "after" else 1
                p.data = old[name] * (1 - lr * run.weight_decay) + gate * (p.data - old[name])
            if run.schedule == "cosine":
                schedule.step()
    return model


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_run_is_the_definition_by_hand(run):
    found, model = train_cnn(run, SMALL, ROWS, epochs=2, batch_size=40), by_definition(run, 2, 40)
    with torch.no_grad():
        parts = {"valid": SMALL[2:4], "test": SMALL[4:], "fresh": ROWS}
        expected = {name: (model(x).argmax(1) == y).double().mean().item() for name, (x, y) in parts.items()}
    for name, value in expected.items():
        assert found[f"{name}_accuracy"] == pytest.approx(value, abs=0.022)  # two of 96 rows: sums in another order


def test_what_it_does_not_have_is_refused_by_name():
    for run in (Run(0, 0.01, 1.0, "after", gate="cautious"), Run(0, 0.01, optimizer="muon")):
        with pytest.raises(ValueError, match="`run`"):
            train_cnn(run, SMALL, ROWS, epochs=1, batch_size=40)
